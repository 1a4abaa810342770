"""A small tokenizer for ShapeWorld, laid out as Phi-3's: ``python -m xseg.data.shapeworld.tokenizer OUT``.

SentencePiece BPE with byte fallback over ShapeWorld's sentences and the words of the tasks, so that both are short and
any other text still works. The two words of boards that no sentence holds follow as tokens of their own. The same code
and libraries give the same bytes.
"""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xseg.data.shapeworld.board import BARE, COVERED, NOWHERE, SQUARES
from xseg.data.shapeworld.language import corpus
from xseg.data.shapeworld.world import COLOURS, GROUNDS, SHAPES, SIZES, TEXTURES

PIECES = 860
"""Size of the SentencePiece vocabulary; the chat tokens and the words of boards come after it."""
SCENES, SEED = 1000, 0
"""The sentences it is trained on."""
CHAT_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
ASCII = "".join(map(chr, range(0x21, 0x7F)))
WORDS = """
a all and Answer at area areas asked background belong belongs by Can categories category Choose divide each every
everything Find for from give Here here I image in into is It it its kinds Label list Mark mark mask me named Name need
object of one Outline outline picture pixels Please region regions result Segment segment segmentation Show Sure
that The the them these things this to Where Which which with you
"""
"""Words of the tasks' questions and answers. A list of its own: weights depend on the pieces, so a new wording must not
change them."""
OPENERS = "Can Describe Find Here How I In Is Label Mark Name Outline Please Segment Show What Where Which"
"""Words that follow the image's line break, and so have no space before them."""


def build(out: Path) -> Any:
    """Train, write to the folder ``out`` (tokenizer.json, tokenizer_config.json) and return it as loaded from there."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    pieces = train_pieces()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_convert(pieces),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.add_tokens([COVERED, BARE])
    fast.save_pretrained(out)
    return AutoTokenizer.from_pretrained(out, local_files_only=True)


def sentences() -> Iterator[str]:
    """Every line the pieces are learnt from."""
    # as often as a middling word of the scenes, so that they become whole pieces too
    for word in (*SHAPES, *COLOURS, *SIZES, *TEXTURES, *GROUNDS, *SQUARES, NOWHERE, *WORDS.split()):
        yield from [word] * 200
    yield from ["."] * 200  # stands alone after a special token
    for word in OPENERS.split():
        yield from [f"/{word}"] * 200  # no piece crosses from a sign to a letter
    yield from corpus(SCENES, SEED)


def train_pieces() -> list[tuple[str, float]]:
    """Return the (piece, score) list of the SentencePiece model, best merge first, in id order."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=target,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        required_chars=ASCII,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_number=False,  # squares such as c4 are one piece
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(target.getvalue())
    return [(p.piece, p.score) for p in model.pieces]


def _convert(pieces: list[tuple[str, float]]) -> Any:
    """SentencePiece pieces -> a tokenizers.Tokenizer with Llama's normaliser and decoder, as Phi-3 ships it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=_merges(ids), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    # a space before the text, and before each chunk between special tokens, as the SentencePiece original puts it
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    # Phi-3's own chat tokens swallow the white space after them
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=t != "<|endoftext|>") for t in CHAT_TOKENS]
    )
    return tokenizer


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, in the order in which the pieces were learnt."""
    found = []
    for piece, rank in ids.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(a, b) for a, b in splits if a in ids and b in ids]
        found += [(rank, ids[a], ids[b], (a, b)) for a, b in pairs]
    return [pair for *_, pair in sorted(found)]


def main(argv: list[str]) -> int:
    """Command line: one argument, the folder to write."""
    if len(argv) != 1:
        print("usage: python -m xseg.data.shapeworld.tokenizer OUT", file=sys.stderr)
        return 2
    tokenizer = build(Path(argv[0]))
    print(json.dumps({"out": argv[0], "vocabulary": len(tokenizer)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
