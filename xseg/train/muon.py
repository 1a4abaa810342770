"""Muon for the matrices of hidden layers, linear and convolutional, and AdamW for the rest, as one optimizer.

PyTorch's and DeepSpeed's Muon take no convolutions, where a small segmentor learns most: stage 1 of ShapeWorld had a PQ
of 57 after 360 steps with the linear layers alone, 71 with the convolutions, and 56 with AdamW (one run each).
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = 3.4445, -4.7750, 2.0315
ROUNDS = 5
"""Newton-Schulz iteration: its polynomial, and how often it is applied (Jordan et al., 2024)."""
MOMENTUM = 0.95
ADAM_SIZE = 0.2
"""Root mean square of AdamW's steps over its rate, which Muon's are given too (Liu et al., 2025): rates carry over."""

OUTPUTS = ("class_head.predictor", "pixel_classifier")
"""Modules that give out classes."""


def matrices(model: nn.Module) -> set[str]:
    """Names of the weights that lead from hidden states to hidden states: no embeddings, words or classes."""
    llm = getattr(model, "llm", None)
    outputs = {id(llm.get_output_embeddings())} if llm is not None else set()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and id(module) not in outputs and not name.endswith(OUTPUTS)
    }


def orthogonal(matrix: Tensor) -> Tensor:
    """(n, r, c) -> the same shape, singular values near 1 (0.7 to 1.2), computed in bfloat16."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    turned = x.shape[1] > x.shape[2]
    x = (x.mT if turned else x).contiguous()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        # sums within the products: fewer passes over memory, and half of the rounding of sums beside them
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if turned else x).to(matrix.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Groups with "shapes" (those of their parameters, in order) get Muon, with steps as large as AdamW's.

    A parameter may be a group's parameters laid end to end, with padding behind them, as ZeRO has it on one process.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        # It steps over the groups and the state of this optimizer; a tensor of its own it must have.
        self.adamw = torch.optim.AdamW([nn.Parameter(torch.empty(0))], betas=betas, fused=True)
        super().__init__(groups, self.adamw.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Do one step; ``closure`` is not supported."""
        assert closure is None
        self.adamw.param_groups = [group for group in self.param_groups if "shapes" not in group]
        self.adamw.state = self.state
        self.adamw.step()
        for group in self.param_groups:
            if "shapes" in group:
                self._muon(group)

    def _muon(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            update = parameter.grad.lerp(state["momentum"], MOMENTUM)
            shapes = group["shapes"] if parameter.ndim == 1 else [parameter.shape]
            for old, new in zip(_pieces(parameter, shapes), _pieces(update, shapes), strict=True):
                alike[old.shape[0], old.shape[1]].append((old, new))
        for shape, pairs in alike.items():
            steps = orthogonal(torch.stack([new for _, new in pairs]))
            for (old, _), step in zip(pairs, steps, strict=True):
                old.sub_(step, alpha=group["lr"] * ADAM_SIZE * math.sqrt(max(shape)))


def _pieces(flat: Tensor, shapes: list[Any]) -> list[Tensor]:
    """Views of ``flat`` as matrices (rows, all else); what lies behind the last one is padding."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = flat.view(-1)[: sum(sizes)].split(sizes)
    return [part.view(shape[0], -1) for part, shape in zip(parts, shapes, strict=True)]
