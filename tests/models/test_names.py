"""SigLIP's texts against what its head sees under a mask."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SiglipConfig, SiglipModel, SiglipVisionModel

from xseg.errors import UserError
from xseg.models import names
from xseg.models.region_sampler import on_canvas, on_image
from xseg.types import ViewGeometry

TINY = Path(__file__).parents[2] / "examples/tiny_parts/siglip"
LOUD = 20.0
WIDE = ViewGeometry((24, 48), (48, 96), 96)
"""An image twice as wide as high: it fills the upper half of the canvas."""


def drawn(side: int, *boxes: tuple[int, int, int, int]) -> Tensor:
    """(1, n, side, side) mask logits of boxes top, left, bottom, right."""
    out = torch.full((1, len(boxes), side, side), -LOUD)
    for k, (top, left, bottom, right) in enumerate(boxes):
        out[0, k, top:bottom, left:right] = LOUD
    return out


def test_a_mask_holds_the_patches_it_covers() -> None:
    view = ViewGeometry((96, 96), (96, 96), 96)
    masks = drawn(96, (0, 0, 32, 16), (16, 16, 40, 32), (1, 1, 4, 4), (0, 0, 0, 0))
    held = names.patches(masks, [view], 6)[0].view(4, 6, 6)
    assert held[0].nonzero().tolist() == [[0, 0], [1, 0]]
    assert held[1].nonzero().tolist() == [[1, 1], [2, 1]], "half of a patch is enough"
    assert held[2].nonzero().tolist() == [[0, 0]], "a mask smaller than half a patch has the one it is in"
    assert held[3].any(), "an empty mask has some, for a head cannot look at nothing"


@pytest.mark.parametrize(("squashed", "wanted"), [(True, [[0, 3], [1, 3], [2, 3]]), (False, [[1, 3], [2, 3]])])
def test_masks_of_a_wide_image_are_found_in_both_views(squashed: bool, wanted: list[list[int]]) -> None:
    """The right half of the image: of the canvas rows 0 to 47; of a padded square its middle rows."""
    view = ViewGeometry(WIDE.original, WIDE.scaled, WIDE.canvas, squashed=squashed)
    strip = drawn(96, (0, 72, 48 if not squashed else 36, 96))
    held = names.patches(strip, [view], 4)[0, 0].view(4, 4)
    assert held.nonzero().tolist() == wanted


@pytest.mark.parametrize("squashed", [True, False])
def test_canvas_and_view_are_inverse(squashed: bool) -> None:
    views = [ViewGeometry(WIDE.original, WIDE.scaled, 96, squashed=squashed), ViewGeometry((7, 5), (96, 69), 96)]
    xy = torch.rand(9, 2)
    there = on_canvas(xy, views)
    torch.testing.assert_close(on_image(there, torch.arange(2), views), xy.expand(2, -1, -1))


def test_the_ensemble_is_fc_clips() -> None:
    classes, cosines = torch.tensor([[1.0, 3.0, 2.0], [0.5, -1.0, 4.0]]), torch.tensor([[0.9, 0.1], [0.2, 0.3]])
    weight, scale = torch.tensor([0.4, 0.8]), 10.0
    found = names.ensemble(classes, cosines, weight, scale).softmax(-1)
    for row in range(2):
        own = [math.exp(v) / sum(math.exp(w) for w in classes[row, :2].tolist()) for v in classes[row, :2].tolist()]
        other = [math.exp(10 * v) for v in cosines[row].tolist()]
        mean = [o ** (1 - w) * (p / sum(other)) ** w for o, p, w in zip(own, other, (0.4, 0.8), strict=True)]
        background = float(classes[row].softmax(0)[-1])
        wanted = [m / sum(mean) * (1 - background) for m in mean] + [background]
        torch.testing.assert_close(found[row], torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    silent = names.ensemble(classes, cosines, torch.zeros(2), scale)
    torch.testing.assert_close(silent.softmax(-1), classes.softmax(-1), rtol=1e-5, atol=1e-6)


def test_new_names_are_known_by_what_was_trained() -> None:
    like = torch.zeros(1)
    asked = ["Tall  tree", "heart"]
    assert names.weights(asked, ["tall tree"], like).tolist() == pytest.approx([names.TRAINED, names.NEW])
    assert names.weights(asked, None, like).tolist() == pytest.approx([names.TRAINED] * 2)


def test_the_whole_picture_is_pooled_as_siglip_pools_it(tmp_path: Path) -> None:
    made = names.load(TINY, "{}")
    config = made.vision.config.to_dict() | {"stem": "patch"}
    plain = SiglipVisionModel(type(made.vision.config)(**config)).eval()
    torch.manual_seed(0)
    own = type(made.vision)(plain.config, -1).eval()
    own.load_state_dict(plain.state_dict())
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        theirs = plain(pixels).pooler_output
        everything = torch.ones(2, 36, dtype=torch.bool)
        torch.testing.assert_close(own.pooled(pixels, torch.arange(2), everything), theirs, rtol=1e-4, atol=1e-5)
        part = everything.clone()
        part[:, 7:] = False
        found = own.pooled(pixels, torch.arange(2), part)
        read = plain(pixels).last_hidden_state[:, :7]
        torch.testing.assert_close(found, plain.head(read), rtol=1e-4, atol=1e-5)


def test_texts_are_siglips_own_and_read_once() -> None:
    made = names.load(TINY, "{}")
    with torch.inference_mode():
        first = made.told(["heart", "Arrow", "heart"])
        wanted = made.text(torch.tensor([made.tokenizer("arrow").input_ids + [860] * 11])).pooler_output
        torch.testing.assert_close(first[1], F.normalize(wanted[0], dim=0))
        assert torch.equal(first[0], first[2])
        made.text = None  # another reading would fail
        assert torch.equal(made.told(["Arrow"])[0], first[1])
    assert made.scale == pytest.approx(32.5, abs=0.2)


def test_a_folder_of_transformers_own_answers_as_it_does(tmp_path: Path) -> None:
    """SiglipModel as upstream saves it, with a picture of 32 pixels that patches of 14 do not fill."""
    vision = {"image_size": 32, "patch_size": 14, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text = {
        "vocab_size": 866,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "projection_size": 32,
    }
    heads = {"num_attention_heads": 4}
    text |= {"max_position_embeddings": 9, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    whole = SiglipModel(SiglipConfig(vision_config=vision | heads, text_config=text | heads)).eval()
    whole.save_pretrained(tmp_path)
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    made = names.load(tmp_path, "the {}")
    words = ["red heart", "arrow"]
    ids = made.tokenizer([f"the {w}" for w in words], padding="max_length", max_length=9, return_tensors="pt").input_ids
    pixels, view = torch.randn(2, 3, 32, 32), ViewGeometry((50, 50), (64, 64), 64)
    with torch.inference_mode():
        theirs = whole(input_ids=ids, pixel_values=pixels)
        seen = made.seen(pixels, torch.full((2, 1, 16, 16), LOUD), [view, view])[:, 0]
        torch.testing.assert_close(made.told(words), theirs.text_embeds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen, theirs.image_embeds, rtol=1e-4, atol=1e-5)
        logits = seen @ made.told(words).T * made.scale + whole.logit_bias
        torch.testing.assert_close(logits, theirs.logits_per_image, rtol=1e-4, atol=1e-4)


def _without(folder: Path, *prefixes: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({n: v for n, v in state.items() if not n.startswith(prefixes)}, folder / "model.safetensors")


def _config(folder: Path, part: str, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(fields)
    (folder / "config.json").write_text(json.dumps(config))


FAULTS = {
    "no text tower": (lambda f: _without(f, "text_model."), "text tower is missing"),
    "half a text tower": (lambda f: _without(f, "text_model.encoder.layers.1."), "not whole"),
    "half a vision tower": (lambda f: _without(f, "vision_model.post_layernorm"), "vision tower is missing, or not"),
    "no temperature": (lambda f: _without(f, "logit_scale"), "no logit_scale"),
    "no head": (lambda f: _config(f, "vision_config", vision_use_head=False), "no pooling head"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "no text tower with its tokenizer"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is not that of a whole SigLIP"),
    "a vision tower alone": (
        lambda f: (f / "config.json").write_text('{"model_type": "siglip_vision_model"}'),
        "config.json is not that of a whole SigLIP",
    ),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"no"), "model.safetensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_whole_siglip_is_named(fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "siglip"
    shutil.copytree(TINY, folder)
    harm, message = FAULTS[fault]
    harm(folder)
    with pytest.raises(UserError, match=message):
        names.load(folder, "{}")


def test_a_folder_without_its_template_is_damaged(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "names")
    with pytest.raises(UserError, match="run `xseg names` again"):
        names.load(tmp_path / "names")
    (tmp_path / "names" / names.FILE).write_text('{"template": "a {}"}')
    assert names.load(tmp_path / "names").template == "a {}"
