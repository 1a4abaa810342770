"""Muon: what gets it, what its steps are, and that they are the same where ZeRO lays the weights end to end."""

import copy
from pathlib import Path

import pytest
import torch
from small_models import save_model
from torch import Tensor, nn

from xseg.config import LrGroup, StageRecipe, load_recipe
from xseg.errors import UserError
from xseg.models import checkpoint
from xseg.train import optim
from xseg.train.muon import ADAM_SIZE, MOMENTUM, MuonAdamW, matrices, orthogonal

RECIPE = load_recipe(StageRecipe, "tiny/s1_segmentor", ["muon=4"])
RATE, DECAY = 1e-2, 0.1


def net() -> nn.Module:
    torch.manual_seed(0)
    out = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.Conv2d(24, 16, 1), nn.Flatten(), nn.Linear(16 * 9, 20), nn.Linear(20, 7)
    )
    out.append(nn.LayerNorm(7))
    return out


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def built(model: nn.Module) -> torch.optim.Optimizer:
    chosen = optim.select(model, [LrGroup(match=".*", lr=RATE, weight_decay=DECAY)])
    return optim.build(model, chosen, RECIPE)


@pytest.mark.parametrize("shape", [(3, 32, 96), (2, 40, 200), (2, 200, 40)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 7
    found = orthogonal(given)
    assert found.shape == given.shape and found.dtype == given.dtype
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.4
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    turned = (found * (left @ right)).sum((1, 2)) / found.norm(dim=(1, 2)) / (left @ right).norm(dim=(1, 2))
    assert turned.min() > 0.97, "the nearest orthogonal matrix, nearly"


def test_a_step_is_the_published_polynomials() -> None:
    given = torch.randn(2, 40, 200, generator=torch.Generator().manual_seed(1))
    x = given / given.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    # bfloat16 has eight bits: 0.3 % at each rounding of ten products
    assert (orthogonal(given) - x).norm() < 0.03 * x.norm()


def test_a_step_has_the_size_of_adamws_whatever_the_gradients() -> None:
    for loud in (1e-3, 1e3):
        weight = nn.Parameter(torch.zeros(32, 96))
        weight.grad = torch.randn(32, 96, generator=torch.Generator().manual_seed(2)) * loud
        MuonAdamW([{"params": [weight], "lr": RATE, "weight_decay": 0.0, "shapes": [(32, 96)]}], (0.9, 0.99)).step()
        assert weight.square().mean().sqrt().item() == pytest.approx(ADAM_SIZE * RATE, rel=0.25)
        assert (weight * weight.grad).sum() < 0


def test_decay_and_momentum_are_those_of_the_paper() -> None:
    start = torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    first, second = (torch.randn(32, 32, generator=torch.Generator().manual_seed(k)) for k in (4, 5))
    weight = nn.Parameter(start.clone())
    optimizer = MuonAdamW([{"params": [weight], "lr": RATE, "weight_decay": DECAY, "shapes": [(32, 32)]}], (0.9, 0.99))
    wanted, kept = start, torch.zeros(32, 32)
    for gradient in (first, second):
        weight.grad = gradient.clone()
        optimizer.step()
        kept = MOMENTUM * kept + (1 - MOMENTUM) * gradient
        ahead = MOMENTUM * kept + (1 - MOMENTUM) * gradient
        wanted = wanted * (1 - RATE * DECAY) - RATE * ADAM_SIZE * 32**0.5 * orthogonal(ahead[None])[0]
    assert torch.allclose(weight, wanted, atol=1e-6)


def test_all_else_gets_adamw() -> None:
    plain = net()
    kept = {name for name, _ in net().named_parameters()} - matrices(net())
    assert kept == {"0.bias", "1.bias", "3.bias", "4.bias", "5.weight", "5.bias"}
    both = copy.deepcopy(plain)
    gradients = {name: torch.randn_like(p) for name, p in plain.named_parameters()}
    for model, recipe in ((plain, RECIPE.model_copy(update={"muon": 0.0})), (both, RECIPE)):
        chosen = optim.select(model, [LrGroup(match=".*", lr=RATE, weight_decay=DECAY)])
        optimizer = optim.build(model, chosen, recipe)
        for _ in range(3):
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name].clone()
            optimizer.step()
    one, other = dict(plain.named_parameters()), dict(both.named_parameters())
    assert all(torch.equal(one[name], other[name]) == (name in kept) for name in one)


def test_weights_laid_end_to_end_take_the_same_steps() -> None:
    whole, flat = net(), net()
    optimizer, split = built(whole), built(flat)
    laid: list[tuple[nn.Parameter, list[Tensor]]] = []
    for group in split.param_groups:
        members = group["params"]
        padding = torch.zeros(5)
        row = nn.Parameter(torch.cat([*(p.detach().flatten() for p in members), padding]))
        group["params"] = [row]
        laid.append((row, members))
    for step in range(4):
        learn(whole, optimizer, 1, step)
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        flat.zero_grad()
        flat(x).square().sum().backward()
        for row, members in laid:
            row.grad = torch.cat([*(p.grad.flatten() for p in members), torch.zeros(5)])
        split.step()
        for row, members in laid:
            parts = row.detach()[:-5].split([p.numel() for p in members])
            for member, part in zip(members, parts, strict=True):
                member.data.copy_(part.view_as(member))
            assert not row.detach()[-5:].any()
    for one, other in zip(whole.parameters(), flat.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_state_goes_on_where_it_was() -> None:
    whole, cut = net(), net()
    optimizer = built(whole)
    learn(whole, optimizer, 6)
    first = built(cut)
    learn(cut, first, 3)
    second = built(cut)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    learn(cut, second, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_embeddings_words_and_classes_keep_adamw(tmp_path: Path) -> None:
    model = checkpoint.load(save_model(tmp_path, ("segmentor", "siglip", "llm"), "concepts"))
    named = {name: p.ndim for name, p in model.named_parameters()}
    found = matrices(model)
    assert found < set(named) and min(named[name] for name in found) == 2
    kept = {n for n, ndim in named.items() if ndim > 1 and n not in found and not n.startswith("siglip.head.")}
    words = ("embed", "rel_pos", "queries_features", "background", "lm_head")
    assert kept and not [name for name in kept if not any(word in name for word in words)]
    assert {"llm_projector.first.weight", "llm.model.layers.0.mlp.down_proj.weight"} < found
    labels = matrices(checkpoint.load(save_model(tmp_path / "labels", ("segmentor",), "labels")))
    assert not any("predictor" in name or "pixel_classifier" in name for name in labels)
    assert any("patch_embed" in name for name in labels) and any("mask_embedder" in name for name in labels)


def test_parts_of_matrices_are_refused() -> None:
    optim.check(4.0, split=True, processes=1)
    optim.check(4.0, split=False, processes=2)
    optim.check(0.0, split=True, processes=8)
    with pytest.raises(UserError, match=r"muon = 4 on 2 processes.*torchrun --nproc-per-node 2 .*muon: 0"):
        optim.check(4.0, split=True, processes=2)
