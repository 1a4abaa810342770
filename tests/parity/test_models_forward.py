"""The model against the official one, layer by layer: forward passes of stages 1, 2 and 3 on both branches."""

import dataclasses

import golden
import numpy as np
import pytest
import torch
from torch import Tensor

from xseg.types import Batch, ModelOutput

pytestmark = pytest.mark.skipif(not golden.GOLDEN, reason=golden.SKIP)
ARCHIVE = sorted(p.stem for p in golden.ROOT.glob("archive/s3_*.npz") if "generate" not in p.stem)
MAIN = sorted(p.stem for p in golden.ROOT.glob("main/full/s3_*.npz") if "generate" not in p.stem)


@torch.no_grad()
def answer(folder: str, stored: dict[str, np.ndarray], batch: Batch, **model: str) -> ModelOutput:
    """Forward with the recorded points of visual prompts."""
    xseg = golden.model_from(folder, **model)
    features = xseg.encode_images(
        batch.llm_pixels, batch.mask_pixels, text=batch.input_ids.shape[1] > 0, masks=batch.max_queries > 0
    )
    if not batch.input_ids.shape[1]:
        return xseg.segment(batch, features, None, None)
    ranks = golden.region_ranks(stored) if "in.vprompt_masks.0" in stored else None
    return xseg.segment(batch, features, *xseg.read(batch, features, ranks))


def check(output: ModelOutput, stored: dict[str, np.ndarray]) -> int:
    """Compare everything the case stores; returns how many arrays that were."""
    pairs = [
        (output.class_logits[-1], "class_queries_logits"),
        (output.class_logits[-1], "tap.segmentor.class_predictor"),
    ]
    pairs += [(output.mask_logits[-1], name) for name in ("mask_logits_s8", "tap.mask_logits_last")]
    for layer in range(len(output.mask_logits)):
        pairs.append((output.class_logits[layer], f"tap.class_logits.{layer}"))
        pairs.append((output.mask_logits[layer], f"tap.segmentor.decoder.masks_queries_logits.{layer}"))
    found = [(ours, name) for ours, name in pairs if name in stored]
    for ours, name in found:
        theirs = torch.from_numpy(stored[name])
        # Padded columns hold the branch's own large negative number.
        real = theirs > -1e5
        assert torch.equal(ours[~real], theirs[~real]), name
        golden.close(ours.masked_fill(~real, 0), theirs.masked_fill(~real, 0), name)
    if "masks_queries_logits_s4" in stored:
        upsampled = torch.nn.functional.interpolate(output.mask_logits[-1], 256, mode="bilinear")
        golden.close(upsampled[..., ::4, ::4], stored["masks_queries_logits_s4"], "masks_queries_logits_s4")
        return len(found) + 1
    return len(found)


@pytest.mark.parametrize("name", ARCHIVE)
def test_archive_forward(name: str) -> None:
    stored = golden.case("archive", name)
    batch = golden.batch_from(stored, golden.images("archive"))
    output = answer("archive", stored, batch)
    compared = check(output, stored)
    assert compared or "pointsample" in name or "chat" in name
    if "llm.logits" in stored:
        golden.close(output.lm_logits, label_rows(batch, stored["llm.logits"]), "llm.logits")
    assert (len(output.lm_labels) > 0) == bool((batch.labels != -100).any())


def label_rows(batch: Batch, logits: np.ndarray) -> Tensor:
    """The official logits at the positions that predict a label; 80 image rows stand for one sentinel."""
    sample, token = (batch.labels != -100).nonzero(as_tuple=True)
    return torch.from_numpy(logits)[sample, token + 79 - 1]


@pytest.mark.parametrize("name", MAIN)
def test_main_forward(name: str) -> None:
    stored = golden.case("main/full", name)
    batch = golden.batch_from(stored, golden.images("main/full"), layout="phrases" if "refseg" in name else "")
    if name.startswith("s3_refseg_loss"):
        # Main gives every image the <SEG> of image 0, and lets all phrases compete in one decode per image.
        batch = dataclasses.replace(batch, seg_position=batch.seg_position[:1].expand(2, -1))
        stored = {k: v for k, v in stored.items() if "class_predictor" not in k}
    output = answer("main/full", stored, batch)
    compared = check(output, stored)
    assert compared or "pointsample" in name or "chat" in name
    if "llm.logits" in stored:
        golden.close(output.lm_logits, label_rows(batch, stored["llm.logits"]), "llm.logits")


@pytest.mark.parametrize("folder", ["archive", "main/segmentor"])
def test_stage_1_forward(folder: str) -> None:
    stored = golden.case(folder, "s1_loss_dense")
    batch = golden.batch_from(stored, golden.images(folder))
    assert batch.input_ids.shape == (2, 0) and batch.query_concepts.shape == (2, 0)
    assert check(answer(folder, stored, batch, head="labels"), stored) >= 4


@pytest.mark.parametrize(("folder", "name", "head"), [
    ("main/segmentor", "s1_loss_dense", "labels"), ("main/full", "s3_genseg_loss_dense", "")
])  # fmt: skip
@torch.no_grad()
def test_every_tap_of_the_segmentor(folder: str, name: str, head: str) -> None:
    stored = golden.case(folder, name)
    batch = golden.batch_from(stored, golden.images(folder))
    model = golden.model_from(folder, head=head)
    states = model.segmentor.sam(batch.mask_pixels, range(5))
    for layer, state in enumerate(states):
        golden.close(state, stored[f"tap.segmentor.encoder.hidden_states.{layer}"], f"SAM state {layer}")
    levels = model.segmentor.connector(states[2:])
    for level, ours in enumerate(levels):
        golden.close(ours, stored[f"tap.seg_connector.{level}"], f"connector {level}")
    features, maps = model.segmentor.pixel_decoder(levels)
    golden.close(features, stored["tap.segmentor.pixel_decoder.mask_features"], "mask features")
    for level, ours in enumerate(maps):
        golden.close(ours, stored[f"tap.segmentor.pixel_decoder.multi_scale_features.{level}"], f"map {level}")
    whole = model.encode_images(batch.llm_pixels, batch.mask_pixels)
    layout, hidden = model.read(batch, whole) if batch.input_ids.shape[1] else (None, None)
    seg = model.vectors(batch, layout, hidden)[0]
    from xseg.models.mask_decoder import Groups

    queries, _ = model.segmentor.mask_decoder(features, maps, seg, Groups(torch.arange(2), 2, 1))
    for layer, ours in enumerate(queries):
        theirs = stored[f"tap.segmentor.decoder.intermediate_hidden_states.{layer}"].swapaxes(0, 1)
        golden.close(ours, theirs, f"decoder state {layer}")


@torch.no_grad()
def test_taps_around_the_language_model() -> None:
    stored = golden.case("main/full", "s3_genseg_loss_dense")
    batch = golden.batch_from(stored, golden.images("main/full"))
    model = golden.model_from("main/full")
    features = model.encode_images(batch.llm_pixels, batch.mask_pixels, masks=False)
    assert features.rows is not None and features.maps is None
    golden.close(features.rows[:, :16], stored["tap.visual_projector"], "SigLIP rows")
    golden.close(features.rows[:, 16:], stored["tap.seg_projector"], "SAM rows")
    layout, hidden = model.read(batch, features)
    projected = model.llm_projector(hidden)[layout.mask]
    golden.close(projected, stored["tap.llm_projector"][layout.mask.numpy()], "llm_projector")
    rows = model.embed(batch, features)[1][layout.mask]
    theirs = golden.case("archive", "s3_genseg_loss_dense")["tap.llm_in.inputs_embeds"]
    golden.close(rows, theirs[layout.mask.numpy()], "what the language model reads")


def test_stage_2_forward_and_its_gradients() -> None:
    from safetensors.torch import load_file
    from torch.nn.functional import cross_entropy

    from xseg.models import key_maps

    stored = golden.case("main/full", "s2_chat_loss")
    batch = golden.batch_from(stored, golden.images("main/full"))
    model = golden.model_from("main/full", parts=("sam", "siglip", "llm"))
    output = model.train()(batch)
    loss = cross_entropy(output.lm_logits, output.lm_labels) + output.touch
    golden.close(loss, stored["loss.loss_llm"], "loss")
    loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    named = key_maps.to_official(ours)
    theirs = load_file(golden.ROOT / "main/full/s2_chat_loss.grads.safetensors")
    assert len(theirs) == 8
    for name, gradient in theirs.items():
        golden.close(named[name], gradient, name)


@pytest.mark.parametrize(
    ("name", "rows"), [("s3_vgdseg_loss_dense", (92, 218)), ("s3_intseg_infer_tensor_box", (89, 152))]
)
def test_a_region_takes_as_many_rows_as_its_code_line_gives_it(name: str, rows: tuple[int, int]) -> None:
    """Rows as the archive line stores them, and as main was measured on the same text (golden/archive/README.md)."""
    stored = golden.case("archive", name)
    batch = golden.batch_from(stored, golden.images("archive"))
    for folder, wanted in zip(("archive", "main/full"), rows, strict=True):
        model = golden.model_from(folder)
        with torch.no_grad():
            features = model.encode_images(batch.llm_pixels, batch.mask_pixels, masks=False)
        assert model.layout(batch, features).mask.shape[1] == wanted


def test_padded_columns_tell_the_code_lines_apart() -> None:
    """The field ``pad_logit`` is needed: with the paper's value the class logits of main would not be met."""
    for folder, pad in (("archive", -1e9), ("main/full", -1e6)):
        stored = golden.case(folder, "s3_genseg_infer_tensor")["class_queries_logits"]
        assert stored.min() == np.float32(pad)
