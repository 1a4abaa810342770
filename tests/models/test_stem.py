"""The convolutional stem of encoders that are trained from scratch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.models.test_parts import SAM, SIGLIP, loaded, random
from xseg.errors import UserError
from xseg.models.configuration import SamConfig, SiglipConfig
from xseg.models.siglip import SiglipEncoder
from xseg.models.stem import ResidualStem

SIXTEEN = {**SIGLIP, "stem": "residual", "patch_size": 16, "hidden_size": 32}


@pytest.mark.parametrize("kind", [SamConfig, SiglipConfig])
@pytest.mark.parametrize(("patch", "grid"), [(8, 12), (16, 6)])
def test_a_stem_cuts_a_picture_into_patches(kind: Any, patch: int, grid: int) -> None:
    stem = ResidualStem(kind(stem="residual", hidden_size=32, patch_size=patch, image_size=96))
    assert stem(torch.randn(2, 3, 96, 96)).shape == (2, 32, grid, grid)


def test_a_patch_sees_its_own_square_and_its_neighbours_only() -> None:
    torch.manual_seed(0)
    pixels = torch.zeros(1, 3, 96, 96)
    stem = ResidualStem(SiglipConfig(stem="residual", hidden_size=32, patch_size=16, image_size=96))
    for norm in (m for m in stem.modules() if isinstance(m, torch.nn.GroupNorm)):
        norm.forward = lambda x: x  # type: ignore[method-assign]  # norms look at the whole picture
    before = stem(pixels)
    pixels[..., :8, :8] = 1.0
    moved = (stem(pixels) - before).abs().amax(1)[0] > 0
    assert moved[0, 0] and not moved[:, 4:].any() and not moved[4:].any()


@torch.no_grad()
def test_siglip_with_a_stem_loads_what_was_kept(tmp_path: Path) -> None:
    kept = random(SiglipEncoder(SiglipConfig(**SIXTEEN), -2))
    state = {f"vision_model.{name}": value.contiguous() for name, value in kept.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(SIXTEEN | {"model_type": "siglip_vision_model"}))
    model, (report,) = loaded(siglip={"pretrained": str(tmp_path)})
    assert not report.fresh and not report.resized and model.config.siglip_config.stem == "residual"
    pixels = torch.randn(2, 3, 32, 32)
    rows = model.siglip(pixels)
    assert rows.shape == (2, 4, 32) and torch.equal(rows, kept(pixels))
    again = type(model.config)(**model.config.to_dict())
    assert again.siglip_config.stem == "residual"


@torch.no_grad()
def test_a_fresh_stem_passes_the_picture_on() -> None:
    """Initialised for a unit variance: rows of a random SigLIP differ between pictures."""
    torch.manual_seed(1)
    model, _ = loaded(siglip=SIXTEEN)
    rows = model.siglip.embeddings.patch_embedding(torch.randn(8, 3, 32, 32))
    assert 0.1 < rows.std(0).mean() < 10


@pytest.mark.parametrize(("part", "sizes"), [("sam", SAM), ("siglip", SIGLIP)])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stem": "conv"}, "{}.stem = 'conv': write 'patch' or 'residual'"),
        ({"stem": "residual", "patch_size": 4}, "{}.stem = 'residual' needs {}.patch_size = 8 or 16, not 4"),
    ],
)
def test_a_stem_that_is_none_is_refused(part: str, sizes: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        loaded(**{part: {**sizes, **given}})
    assert message.replace("{}", part) in str(raised.value)
