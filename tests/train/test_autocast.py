"""Attention under bfloat16 autocast on CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from xseg.train.autocast import attend_in_float32

SHAPE = (2, 4, 36, 32)


def heads(seed: int) -> Tensor:
    """Rows as a bfloat16 product gives them."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=g).bfloat16().requires_grad_()


def test_attention_is_that_of_float32() -> None:
    """Values and gradients are those of the same numbers in float32, not of bfloat16's sums."""
    attend_in_float32()
    open_cells = torch.ones(36, 36, dtype=torch.bool).tril()
    q, k, v = heads(0), heads(1), heads(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=open_cells, scale=0.3)
    out.square().sum().backward()
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, attn_mask=open_cells, scale=0.3)
    expected.square().sum().backward()
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    for got, want in zip((q, k, v), wide, strict=True):
        assert got.grad is not None
        assert want.grad is not None
        assert torch.equal(got.grad, want.grad.bfloat16())


def test_an_additive_mask_is_widened_too() -> None:
    """SAM adds its relative positions, which a bfloat16 product made, to the scores; they learn."""
    attend_in_float32()
    q, places = heads(0), torch.randn(36, 36).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(q, q, q, places)
    out.sum().backward()
    assert out.dtype == torch.float32
    assert places.grad is not None
    assert places.grad.abs().sum() > 0


def test_products_stay_in_bfloat16() -> None:
    """Only attention is changed, and nothing outside of autocast."""
    attend_in_float32()
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
    q = heads(0)
    assert F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
