"""Small annotation files, a word-level encoder and tasks that need nothing from the rest of the package."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from xseg.geometry.masks import encode, to_json, write_id_map
from xseg.tasks.base import Base
from xseg.tokens import find_spans
from xseg.types import EncodedText, Formatted, Masks, Query, Sample, Turn, VisualPrompt

WORDS = {"<image>": -200, "<region>": -300, "<SEG>": 1, "<p>": 2, "</p>": 3}


class WordEncoder:
    """One id per word; assistant words are supervised."""

    max_tokens = 1000

    def encode(self, turns: Any, *, generation: bool = False) -> EncodedText:
        ids, labels = [9], [-100]
        for turn in turns:
            words = re.findall(r"<[^>]+>|\w+", turn.text)
            row = [WORDS.get(w, 10 + sum(map(ord, w)) % 90) for w in words]
            ids += row
            labels += row if turn.role == "assistant" else [-100] * len(row)
        array = np.array(ids, np.int64)
        special = type("Special", (), {"p_open": 2, "p_close": 3})
        where = {name: np.flatnonzero(array == value) for name, value in WORDS.items()}
        spans = find_spans(array, special)  # type: ignore[arg-type]
        return EncodedText(
            array, np.array(labels, np.int64), spans, where["<SEG>"], where["<image>"], where["<region>"]
        )


@dataclass(frozen=True)
class PhraseTask(Base):
    """A turn and a query per phrase."""

    negatives: str = "batch"

    def format(self, sample: Sample, rng: np.random.Generator, donors: Any = (), *, train: bool = True) -> Formatted:
        turns, queries = [], []
        for k, phrase in enumerate(sample.phrases):
            opening = ["find", "show", "segment"][int(rng.integers(3))]
            turns.append(Turn("user", f"{'<image>' if not k else ''} {opening} <p>{phrase.text}</p>"))
            turns.append(Turn("assistant", "it is <SEG>"))
            rows = tuple(sample.instances[i].mask for i in phrase.instances)
            queries.append(Query(k, (k,), rows, (0,) * len(rows), negatives=self.negatives))  # type: ignore[arg-type]
        return Formatted(tuple(turns), tuple(queries))


@dataclass(frozen=True)
class LabelTask(Base):
    """No text, a fixed label list."""

    def format(self, sample: Sample, rng: np.random.Generator, donors: Any = (), *, train: bool = True) -> Formatted:
        targets = [i for i in sample.instances if not i.is_crowd]
        return Formatted(queries=(Query(None, (), tuple(i.mask for i in targets), tuple(i.category for i in targets)),))


@dataclass(frozen=True)
class PromptTask(Base):
    """One drawn prompt that is also the target."""

    def format(self, sample: Sample, rng: np.random.Generator, donors: Any = (), *, train: bool = True) -> Formatted:
        assert sample.masks is not None
        turns = (Turn("user", "<image> segment <p><region></p>"), Turn("assistant", "<SEG>"))
        return Formatted(turns, (Query(0, (0,), (0,), (0,)),), (VisualPrompt(sample.masks.rles[0]),))


@dataclass(frozen=True)
class TalkTask(Base):
    """The conversation as it is."""

    def format(self, sample: Sample, rng: np.random.Generator, donors: Any = (), *, train: bool = True) -> Formatted:
        return Formatted(sample.turns)


@dataclass
class ListSource:
    """Samples from a list."""

    samples: list[Sample]
    categories = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def boxes(height: int, width: int) -> np.ndarray:
    """Three disjoint rectangles."""
    out = np.zeros((3, height, width), np.uint8)
    out[0, : height // 2, : width // 2] = 1
    out[1, : height // 2, width // 2 :] = 1
    out[2, height // 2 :, : width // 3] = 1
    return out


def coco_file(folder: Path) -> dict[str, Any]:
    """Two images; the first has a polygon, an uncompressed and a compressed crowd mask, and an empty one."""
    (folder / "pictures").mkdir(exist_ok=True)
    for number, size in ((7, (20, 31)), (9, (16, 12))):
        noise(*size, seed=number).save(folder / f"pictures/{number}.png")
    masks = boxes(20, 31)
    runs = {"size": [20, 31], "counts": column_runs(masks[1])}
    common = {"image_id": 7, "iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]}
    data = {
        "images": [
            {"id": 7, "file_name": "7.png", "height": 20, "width": 31},
            {"id": 9, "file_name": "9.png", "height": 16, "width": 12},
        ],
        "annotations": [
            {**common, "id": 70, "category_id": 5, "segmentation": [[0, 0, 15, 0, 15, 10, 0, 10]]},
            {**common, "id": 71, "category_id": 2, "segmentation": runs},
            {**common, "id": 72, "category_id": 5, "segmentation": to_json(encode(masks[2])), "iscrowd": 1},
            {**common, "id": 73, "category_id": 2, "segmentation": [[3, 3, 4, 4]]},
        ],
        "categories": [{"id": 5, "name": "Wall-other-merged"}, {"id": 2, "name": "potted-plant, flower pot"}],
    }
    (folder / "instances.json").write_text(json.dumps(data))
    return data


def column_runs(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], mask.T.ravel(), [1 - mask.T.ravel()[-1]]])
    cuts = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], cuts])).tolist()


def panoptic_file(folder: Path) -> dict[str, Any]:
    """The first image as a panoptic record with its PNG."""
    data = coco_file(folder)
    ids = np.zeros((20, 31), np.int32)
    for value, mask in zip((300, 70000, 5), boxes(20, 31), strict=True):
        ids[mask > 0] = value
    (folder / "panoptic").mkdir(exist_ok=True)
    write_id_map(folder / "panoptic/7.png", ids)
    segments = [
        {"id": 300, "category_id": 5},
        {"id": 70000, "category_id": 2, "iscrowd": 0},
        {"id": 5, "category_id": 5, "iscrowd": 1},
    ]
    data["annotations"] = [{"image_id": 7, "file_name": "7.png", "segments_info": segments}]
    data["categories"][0]["isthing"] = 0
    (folder / "panoptic.json").write_text(json.dumps(data))
    return data


def phrase_sample(key: str, size: tuple[int, int], texts: tuple[str, ...], seed: int = 0) -> Sample:
    """Phrase k names instance k of ``boxes``."""
    from xseg.types import Instance, Phrase

    masks = boxes(*size)
    return Sample(
        key=key,
        images=(noise(*size, seed=seed),),
        size=size,
        masks=Masks(size, tuple(encode(m) for m in masks)),
        instances=tuple(Instance(i, i) for i in range(3)),
        phrases=tuple(Phrase(text, (k,)) for k, text in enumerate(texts)),
    )


def real(name: str) -> Path:
    """A folder of the real test images; skips where XSEG_REAL does not name them."""
    root = os.environ.get("XSEG_REAL")
    if not root:
        pytest.skip("XSEG_REAL is not set: real images and annotations are not at hand")
    return Path(root) / name
