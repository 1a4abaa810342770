"""Conversations in the LLaVA layout: a JSON list of ``{id, image, conversations: [{from: human|gpt, value}]}``."""

from pathlib import Path
from typing import Any

from xseg.data.records import Packed, field, read_records, records
from xseg.errors import UserError
from xseg.paths import data_path
from xseg.tokens import IMAGE
from xseg.types import Categories, Role, Sample, Turn

ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}


class Source:
    """One sample per conversation; rows without an image are kept as pure text.

    The image token, wherever the row has it, moves to the start of the first question (one per image). An answer
    before any question is dropped. ``kind`` comes from "question_type" of the row or of its "metadata". ``name``
    starts the keys.
    """

    categories: Categories | None = None

    def __init__(self, root: Path, split: str, *, json: str, images: str = ".", name: str = "llava") -> None:
        self.prefix, self.images, self.path = f"{name}/{split}", data_path(root, images), data_path(root, json)
        rows = read_records(self.path)
        if not isinstance(rows, list):
            raise UserError(f"{self.path}: expected a list of conversations, found a {type(rows).__name__}")
        self.records = Packed(read_record(row, f"{self.path}: conversation {i}") for i, row in enumerate(rows))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        return Sample(
            key=f"{self.prefix}/{index % len(self):07d}",
            images=tuple(self.images / name for name in record["images"]),
            turns=tuple(Turn(role, text) for role, text in record["turns"]),
            image_id=record["images"][0] if record["images"] else record["id"],
            kind=record["kind"],
        )

    def texts(self, index: int) -> tuple[str, ...]:
        """What the turns of a sample say, ``<image>`` included."""
        return tuple(text for _, text in self.records[index]["turns"])


def read_record(row: Any, where: str) -> dict[str, Any]:
    """Files, turns and kind of one conversation; UserError for anything wrong with it."""
    turns = [_turn(turn, where) for turn in records(row, "conversations", where)]
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
    if not turns:
        raise UserError(f"{where}: no question; a conversation starts with a turn from 'human'")
    for number, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[number % 2]:
            raise UserError(f"{where}: turn {number}: two turns of the same side in a row; human and gpt alternate")
    image = row.get("image") or []
    images = [image] if isinstance(image, str) else list(image)
    if not images and any(IMAGE in text for _, text in turns):
        raise UserError(f"{where}: the text holds {IMAGE} but 'image' names no file; add the file or take it out")
    turns = [(role, text.replace(IMAGE, "").strip() if IMAGE in text else text) for role, text in turns]
    turns[0] = (turns[0][0], f"{IMAGE}\n" * len(images) + turns[0][1])
    kind = row.get("question_type") or (row.get("metadata") or {}).get("question_type") or ""
    return {"id": row.get("id", 0), "images": images, "turns": turns, "kind": str(kind)}


def _turn(turn: Any, where: str) -> tuple[Role, str]:
    speaker, text = field(turn, "from", where), str(field(turn, "value", where))
    if speaker not in ROLES:
        raise UserError(f"{where}: from: {speaker!r} must be 'human' or 'gpt'")
    return ROLES[speaker], text
