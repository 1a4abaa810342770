"""What must hold whatever the weights are: gradients everywhere, grouping, padding, dtypes, missing parts."""

import dataclasses

import pytest
import torch
from model_cases import CATEGORIES, TALK, TWO_TURNS, alone, batch, kinds, model
from torch import Tensor

from xseg.errors import UserError
from xseg.models import llm
from xseg.models.configuration import XSegConfig
from xseg.models.mask_decoder import Groups
from xseg.models.region_sampler import sample_regions
from xseg.types import Batch, ModelOutput

torch.set_num_threads(1)


def total(output: ModelOutput) -> Tensor:
    """A sum over what the criterion reads."""
    loss = output.lm_logits.float().square().sum() + output.mask_logits.square().sum() + output.touch
    return loss + output.class_logits.clamp(min=-1e3).square().sum()


def without_gradient(made: torch.nn.Module, output: ModelOutput) -> list[str]:
    made.zero_grad()
    total(output).backward()
    return [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("kind", list(kinds()))
@pytest.mark.parametrize("decoder", ["fpn", "deformable"])
def test_every_trainable_parameter_gets_a_gradient(kind: str, decoder: str) -> None:
    made = model(pixel_decoder=decoder).train()
    output = made(kinds()[kind])
    assert output.touch is not None and output.touch.item() == 0
    assert without_gradient(made, output) == []


@pytest.mark.parametrize("decoder", ["fpn", "deformable"])
def test_modules_run_and_gradients_come_in_an_order_that_no_batch_changes(decoder: str) -> None:
    """ZeRO-3 gathers weights as modules run, ZeRO-2 adds up gradients as they come: ranks with other tasks agree."""
    made = model(pixel_decoder=decoder).train()
    ran: list[str] = []
    came: list[str] = []
    for name, module in made.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: came.append(name))
    orders = {}
    for kind, given in kinds().items():
        ran.clear()
        came.clear()
        made.zero_grad()
        total(made(given)).backward()
        orders[kind] = [*ran], [*came]
    assert len(orders["categories"][1]) == sum(p.requires_grad for p in made.parameters())
    assert [kind for kind in orders if orders[kind][0] != orders["categories"][0]] == []
    assert [kind for kind in orders if orders[kind][1] != orders["categories"][1]] == []


def test_what_nothing_reads_is_frozen() -> None:
    frozen = {n for n, p in model().named_parameters() if not p.requires_grad}
    assert {n.split(".")[1] for n in frozen if n.startswith("segmentor")} == {"sam"}
    assert all(".neck." in n for n in frozen if n.startswith("segmentor"))
    assert {n.split(".")[1] for n in frozen if n.startswith("siglip")} == {"encoder", "post_layernorm", "head"}


def test_stage_1_and_stage_2_train_all_they_have() -> None:
    first = model(parts=("segmentor",), head="labels", num_labels=4, pixel_classifier=True).train()
    output = first(batch([[], []], [(0, -1, []), (1, -1, [])], images=2))
    assert output.class_logits.shape == (4, 2, 5, 5) and output.pixel_logits.shape == (2, 5, 8, 8)
    assert without_gradient(first, output) == []
    second = model(parts=("sam", "siglip", "llm")).train()
    assert without_gradient(second, second(batch([TALK]))) == []


@torch.no_grad()
def test_queries_of_one_image_together_equal_one_by_one() -> None:
    made, whole = model().eval(), kinds()["phrases"]
    together = made(whole)
    for query in range(3):
        one = made(alone(whole, query))
        torch.testing.assert_close(together.mask_logits[:, query], one.mask_logits[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.class_logits[:, query], one.class_logits[:, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_sample_in_a_padded_batch_equals_the_sample_alone() -> None:
    made = model().eval()
    mixed = batch([CATEGORIES, TWO_TURNS], [(0, 0, [0, 1]), (1, 1, [2])])
    one = batch([CATEGORIES], [(0, 0, [0, 1])])
    one = dataclasses.replace(one, llm_pixels=mixed.llm_pixels[:1], mask_pixels=mixed.mask_pixels[:1])
    both, single = made(mixed), made(one)
    torch.testing.assert_close(both.mask_logits[:, 0], single.mask_logits[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.class_logits[:, 0], single.class_logits[:, 0], rtol=1e-4, atol=1e-4)
    count = len(single.lm_labels)
    torch.testing.assert_close(both.lm_logits[:count], single.lm_logits, rtol=1e-4, atol=1e-5)
    assert both.lm_labels[:count].tolist() == single.lm_labels.tolist() == [30, 61, 2]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_texts_padded_behind_need_no_mask(kernel: str) -> None:
    made, totals = model().llm, torch.tensor([9, 4, 1])
    made.set_attn_implementation(kernel)
    mask = torch.arange(9) < totals[:, None]
    rows = torch.randn(3, 9, made.config.hidden_size, generator=torch.Generator().manual_seed(0))
    found = []
    for given in (None, mask):
        leaf = rows.clone().requires_grad_()
        states = llm.hidden_states(made, leaf, mask=given)[mask]
        (gradient,) = torch.autograd.grad(states.square().sum(), leaf)
        found.append((states, gradient))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert not found[0][1][~mask].any(), "nothing looks at what stands behind"


@torch.no_grad()
def test_padded_concepts_never_win_and_change_nothing() -> None:
    made, plain = model().eval(), kinds()["categories"]
    padded = dataclasses.replace(plain, query_concepts=torch.tensor([[0, 1, -1, -1]]))
    narrow, wide = made(plain).class_logits, made(padded).class_logits
    torch.testing.assert_close(wide[..., [0, 1, 4]], narrow)
    assert (wide[..., 2:4] == -1e9).all()


@torch.no_grad()
def test_the_seg_token_and_the_phrase_decide() -> None:
    made, first = model().eval(), kinds()["categories"]
    other = batch([[*CATEGORIES[:3], 40, *CATEGORIES[4:]]], [(0, 0, [0, 1])])
    assert not torch.allclose(made(first).mask_logits, made(other).mask_logits)
    swapped = dataclasses.replace(first, query_concepts=torch.tensor([[1, 0]]))
    torch.testing.assert_close(made(first).class_logits[..., [1, 0, 2]], made(swapped).class_logits)


@torch.no_grad()
def test_a_share_of_the_seg_vectors_scales_them_alone() -> None:
    made, given = model().eval(), kinds()["categories"]
    layout, hidden = made.read(given, made.encode_images(given.llm_pixels, given.mask_pixels))
    whole, concepts, _ = made.vectors(given, layout, hidden)
    made.seg_share = 0.25
    part, same, _ = made.vectors(given, layout, hidden)
    assert whole.abs().min() > 0
    torch.testing.assert_close(part, whole / 4)
    assert torch.equal(concepts, same)


@torch.no_grad()
def test_a_region_prompt_says_which_region() -> None:
    made, plain = model().eval(), kinds()["regions"]
    moved = dataclasses.replace(plain, prompt_mask=plain.prompt_mask.flip(1))
    assert not torch.allclose(made(plain).class_logits, made(moved).class_logits)


@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_bfloat16_works_and_gives_float32_logits(mode: str) -> None:
    made, one = model(pixel_decoder="deformable").train(), kinds()["phrases"]
    made = made.to(torch.bfloat16) if mode == "weights" else made
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        output = made(one)
    assert output.mask_logits.dtype == output.class_logits.dtype == torch.float32
    exact = model(pixel_decoder="deformable").train()(one)
    near = (output.class_logits - exact.class_logits)[0].abs().max() / exact.class_logits[0].abs().max()
    assert near < 0.1
    assert without_gradient(made, output) == []


def test_gradient_checkpointing_changes_no_gradient() -> None:
    one = kinds()["categories"]
    gradients = []
    for checkpointing in (False, True):
        made = model().train()
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": False})
            assert (
                made.segmentor.sam.layers[0].gradient_checkpointing
                and made.siglip.encoder.layers[0].gradient_checkpointing
            )
        total(made(one)).backward()
        gradients.append({n: p.grad for n, p in made.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("language", ["phi3", "llama", "qwen3"])
def test_any_causal_language_model(language: str) -> None:
    made = model(language=language).train()
    output = made(kinds()["phrases"])
    assert output.mask_logits.shape == (4, 3, 5, 8, 8) and without_gradient(made, output) == []


def test_text_without_a_language_model_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="no language part"):
        model(parts=("segmentor",))(kinds()["categories"])


def test_wrong_sizes_name_their_key() -> None:
    with pytest.raises(UserError, match=r"num_querys.*did you mean 'num_queries'"):
        model(num_querys=3)
    with pytest.raises(UserError, match=r"pixel_decoder = 'fpm'"):
        model(pixel_decoder="fpm")


def order(made: Batch) -> list[int]:
    return made.image_slot[:, 2].tolist()


@torch.no_grad()
def test_shared_images_are_encoded_once_and_read_by_all() -> None:
    made, shared = model().eval(), kinds()["same picture twice"]
    assert order(shared) == [0, 0] and len(shared.mask_pixels) == 1
    pixels = {k: getattr(shared, k).expand(2, -1, -1, -1) for k in ("llm_pixels", "mask_pixels")}
    slots = torch.cat((shared.image_slot[:, :2], torch.tensor([[0], [1]])), 1)
    twice = dataclasses.replace(shared, image_slot=slots, query_image=torch.tensor([1]), **pixels)
    torch.testing.assert_close(made(shared).mask_logits, made(twice).mask_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made(shared).lm_logits, made(twice).lm_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoder", ["fpn", "deformable"])
@torch.no_grad()
def test_encoder_and_decoder_compile_into_one_graph(decoder: str) -> None:
    made, whole = model(pixel_decoder=decoder).eval(), kinds()["phrases"]
    groups = Groups(whole.query_image * 2 + whole.query_slot, 2, 2)
    seg = torch.randn(3, 32)

    def decode(pixels: Tensor, seg: Tensor) -> tuple[Tensor, Tensor]:
        maps = made.segmentor.maps(made.segmentor.sam(pixels, made.segmentor.layers))
        return made.segmentor.mask_decoder(*maps, seg, groups)

    compiled = torch.compile(decode, backend="eager", fullgraph=True)
    for ours, plain in zip(compiled(whole.mask_pixels, seg), decode(whole.mask_pixels, seg), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_a_region_of_several_rows_stands_where_its_sentinel_does() -> None:
    made, batch = model().eval(), kinds()["regions"]
    made.config.region_rows = 4
    with torch.no_grad():
        features = made.encode_images(batch.llm_pixels, batch.mask_pixels)
        layout, rows = made.embed(batch, features)
        assert features.cells is not None
        prompts = sample_regions(features.cells, batch.prompt_image, batch.prompt_mask, rows=4)
        for (sample, position), own in zip(batch.region_position.tolist(), prompts, strict=True):
            first = int(layout.start[sample, position])
            assert torch.equal(rows[sample, first : first + 4], own)
            assert int(layout.start[sample, position + 1]) == first + 4
        assert not torch.equal(prompts[0, 0], prompts[0, 3])
        one = sample_regions(features.cells, batch.prompt_image, batch.prompt_mask)
        assert (one[:, 0] >= prompts.amax(1)).all(), "a maximum is above every mean"
    with pytest.raises(UserError, match=r"region_rows = 3: .*256 points"):
        XSegConfig(region_rows=3)


@pytest.mark.parametrize("clamp", [500.0, 50.0])
def test_class_logits_are_clamped_where_the_profile_says(clamp: float) -> None:
    made = model(logit_clamp=clamp).eval()
    with torch.no_grad():
        made.segmentor.class_head.logit_scale.fill_(8.0)  # exp(8) = 2981
        logits = made(kinds()["categories"]).class_logits
    assert logits.abs().max() == clamp
