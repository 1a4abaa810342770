from pathlib import Path

import pytest
from transformers import AutoTokenizer

from xseg.data.shapeworld import tokenizer as building
from xseg.data.shapeworld.board import BARE, COVERED, NOWHERE, SQUARES
from xseg.data.shapeworld.language import corpus
from xseg.data.shapeworld.world import COLOURS, GROUNDS, SHAPES, SIZES, TEXTURES
from xseg.encode import Encoder
from xseg.tasks import phrasing
from xseg.tokens import IMAGE, add_special_tokens, special_ids
from xseg.types import Turn

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "examples/tiny_parts/phi"


@pytest.fixture(scope="module")
def tokenizer() -> object:
    loaded = AutoTokenizer.from_pretrained(COMMITTED, local_files_only=True)
    add_special_tokens(loaded)
    return loaded


def test_the_committed_files_are_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    building.build(tmp_path)
    built = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(built) == {"tokenizer.json", "tokenizer_config.json"}
    assert built == {name: (COMMITTED / name).read_bytes() for name in built}


def test_a_square_is_one_piece_and_never_takes_the_sign_behind_it(tokenizer) -> None:
    for word in (*SQUARES, NOWHERE):
        assert tokenizer.tokenize(f"at {word}. {word}, and")[1:5] == [f"▁{word}", ".", f"▁{word}", ","]


def test_a_word_of_boards_is_one_token(tokenizer) -> None:
    for word in (*SQUARES, COVERED, BARE, *GROUNDS, *SIZES, *COLOURS, *TEXTURES, *SHAPES):
        assert [p.removeprefix("▁") for p in tokenizer.tokenize(word)] == [word]


def test_special_tokens_are_single_ids_at_the_end(tokenizer) -> None:
    ids = special_ids(tokenizer)
    assert (ids.seg, ids.p_open, ids.p_close) == tuple(range(len(tokenizer) - 3, len(tokenizer)))
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    for token in ("<|user|>", "<|assistant|>", "<|end|>"):
        [found] = tokenizer.encode(f"{token}\n", add_special_tokens=False)  # the line break is swallowed, as in Phi-3
        assert tokenizer.decode([found]) == token


@pytest.mark.parametrize(
    "text",
    ["the large red circle", "Hello, wörld! 你好 {x} = 3.14;\n\ttab", "".join(map(chr, range(32, 127))), "a  b "],
)
def test_any_text_survives(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert 0 not in ids


def test_the_worlds_words_are_whole_pieces(tokenizer) -> None:
    for word in (*SHAPES, *COLOURS, *GROUNDS, "second", "left", "corner", "many", "yes", "no", "3"):
        assert len(tokenizer.encode(word, add_special_tokens=False)) <= 1 + word.isdigit(), word


def test_wordings_are_short(tokenizer) -> None:
    lines = [*phrasing.CATEGORIES, *phrasing.PHRASE, *phrasing.ANSWER, *corpus(30, 1)]
    tokens = sum(len(tokenizer.encode(line, add_special_tokens=False)) for line in lines)
    assert tokens < 1.5 * sum(len(line.split()) for line in lines)


def test_each_chunk_starts_with_a_space_piece(tokenizer) -> None:
    encoder = Encoder(tokenizer, (ROOT / "chat_templates/phi3.jinja").read_text(), 500)
    turns = [Turn("user", f"{IMAGE}\nPlease segment <p>the star</p>."), Turn("assistant", "It is <SEG>.")]
    pieces = tokenizer.convert_ids_to_tokens([int(i) for i in encoder.encode(turns).input_ids if i >= 0])
    assert pieces[:7] == ["<s>", "<|user|>", "▁", "<0x0A>", "Please", "▁segment", "▁"]
    assert pieces.count("<SEG>") == pieces.count("<p>") == pieces.count("</p>") == 1
    assert "▁." in pieces
