"""POPE: yes-or-no questions whether a thing is in a picture, one JSON object a line, or a JSON list of them."""

import json as json_module
from pathlib import Path
from typing import Any

from xseg.data.records import Packed, field, read_records
from xseg.errors import UserError
from xseg.paths import data_path
from xseg.tokens import IMAGE
from xseg.types import Categories, Sample, Turn


class Source:
    """One sample per question: {question_id, image, text, label: yes | no}.

    ``file`` of a row names its picture where that is not called as ``image`` says. ``kind`` is the row's "pope" (how
    the absent things were chosen: random, popular, adversarial) or "category". Answers are "Yes" and "No".
    """

    categories: Categories | None = None

    def __init__(self, root: Path, split: str, *, json: str, images: str, name: str = "pope") -> None:
        self.prefix, self.images, self.path = f"{name}/{split}", data_path(root, images), data_path(root, json)
        self.records = Packed(_rows(self.path))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        row, where = self.records[index], f"{self.path}: question {index % len(self)}"
        label = str(field(row, "label", where)).strip().lower()
        if label not in ("yes", "no"):
            raise UserError(f"{where}: label {label!r} must be 'yes' or 'no'; correct it")
        file = str(row.get("file") or field(row, "image", where))
        question = str(field(row, "text", where)).strip()
        return Sample(
            key=f"{self.prefix}/{index % len(self):05d}",
            images=(self.images / file,),
            turns=(Turn("user", f"{IMAGE}\n{question}"), Turn("assistant", label.capitalize())),
            image_id=file,
            kind=str(row.get("pope") or row.get("category") or ""),
        )


def _rows(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf8").splitlines()
        if not lines or not lines[0].lstrip().startswith("{"):
            rows = read_records(path)
        else:
            rows = [json_module.loads(line) for line in lines if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such annotation file; check the recipe's options and the data root") from error
    except (OSError, json_module.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the annotation file cannot be read ({error}); fetch it again") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of questions, found a {type(rows).__name__}")
    return rows
