"""What a step did: FLOPs and the share of the accelerator's peak, memory, and the gradient's norm part by part."""

import resource
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from xseg.models import adapters, key_maps

PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16 FLOP/s by the makers' data sheets; MFU is told for these accelerators only."""
GIGABYTE, TERA = 1e9, 1e12


def attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of the two products of attention, (..., n, d) each; causal or not, every pair counts."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return attention_flops(query, key, value)


def _backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> int:
    # dV, dP, dQ and dK; that kernels make the scores anew is no work of the model's.
    return 2 * attention_flops(query, key, value)


aten = torch.ops.aten
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    aten._scaled_dot_product_flash_attention_backward: _backward,
    aten._scaled_dot_product_efficient_attention_backward: _backward,
    aten._scaled_dot_product_cudnn_attention_backward: _backward,
}
"""FLOPs of an operation from its arguments: the library's, and those of attention as MFU is commonly counted."""


class Flops(TorchDispatchMode):
    """Adds up the FLOPs of what runs while it is active (2 for a multiply and add), and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and add what its formula says of it."""
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


class Meter:
    """Figures of this rank's steps, for metrics.jsonl and trackers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((flops for part, flops in PEAKS.items() if part in name), None)
        self.flops: dict[int, int] = {}
        """Of a step by data set, counted on the first step of each."""
        self.norms: dict[str, float] = {}

    def listen(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the norms of every part at each update. Under DeepSpeed gradients lie elsewhere, and there are none."""
        named = [(adapters.plain(name), p) for name, p in model.named_parameters() if p.requires_grad]

        def take(*_: Any) -> None:
            self.norms = part_norms({name: p.grad for name, p in named if p.grad is not None})

        optimizer.register_step_pre_hook(take)

    @contextmanager
    def counting(self, source: int) -> Iterator[None]:
        """Count the step inside where it is the first one of its data set."""
        if source in self.flops:
            yield
            return
        with Flops() as counted:
            yield
        self.flops[source] = counted.total

    def figures(self, source: int, seconds: float, grad_norm: float) -> dict[str, Any]:
        """``tflops`` a second of this rank, ``mfu`` 0..1, ``memory_gb`` at the worst moment so far, norms by part.

        The norms are those before clipping, as ``grad_norm`` is; at an update gradients are clipped already.
        """
        speed = self.flops[source] / seconds
        out: dict[str, Any] = {"tflops": speed / TERA, "memory_gb": self.memory() / GIGABYTE}
        if self.peak is not None:
            out["mfu"] = speed / self.peak
        clipped = sum(norm**2 for norm in self.norms.values()) ** 0.5
        if clipped:
            out["grad_norms"] = {part: _short(norm * grad_norm / clipped) for part, norm in self.norms.items()}
        return out

    def memory(self) -> float:
        """Most bytes that lay on the accelerator, or in this process."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kilobytes * (1.0 if sys.platform == "darwin" else 1024.0)


def part_norms(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm over each part of a model: ``segmentor.sam``, ``llm``, ..."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, gradient in gradients.items():
        parts[key_maps.part_of(name)].append(gradient)
    return {part: float(whole(get_total_norm(tensors))) for part, tensors in parts.items()}


def whole(value: Tensor) -> Tensor:
    """The value of a norm of which every rank has its share (FSDP2); all ranks call it alike."""
    return value.full_tensor() if isinstance(value, DTensor) else value  # type: ignore[no-any-return]


def _short(value: float) -> float:
    return float(f"{value:.7g}")
