"""What bfloat16 autocast does on CPU, where it is not what it should be."""

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library


@cache
def attend_in_float32() -> library.Library:
    """From now on autocast on CPU runs attention in float32; the products around it stay in bfloat16.

    Backward of the fused kernel takes 8 times as long in bfloat16 at 36 rows, 1.7 times at 200 (bench/attention.py).
    """
    kernels = library.Library("aten", "IMPL")  # lives as long as the cache
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*other operators may also be overridden")
        kernels.impl("scaled_dot_product_attention", _attention, "AutocastCPU", allow_override=True)
    return kernels


def _attention(*given: Any, **more: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        wide = {name: _float32(value) for name, value in more.items()}
        return F.scaled_dot_product_attention(*map(_float32, given), **wide)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
