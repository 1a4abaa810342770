"""Encoder: chunk-wise ids, exactly the answers supervised, spans and SEGs found, truncation that never dangles."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xseg.config import TaskSpec
from xseg.encode import Encoder, surviving
from xseg.errors import UserError
from xseg.tasks import load_task
from xseg.tokens import IGNORE_LABEL, SENTINEL_PATTERN, SENTINELS, add_special_tokens
from xseg.types import Formatted, Query, Turn

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted(p.stem for p in (ROOT / "chat_templates").glob("*.jinja"))
SHIPPED = sorted(p.parent for p in (ROOT / "examples/tiny_parts").glob("*/tokenizer_config.json"))
CHAT = ["<|user|>", "<|assistant|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CORPUS = [
    "User: segment the red circle in the image\nAssistant:\n",
    "Sure, it is the mask.",
    "a b c d e f user assistant",
]
QUESTION = Turn("user", "<image>\nSegment <p>the red circle</p> in the image.")
ANSWER = Turn("assistant", "Sure, it is <SEG>.")
SECOND = (Turn("user", "And <p>the mask</p>, <region>?"), Turn("assistant", "It is <SEG>."))


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2 kind: no dummy prefix, no BOS."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", additional_special_tokens=CHAT)


def llama_like() -> PreTrainedTokenizerFast:
    """SentencePiece kind: a dummy prefix before every encoded text, BOS id 1."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(pieces)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=specials, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=CHAT
    )


@pytest.fixture(scope="module", params=[byte_level, llama_like])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    tokenizer = request.param()
    add_special_tokens(tokenizer)
    return tokenizer


def source(name: str) -> str:
    return (ROOT / f"chat_templates/{name}.jinja").read_text(encoding="utf8")


@pytest.fixture
def phi3(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, source("phi3"), 2319)


def test_phi3_ids_are_those_of_separately_encoded_pieces(tokenizer: Any, phi3: Encoder) -> None:
    def ids(text: str) -> list[int]:
        parts = [p for p in SENTINEL_PATTERN.split(text) if p]
        rows = [[SENTINELS[p]] if p in SENTINELS else tokenizer.encode(p, add_special_tokens=False) for p in parts]
        return [i for row in rows for i in row]

    want, labels = ([1], [IGNORE_LABEL]) if tokenizer.bos_token else ([], [])
    for question, answer in ((QUESTION, ANSWER), SECOND):
        user = ids(f"<|user|>\n{question.text}<|end|>\n<|assistant|>\n")
        said = ids(answer.text) + ids("<|end|>")
        want = want + user + said + ids("\n")
        labels = labels + [IGNORE_LABEL] * len(user) + said + [IGNORE_LABEL] * len(ids("\n"))
    got = phi3.encode([QUESTION, ANSWER, *SECOND])
    assert got.input_ids.tolist() == want
    assert got.labels.tolist() == labels


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_answers_and_their_suffix_are_supervised(tokenizer: Any, name: str) -> None:
    encoder = Encoder(tokenizer, source(name), 2319)
    got = encoder.encode([QUESTION, ANSWER, *SECOND])
    supervised = got.labels != IGNORE_LABEL
    assert (got.labels[supervised] == got.input_ids[supervised]).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], supervised.astype(int), [0]])))
    said = [encoder.decode(got.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]
    assert len(said) == 2
    for text, turn in zip(said, (ANSWER, SECOND[1])):
        assert encoder.decode(tokenizer.encode(text, add_special_tokens=False), stop=True).replace(" ", "") == (
            turn.text.replace(" ", "")
        )
        assert text.replace(" ", "") != turn.text.replace(" ", ""), "the suffix must be supervised"
    assert all(got.input_ids[b - 1] in encoder.stop_ids for _, b in edges.reshape(-1, 2))


@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_agrees_on_the_supervised_tokens(name: str) -> None:
    tokenizer = byte_level()
    add_special_tokens(tokenizer)
    turns = [Turn("user", "Segment <p>the circle</p>."), ANSWER, Turn("user", "And <p>b</p>?"), SECOND[1]]
    got = Encoder(tokenizer, source(name), 2319).encode(turns)
    theirs = tokenizer.apply_chat_template(
        [{"role": t.role, "content": t.text} for t in turns],
        chat_template=source(name),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert theirs["input_ids"] == got.input_ids.tolist()
    assert theirs["assistant_masks"] == (got.labels != IGNORE_LABEL).astype(int).tolist()


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda p: p.name)
def test_shipped_tokenizers_agree_with_transformers_on_what_is_supervised(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_special_tokens(tokenizer)
    turns = [Turn("user", "Segment <p>the circle</p>."), ANSWER, Turn("user", "And <p>the square</p>?"), SECOND[1]]
    encoder = Encoder(tokenizer, source("phi3"), 2319)
    got = encoder.encode(turns)
    theirs = tokenizer.apply_chat_template(
        [{"role": t.role, "content": t.text} for t in turns],
        chat_template=source("phi3"),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    # encoding the whole text gives other space pieces than chunk by chunk, but the words must be the same
    rows = zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
    words = encoder.decode([i for i, supervised in rows if supervised])
    assert encoder.decode(got.labels[got.labels != IGNORE_LABEL]).replace(" ", "") == words.replace(" ", "")
    assert len(got.segs) == len(got.spans) == 2


def test_spans_segs_and_sentinels_are_found(phi3: Encoder) -> None:
    got = phi3.encode([QUESTION, ANSWER, *SECOND])
    assert len(got.segs) == 2 and len(got.images) == 1 and len(got.regions) == 1
    assert [phi3.decode(got.input_ids[a:b]).replace(" ", "") for a, b in got.spans] == [
        "<p>theredcircle</p>",
        "<p>themask</p>",
    ]
    assert got.images[0] < got.spans[0, 0] < got.segs[0] < got.spans[1, 0] < got.regions[0] < got.segs[1]
    assert (got.labels[got.images] == IGNORE_LABEL).all()


def test_special_ids_are_never_the_leading_space_piece(tokenizer: Any, phi3: Encoder) -> None:
    assert phi3.special.seg == tokenizer.get_vocab()["<SEG>"]
    got = phi3.encode([QUESTION, ANSWER])
    assert got.input_ids[got.segs].tolist() == [phi3.special.seg]


def test_tokenizer_without_the_special_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="<SEG>"):
        Encoder(byte_level(), source("phi3"), 100)


def test_generation_ends_with_the_assistant_header_and_equals_the_training_prefix(phi3: Encoder) -> None:
    prompt = phi3.encode([QUESTION], generation=True)
    full = phi3.encode([QUESTION, ANSWER])
    assert prompt.input_ids.tolist() == full.input_ids[: len(prompt.input_ids)].tolist()
    assert full.labels[len(prompt.input_ids)] != IGNORE_LABEL, "the next token is the first of the answer"
    assert (prompt.labels == IGNORE_LABEL).all()


def test_bos_is_written_only_where_the_tokenizer_starts_texts_with_it() -> None:
    tokenizer = byte_level()
    tokenizer.bos_token = "<|im_start|>"  # SmolLM2: the name of the turn marker, not of a text's begin
    add_special_tokens(tokenizer)
    ids = Encoder(tokenizer, source("smollm2"), 100).encode([Turn("user", "a")]).input_ids
    assert (ids == tokenizer.bos_token_id).sum() == 1


def cut(encoder: Encoder, limit: int) -> Encoder:
    return Encoder(encoder.tokenizer, encoder.template, limit)


def test_long_conversations_lose_whole_pairs_with_their_queries(phi3: Encoder) -> None:
    turns = [QUESTION, ANSWER, *SECOND, *SECOND]
    two = phi3.encode(turns[:4])
    got = cut(phi3, len(two.input_ids) + 3).encode(turns)
    assert got.input_ids.tolist() == two.input_ids.tolist()
    queries = tuple(Query(seg=i, concepts=(i,)) for i in range(3))
    assert surviving(Formatted(tuple(turns), queries), got).queries == queries[:2]


def test_a_cut_never_takes_a_seg_but_may_shorten_a_plain_answer(phi3: Encoder) -> None:
    length = len(phi3.encode([QUESTION, ANSWER]).input_ids)
    with pytest.raises(UserError, match="max_tokens"):
        cut(phi3, length - 8).encode([QUESTION, ANSWER])
    chat = [Turn("user", "a?"), Turn("assistant", "a b c d e f " * 9)]
    assert len(cut(phi3, 40).encode(chat).input_ids) == 40
    with pytest.raises(UserError, match="max_tokens"):
        cut(phi3, 10).encode([Turn("user", "a b c d e f " * 9)], generation=True)


@pytest.mark.parametrize(
    ("text", "word"), [("<p>a", "pair up"), ("</p>a<p>", "pair up"), ("a <SEG>", "answers"), ("a\x02b", "control")]
)
def test_malformed_text_is_refused(phi3: Encoder, text: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        phi3.encode([Turn("user", text)])


def test_template_without_an_end_token_is_refused(tokenizer: Any) -> None:
    bare = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(UserError, match="end with one token"):
        Encoder(tokenizer, bare, 100)


@pytest.mark.parametrize(
    ("template", "said"), [("{% for m in", "TemplateSyntaxError"), ("{{ f(1) }}", "'f' is undefined")]
)
def test_a_broken_template_is_refused(tokenizer: Any, template: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Encoder(tokenizer, template, 100)


def test_show_colours_answers_and_underlines_spans(phi3: Encoder) -> None:
    shown = phi3.show(phi3.encode([QUESTION, ANSWER]))
    green = shown.split("\033[32m")[1].split("\033[0m")[0].replace(" ", "")
    underlined = shown.split("\033[4m")[1].split("\033[0m")[0].replace(" ", "")
    assert green == "Sure,itis<SEG>.<|end|>"
    assert underlined == "<p>theredcircle</p>"


@pytest.mark.parametrize("name", ["generic_seg", "refer_seg"])
def test_every_query_of_a_task_finds_its_seg_and_spans(phi3: Encoder, name: str) -> None:
    task = load_task(TaskSpec(name=name))
    for seed in range(10):
        formatted = task.format(task.example(), np.random.default_rng(seed))
        text = phi3.encode(formatted.turns)
        assert len(text.segs) == len(formatted.queries)
        assert len(text.spans) == sum(len(q.concepts) for q in formatted.queries)
        assert len(text.images) == 1 and (text.labels[text.segs] == phi3.special.seg).all()
        assert surviving(formatted, text) == formatted


def test_the_encoder_travels_to_data_loader_workers(phi3: Encoder) -> None:
    again = pickle.loads(pickle.dumps(phi3))
    assert again.encode([QUESTION, ANSWER]).input_ids.tolist() == phi3.encode([QUESTION, ANSWER]).input_ids.tolist()


def test_text_only_and_empty_turns(tokenizer: Any, phi3: Encoder) -> None:
    got = phi3.encode([Turn("user", "a"), Turn("assistant", "")])
    assert (got.labels != IGNORE_LABEL).sum() == 1 and got.images.shape == got.segs.shape == (0,)
    assert got.spans.shape == (0, 2)
