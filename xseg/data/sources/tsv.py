"""Questions in VLMEvalKit's TSV: MME, MMBench, SEED-Bench, AI2D and others, pictures as base64 in the table."""

import base64
import binascii
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from xseg.data.records import Packed, field
from xseg.errors import UserError
from xseg.paths import data_path
from xseg.tokens import IMAGE
from xseg.types import Categories, Sample, Turn

LETTERS = "ABCDEFGH"
REFERENCE = 64
"""A text of at most this many characters in the column "image" is the index of the row that has the picture."""
ROLL = 1_000_000
"""Rows whose indices are equal up to a multiple of this ask one question with its options in another order."""


class Source:
    """One sample per row: {index, image, question, answer} and, for a choice, {A, B, …, hint}.

    The question is the hint, the question, the options with their letters, and ``instruction``, which by default asks
    for a letter where there are options. "Answer" is a letter or a text, as the table has it. What counts together is
    told by ``image_id``: ``group`` "question" = rows of one question, whatever the order of its options; "image" = rows
    of one "image_path". ``kind`` is the "category". Pictures stay in the file until they are needed.
    """

    categories: Categories | None = None

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        file: str,
        instruction: str | None = None,
        group: Literal["question", "image"] = "question",
        name: str = "questions",
    ) -> None:
        if group not in ("question", "image"):
            raise UserError(f"source tsv: group: {group!r} must be 'question' or 'image'")
        self.path, self.prefix, self.instruction = data_path(root, file), f"{name}/{split}", instruction
        self.group = group
        self.columns: list[str] = []
        self.records = Packed(_kept(self.path, self.columns))
        self.places = {row["index"]: number for number, row in enumerate(self.records)}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        row, where = self.records[index], f"{self.path}: row {index % len(self) + 1}"
        answer = row.get("answer", "").strip()
        if not answer:
            raise UserError(f"{where} (index {row['index']}): no answer; splits without answers cannot be scored here")
        options = [(letter, row[letter]) for letter in LETTERS if row.get(letter)]
        if options and answer not in dict(options):
            raise UserError(
                f"{where} (index {row['index']}): answer {answer!r} is none of the options "
                f"{', '.join(letter for letter, _ in options)}; correct it"
            )
        return Sample(
            key=f"{self.prefix}/{row['index']}",
            images=(self._picture(row, where),),
            turns=(Turn("user", f"{IMAGE}\n{self._question(row, options)}"), Turn("assistant", answer)),
            image_id=question_of(row["index"]) if self.group == "question" else field(row, "image_path", where),
            kind=row.get("category", ""),
        )

    def _question(self, row: dict[str, Any], options: list[tuple[str, str]]) -> str:
        parts = [f"Hint: {row['hint']}"] if row.get("hint") else []
        parts.append(row["question"])
        parts += [f"{letter}. {text}" for letter, text in options]
        by_letter = "Answer with the option's letter from the given choices directly."
        instruction = self.instruction if self.instruction is not None else by_letter if options else ""
        return "\n".join([*parts, instruction] if instruction else parts)

    def _picture(self, row: dict[str, Any], where: str) -> Image.Image:
        start, length = row["place"]
        text = _cells(self.path, start, length)[self.columns.index("image")]
        if len(text) <= REFERENCE:
            if text not in self.places or self.places[text] == self.places[row["index"]]:
                raise UserError(f"{where}: image {text!r} is neither a picture nor the index of another row")
            start, length = self.records[self.places[text]]["place"]
            text = _cells(self.path, start, length)[self.columns.index("image")]
        try:
            return Image.open(io.BytesIO(base64.b64decode(text, validate=True))).convert("RGB")
        except (binascii.Error, UnidentifiedImageError, OSError) as error:
            raise UserError(f"{where}: its picture cannot be decoded ({error}); fetch the table again") from error


def question_of(index: str) -> int | str:
    """The question that an index stands for, whatever order its options have."""
    return int(index) % ROLL if index.isdigit() else index


def _kept(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows without their pictures, "place" = (start, length) in bytes; the names in the head go to ``columns``."""
    lines = _lines(path)
    head = next(lines, None)
    if head is None:
        raise UserError(f"{path}: is empty; fetch the table again")
    columns += _split(head[2])
    missing = {"index", "question", "image"} - set(columns)
    if missing:
        raise UserError(f"{path}: column '{min(missing)}' is missing (columns there: {', '.join(columns)})")
    for number, (start, length, text) in enumerate(lines, start=1):
        cells = _split(text)
        if len(cells) != len(columns):
            raise UserError(f"{path}: row {number}: {len(cells)} cells for {len(columns)} columns; fetch it again")
        row = {name: cell for name, cell in zip(columns, cells, strict=True) if name != "image" and cell != ""}
        yield {"index": "", "question": "", **row, "place": (start, length)}


def _lines(path: Path) -> Iterator[tuple[int, int, str]]:
    """(start, length, text) of the records of a table; a quoted cell may go over several lines of the file."""
    try:
        with path.open("rb") as file:
            start, raw = 0, b""
            for line in file:
                raw += line
                if raw.count(b'"') % 2 == 0:
                    if raw.strip():
                        yield start, len(raw), raw.decode("utf8")
                    start, raw = start + len(raw), b""
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such table; check the recipe's options and the data root") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the table cannot be read ({error}); fetch it again") from error
    if raw.strip():
        raise UserError(f"{path}: ends inside a quoted cell: cut short; fetch it again")


def _cells(path: Path, start: int, length: int) -> list[str]:
    with path.open("rb") as file:
        file.seek(start)
        return _split(file.read(length).decode("utf8"))


def _split(text: str) -> list[str]:
    csv.field_size_limit(1 << 30)
    return next(csv.reader(io.StringIO(text), delimiter="\t"))
