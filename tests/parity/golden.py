"""The golden cases as inputs of this library: a case file becomes a Batch, a folder's weights become an XSegModel."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from xseg.models import checkpoint
from xseg.models.build import build_model
from xseg.models.configuration import XSegConfig
from xseg.models.xseg import XSegModel
from xseg.tokens import SENTINELS
from xseg.types import Batch, ViewGeometry

GOLDEN = os.environ.get("XSEG_GOLDEN")
ROOT = Path(GOLDEN or ".")
SKIP = "XSEG_GOLDEN names no folder of golden files"
SIZES = [(200, 256), (256, 180)]
CANVAS = 256


def case(folder: str, name: str) -> dict[str, np.ndarray]:
    """All arrays of one case file, for example ``case("archive", "s3_genseg_loss_dense")``."""
    with np.load(ROOT / folder / f"{name}.npz") as arrays:
        return {k: arrays[k] for k in arrays.files}


def images(folder: str) -> dict[str, np.ndarray]:
    """The two images that all cases of a folder share."""
    return case(folder, "images")


def close(ours: Tensor, theirs: "np.ndarray | Tensor", name: str = "", tolerance: float = 1e-4) -> None:
    """Assert equality within ``tolerance`` of the golden array's largest magnitude."""
    wanted = torch.as_tensor(np.asarray(theirs)).float()
    got = ours.detach().float().cpu()
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, golden {tuple(wanted.shape)}"
    error = (got - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-12)
    assert error <= tolerance, f"{name}: off by {error:.2e} of the maximum"


def batch_from(stored: dict[str, np.ndarray], shared: dict[str, np.ndarray], *, layout: str = "") -> Batch:
    """Make the Batch of a case.

    Referring cases (``layout="phrases"``, found by itself for archive cases) have one query per phrase, all phrases
    of the micro-batch compete, and each phrase has one mask. All others have one query per image.
    """
    count = len(stored["in.input_ids"]) if "in.input_ids" in stored else _count(stored, "in.mask_labels.")
    task = str(stored["meta.task"]) if "meta.task" in stored else ""
    phrases = (layout or ("phrases" if task in ("refseg", "reaseg") else "images")) == "phrases"
    text = _text(stored, count)
    queries = _phrase_queries(text) if phrases else _image_queries(text, count, bool(_count(stored, "in.mask_labels.")))
    order = stored["meta.image_index"].tolist() if "meta.image_index" in stored else range(count)
    pixels = {
        k: torch.from_numpy(shared[k][list(order)]) for k in ("pixel_values", "extra_pixel_values") if k in shared
    }
    mask_pixels = pixels["extra_pixel_values"]
    return Batch(
        keys=tuple(f"golden/{i}" for i in range(count)),
        llm_pixels=pixels.get("pixel_values", torch.zeros(count, 3, 0, 0)),
        mask_pixels=mask_pixels,
        **text,
        **queries,
        **_targets(stored, count, phrases),
        **_prompts(stored, text),
        ignore=None,
        geometry=tuple(ViewGeometry(SIZES[i], SIZES[i], CANVAS) for i in order),
    )


def _count(stored: dict[str, np.ndarray], prefix: str) -> int:
    return sum(k.startswith(prefix) for k in stored)


def _long(rows: list[Any], *shape: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), *shape)


def _text(stored: dict[str, np.ndarray], count: int) -> dict[str, Any]:
    if "in.input_ids" not in stored:
        none = torch.zeros(count, 0, dtype=torch.int64)
        places = {"image_slot": _long([], 3), "concept_span": _long([], 3), "seg": []}
        return {"input_ids": none, "labels": none, "attention_mask": none.bool(), **places}
    ids = torch.from_numpy(stored["in.input_ids"])
    labels = torch.from_numpy(stored["in.labels"]) if "in.labels" in stored else torch.full_like(ids, -100)
    slots = [[b, t, b] for b, t in (ids == SENTINELS["<image>"]).nonzero().tolist()]
    spans, segs = [], []
    for b in range(count):
        cond = stored["in.cond_ids"][b] if "in.cond_ids" in stored else np.full(ids.shape[1], -1)
        for k in range(int(cond.max()) + 1):
            at = np.flatnonzero(cond == k)
            spans.append([b, int(at[0]), int(at[-1]) + 1])
        if "in.seg_ids" in stored:
            segs += [[b, t] for t in np.flatnonzero(stored["in.seg_ids"][b] >= 0).tolist()]
    return {
        "input_ids": ids,
        "labels": labels,
        # The official collate attends to padding; only padded rows differ, and nobody reads those.
        "attention_mask": ids != 0,
        "image_slot": _long(slots, 3),
        "concept_span": _long(spans, 3),
        "seg": segs,
    }


def _image_queries(text: dict[str, Any], count: int, targets: bool) -> dict[str, Any]:
    segs, spans = dict(text.pop("seg")), text["concept_span"]
    has_text = text["input_ids"].shape[1] > 0
    own = [[i for i, s in enumerate(spans.tolist()) if s[0] == b] for b in range(count)]
    asked = [b for b in range(count) if not has_text or own[b] or b in segs] if targets or len(spans) or segs else []
    width = max((len(o) for o in own), default=0)
    return {
        "query_image": _long(asked),
        "query_slot": _long([0] * len(asked)),
        "seg_position": _long([[b, segs[b]] if b in segs else [-1, -1] for b in asked], 2),
        "query_concepts": _long([own[b] + [-1] * (width - len(own[b])) for b in asked], width),
        "max_queries": min(1, len(asked)),
    }


def _phrase_queries(text: dict[str, Any]) -> dict[str, Any]:
    segs, spans = text.pop("seg"), text["concept_span"].tolist()
    slots = [sum(s[0] == spans[j][0] for s in spans[:j]) for j in range(len(spans))]
    return {
        "query_image": _long([s[0] for s in spans]),
        "query_slot": _long(slots),
        "seg_position": _long(segs if segs else [[-1, -1]] * len(spans), 2),
        "query_concepts": _long([list(range(len(spans)))] * len(spans), len(spans)),
        "max_queries": max(slots, default=-1) + 1,
    }


def _targets(stored: dict[str, np.ndarray], count: int, phrases: bool) -> dict[str, Any]:
    found = _count(stored, "in.mask_labels.")
    masks = [torch.from_numpy(stored[f"in.mask_labels.{i}"]) for i in range(found)]
    classes = [torch.from_numpy(stored[f"in.class_labels.{i}"]) for i in range(found)]
    total = sum(len(m) for m in masks)
    owner = [b for b, m in enumerate(masks) for _ in m]
    return {
        "target_masks": torch.cat(masks) if masks else torch.zeros(0, CANVAS, CANVAS, dtype=torch.uint8),
        "target_query": torch.arange(total) if phrases else _long(owner),
        "target_class": (torch.arange(total) if phrases else torch.cat(classes)) if masks else _long([]),
    }


def _prompts(stored: dict[str, np.ndarray], text: dict[str, Any]) -> dict[str, Any]:
    rows = chosen_prompts(stored)
    masks = [torch.from_numpy(stored[f"in.vprompt_masks.{i}"][k]) for i, k in rows]
    where = (text["input_ids"] == SENTINELS["<region>"]).nonzero()
    return {
        "prompt_mask": torch.stack(masks) if masks else torch.zeros(0, CANVAS, CANVAS, dtype=torch.uint8),
        "prompt_image": _long([i for i, _ in rows]),
        "region_position": where.reshape(-1, 2),
    }


def chosen_prompts(stored: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """(image, row) of the prompt behind each ``<region>``: the official choice with its recorded draws replayed.

    A listed category takes any prompt of it in the micro-batch; an absent one takes a prompt of a foreign class.
    """
    if "in.sampled_labels" not in stored:
        return []
    listed = json.loads(str(stored["in.sampled_labels"]))
    owned = [[(listed[i][c], (i, k)) for k, c in enumerate(stored[f"in.class_labels.{i}"])] for i in range(len(listed))]
    everything = [entry for row in owned for entry in row]
    draws = [int(stored[k][0]) for k in sorted(stored) if k.startswith("rand.") and k.endswith("randint")]
    draws = [d for d, k in zip(draws, [k for k in sorted(stored) if k.endswith("randint")]) if stored[k].shape == (1,)]
    rows = []
    for labels in listed:
        for label in labels:
            pool = [at for category, at in everything if category == label]
            pool = pool or [at for category, at in everything if category not in labels]
            rows.append(pool[draws[len(rows)]])
    return rows


def region_ranks(stored: dict[str, np.ndarray]) -> Tensor:
    """(P, 256) ranks of the sampled pixels among the prompt's pixels, as recorded, for ``sample_regions``."""
    made, at = {}, 0
    names = sorted(k for k in stored if k.startswith("rand."))
    for image in range(_count(stored, "in.vprompt_masks.")):
        for row, mask in enumerate(stored[f"in.vprompt_masks.{image}"]):
            size = int(mask.sum())
            if size > 256:
                made[image, row] = stored[names[at]][:256]
            else:
                made[image, row] = np.concatenate([np.arange(size), stored[names[at]] if size < 256 else []])
            at += size != 256
    return torch.from_numpy(np.stack([made[at] for at in chosen_prompts(stored)]).astype(np.int64))


def config_from(folder: str, *, head: str = "", parts: tuple[str, ...] = ("segmentor", "siglip", "llm")) -> XSegConfig:
    """The XSegConfig of a golden folder's ``config.json``, with the semantics of its code line."""
    sizes = json.loads((ROOT / folder / "config.json").read_text())
    m2f, has = sizes["mask2former"], lambda part: part in sizes and part in parts
    connector = sizes["connector"]
    head = head or ("labels" if m2f.get("head_cls_type") == "linear" else "concepts")
    segmentor = {
        "width": m2f["hidden_dim"],
        "connector_width": connector["hidden"],
        "connector_layers": [2, 3, 4],
        "connector_scales": [2.0, 1.0, 0.5],
        "pixel_layers": m2f["encoder_layers"],
        "pixel_ffn": m2f["encoder_feedforward_dim"],
        "num_queries": m2f["num_queries"],
        "decoder_layers": m2f["decoder_layers"] - 1,
        "heads": m2f["num_attention_heads"],
        "ffn": m2f["dim_feedforward"],
        "head": head,
        "num_labels": 7 if head == "labels" else 0,
    }
    language = {"model_type": "phi3", **sizes["phi3"]} if has("llm") or ("phi3" in sizes and "llm" in parts) else None
    main = folder.startswith("main")
    segmentor |= {"logit_clamp": 50.0, "pad_logit": -1e6} if main else {}
    return XSegConfig(
        region_rows=64 if main else 1,
        sam_config=sizes["sam"],
        siglip_config=sizes["siglip"] if has("siglip") else None,
        text_config={k: v for k, v in language.items() if k != "vocab_after_resize"} if language else None,
        segmentor_config=segmentor if "segmentor" in parts else None,
        seg_token_id=253,
        p_open_token_id=254,
        p_close_token_id=255,
    )


@cache
def weights(folder: str) -> dict[str, Tensor]:
    """The official state of a folder."""
    return load_file(ROOT / folder / "model.safetensors")


def model_from(folder: str, *, head: str = "", parts: tuple[str, ...] = ("segmentor", "siglip", "llm")) -> XSegModel:
    """An XSegModel in eval mode with a golden folder's weights, through the official key map.

    ``head="labels"`` on ``archive`` gives its stage-1 model; ``parts=("sam", "siglip", "llm")`` gives stage 2.
    """
    config = config_from(folder, head=head, parts=parts)
    model = build_model(config)
    state = dict(weights(folder))
    if head == "labels" and folder == "archive":
        state |= load_file(ROOT / folder / "s1_class_predictor.safetensors")
    report = checkpoint.load_official(model, state)
    whole = not head and "segmentor" in parts
    assert not report.fresh and (not whole or not report.unexpected), str(report)
    return model.eval()
