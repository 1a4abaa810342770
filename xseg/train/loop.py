"""The training loop: one function from a stage to ``out/final``, with every step of it in plain sight."""

import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from xseg.data.loader import keys, loader
from xseg.data.mixture import Plan
from xseg.errors import RunError
from xseg.losses.criterion import Criterion
from xseg.losses.points import generator
from xseg.models import adapters
from xseg.train import assemble, consolidate, launch, optim, slim, state, tracking
from xseg.train.export import export
from xseg.train.log import Console
from xseg.train.meter import Meter, whole
from xseg.train.stage import Stage
from xseg.train.stop import Stop, Stopped
from xseg.train.trouble import Skipped, check_gradients, told
from xseg.train.watch import HeldOut, held_out
from xseg.train.watchdog import Watchdog, contents
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
    rates: Sequence[float]
    """Learning rate of every parameter group, before the schedule's factor; a checkpoint holds them with it."""
    seed: int
    clip: float
    precision: launch.Precision
    num_queries: int
    """Object queries N of the decoder; 0 without one."""
    watchdog: Watchdog
    skipped: Skipped
    """Steps whose loss or gradient was no finite number."""
    meter: Meter

    def step(self, step: int, micros: Sequence[Batch]) -> dict[str, float]:
        """Do optimiser step ``step`` (0-based) on this rank's micro-batches; return figures of the global batch.

        Everything random depends on (seed, step, rank, micro-batch) alone, so a resumed run draws the same. Where the
        loss or the gradient is no finite number no weight changes; ``skipped`` says whether the run goes on.
        """
        acc, rank = self.acc, self.acc.process_index
        self.watchdog.at("counts with the other ranks")
        held = [contents(batch) for batch in micros]
        micros = [batch.to(acc.device) for batch in micros]
        totals, finite = self._totals(micros), []
        sums = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=acc.device)
        norm = 0.0
        torch.manual_seed(int(generator("cpu", self.seed, step, rank).initial_seed()))
        for number, batch in enumerate(micros):
            self.watchdog.begin(number, held[number])
            draw = generator(acc.device, self.seed, step, rank, number)
            # FSDP2 cuts the gradients of every micro-batch: kept whole, they would fill the memory it saves.
            with acc.accumulate(*(() if acc.is_fsdp2 else (self.model,))):
                with torch.autocast(acc.device.type, torch.bfloat16, enabled=self.precision == "autocast"):
                    output = self.model(batch)
                losses = self.criterion(output, batch, totals=totals[:-2], draw=draw)
                # The frameworks average over ranks and micro-batches; the criterion's shares are to be added.
                acc.backward(losses.total * (acc.num_processes * len(micros)))
                check_gradients(self.watchdog, step, batch)
                if acc.sync_gradients:
                    norm = self._update()
            sums += _sums(losses.terms, losses.total.detach())
            finite.append(losses.total.isfinite())
        self.watchdog.at("adds up the losses with the other ranks")
        loss, *values = acc.reduce(sums, "sum").tolist()
        figures = {"loss": loss, **{name: value for name, value in zip(TERMS, values, strict=True) if value}}
        figures |= {"grad_norm": norm, "tokens": totals[-2].item(), "images": totals[-1].item()}
        self.skipped.check(step, figures, micros, [bool(ok) for ok in finite])
        return figures | ({"skipped": self.skipped.count} if self.skipped.count else {})

    def _totals(self, micros: Sequence[Batch]) -> torch.Tensor:
        """Counts of the global batch: those of the criterion, then text tokens and images. One all-reduce a step."""
        counts = sum(self.criterion.totals(batch, self.num_queries) for batch in micros)
        assert isinstance(counts, torch.Tensor)
        seen = counts.new_tensor(
            [sum(int(b.attention_mask.sum()) for b in micros), sum(len(b.geometry) for b in micros)]
        )
        return self.acc.reduce(torch.cat([counts, seen]), "sum")

    def _update(self) -> float:
        """Clip, step and clear; DeepSpeed did all of it in ``backward``. Returns the gradient norm before clipping.

        A norm that is not finite leaves the weights as they are, here as in DeepSpeed.
        """
        if self.acc.distributed_type == DistributedType.DEEPSPEED:
            return float(self.model.get_global_grad_norm() or 0.0)
        norm = whole(self.acc.clip_grad_norm_(self.model.parameters(), self.clip))
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


def _sums(terms: Mapping[str, torch.Tensor], total: torch.Tensor) -> torch.Tensor:
    values = {name: total.new_zeros(()) for name in TERMS}
    for name, value in terms.items():
        key = name if name in TERMS else "aux"
        values[key] = values[key] + value
    return torch.stack([total, *(values[name] for name in TERMS)]).double()


def train(stage: Stage, resume: str = "none") -> None:
    """Train a stage from its recipe to ``out/final``.

    ``resume``: "none"; "auto" = go on from the newest whole checkpoint; or a folder that ``consolidate`` wrote, from
    which the run starts while it has no checkpoint of its own. Raises UserError for everything the user can mend; files
    and recipes are checked before the model is built. Raises RunError when a process, a sample or the arithmetic ends
    the run, and Stopped after SIGTERM or SIGINT.
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
    slim.check(launch.split_by(acc), recipe.adapters)
    optim.check(recipe.muon, acc.is_fsdp2 or launch.uses_deepspeed(), acc.num_processes)
    watched = held_out(stage, skeleton, data.processor, launch.split_by(acc))
    plan = assemble.plan(stage, data, acc.num_processes)
    begin = 0
    if resume not in ("auto", "none"):
        begin = consolidate.begin(stage, Path(resume), acc.num_processes)
        stage = replace(stage, recipe=recipe.model_copy(update={"init_from": [resume]}))
    model, reports = assemble.build(stage, config)
    selections = optim.select(model, recipe.trainable)
    if recipe.adapters:
        slim.register(acc, model)
    acc.print(optim.table(model, selections), *reports, f"precision {precision}", sep="\n", flush=True)
    launch.shard(acc, model, precision)
    optimizer = optim.build(model, selections, recipe)
    rates = [group["lr"] for group in optimizer.param_groups]
    queries, skipped = assemble.num_queries(config), Skipped(recipe.skip_nonfinite, partial(acc.print, flush=True))
    meter = Meter(acc.device)
    meter.listen(model, optimizer)
    tracking.start(acc, stage)
    with Watchdog(stage.out, acc.process_index, acc.num_processes, recipe.stall) as watchdog, told(watchdog):
        watchdog.listen(model)
        model, optimizer = launch.prepare(acc, model.train(), optimizer)
        numbers = recipe.seed, recipe.clip, precision, queries
        trainer = Trainer(acc, model, optimizer, criterion, rates, *numbers, watchdog, skipped, meter)
        start = go_on(trainer, stage, begin) if resume != "none" else 0
        run(trainer, stage, plan, data, start, watched)
        with watchdog.slow("exports the model"):
            export(acc, model, stage, data.processor, reports)
    launch.finish(acc)


def run(trainer: Trainer, stage: Stage, plan: Plan, data: assemble.Data, start: int, watched: HeldOut | None) -> None:
    """Do the steps after ``start``, with what happens between them: rate, log, save, and a look at held-out images.

    Raises Stopped, the state saved, when any rank got SIGTERM or SIGINT.
    """
    recipe, acc, names, watchdog = stage.recipe, trainer.acc, assemble.names(stage), trainer.watchdog
    steps = recipe.steps or max(1, round(recipe.epochs * plan.steps_per_epoch))
    saved = start
    batches = loader(data.datasets, plan, acc.process_index, start, steps, recipe.num_workers)
    sources = list(zip(names, assemble.tasks(stage), strict=True))
    console = Console(stage.out, sources, start, steps, acc.is_main_process, acc.log)
    bare = acc.unwrap_model(trainer.model)
    bare.seg_share = optim.seg_share(start - 1, steps, recipe.seg_warmup)  # as the last step left it
    if watched and start and watched.due(start, steps):
        look(trainer, watched, console, start)  # the checkpoint was written, the look may have been cut short
    with Stop(acc.is_main_process) as stop, closing(batches):
        for step in range(start, steps):
            clock, planned = time.monotonic(), plan.batch(step)
            own, source = [item for micro in planned[acc.process_index] for item in micro], planned[0][0][0].dataset
            watchdog.step(step + 1, names[own[0].dataset], partial(keys, data.datasets, own))
            try:
                micros = next(batches)
            except RunError:
                if not stop.asked:  # else the signal went to all processes, and the data workers ended of it
                    raise
            waited = time.monotonic() - clock
            if not launch.together(acc, step, planned, stop.asked):
                if step > saved:
                    save(trainer, stage, step)
                raise Stopped(stop.asked or signal.SIGTERM)
            factor = optim.factor(step, steps, recipe.schedule)
            optim.set_rates(trainer.optimizer, trainer.rates, factor)
            bare.seg_share = optim.seg_share(step, steps, recipe.seg_warmup)
            with trainer.meter.counting(source):
                figures = {"lr": factor * max(trainer.rates), "data_s": waited} | trainer.step(step, micros)
            last, seconds = step + 1 == steps, time.monotonic() - clock
            figures |= trainer.meter.figures(source, seconds, figures["grad_norm"])
            due = watched is not None and watched.due(step + 1, steps)
            watchdog.done(seconds)
            console.log(step + 1, figures, source, seconds, write=last or due or (step + 1) % recipe.log_every == 0)
            if last or (step + 1) % recipe.save_every == 0:
                saved = save(trainer, stage, step + 1)
            if watched and due:
                look(trainer, watched, console, step + 1)
    console.progress.close()


def go_on(trainer: Trainer, stage: Stage, begin: int) -> int:
    """Take up the newest whole checkpoint; return its step, ``begin`` without one."""
    found = state.newest(trainer.acc, stage.out)
    if found is None:
        if begin:
            given = stage.recipe.init_from[0]
            trainer.acc.print(f"goes on after step {begin} with the weights of {given}, a new optimiser", flush=True)
        return begin
    written = state.restore(trainer.acc, found, stage.resolved())
    trainer.skipped.count = written["skipped"]
    trainer.acc.print(f"resumed from {found}", flush=True)
    return int(written["step"])


def save(trainer: Trainer, stage: Stage, step: int) -> int:
    """Write the checkpoint of the weights after ``step``; return ``step``."""
    with trainer.watchdog.slow("saves"):
        keep = stage.recipe.keep_checkpoints
        state.save(trainer.acc, stage.out, step, stage.resolved(), keep, trainer.skipped.count)
    return step


def look(trainer: Trainer, watched: HeldOut, console: Console, step: int) -> None:
    """Record the held-out figures of the weights after ``step``, unless they stand there; rank 0 works, all wait."""
    with trainer.watchdog.slow("looks at held-out images"):
        if trainer.acc.is_main_process and not console.looked(step):
            with console.paused():
                figures = watched.figures(trainer.acc.unwrap_model(trainer.model))
            console.held_out(step, figures)
        trainer.acc.wait_for_everyone()
