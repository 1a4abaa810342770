"""The training loop: one function from a stage to ``out/final``, with every step of it in plain sight."""

import errno
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from xseg.data.loader import loader
from xseg.data.mixture import Plan
from xseg.errors import UserError
from xseg.losses.criterion import Criterion
from xseg.losses.points import generator
from xseg.models import adapters
from xseg.train import assemble, launch, optim, slim, state, tracking
from xseg.train.export import export
from xseg.train.log import Console
from xseg.train.meter import Meter
from xseg.train.stage import Stage
from xseg.train.watch import HeldOut, held_out
from xseg.types import Batch

TERMS = ("lm", "class", "mask", "dice", "pixel_class", "aux")
"""Loss terms of metrics.jsonl; "aux" is the sum over the earlier predictions of the decoder."""


@dataclass(frozen=True)
class Trainer:
    """What a step needs, after accelerate has prepared it."""

    acc: Accelerator
    model: Any
    optimizer: Any
    criterion: Criterion
    seed: int
    clip: float
    precision: launch.Precision
    num_queries: int
    """Object queries N of the decoder; 0 without one."""
    meter: Meter

    def step(self, step: int, micros: Sequence[Batch]) -> dict[str, float]:
        """Do optimiser step ``step`` (0-based) on this rank's micro-batches; return figures of the global batch.

        Everything random depends on (seed, step, rank, micro-batch) alone, so a resumed run draws the same.
        """
        acc, rank = self.acc, self.acc.process_index
        micros = [batch.to(acc.device) for batch in micros]
        totals = self._totals(micros)
        sums = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=acc.device)
        norm = 0.0
        torch.manual_seed(int(generator("cpu", self.seed, step, rank).initial_seed()))
        for number, batch in enumerate(micros):
            draw = generator(acc.device, self.seed, step, rank, number)
            with acc.accumulate(self.model):
                with torch.autocast(acc.device.type, torch.bfloat16, enabled=self.precision == "autocast"):
                    output = self.model(batch)
                losses = self.criterion(output, batch, totals=totals[:-2], draw=draw)
                # The frameworks average over ranks and micro-batches; the criterion's shares are to be added.
                acc.backward(losses.total * (acc.num_processes * len(micros)))
                if acc.sync_gradients:
                    norm = self._update()
            sums += _sums(losses.terms, losses.total.detach())
        figures = acc.reduce(sums, "sum").tolist()
        terms = {name: value for name, value in zip(TERMS, figures[1:], strict=True) if value}
        if not math.isfinite(figures[0]):
            keys = ", ".join(key for batch in micros for key in batch.keys)
            raise FloatingPointError(f"step {step + 1}: loss is {figures[0]}; samples of this rank: {keys}")
        return {
            "loss": figures[0],
            **terms,
            "grad_norm": norm,
            "tokens": totals[-2].item(),
            "images": totals[-1].item(),
        }

    def _totals(self, micros: Sequence[Batch]) -> torch.Tensor:
        """Counts of the global batch: those of the criterion, then text tokens and images. One all-reduce a step."""
        counts = sum(self.criterion.totals(batch, self.num_queries) for batch in micros)
        assert isinstance(counts, torch.Tensor)
        seen = counts.new_tensor(
            [sum(int(b.attention_mask.sum()) for b in micros), sum(len(b.geometry) for b in micros)]
        )
        return self.acc.reduce(torch.cat([counts, seen]), "sum")

    def _update(self) -> float:
        """Clip, step and clear; DeepSpeed did all of it in ``backward``. Returns the gradient norm before clipping."""
        if self.acc.distributed_type == DistributedType.DEEPSPEED:
            return float(self.model.get_global_grad_norm() or 0.0)
        norm = self.acc.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


def _sums(terms: Mapping[str, torch.Tensor], total: torch.Tensor) -> torch.Tensor:
    values = {name: total.new_zeros(()) for name in TERMS}
    for name, value in terms.items():
        key = name if name in TERMS else "aux"
        values[key] = values[key] + value
    return torch.stack([total, *(values[name] for name in TERMS)]).double()


def train(stage: Stage, resume: bool) -> None:
    """Train a stage from its recipe to ``out/final``.

    Raises UserError for everything the user can mend; files and recipes are checked before the model is built.
    """
    recipe = stage.recipe
    tracking.check(recipe.track)
    data = assemble.load_data(stage)
    criterion = assemble.criterion(stage, data)
    config = assemble.configuration(stage, data)
    skeleton = assemble.skeleton(config, recipe.adapters)
    optim.select(skeleton, recipe.trainable)
    adapters.check(skeleton, recipe.adapters or {})
    precision = launch.choose_precision(recipe)
    acc = launch.accelerator(recipe, precision)
    slim.check(state.layout(acc)["zero"], recipe.adapters)
    watched = held_out(stage, skeleton, data.processor, state.layout(acc)["zero"])
    plan = assemble.plan(stage, data, acc.num_processes)
    model, reports = assemble.build(stage, config)
    selections = optim.select(model, recipe.trainable)
    if recipe.adapters:
        slim.register(acc, model)
    acc.print(optim.table(model, selections), *reports, f"precision {precision}", sep="\n", flush=True)
    optimizer = optim.adamw(model, selections, recipe.betas)
    meter = Meter(acc.device)
    meter.listen(model, optimizer)
    model, optimizer = acc.prepare(model.train(), optimizer)
    num_queries = assemble.num_queries(config)
    trainer = Trainer(acc, model, optimizer, criterion, recipe.seed, recipe.clip, precision, num_queries, meter)
    tracking.start(acc, stage)
    with own_trouble(acc.process_index):
        run(trainer, stage, plan, data, resume, watched)
        export(acc, model, stage, data.processor, reports)
    launch.finish(acc)


def run(trainer: Trainer, stage: Stage, plan: Plan, data: assemble.Data, resume: bool, watched: HeldOut | None) -> None:
    """Do the steps that are left, with what happens between them: rate, log, save, and a look at held-out images."""
    recipe, acc, out = stage.recipe, trainer.acc, stage.out
    steps = recipe.steps or max(1, round(recipe.epochs * plan.steps_per_epoch))
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    start, resolved = 0, stage.resolved()
    found = state.newest(acc, out) if resume else None
    if found is not None:
        start = state.restore(acc, found, resolved)
        acc.print(f"resumed from {found}", flush=True)
    batches = loader(data.datasets, plan, acc.process_index, start, steps, recipe.num_workers)
    sources = list(zip(assemble.names(stage), assemble.tasks(stage), strict=True))
    console = Console(out, sources, start, steps, acc.is_main_process, acc.log)
    if watched and start and watched.due(start, steps):
        look(trainer, watched, console, start)  # the checkpoint was written, the look may have been cut short
    for step in range(start, steps):
        clock = time.monotonic()
        micros = next(batches)
        waited = time.monotonic() - clock
        factor = optim.factor(step, steps, recipe.schedule)
        optim.set_rates(trainer.optimizer, rates, factor)
        last, source = step + 1 == steps, plan.batch(step)[0][0][0].dataset
        with trainer.meter.counting(source):
            figures = {"lr": factor * max(rates), "data_s": waited} | trainer.step(step, micros)
        due = watched is not None and watched.due(step + 1, steps)
        seconds = time.monotonic() - clock
        figures |= trainer.meter.figures(source, seconds, figures["grad_norm"])
        console.log(step + 1, figures, source, seconds, write=last or due or (step + 1) % recipe.log_every == 0)
        if last or (step + 1) % recipe.save_every == 0:
            state.save(acc, out, step + 1, resolved, recipe.keep_checkpoints)
        if watched and due:
            look(trainer, watched, console, step + 1)
    console.progress.close()


def look(trainer: Trainer, watched: HeldOut, console: Console, step: int) -> None:
    """Record the held-out figures of the weights after ``step``, unless they stand there; rank 0 works, all wait."""
    if trainer.acc.is_main_process and not console.looked(step):
        with console.paused():
            figures = watched.figures(trainer.acc.unwrap_model(trainer.model))
        console.held_out(step, figures)
    trainer.acc.wait_for_everyone()


@contextmanager
def own_trouble(rank: int) -> Iterator[None]:
    """Mark errors that one rank may meet alone, so that this rank tells them."""
    try:
        yield
    except UserError as error:
        error.add_note(f"on rank {rank}")
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        full = UserError(f"{error.filename or 'the run folder'}: disk full; free some space, then --resume auto")
        full.add_note(f"on rank {rank}")
        raise full from error
