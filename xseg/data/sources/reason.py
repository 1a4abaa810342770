"""ReasonSeg (LISA): a folder of pictures, each with a JSON of questions and polygons of one mask."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from xseg.data.records import Packed, field, read_records, records
from xseg.errors import UserError
from xseg.geometry.masks import encode
from xseg.geometry.views import read_size
from xseg.paths import data_path
from xseg.tokens import IMAGE
from xseg.types import Categories, Instance, Masks, Phrase, Sample, Size

TARGET, IGNORED = 1, 255


class Source:
    """Questions about the pictures of ``folder``/``split``: ``X.jpg`` beside ``X.json`` of {text, is_sentence, shapes}.

    Polygons are painted from the largest to the smallest, as the release wants it: a label with "ignore" makes its
    pixels count neither way (``Sample.ignore``), "flag" is no region, any other label is the target. ``grouping``
    "image" (default where the split's name starts with "train"): all questions of a picture together; "sentence"
    (default elsewhere): one sample a question. The phrases' kind is "long" (a sentence) or "short" (a phrase).
    ``explanations`` is the release's list of {image, outputs}: what may be said with the mask. A JSON is read when
    its sample is asked for, and only then is anything wrong with its shapes an error.
    """

    categories: Categories | None = None

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        folder: str,
        explanations: str | None = None,
        grouping: Literal["image", "sentence"] | None = None,
        name: str = "reason",
    ) -> None:
        if grouping not in (None, "image", "sentence"):
            raise UserError(f"source reason: grouping: {grouping!r} must be 'image' or 'sentence'")
        self.prefix, self.folder = f"{name}/{split}", data_path(root, folder) / split
        paths = sorted(self.folder.glob("*.json"))
        if not paths:
            raise UserError(f"{self.folder}: no *.json there: every picture of ReasonSeg has one; check the folder")
        per_sentence = (grouping or ("image" if split.startswith("train") else "sentence")) == "sentence"
        said = {} if explanations is None else _explanations(data_path(root, explanations))
        self.records = Packed(record for path in paths for record in _records(path, per_sentence, said))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        path = self.folder / record["file"]
        image = _picture(path)
        size = read_size(image, str(path))
        canvas = _painted(read_records(path), size, str(path))
        target, ignored = canvas == TARGET, canvas == IGNORED
        there = (0,) if target.any() else ()
        return Sample(
            key=f"{self.prefix}/{record['key']}",
            images=(image,),
            size=size,
            masks=Masks(size, (encode(target),) if there else ()),
            instances=tuple(Instance(row, -1) for row in there),
            phrases=tuple(Phrase(**phrase, instances=there) for phrase in record["phrases"]),
            image_id=path.stem,
            kind=record["phrases"][0]["kind"],
            ignore=encode(ignored) if ignored.any() else None,
        )

    def texts(self, index: int) -> tuple[str, ...]:
        """``<image>`` and the questions of a sample, each with its explanation."""
        return (IMAGE, *(phrase["text"] + phrase["explanation"] for phrase in self.records[index]["phrases"]))

    def outlines(self, index: int) -> Iterator[tuple[str, Any]]:
        """(place, [x1, y1, x2, y2, …]) of every polygon as annotated."""
        path = self.folder / self.records[index]["file"]
        for number, shape in enumerate(records(read_records(path), "shapes", str(path))):
            yield f"{path}: shapes[{number}]", np.ravel(_points(shape, f"{path}: shapes[{number}]")).tolist()


def _records(path: Path, per_sentence: bool, said: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    data = read_records(path)
    texts = field(data, "text", str(path))
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise UserError(f"{path}: 'text' is empty: a picture of ReasonSeg has at least one question; add it")
    kind = "long" if field(data, "is_sentence", str(path)) else "short"
    spoken = next((said[f"{path.stem}{s}"] for s in (".jpg", ".png", ".jpeg") if f"{path.stem}{s}" in said), "")
    phrases = [
        {"text": str(text).strip(), "id": f"{path.stem}:{number}", "kind": kind, "explanation": spoken}
        for number, text in enumerate(texts)
    ]
    if per_sentence:
        for number, phrase in enumerate(phrases):
            yield {"file": path.name, "key": f"{path.stem}-{number}", "phrases": [phrase]}
        return
    yield {"file": path.name, "key": path.stem, "phrases": phrases}


def _explanations(path: Path) -> dict[str, str]:
    rows = read_records(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of {{image, outputs}}, found a {type(rows).__name__}")
    where = [f"{path}: record {i}" for i in range(len(rows))]
    return {str(field(r, "image", w)): str(field(r, "outputs", w)).strip() for r, w in zip(rows, where, strict=True)}


def _picture(path: Path) -> Path:
    for suffix in (".jpg", ".jpeg", ".png"):
        if path.with_suffix(suffix).is_file():
            return path.with_suffix(suffix)
    raise UserError(f"{path}: image {path.stem}.jpg does not exist beside it; every JSON of ReasonSeg has its picture")


def _points(shape: Any, where: str) -> Sequence[Sequence[float]]:
    points = field(shape, "points", where)
    array = np.asarray(points, np.float64) if _is_pairs(points) else np.zeros((0, 0))
    if array.ndim != 2 or array.shape[1] != 2 or len(array) < 2 or not np.isfinite(array).all():
        raise UserError(f"{where}: points {str(points)[:60]} must be two or more finite pairs [x, y]; repair the shape")
    return array.tolist()  # type: ignore[no-any-return]


def _is_pairs(points: Any) -> bool:
    return isinstance(points, list) and all(
        isinstance(p, list) and len(p) == 2 and all(isinstance(v, int | float) for v in p) for p in points
    )


def _painted(data: Any, size: Size, where: str) -> np.ndarray:
    """(H, W) uint8 of 0, TARGET and IGNORED. Pixels under an outline belong to it, as in the release's own reader."""
    layers = []
    for number, shape in enumerate(records(data, "shapes", where)):
        place = f"{where}: shapes[{number}]"
        label = str(field(shape, "label", place)).lower()
        if "flag" in label:
            continue
        layer = Image.new("L", size[::-1])
        points = [(int(x), int(y)) for x, y in _points(shape, place)]
        ImageDraw.Draw(layer).polygon(points, fill=1, outline=1)
        layers.append((np.asarray(layer) > 0, IGNORED if "ignore" in label else TARGET))
    canvas = np.zeros(size, np.uint8)
    for layer_mask, value in sorted(layers, key=lambda layer: -int(layer[0].sum())):
        canvas[layer_mask] = value
    return canvas
