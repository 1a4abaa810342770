"""The paper recipe against every key and shape of the released sizes."""

import os
from pathlib import Path

import pytest
import torch

from xseg.config import ModelRecipe, load_recipe
from xseg.models import released, shards
from xseg.models.build import build_config, build_model
from xseg.models.key_maps import to_official, unified
from xseg.models.shards import Stored

GOLDEN = os.environ.get("XSEG_GOLDEN", "")
UNUSED = "segmentor.shared_image_embedding.positional_embedding"
"""A buffer of SAM's prompt encoder that nothing reads; xseg has no place for it."""


def listed() -> list[dict[str, tuple[int, ...]]]:
    """Stage 1's and stage 3's keys -> shapes."""
    stages: list[dict[str, tuple[int, ...]]] = []
    for line in (Path(GOLDEN) / "main/full_keys.txt").read_text().splitlines():
        if line.startswith("# stage"):
            stages.append({})
        elif line and not line.startswith("#"):
            name, shape = line.split("\t")
            stages[-1][unified(name)] = tuple(int(n) for n in shape.strip("[]").split(",") if n.strip())
    return stages


@pytest.mark.skipif(not GOLDEN, reason="XSEG_GOLDEN names no folder of golden outputs")
@pytest.mark.parametrize("stage", [0, 1], ids=["stage 1", "stage 3"])
def test_every_key_and_shape(stage: int) -> None:
    parts, head, labels = ((["segmentor"], "labels", 133), (["segmentor", "siglip", "llm"], "concepts", 0))[stage]
    recipe = load_recipe(ModelRecipe, "paper")
    config = build_config(recipe, parts, head, labels, 32064 if "llm" in parts else None)
    with torch.device("meta"):
        model = build_model(config)
    ours = {name: tuple(value.shape) for name, value in to_official(model.state_dict()).items()}
    wanted = listed()[stage]
    assert set(wanted) - set(ours) <= {UNUSED}
    assert not set(ours) - set(wanted)
    differing = {name: (shape, wanted[name]) for name, shape in ours.items() if shape != wanted[name]}
    assert not {n: d for n, d in differing.items() if d != ((), (1,))}


@pytest.mark.skipif(not GOLDEN, reason="XSEG_GOLDEN names no folder of golden outputs")
@pytest.mark.parametrize("line", ["main", "archive"])
@pytest.mark.parametrize("stage", [0, 1], ids=["stage 1", "stage 3"])
def test_import_explains_every_tensor_of_the_released_sizes(
    stage: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing missing and nothing unexpected, under the names of either code line; only the tables of contents."""
    names = listed()[stage]
    if line == "archive":
        names = {n.replace("vision_encoder.", "visual_encoder."): shape for n, shape in names.items()}
        names = {n.replace("class_predictor.logit_scale", "logit_scale"): shape for n, shape in names.items()}
        names = {n.replace("class_predictor.predictor.", "class_predictor."): shape for n, shape in names.items()}
    there = {n: Stored(Path("a.bin"), n, shape, torch.bfloat16) for n, shape in names.items()}
    monkeypatch.setattr(shards, "catalog", lambda source: there)
    found = released.inspect(Path("a.bin"))
    parts, head, labels = ((["segmentor"], "labels", 133), (["segmentor", "siglip", "llm"], "concepts", 0))[stage]
    assert found.parts == parts
    config = build_config(load_recipe(ModelRecipe, "paper"), parts, head, labels, 32064 if stage else None)
    with torch.device("meta"):
        skeleton = build_model(config)
    pieces, report = released.plan(found, skeleton, {}, 0.0)
    assert not (report.fresh or report.unexpected or report.mismatched)
    assert set(pieces) == set(skeleton.state_dict()) and len(found.weights) == len(names) - (UNUSED in names)
