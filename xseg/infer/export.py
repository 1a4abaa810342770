"""``xseg export``: a stage's ``final`` folder as a smaller one for users, held against its source before it appears."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xseg.config import SuiteRow, TaskSpec
from xseg.data.shapeworld.write import write
from xseg.errors import UserError, did_you_mean
from xseg.geometry import masks as rle
from xseg.infer import card
from xseg.infer.evaluate import open_row, predict
from xseg.infer.predictor import Predictor, load
from xseg.models import adapters, checkpoint
from xseg.types import ModelOutput, Prediction

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = (
    SuiteRow(recipe="shapes/panoptic_val"),
    SuiteRow(recipe="shapes/refer_val", task=TaskSpec(**{"name": "refer_seg", "answer": "given"})),  # masks are sure
    SuiteRow(recipe="shapes/talk_val"),
)
PICTURES, SIDE, SEED = 12, 96, 1
"""Held-out scenes that source and copy both answer; the figures of a suite are of seed 0 unless it was told else."""
LEAST_IOU, LEAST_TEXTS = 0.97, 0.95
"""What rounding may cost: the mean IoU of the copy's masks with the source's, and the part of answers that are equal
word by word. An answer may tip where two words were all but equally likely."""
WHOLE, HALF = 1e-5, 2e-2
"""How far logits may be off, as part of the largest: the worst one of a float32 copy, the mean of a half-precision
one. (The worst says little there: where a mask's border falls on the other side, so does what the next layer reads.)"""
PADDING = 1e5
EXPORT: checkpoint.Mark = (card.FILE, "Written by `xseg export`")
"""Of a folder that an earlier export left: only that is replaced, never what training wrote."""
BATCH = 8
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Export:
    """What is asked for."""

    source: Path
    """A ``final`` folder, or a run, whose last stage is taken."""
    out: Path
    dtype: str = "bf16"
    limit_mb: float | None = None
    """Most megabytes (10^6 bytes) that the whole folder may have."""


def export(asked: Export) -> card.Agreement:
    """Cast the weights, check that the copy answers as its source does, and write ``asked.out`` with a model card.

    Adapters are merged in the copy; in the source they stand beside the weights, so that merging is checked as well.

    Both are run on the CPU in float32, so that nothing but the rounding differs. Raises UserError, and leaves ``out``
    as it was, for a source that is no model, an unknown dtype, an ``out`` that holds anything but an earlier export,
    answers that differ, and a folder above its limit.
    """
    check_dtype(asked.dtype)
    source = final_folder(asked.source)
    if source.resolve() == asked.out.resolve():
        raise UserError(f"--out {asked.out}: is the source itself, and would be overwritten; give another folder")
    checkpoint.check_place(asked.out, EXPORT)
    predictor, processor = load(source, "cpu", merged=False)
    with tempfile.TemporaryDirectory() as data, checkpoint.replacing(asked.out, EXPORT) as partial:
        write(Path(data) / "shapes/val", PICTURES, SEED, size=SIDE, split="val")
        wanted, logits = answers(predictor, Path(data))
        adapters.merge(predictor.model)
        predictor.model.to(DTYPES[asked.dtype]).save_pretrained(partial)
        processor.save_pretrained(partial)
        if (source / card.STAGE).is_file():
            shutil.copyfile(source / card.STAGE, partial / card.STAGE)
        given, other = answers(load(partial, "cpu")[0], Path(data))
        agreement = compare(wanted, given)
        check(agreement, asked)
        check_logits(logits, other, asked)
        count = sum(p.numel() for p in predictor.model.parameters())
        example = (asked.out / card.EXAMPLE).is_file()
        name, named = asked.out.resolve().name, processor.names is not None
        made = card.Copy(name, asked.dtype, count, processor.sizes, agreement, example, named)
        (partial / card.FILE).write_text(card.write(source, made), encoding="utf8")
        (partial / "model.safetensors").chmod(0o644)
        check_size(partial, asked)
    return agreement


def final_folder(given: Path) -> Path:
    """The model of a run's last stage, or the folder itself where it is a model. UserError when there is none."""
    if (given / "config.json").is_file():
        return given
    found = sorted(given.glob("s[0-9]*/final/config.json"))
    if (given / "final/config.json").is_file():
        found.append(given / "final/config.json")
    if not found:
        raise UserError(
            f"{given}: no model here (looked for config.json, final/config.json and s*/final/config.json); give a run "
            "of `xseg demo` or the `final` folder of a stage"
        )
    return found[-1].parent


def answers(predictor: Predictor, data_root: Path) -> tuple[list[Prediction], list[torch.Tensor]]:
    """What a model says of the held-out scenes, by every task it can do, and the logits of its last layer."""
    out: list[Prediction] = []
    logits: list[torch.Tensor] = []

    def keep(model: Any, given: Any, output: ModelOutput) -> None:
        logits.extend((output.mask_logits[-1], output.class_logits[-1], output.lm_logits))

    hook = predictor.model.register_forward_hook(keep)
    for row in ROWS:
        dataset = open_row(predictor, row, data_root)
        if dataset is None:
            continue
        for start in range(0, len(dataset), BATCH):
            found = predict(predictor, dataset, range(start, min(start + BATCH, len(dataset))))
            out += [prediction for _, prediction in found]
    hook.remove()
    return out, logits


def check_dtype(name: str) -> None:
    """Raise UserError for a dtype that weights are not stored in."""
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: no such dtype{did_you_mean(name, DTYPES)}")


def distance(wanted: torch.Tensor, given: torch.Tensor, dtype: str) -> float:
    """How far two arrays of logits are apart, as part of the largest: see ``WHOLE`` and ``HALF``."""
    if wanted.shape != given.shape or not wanted.numel():
        return 0.0 if wanted.shape == given.shape else float("inf")
    # The logit of a class column that is padding is one huge number on both sides.
    real = wanted.abs() < PADDING
    off = (wanted - given).abs()[real]
    largest = wanted[real].abs().max().clamp_min(1e-12) if real.any() else wanted.new_ones(())
    return ((off.max() if dtype == "fp32" else off.mean()) / largest).item() if len(off) else 0.0


def check_logits(wanted: Sequence[torch.Tensor], given: Sequence[torch.Tensor], asked: Export) -> None:
    """Raise UserError when logits of the copy are further from its source's than its dtype explains."""
    most = WHOLE if asked.dtype == "fp32" else HALF
    off = max((distance(a, b, asked.dtype) for a, b in zip(wanted, given, strict=True)), default=0.0)
    if off > most:
        raise UserError(
            f"{asked.source}: its {asked.dtype} copy gives other logits: off by {off:.1e} of the largest (at most "
            f"{most:.0e}); {asked.out} was not written. Export with --dtype fp32"
        )


def compare(wanted: Sequence[Prediction], given: Sequence[Prediction]) -> card.Agreement:
    """Masks by IoU, the objects of one class united; texts word by word."""
    ious, same, texts = [], 0, 0
    for one, other in zip(wanted, given, strict=True):
        if one.text or other.text:
            texts, same = texts + 1, same + (one.text == other.text)
        a, b = _masks(one), _masks(other)
        ious += [_iou(a.get(name), b.get(name)) for name in sorted({*a, *b})]
    mean = sum(ious) / len(ious) if ious else 1.0
    return card.Agreement(PICTURES, len(ious), mean, texts, same)


def _masks(prediction: Prediction) -> dict[int, Any]:
    """The RLE of each class, or of each query where segments are not objects of a picture's classes."""
    groups: dict[int, list[Any]] = {}
    for place, segment in enumerate(prediction.segments):
        groups.setdefault(place if prediction.panoptic is None else segment.category, []).append(segment.mask)
    return {name: rle.union(found) for name, found in groups.items()}


def _iou(one: Any, other: Any) -> float:
    """Equal emptiness agrees; a class that only one of the two has does not."""
    if one is None or other is None:
        return 0.0
    united = rle.area(rle.union([one, other]))
    return (rle.area(one) + rle.area(other) - united) / united if united else 1.0


def check(agreement: card.Agreement, asked: Export) -> None:
    """Raise UserError when the copy answers otherwise than its source."""
    if agreement.masks + agreement.texts == 0:
        names = ", ".join(row.recipe for row in ROWS)
        raise UserError(f"{asked.source}: answers none of {names}, so a copy of it cannot be verified")
    if agreement.iou < LEAST_IOU or agreement.same < LEAST_TEXTS * agreement.texts:
        raise UserError(
            f"{asked.source}: its {asked.dtype} copy answers otherwise: mean IoU {agreement.iou:.3f} over "
            f"{agreement.masks} masks (at least {LEAST_IOU}), {agreement.same} of {agreement.texts} texts equal (at "
            f"least {LEAST_TEXTS:.0%}); {asked.out} was not written. Export with --dtype fp32, or train longer"
        )


def check_size(partial: Path, asked: Export) -> None:
    """Raise UserError when what is written, with what stays of an earlier ``out``, is above the limit."""
    places = (*partial.iterdir(), *checkpoint.staying(asked.out, partial))
    files = [file for place in places for file in (place, *place.rglob("*")) if file.is_file()]
    size = sum(p.stat().st_size for p in files) / MEGABYTE
    if asked.limit_mb is not None and size > asked.limit_mb:
        raise UserError(
            f"--limit-mb {asked.limit_mb:g}: {asked.out} would have {size:.1f} MB; use --dtype bf16, a smaller model "
            "recipe, or a higher limit. Nothing was written"
        )
