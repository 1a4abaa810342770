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
from transformers import SiglipConfig, SiglipModel

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
    held = names.patches(masks, [view], 6, 1.0)[0].view(4, 6, 6)
    assert held[0].nonzero().tolist() == [[0, 0], [1, 0]]
    assert held[1].nonzero().tolist() == [[1, 1], [2, 1]], "half of a patch is enough"
    assert held[2].nonzero().tolist() == [[0, 0]], "a mask smaller than half a patch has the one it is in"
    assert held[3].any(), "an empty mask has some, for a head cannot look at nothing"


@pytest.mark.parametrize(("squashed", "wanted"), [(True, [[0, 3], [1, 3], [2, 3], [3, 3]]), (False, [[1, 3], [2, 3]])])
def test_masks_of_a_wide_image_are_found_in_both_views(squashed: bool, wanted: list[list[int]]) -> None:
    """The right half of the image: of the canvas rows 0 to 47; of a padded square its middle rows."""
    view = ViewGeometry(WIDE.original, WIDE.scaled, WIDE.canvas, squashed=squashed)
    strip = drawn(96, (0, 72, 96, 96))  # what it says of the canvas beside the image counts for nothing
    held = names.patches(strip, [view], 4, 1.0)[0, 0].view(4, 4)
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
    assert names.weights(asked, ["tall tree"], like).tolist() == pytest.approx([names.LISTED, names.NEW])
    assert names.weights(asked, None, like).tolist() == pytest.approx([names.LISTED] * 2)


def test_a_part_is_pooled_as_if_there_were_nothing_else() -> None:
    """Two pictures of three parts each, against the head's own forward on the rows of each part."""
    made = names.load(TINY, 96, "{}")
    masks = drawn(96, (0, 0, 96, 96), (0, 0, 32, 48), (33, 33, 40, 40)).expand(2, -1, -1, -1).clone()
    masks[1] = masks[1].flip(-1)
    views = [ViewGeometry((96, 96), (96, 96), 96)] * 2
    with torch.no_grad():
        rows = made.read(torch.randn(2, 3, 96, 96))
        found, held = made.seen(rows, masks, views), names.patches(masks, views, 6, 1.0)
        assert held.sum(2).tolist() == [[36, 6, 1]] * 2
        for picture in range(2):
            for part in range(3):
                alone = made.vision.head(rows[picture][held[picture, part]][None])[0]
                torch.testing.assert_close(found[picture, part], F.normalize(alone, dim=0), rtol=1e-4, atol=1e-5)


def test_texts_are_siglips_own_and_read_once() -> None:
    made = names.load(TINY, 96, "{}")
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
    made = names.load(tmp_path, 32, "the {}")
    words = ["red heart", "arrow"]
    ids = made.tokenizer([f"the {w}" for w in words], padding="max_length", max_length=9, return_tensors="pt").input_ids
    pixels, view = torch.randn(2, 3, 32, 32), ViewGeometry((50, 50), (64, 64), 64)
    with torch.inference_mode():
        theirs = whole(input_ids=ids, pixel_values=pixels)
        seen = made.seen(made.read(pixels), torch.full((2, 1, 16, 16), LOUD), [view, view])[:, 0]
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


def _tokenizer(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


FAULTS = {
    "no text tower": (lambda f: _without(f, "text_model."), "tensors of a tower are missing.*text_model"),
    "half a text tower": (lambda f: _without(f, "text_model.encoder.layers.1."), "text_model.encoder.layers.1"),
    "half a vision tower": (lambda f: _without(f, "vision_model.post_layernorm"), "vision_model.post_layernorm"),
    "other sizes": (lambda f: _config(f, "text_config", hidden_size=64), "not those of config.json"),
    "no temperature": (lambda f: _without(f, "logit_scale"), "no logit_scale"),
    "no head": (lambda f: _config(f, "vision_config", vision_use_head=False), "no pooling head"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "no tokenizer that can be read"),
    "no pad token": (lambda f: _tokenizer(f, pad_token=None), "must have a pad token"),
    "a tokenizer of more words": (lambda f: _tokenizer(f, extra_special_tokens=["<a>"]), "a row for each word"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json here"),
    "no folder": (shutil.rmtree, "no config.json here"),
    "a config that is none": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "a vision tower alone": (lambda f: _config(f, "", model_type="siglip_vision_model"), "must be 'siglip'"),
    "CLIP": (lambda f: (f / "config.json").write_text('{"model_type": "clip"}'), "must be 'siglip'"),
    "pictures of any size": (lambda f: (f / "config.json").write_text('{"model_type": "siglip2"}'), "must be 'siglip'"),
    "another size": (lambda f: _config(f, "vision_config", image_size=112), "reads pictures of 112 pixels"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"no"), "model.safetensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_whole_siglip_is_named(fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "siglip"
    shutil.copytree(TINY, folder)
    harm, message = FAULTS[fault]
    harm(folder)
    with pytest.raises(UserError, match=message):
        names.load(folder, 96, "{}")


def test_a_folder_without_its_template_is_damaged(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "names")
    with pytest.raises(UserError, match="run `xseg names` again"):
        names.load(tmp_path / "names", 96)
    (tmp_path / "names" / names.FILE).write_text('{"template": "a {}"}')
    assert names.load(tmp_path / "names", 96).template == "a {}"
