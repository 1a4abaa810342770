"""The criterion alone against the official one, on the logits stored in the goldens."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))
from loss_cases import make_batch, make_output

from xseg.config import LossWeights
from xseg.losses.criterion import Criterion
from xseg.losses.matcher import match
from xseg.losses.points import Draw
from xseg.losses.targets import Targets
from xseg.types import Batch, ModelOutput

GOLDEN = os.environ.get("XSEG_GOLDEN")
pytestmark = pytest.mark.skipif(not GOLDEN, reason="XSEG_GOLDEN names no folder of golden files")
ROOT = Path(GOLDEN or ".")
OFFICIAL = {"class": "cls", "mask": "mask", "dice": "dice"}
WITH_ALL_LAYERS = [
    "main/segmentor/s1_loss_dense",
    "main/segmentor/s1_loss_pointsample",
    "archive/s3_genseg_loss_dense",
    "archive/s3_genseg_loss_pointsample",
]
LAST_LAYER = sorted(f"archive/{p.stem}" for p in ROOT.glob("archive/s*_loss_dense.npz") if "chat" not in p.stem)


def tensors(case: str) -> dict[str, Tensor]:
    arrays = np.load(ROOT / f"{case}.npz")
    return {k: torch.from_numpy(arrays[k]) for k in arrays.files if arrays[k].dtype.kind in "fiub"}


def targets(stored: dict[str, Tensor]) -> Batch:
    """The target masks of a case, one query per decode item."""
    count = len([k for k in stored if k.startswith("in.mask_labels.")])
    masks = [stored[f"in.mask_labels.{i}"] for i in range(count)]
    used = "tap.class_labels_used" if "tap.class_labels_used.0" in stored else "in.class_labels"
    if "tap.n_mask_labels" in stored:
        masks = list(torch.cat(masks).split(stored["tap.n_mask_labels"].tolist()))
    return make_batch(masks, [stored[f"{used}.{i}"] for i in range(len(masks))])


def all_layers(case: str) -> ModelOutput:
    """Logits of every layer, from the dense file of the same inputs and weights."""
    taps = tensors(case.replace("pointsample", "dense"))
    maps = [taps[f"tap.segmentor.decoder.masks_queries_logits.{i}"] for i in range(4)]
    if "tap.class_logits.0" in taps:
        classes = [taps[f"tap.class_logits.{i}"] for i in range(4)]
    else:
        head = load_file(ROOT / "main/segmentor/model.safetensors")
        weight, bias = (head[f"segmentor.class_predictor.predictor.{k}"] for k in ("weight", "bias"))
        hidden = [taps[f"tap.segmentor.decoder.intermediate_hidden_states.{i}"] for i in range(4)]
        classes = [h.transpose(0, 1) @ weight.T + bias for h in hidden]
    return make_output(torch.stack(maps), torch.stack(classes))


def recorded(case: str, batch: Batch, layers: int) -> Draw:
    """Replay ``rand.*``: per layer one matcher draw per item, then candidates and remainder of all items at once."""
    arrays = np.load(ROOT / f"{case}.npz")
    stream = iter(torch.from_numpy(arrays[k]) for k in sorted(k for k in arrays.files if k.startswith("rand.")))
    counts = torch.bincount(batch.target_query, minlength=len(batch.query_image)).tolist()
    known: dict[tuple[str, int, int], Tensor] = {}
    for layer in [layers - 1, *range(layers - 1)]:
        known |= {("matcher", layer, item): next(stream) for item in range(len(counts))}
        for kind in ("candidates", "remainder"):
            known |= {(kind, layer, item): rows for item, rows in enumerate(next(stream).split(counts))}
    assert next(stream, None) is None

    def draw(kind: str, layer: int, item: int, shape: tuple[int, ...]) -> Tensor:
        assert known[kind, layer, item].shape == shape
        return known[kind, layer, item]

    return draw


def assert_terms(terms: Mapping[str, Tensor], stored: dict[str, Tensor], expected: int) -> None:
    compared = 0
    for name, value in terms.items():
        kind, _, layer = name.partition("_")
        if kind in OFFICIAL:
            official = stored[f"loss.loss_{OFFICIAL[kind]}" + (f"_{layer}" if layer else "")].item()
            assert value.item() == pytest.approx(official, rel=1e-4), name
            compared += 1
    assert compared == expected


@pytest.mark.parametrize("case", WITH_ALL_LAYERS)
def test_every_layer_equals_the_official_losses_and_pairs(case: str) -> None:
    stored = tensors(case)
    batch, output = targets(stored), all_layers(case)
    sampled = "pointsample" in case
    weights = LossWeights(points="sampled", num_points=64) if sampled else LossWeights(points="canvas")
    draw = recorded(case, batch, len(output.mask_logits)) if sampled else None
    losses = Criterion(weights)(output, batch, draw=draw)
    assert_terms(losses.terms, stored, 12)
    assert losses.total.item() == pytest.approx(stored["loss.loss_seg"].item(), rel=1e-4)
    group = Targets(batch)
    matches = match(output, group, weights, draw)
    for call, layer in enumerate([3, 0, 1, 2]):
        for item, start in enumerate(group.starts):
            mine = matches.item == item
            assert torch.equal(matches.query[layer, mine], stored[f"match.{call}.{item}.q"])
            assert torch.equal(matches.row[layer, mine] - start, stored[f"match.{call}.{item}.t"])


@pytest.mark.parametrize("case", LAST_LAYER)
def test_last_layer_of_every_archive_case(case: str) -> None:
    stored = tensors(case)
    output = make_output(stored["tap.mask_logits_last"][None], stored["tap.class_logits.3"][None])
    losses = Criterion(LossWeights(points="canvas"))(output, targets(stored))
    assert_terms(losses.terms, stored, 3)


def test_main_referring_case_from_its_own_taps() -> None:
    stored = tensors("main/full/s3_refseg_loss_dense")
    maps = stored["tap.segmentor.decoder.masks_queries_logits.3"]
    batch = targets(stored)
    # The phrases of a micro-batch compete: the class of item i is its place in the flattened batch.
    batch = dataclasses.replace(batch, target_class=torch.arange(len(batch.target_class)))
    output = make_output(maps[None], stored["tap.segmentor.class_predictor"][None])
    assert_terms(Criterion(LossWeights(points="canvas"))(output, batch).terms, stored, 3)
