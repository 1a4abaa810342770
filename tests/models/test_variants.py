"""The choices of the ablations: connectors, SAM's mask decoder, and which encoders the language model sees."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from model_cases import CATEGORIES, TALK, alone, batch, config, kinds, model
from PIL import Image
from test_model_properties import without_gradient

from xseg.config import LossWeights, ModelRecipe
from xseg.errors import UserError
from xseg.geometry.views import ViewSizes
from xseg.losses.criterion import Criterion
from xseg.models import checkpoint
from xseg.models.build import build_config
from xseg.models.configuration import XSegConfig
from xseg.models.mask_decoder import Groups
from xseg.models.projector import Projector
from xseg.models.region_sampler import on_image, sample_regions
from xseg.types import ViewGeometry

torch.set_num_threads(1)
SEGMENTORS = {
    "conv": {"connector": "conv"},
    "linear": {"connector": "linear", "pixel_decoder": "deformable"},
    "none": {"connector": "none"},
    "sam": {"connector": "none", "mask_decoder": "sam"},
    "sam after conv": {"connector": "conv", "mask_decoder": "sam"},
}


@pytest.mark.parametrize("kind", list(kinds()))
@pytest.mark.parametrize("name", list(SEGMENTORS))
def test_every_trainable_parameter_gets_a_gradient(kind: str, name: str) -> None:
    made = model(**SEGMENTORS[name]).train()
    assert without_gradient(made, made(kinds()[kind])) == []


@pytest.mark.parametrize("name", list(SEGMENTORS))
@torch.no_grad()
def test_queries_of_one_image_together_equal_one_by_one(name: str) -> None:
    made, whole = model(**SEGMENTORS[name]).eval(), kinds()["phrases"]
    together = made(whole)
    for query in range(3):
        one = made(alone(whole, query))
        torch.testing.assert_close(together.mask_logits[:, query], one.mask_logits[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.class_logits[:, query], one.class_logits[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(SEGMENTORS))
def test_stage_1_learns_with_a_label_head_and_the_criterion(name: str) -> None:
    made = model(parts=("segmentor",), head="labels", num_labels=4, pixel_classifier=True, **SEGMENTORS[name]).train()
    one = batch([[], []], [(0, -1, []), (1, -1, [])], images=2)
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[:, 4:20, 8:28] = 1
    targets = {"target_masks": masks, "target_query": torch.tensor([0, 1]), "target_class": torch.tensor([1, 2])}
    one = dataclasses.replace(one, **targets)
    criterion = Criterion(LossWeights(points="grid", pixel_class=1.0))
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = criterion(made(one), one).total
        loss.backward()
        if not losses:
            assert [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("side", [32, 24])
@torch.no_grad()
def test_a_single_scale_gives_maps_of_the_same_sizes_from_the_last_state_alone(side: int) -> None:
    pixels = torch.randn(1, 3, side, side)
    several, single = model().eval().segmentor, model(connector="conv").eval().segmentor
    shapes = [m.shape[-2:] for m in several.connector(several.sam(pixels, several.layers))]
    states = single.sam(pixels, single.layers)
    assert len(states) == 1 and single.layers == several.layers[-1:]
    maps = single.connector(states)
    assert [m.shape[-2:] for m in maps] == shapes
    assert [m.shape[1] for m in maps] == single.connector.channels
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(maps[1], 2), maps[2])


@torch.no_grad()
def test_without_a_connector_the_map_is_the_hidden_state() -> None:
    segmentor = model(connector="none", mask_decoder="sam").eval().segmentor
    (state,) = segmentor.sam(torch.randn(1, 3, 32, 32), segmentor.layers)
    (only,) = segmentor.connector([state])
    assert torch.equal(only, state.permute(0, 3, 1, 2)) and not list(segmentor.connector.parameters())


@torch.no_grad()
def test_sams_decoder_reads_the_prompt_and_the_place() -> None:
    segmentor = model(connector="none", mask_decoder="sam").eval().segmentor
    maps = segmentor.maps(segmentor.sam(torch.randn(1, 3, 32, 32), segmentor.layers))
    groups = Groups(torch.tensor([0, 1]), 1, 2)
    seg = torch.randn(2, 32)
    states, masks = segmentor.mask_decoder(*maps, seg, groups)
    assert masks.shape == (1, 2, 5, 16, 16) and states.shape == (1, 2, 5, 32)
    assert not torch.allclose(masks[0, 0], masks[0, 1])
    nothing = segmentor.mask_decoder(*maps, None, groups)[1]
    torch.testing.assert_close(nothing, segmentor.mask_decoder(*maps, torch.zeros(2, 32), groups)[1])
    # A map that is the same everywhere still gives different masks in different places.
    flat = torch.ones_like(maps[0])
    assert segmentor.mask_decoder(flat, [], seg, groups)[1].flatten(3).std(-1).min() > 1e-6
    compiled = torch.compile(segmentor.mask_decoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*maps, seg, groups)[1], masks, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [k for k in kinds() if k != "regions"])
def test_siglip_alone_keeps_every_gradient(kind: str) -> None:
    made = model(llm_sees=["siglip"]).train()
    assert not hasattr(made, "sam_projector")
    assert without_gradient(made, made(kinds()[kind])) == []


@torch.no_grad()
def test_with_siglip_alone_the_text_is_blind_to_sams_view_and_masks_are_not() -> None:
    made, one = model(llm_sees=["siglip"]).eval(), batch([CATEGORIES], [(0, 0, [0, 1])])
    other = dataclasses.replace(one, mask_pixels=one.mask_pixels.flip(-1))
    a, b = made(one), made(other)
    assert torch.equal(a.lm_logits, b.lm_logits) and not torch.allclose(a.mask_logits, b.mask_logits)
    rows = made.encode_images(one.llm_pixels, one.mask_pixels).rows
    both = model().eval().encode_images(one.llm_pixels, one.mask_pixels).rows
    assert rows.shape[1] == 4 and both.shape[1] == 8


def test_what_the_language_model_does_not_see_is_frozen_in_stage_2() -> None:
    second = model(llm_sees=["siglip"], parts=("sam", "siglip", "llm")).train()
    assert not [n for n, p in second.named_parameters() if n.startswith("segmentor.") and p.requires_grad]
    assert without_gradient(second, second(batch([TALK]))) == []


def test_a_drawn_prompt_needs_the_rows_of_its_encoder() -> None:
    for seen, encoder in (("siglip", "sam"), ("sam", "siglip")):
        with pytest.raises(UserError, match=f"<region> is read from {encoder}'s rows.*llm_sees"):
            model(llm_sees=[seen], region_encoder=encoder)(kinds()["regions"])
    with pytest.raises(UserError, match=r"region_encoder: 'sigclip' is no image encoder.*siglip"):
        XSegConfig(region_encoder="sigclip")


@pytest.mark.parametrize("sees", [["siglip", "sam"], ["siglip"]])
def test_a_drawn_prompt_may_be_read_from_siglip(sees: list[str]) -> None:
    made, one = model(region_encoder="siglip", llm_sees=sees), kinds()["regions"]
    tall, wide = ViewGeometry((80, 40), (32, 16), 32), ViewGeometry((40, 80), (16, 32), 32)
    one = dataclasses.replace(one, geometry=(tall, wide)[: len(one.llm_pixels)])
    assert without_gradient(made.train(), made(one)) == []
    with torch.no_grad():
        features = made.eval().encode_images(one.llm_pixels, one.mask_pixels)
        assert torch.equal(features.cells.flatten(1, 2), features.rows[:, :4])
        layout, rows = made.embed(one, features)
        prompts = sample_regions(features.cells, one.prompt_image, one.prompt_mask, views=one.geometry)
        on_canvas = sample_regions(features.cells, one.prompt_image, one.prompt_mask)
        for (sample, position), own, other in zip(one.region_position.tolist(), prompts, on_canvas, strict=True):
            found = rows[sample, int(layout.start[sample, position])]
            assert torch.equal(found, own[0]) and not torch.allclose(found, other[0])
    bare = dataclasses.replace(one, prompt_mask=one.prompt_mask[:, :0, :0])
    with pytest.raises(UserError, match="prompts are drawn on SAM's canvas"):
        made.embed(bare, features)


def test_a_prompt_is_found_in_the_picture_that_siglip_sees() -> None:
    """40 x 80 pixels of a picture lie as 16 x 32 on a canvas of 32; a crop shows the part behind its offset."""
    wide, crop = ViewGeometry((40, 80), (16, 32), 32), ViewGeometry((40, 80), (64, 128), 32, (16, 64))
    xy = torch.tensor([[[0.25, 0.375]], [[0.5, 0.5]]])
    assert on_image(xy, torch.tensor([1, 0]), [crop, wide]).tolist() == [[[0.25, 0.75]], [[0.625, 0.5]]]
    squared = dataclasses.replace(wide, squashed=False)  # the 40 rows are the middle half of a square
    assert on_image(xy[:1], torch.tensor([0]), [squared]).tolist() == [[[0.25, 0.625]]]
    picture = Image.new("RGB", (80, 40))
    assert [ViewSizes(32, 16, mode).views(picture).geometry for mode in ("squash", "pad_square")] == [wide, squared]


@pytest.mark.parametrize("covered", [1.0, 0.75])
def test_a_square_of_the_picture_is_read_from_its_own_cell(covered: float) -> None:
    """Cells of 8 pixels on a picture of 32; with less of it covered, as by patches that do not divide it, of 6."""
    names, side = torch.eye(16).reshape(1, 4, 4, 16), int(8 * covered)
    masks = torch.zeros(16, 32, 32, dtype=torch.uint8)
    for k in range(16):
        top, left = k // 4 * side, k % 4 * side
        masks[k, top : top + side, left : left + side] = 1
    view = [ViewGeometry((32, 32), (32, 32), 32)]
    found = sample_regions(names, torch.zeros(16, dtype=torch.long), masks, views=view, covered=covered, rows=2)
    assert torch.equal(found.mean(1).argmax(1), torch.arange(16))
    assert found.mean(1).diagonal().min() > 0.5, "most of the row is of its own cell"


@pytest.mark.parametrize("kind", list(kinds()))
def test_interleaved_rows_keep_every_gradient(kind: str) -> None:
    made = model(llm_rows="interleaved").train()
    assert without_gradient(made, made(kinds()[kind])) == []


@torch.no_grad()
def test_interleaved_rows_are_the_same_rows_square_by_square() -> None:
    one = batch([TALK])
    plain = model().eval().encode_images(one.llm_pixels, one.mask_pixels).rows
    paired = model(llm_rows="interleaved").eval().encode_images(one.llm_pixels, one.mask_pixels).rows
    assert torch.equal(paired[:, 0::2], plain[:, :4]) and torch.equal(paired[:, 1::2], plain[:, 4:])
    alone = model(llm_rows="interleaved", llm_sees=["siglip"]).eval()
    assert alone.encode_images(one.llm_pixels, one.mask_pixels).rows.shape[1] == 4


@torch.no_grad()
def test_normed_rows_do_not_depend_on_the_size_of_what_the_encoders_give() -> None:
    plain, normed = Projector(6, 4), Projector(6, 4, normed=True)
    normed.load_state_dict(plain.state_dict())  # the same tensors serve both
    x = torch.randn(3, 6)
    assert torch.allclose(normed(x), normed(30 * x + 2), atol=1e-4)
    assert torch.equal(normed(x), plain(torch.nn.functional.layer_norm(x, (6,))))
    one = batch([TALK])
    rows = [
        model(llm_normed_rows=on).eval().encode_images(one.llm_pixels, one.mask_pixels).rows for on in (True, False)
    ]
    assert not torch.allclose(*rows)


@torch.no_grad()
def test_the_gain_of_seg_moves_nothing_but_the_seg_vectors() -> None:
    one, found = kinds()["phrases"], []
    for gain in (1.0, 4.0):
        made = model(seg_gain=gain).eval()
        layout, hidden = made.read(one, made.encode_images(one.llm_pixels, one.mask_pixels))
        found.append(made.vectors(one, layout, hidden))
    (seg, concepts, real), (louder, same, also) = found
    assert torch.allclose(louder, 4 * seg) and seg.abs().max() > 0
    assert torch.equal(concepts, same) and torch.equal(real, also)


def test_choices_are_saved_and_absent_ones_are_todays(tmp_path: Path) -> None:
    made = model(llm_sees=["siglip"], connector="none", mask_decoder="sam").eval()
    checkpoint.save(made, tmp_path / "new")
    again = checkpoint.load(tmp_path / "new").eval()
    with torch.no_grad():
        assert torch.equal(made(kinds()["phrases"]).mask_logits, again(kinds()["phrases"]).mask_logits)
    plain = model().eval()
    checkpoint.save(plain, tmp_path / "old")
    path = tmp_path / "old/config.json"
    stored = json.loads(path.read_text())
    del (
        stored["llm_sees"],
        stored["llm_rows"],
        stored["llm_normed_rows"],
        stored["segmentor_config"]["connector"],
        stored["segmentor_config"]["seg_gain"],
        stored["segmentor_config"]["mask_decoder"],
    )
    path.write_text(json.dumps(stored))
    with torch.no_grad():
        opened = checkpoint.load(tmp_path / "old").eval()(kinds()["phrases"])
        assert torch.equal(opened.mask_logits, plain(kinds()["phrases"]).mask_logits)


def test_wrong_choices_say_what_is_right() -> None:
    with pytest.raises(UserError, match=r"connector = 'convolution': write one of multiscale, conv, linear, none"):
        model(connector="convolution")
    with pytest.raises(UserError, match=r"mask_decoder = 'sam2': write one of mask2former, sam"):
        model(mask_decoder="sam2", connector="none")
    with pytest.raises(UserError, match=r"reads one map.*set segmentor\.connector to one of conv, linear, none"):
        model(mask_decoder="sam")
    with pytest.raises(UserError, match=r"llm_rows = 'mixed': write one of concatenated, interleaved"):
        model(llm_rows="mixed")
    with pytest.raises(UserError, match=r"SigLIP has 2 rows a side, SAM's grid of 4 gives 4"):
        XSegConfig(**{**config(llm_rows="interleaved").to_dict(), "sam_shuffle": 1})
    with pytest.raises(UserError, match=r"'siglipp' is no image encoder.*'siglip'"):
        model(llm_sees=["siglipp"])
    sam = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    llm = {"model_type": "phi3", "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "pad_token_id": 0}
    recipe = ModelRecipe(sam=sam, llm=llm, llm_sees=["siglip"])
    with pytest.raises(UserError, match=r"llm_sees = \['siglip'\]: the stage builds none of them, only sam"):
        build_config(recipe, ("sam", "llm"))
