"""What one training step costs, found by walking it without values: bytes that live at once, and FLOPs.

The model, its pictures and all that comes of them are fake tensors (shapes only, no memory); ids and positions are
real, because the shapes of a batch depend on them. Every operation of forward, criterion and backward is seen, so the
peak is that of the program as it is, not of a formula.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from xseg.losses.criterion import Criterion
from xseg.losses.targets import Targets
from xseg.models.xseg import XSegModel
from xseg.train.meter import Flops, attention_flops
from xseg.types import Batch


@dataclasses.dataclass(frozen=True)
class Cost:
    """One micro-batch, forward and backward."""

    activations: int
    """Most bytes that live at once, the batch among them, without weights and their gradients."""
    together: int
    """Likewise with the gradients as they come in: none are there at first."""
    flops: int
    """2 for a multiply and add; what is computed twice counts twice."""


class Ledger(Flops):
    """Counts the bytes of all storages that are made while it is active, and the FLOPs."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        """``known``: tensors that were there before; what lies in their memory is not counted."""
        super().__init__()
        self.sizes = {t.untyped_storage()._cdata: 0 for t in known}
        self.live = self.kept = self.activations = self.together = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, then enter what it gave."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.enter(tensor)
        return out

    def enter(self, tensor: Tensor) -> None:
        """Count a storage from now until nobody holds it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._leave, key)
        self.live += self.sizes[key]
        self.together = max(self.together, self.live)
        self.activations = max(self.activations, self.live - self.kept)

    def _leave(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def keep(self, parameter: Tensor) -> None:
        """Count a gradient that has come in as one."""
        if parameter.grad is not None:
            self.kept += parameter.grad.untyped_storage().nbytes()


class _Attention(torch.autograd.Function):
    """Shapes of fused attention: the scores are never written, only a sum of each row is."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given = ctx.saved_tensors[:4]
        return tuple(
            torch.empty_like(t) if wanted else None for t, wanted in zip(given, ctx.needs_input_grad, strict=True)
        )


@contextlib.contextmanager
def fused_attention(ledger: Ledger, on_cpu: bool) -> Iterator[None]:
    """Attention as the kernels of an accelerator do it, or a CPU's, which write the scores where a mask learns.

    The function itself is replaced, because what is computed again in backward must meet the same one.
    """
    real = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Any:
        if on_cpu and attn_mask is not None and attn_mask.requires_grad:
            return real(query, key, value, attn_mask, **more)
        if on_cpu and torch.is_autocast_enabled("cpu"):
            query, key, value = (t.float() for t in (query, key, value))  # `attend_in_float32`
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # The function makes an addend of it, whatever kernel follows.
            attn_mask = query.new_empty(attn_mask.shape)
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        ledger.total += attention_flops(query, key, value) * (3 if learns else 1)
        return _Attention.apply(query, key, value, attn_mask)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


def in_order(costs: Sequence[Tensor], ranges: Sequence[tuple[int, int]], targets: Targets) -> np.ndarray:
    """Pairs (L, 2, R) where no cost has a value: the first target with the first object query, and so on."""
    layers, queries = costs[0].shape[0], costs[0].shape[2]
    counts = [min(queries, n) for n in targets.counts]
    query = np.concatenate([np.arange(n) for n in counts])
    row = np.concatenate([start + np.arange(n) for start, n in zip(targets.starts, counts, strict=True)])
    return np.repeat(np.stack([query, row])[None], layers, 0)


def fake(model: XSegModel, dtype: torch.dtype) -> FakeTensorMode:
    """Make the tensors of a model on ``meta`` fake ones of a device, in place; floats become ``dtype``."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}

    def of(old: Tensor) -> Any:
        # Tied weights stay tied.
        if id(old) not in made:
            with mode:
                new = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype)
                made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        return made[id(old)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: of(tensor) for name, tensor in held.items() if tensor is not None})  # type: ignore[attr-defined]
    model.train()
    return mode


def walk(
    mode: FakeTensorMode, model: XSegModel, criterion: Criterion, batch: Batch, *, on_cpu: bool, autocast: bool
) -> Cost:
    """Do one micro-batch of a fake model and say what it cost; ``criterion`` solves ``in_order``."""
    batch = _fake(mode, batch)
    fields = [v for v in vars(batch).values() if isinstance(v, Tensor)]
    ledger = Ledger([*model.parameters(), *model.buffers(), *fields])
    ledger.live = sum(t.untyped_storage().nbytes() for t in fields)

    def draw(kind: str, layer: int, item: int, shape: tuple[int, ...]) -> Tensor:
        with mode:
            return torch.empty(shape)

    with _gradients(model, ledger), fused_attention(ledger, on_cpu), ledger:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(batch)
        losses = criterion(output, batch, draw=draw)
        losses.total.backward()
    return Cost(ledger.activations, ledger.together, ledger.total)


@contextlib.contextmanager
def _gradients(model: XSegModel, ledger: Ledger) -> Iterator[None]:
    hooks = [p.register_post_accumulate_grad_hook(ledger.keep) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)


def _fake(mode: FakeTensorMode, batch: Batch) -> Batch:
    """Pictures and masks lose their values; ids and positions keep them."""

    def empty(value: Tensor) -> Tensor:
        with mode:
            return torch.empty(value.shape, dtype=value.dtype)

    large: dict[str, Any] = {
        f.name: empty(value)
        for f in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, f.name), Tensor) and value.dtype in (torch.float32, torch.uint8)
    }
    return dataclasses.replace(batch, **large)
