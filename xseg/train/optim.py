"""Which parameters learn, how fast, and how the learning rate moves: regex groups, AdamW or Muon, a schedule without
state."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xseg.config import LrGroup, Schedule, StageRecipe
from xseg.errors import UserError, did_you_mean
from xseg.train.muon import MuonAdamW, matrices

WARMUP_START = 1e-5
"""Factor at step 0 of a warm-up (X-SAM's training, as in mmengine's linear warm-up)."""


@dataclass(frozen=True)
class Selection:
    """The parameters one ``trainable`` entry got."""

    group: LrGroup
    names: tuple[str, ...]
    size: int
    """Number of values."""


def select(model: torch.nn.Module, groups: Sequence[LrGroup]) -> list[Selection]:
    """Give every parameter to the first entry whose ``match`` fits the begin of its name, and freeze the rest.

    Parameters that the model itself froze, because nothing reads them, are given to no entry. Raises UserError for an
    entry that matches no parameter, or only parameters that earlier entries took.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    taken: dict[str, int] = {}
    for number, group in enumerate(groups):
        matched = [name for name in parameters if re.match(group.match, name)]
        if not matched:
            parts = {name.rsplit(".", 1)[0] for name in parameters}
            heads = {".".join(part.split(".")[:n]) for part in parts for n in (1, 2)}
            raise UserError(
                f"trainable: match: {group.match!r} matches no parameter of this stage's model (a regex, fitted from "
                f"the begin of the name){did_you_mean(group.match.replace(chr(92), ''), heads)}"
            )
        fresh = [name for name in matched if name not in taken]
        if not fresh:
            raise UserError(
                f"trainable: match: {group.match!r} gets no parameter: entries above it took all {len(matched)}; the "
                "first match wins, so put narrow entries first"
            )
        taken |= dict.fromkeys(fresh, number)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in taken)
    chosen = [tuple(n for n, number in taken.items() if number == k) for k in range(len(groups))]
    return [
        Selection(group, names, sum(parameters[n].numel() for n in names))
        for group, names in zip(groups, chosen, strict=True)
    ]


def table(model: torch.nn.Module, selections: Sequence[Selection]) -> str:
    """Return the table of what learns and what is frozen, for the log."""
    trained = sum(s.size for s in selections)
    total = sum(p.numel() for p in model.parameters())
    rows = [(s.group.match, f"{s.group.lr:g}", f"{s.group.weight_decay:g}", len(s.names), s.size) for s in selections]
    width = max(len("parameters matching"), *(len(row[0]) for row in rows))
    lines = [f"{'parameters matching':{width}}  {'lr':>8}  {'decay':>6}  {'tensors':>7}  {'values':>13}"]
    lines += [f"{match:{width}}  {lr:>8}  {decay:>6}  {n:>7}  {size:>13,}" for match, lr, decay, n, size in rows]
    lines.append(f"{'frozen':{width}}  {'':>8}  {'':>6}  {'':>7}  {total - trained:>13,}")
    return "\n".join(lines)


def check(muon: float, split: bool, processes: int) -> None:
    """Raise UserError where ``muon`` is asked for and a launch leaves no whole matrices: ``split`` over processes."""
    if muon and split and processes > 1:
        raise UserError(
            f"muon = {muon:g} on {processes} processes under ZeRO or FSDP2: each has parts of matrices, and Muon needs "
            f"whole ones; launch one, or torchrun --nproc-per-node {processes} -m xseg.train (DDP), or write muon: 0"
        )


def build(model: torch.nn.Module, selections: Sequence[Selection], recipe: StageRecipe) -> torch.optim.Optimizer:
    """Build AdamW (decoupled weight decay, eps 1e-8) over the selected parameters; ``muon`` takes the matrices."""
    parameters = dict(model.named_parameters())
    hidden = matrices(model) if recipe.muon else set()
    groups: list[dict[str, Any]] = []
    for selection in selections:
        entry, chosen = selection.group, selection.names
        fast = [parameters[n] for n in chosen if n in hidden]
        rest = [parameters[n] for n in chosen if n not in hidden]
        vectors = [p for p in rest if p.ndim < 2 and not entry.decay_vectors]
        kept = [p for p in rest if p.ndim >= 2 or entry.decay_vectors]
        for members, decay in ((kept, entry.weight_decay), (vectors, 0.0)):
            if members:
                groups.append({"params": members, "lr": entry.lr, "weight_decay": decay})
        if fast:
            rate, shapes = entry.lr * recipe.muon, [tuple(p.shape) for p in fast]
            groups.append({"params": fast, "lr": rate, "weight_decay": entry.weight_decay, "shapes": shapes})
    if recipe.muon:
        return MuonAdamW(groups, recipe.betas)
    # One kernel for all tensors of a group: on CPU a third of the time of the loop over tensors.
    return torch.optim.AdamW(groups, betas=recipe.betas, fused=True)


def factor(step: int, total: int, schedule: Schedule) -> float:
    """Return the factor on every learning rate at optimiser step ``step`` (0-based) of ``total``."""
    warm = schedule.warmup * total
    if step < warm:
        return WARMUP_START + (1 - WARMUP_START) * step / warm
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "step":
        return schedule.gamma ** sum(step >= milestone * total for milestone in schedule.milestones)
    done = (step - warm) / max(total - warm, 1)
    return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def seg_share(step: int, total: int, warmup: float) -> float:
    """Return the factor on ``<SEG>`` vectors in optimiser step ``step`` (0-based) of ``total``; the last has 1."""
    return min(1.0, (step + 1) / max(warmup * total, 1.0))


def set_rates(optimizer: torch.optim.Optimizer, base: Sequence[float], step_factor: float) -> None:
    """Set ``lr`` of every group; ``base`` holds the groups' own rates in order."""
    for group, rate in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = rate * step_factor
