"""What the three scripts share: a resumable training loop, its log, and the card it ends with."""

import argparse
import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from xseg.train.autocast import attend_in_float32

STATE, LOG = "state.pt", "metrics.jsonl"
EVERY = 50
"""Steps between two lines of the log."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast a part is trained."""

    steps: int
    lr: float
    seed: int
    warmup: int = 200
    weight_decay: float = 0.05
    muon: float = 0.0
    """Learning rate of Muon, for the matrices, as a multiple of ``lr``; 0 = AdamW for all. Muon's steps are scaled to
    the size of AdamW's; it needs about half as many of them here."""
    clip: float = 1.0
    average: float = 0.998
    """Decay of the moving average of the weights, which is what is kept; it takes a share of the first steps only."""
    save_every: int = 200
    check_every: int = 1000

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine down to a hundredth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        part = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))


class Batches(Dataset):
    """Batch k, a pure function of k, for a loader that may start anywhere."""

    def __init__(self, make: Callable[[int], Any], first: int, last: int) -> None:
        self.make, self.first, self.last = make, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, k: int) -> Any:
        return self.make(self.first + k)


def arguments(description: str) -> argparse.Namespace:
    """Read the command line that the three scripts have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for config.json, model.safetensors and the card"
    )
    parser.add_argument("--steps", type=int, help="fewer steps than planned, for a try")
    return parser.parse_args()


def processes() -> tuple[int, int]:
    """Return rank and number of processes; under torchrun each takes its share of every batch."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def train(
    model: nn.Module,
    plan: Plan,
    make: Callable[[int], Any],
    loss_of: Callable[[nn.Module, Any], dict[str, Tensor]],
    check: Callable[[nn.Module], dict[str, float]],
    work: Path,
) -> nn.Module:
    """Train, resuming from ``work`` where it holds an earlier state, and return the averaged model in eval mode.

    ``loss_of`` gives the terms of the loss, which are added; ``check`` gives held-out figures.
    """
    rank, world = processes()
    attend_in_float32()
    work.mkdir(parents=True, exist_ok=True)
    optimizers = _optimizers(model, plan)
    mean = {name: value.detach().clone() for name, value in model.state_dict().items()}
    first, seconds = _restore(work, model, optimizers, mean)
    loader = DataLoader(Batches(make, first, plan.steps), batch_size=None, num_workers=1, prefetch_factor=4)
    sums: dict[str, float] = {}
    clock = time.monotonic()
    for step, batch in enumerate(loader, first):
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = plan.rate(step) * (plan.muon if "momentum" in group else 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            terms = loss_of(model, batch)
        total = torch.stack(list(terms.values())).sum()
        model.zero_grad()
        total.backward()
        if world > 1:
            _share(model, world)
        nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        for optimizer in optimizers:
            optimizer.step()
        _average(mean, model, min(plan.average, (step + 1) / (step + 10)))
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        done = step + 1
        if rank:  # the first process writes and checks
            continue
        if done % EVERY == 0:
            spent = seconds + time.monotonic() - clock
            _log(work, {"step": done, "seconds": round(spent, 1), **{k: round(v / EVERY, 4) for k, v in sums.items()}})
            sums = {}
        if done % plan.check_every == 0 or done == plan.steps:
            paused = time.monotonic()
            figures = check(_averaged(model, mean))
            clock += time.monotonic() - paused
            spent = seconds + time.monotonic() - clock
            _log(work, {"step": done, "seconds": round(spent, 1), "held_out": figures})
        if done % plan.save_every == 0 or done == plan.steps:
            _keep(work, model, optimizers, mean, done, seconds + time.monotonic() - clock)
    return _averaged(model, mean)


def _optimizers(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """AdamW; with ``plan.muon`` the matrices of the blocks get Muon, with steps as large as AdamW's."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    muon = [p for n, p in named if plan.muon and p.ndim == 2 and "embed" not in n]
    taken = {id(p) for p in muon}
    matrices = [p for _, p in named if p.ndim > 1 and id(p) not in taken]
    vectors = [p for _, p in named if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.98))]
    if muon:
        decay = plan.weight_decay
        found.append(torch.optim.Muon(muon, lr=plan.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return found


def _share(model: nn.Module, world: int) -> None:
    """Replace the gradients by their means over all processes."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.div_(world).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _average(mean: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for name, value in model.state_dict().items():
            mean[name].lerp_(value, 1 - decay) if value.is_floating_point() else mean[name].copy_(value)


def _averaged(model: nn.Module, mean: dict[str, Tensor]) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.load_state_dict(mean)
    return twin.eval()


def _restore(work: Path, model: nn.Module, optimizers: list[Any], mean: dict[str, Tensor]) -> tuple[int, float]:
    path = work / STATE
    if not path.is_file():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    for name, value in state["mean"].items():
        mean[name].copy_(value)
    if processes()[0]:
        return int(state["step"]), 0.0
    lines = [json.loads(line) for line in (work / LOG).read_text(encoding="utf8").splitlines()]
    earlier = [line for line in lines if line["step"] <= state["step"]]
    (work / LOG).write_text("".join(json.dumps(line) + "\n" for line in earlier), encoding="utf8")
    return int(state["step"]), float(state["seconds"])


def _keep(
    work: Path, model: nn.Module, optimizers: list[Any], mean: dict[str, Tensor], step: int, seconds: float
) -> None:
    state = {
        "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "mean": mean,
        "step": step, "seconds": seconds,
    }  # fmt: skip
    torch.save(state, work / f"{STATE}.partial")
    os.replace(work / f"{STATE}.partial", work / STATE)


def _log(work: Path, row: dict[str, Any]) -> None:
    with (work / LOG).open("a", encoding="utf8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def save(out: Path, config: dict[str, Any], state: dict[str, Tensor], card: str, work: Path) -> None:
    """Write config.json, model.safetensors in bf16, the card and the log of the training into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    halves = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    save_file(halves, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf8")
    (out / "README.md").write_text(card, encoding="utf8")
    shutil.copyfile(work / LOG, out / LOG)


def card(text: str, plan: Plan, work: Path) -> str:
    """Return a card, with the number of steps put in and the held-out figures of the log as a Markdown table."""
    rows = [json.loads(line) for line in (work / LOG).read_text(encoding="utf8").splitlines()]
    rows = [row for row in rows if "held_out" in row]
    names = list(rows[-1]["held_out"])
    lines = ["| step | minutes | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    for row in rows:
        cells = [f"{row['held_out'][name]:.1f}" for name in names]
        lines.append(f"| {row['step']} | {row['seconds'] / 60:.1f} | " + " | ".join(cells) + " |")
    return text.replace("@STEPS", str(plan.steps)) + "\n".join(lines) + "\n"
