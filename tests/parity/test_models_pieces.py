"""Single pieces against the official ones: shuffles, connector, projectors, region sampler, splice, generation."""

import dataclasses
import json

import golden
import numpy as np
import pytest
import torch
from torch import Tensor

from xseg.models.projector import shuffle, unshuffle
from xseg.models.region_sampler import sample_regions
from xseg.models.splice import Layout
from xseg.tokens import SENTINELS
from xseg.types import Batch

pytestmark = pytest.mark.skipif(not golden.GOLDEN, reason=golden.SKIP)
GENERATE = [
    (folder, p.stem)
    for folder in ("archive", "main/full")
    for p in sorted(golden.ROOT.glob(f"{folder}/*_generate.npz"))
]


def tensor(value: np.ndarray) -> Tensor:
    return torch.from_numpy(value)


def test_pixel_shuffles_have_the_released_channel_order() -> None:
    stored = golden.case("archive", "modules_golden")
    golden.close(unshuffle(tensor(stored["in.shuffle_down"])), stored["out.shuffle_down"])
    golden.close(shuffle(tensor(stored["in.shuffle_up"])), stored["out.shuffle_up"])
    golden.close(unshuffle(tensor(stored["in.shuffle_random"])), stored["out.shuffle_random_down"])
    golden.close(shuffle(tensor(stored["in.shuffle_random"])), stored["out.shuffle_random_up"])


@torch.no_grad()
def test_connector_and_projectors_alone() -> None:
    stored = golden.case("archive", "modules_golden")
    model = golden.model_from("archive")
    for sides in ("even", "odd"):
        states = [tensor(stored[f"in.connector_{sides}.{i}"]) for i in range(3)]
        for level, ours in enumerate(model.segmentor.connector(states)):
            golden.close(ours, stored[f"out.connector_{sides}.{level}"], f"connector {sides} {level}")
    cells = unshuffle(tensor(stored["in.seg_projector"]))
    golden.close(model.sam_projector(cells).flatten(1, 2), stored["out.seg_projector"])
    golden.close(model.siglip_projector(tensor(stored["in.visual_projector"])), stored["out.visual_projector"])
    golden.close(model.llm_projector(tensor(stored["in.llm_projector"])), stored["out.llm_projector"])


def test_region_sampler_replays_the_recorded_points() -> None:
    stored = golden.case("archive", "sampler_golden")
    draws = [stored[k] for k in sorted(k for k in stored if k.startswith("rand."))]
    masks = [stored[f"in.masks.{i}"] for i in range(2)]
    ranks = []
    for mask in np.concatenate(masks):
        size = int((mask > 0).sum())
        drawn = draws.pop(0) if size != 256 else None
        some = np.arange(size) if size <= 256 else drawn[:256]
        ranks.append(np.concatenate([some, drawn]) if size < 256 else some)
    image = torch.tensor([0] * len(masks[0]) + [1] * len(masks[1]))
    cells = tensor(stored["in.feats"]).unflatten(1, (8, 8))
    prompts = tensor(np.concatenate(masks))
    ours = sample_regions(cells, image, prompts, 256, tensor(np.stack(ranks).astype(np.int64)))
    golden.close(ours[:, 0], np.concatenate([stored[f"out.region_feats.{i}"] for i in range(2)]))
    # Branch main gives 64 rows: means of four points each, at the same points.
    rows = sample_regions(cells, image, prompts, 256, tensor(np.stack(ranks).astype(np.int64)), rows=64)
    for i, first in enumerate((0, len(masks[0]))):
        points = tensor(stored[f"out.point_feats_first_mask.{i}"])
        golden.close(rows[first], points.unflatten(0, (64, 4)).mean(1).numpy(), "64 rows")


def splice(stored: dict[str, np.ndarray], name: str) -> tuple[Layout, Tensor]:
    """Splice the made-up rows into one of the stored token rows."""
    ids = tensor(stored[f"in.{name}.input_ids"])
    mask = tensor(stored[f"in.{name}.attention_mask"]) if f"in.{name}.attention_mask" in stored else ids == ids
    where = [[b, t, b] for b, t in (ids == SENTINELS["<image>"]).nonzero().tolist()]
    regions = (ids == SENTINELS["<region>"]).nonzero()
    base = golden.batch_from(golden.case("archive", "s3_chat_loss"), golden.images("archive"))
    batch: Batch = dataclasses.replace(
        base,
        input_ids=ids,
        attention_mask=mask,
        image_slot=torch.tensor(where).reshape(-1, 3),
        region_position=regions,
        prompt_image=torch.zeros(len(regions), dtype=torch.long),
    )
    words = golden.weights("archive")["llm.model.embed_tokens.weight"][ids.clamp(min=0)]
    rows = torch.cat([tensor(stored["in.pixel_rows"]), tensor(stored["in.extra_rows"])], 1).expand(len(ids), -1, -1)
    layout = Layout.of(batch, rows.shape[1])
    return layout, layout.splice(batch, words, rows, tensor(stored["in.region_rows"])[: len(regions), None])


# "adjacent" and "image_first" hold a fault: text moves in front of an image that comes first or of touching sentinels.
@pytest.mark.parametrize("name", ["usual", "text_only", "image_last"])
def test_splice(name: str) -> None:
    stored = golden.case("archive", "splice_golden")
    layout, rows = splice(stored, name)
    golden.close(rows, stored[f"out.{name}.inputs_embeds"])
    assert layout.mask.all()


def test_splice_of_padded_rows_counts_real_tokens_only() -> None:
    stored = golden.case("archive", "splice_golden")
    layout, _ = splice(stored, "true_mask")
    assert torch.equal(layout.mask, tensor(stored["out.true_mask.attention_mask"]))


def test_splice_keeps_the_order_where_the_official_code_does_not() -> None:
    stored = golden.case("archive", "splice_golden")
    layout, rows = splice(stored, "image_first")
    golden.close(rows[0, :3], stored["in.pixel_rows"][0])
    golden.close(rows[0, 3:5], stored["in.extra_rows"][0])
    assert layout.start[0].tolist() == [0, 5, 6, 7, 8]


@pytest.mark.parametrize(("folder", "name"), GENERATE)
def test_generation(folder: str, name: str) -> None:
    stored = golden.case(folder, name)
    model = golden.model_from(folder)
    # Both lines were run with the same settings; only the archive's files hold them.
    asked = json.loads(str(golden.case("archive", name)["meta.gen"]))
    batch = golden.batch_from(stored, golden.images(folder))
    made = model.generate(batch, max_new_tokens=asked["max_new_tokens"], stop_ids=[2], processors=[forced(asked)])
    assert made.sequences == stored["gen.sequences"].tolist()
    rows = stored["gen.hidden"].shape[1]
    golden.close(made.hidden[:, :rows], stored["gen.hidden"], "states")
    if "seg_none" not in stored:
        assert "class_queries_logits" not in stored
        return
    assert (made.output is None) == bool(stored["seg_none"])
    if made.output is not None:
        golden.close(made.output.class_logits[-1], stored["class_queries_logits"], "classes")
        golden.close(made.output.mask_logits[-1], stored["mask_logits_s8"], "masks")


def forced(asked: dict) -> "object":
    """The bias and the forced last token of the recorded run."""

    def process(ids: Tensor, logits: Tensor) -> Tensor:
        for token, bias in asked.get("sequence_bias", []):
            logits = logits.index_add(1, torch.tensor(token), torch.full((len(logits), len(token)), bias))
        if "forced_eos_token_id" in asked and ids.shape[1] == asked["max_new_tokens"] - 1:
            logits = torch.full_like(logits, -1e9).index_fill(1, torch.tensor([asked["forced_eos_token_id"]]), 0.0)
        return logits

    return process


def test_official_key_lists_are_covered_in_both_directions() -> None:
    from xseg.models import key_maps

    for folder in ("archive", "main/full", "main/segmentor"):
        model = golden.model_from(folder)
        back = key_maps.to_official(model.state_dict())
        theirs = {key_maps.unified(n): v for n, v in golden.weights(folder).items() if "shared_image" not in n}
        assert back.keys() == theirs.keys()
        assert all(torch.equal(back[n], v) for n, v in theirs.items())
