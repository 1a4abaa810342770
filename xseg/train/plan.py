"""``xseg plan``: the memory and time of a stage, and how to launch it, before there is a machine or a weight.

Weights, gradients and optimiser state are counted from shapes; activations and FLOPs are those of a step that is
walked without values (``trace``). On accelerators bfloat16 weights with float32 masters under DeepSpeed ZeRO are meant.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from xseg.config import DataRecipe, load_recipe
from xseg.data.loader import MicroBatches
from xseg.data.mixture import Plan, repeat_factors
from xseg.errors import UserError
from xseg.geometry.views import ViewSizes
from xseg.losses.criterion import Criterion
from xseg.models import adapters
from xseg.models.build import build_config
from xseg.models.configuration import XSegConfig
from xseg.models.xseg import XSegModel
from xseg.train import assemble, launch, muon, optim, slim, trace
from xseg.train.stage import Stage
from xseg.train.typical import typical_batch
from xseg.types import Batch

RESERVED = 0.08
"""Share of an accelerator's memory that contexts, communication and fragments take."""
BUCKET = 5e8
"""Values that DeepSpeed reduces, or gathers ahead (ZeRO-3), at once, at its defaults."""
FOUR_BITS = 0.52
"""Bytes of an NF4 value with its share of the statistics (QLoRA, section 3)."""
HEAP = 1.3
"""Resident over live bytes of what comes and goes in a step on a CPU, whose allocator keeps freed blocks between those
in use: 1.2 to 1.45 where it was measured (bench/plan_memory.py)."""
LOOKED = 8
"""Batches of the run that are looked at for the largest one of every data set."""
LABELS = 133
"""Labels of a linear head whose data set is not at hand: COCO panoptic's."""


@dataclass(frozen=True)
class Asked:
    """The machine."""

    gpus: int
    """0 = one process on this machine's CPU."""
    memory: float
    """Bytes of each accelerator, or of this machine."""
    flops: float
    """FLOP/s that one accelerator sustains."""


@dataclass(frozen=True)
class Setting:
    """How a stage is launched."""

    zero: int
    """ZeRO stage; 0 = without DeepSpeed."""
    batch_size: int
    accumulate: int
    checkpointing: bool


@dataclass(frozen=True)
class Need:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    program: float = 0.0
    """What the process holds without a model (CPU only)."""

    @property
    def total(self) -> float:
        """All of it at the worst moment."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.program


@dataclass(frozen=True)
class Prediction:
    """The plan of a stage."""

    parameters: int
    trained: int
    basis: str
    """What kind of batch was walked."""
    given: Setting
    need: Need
    """Of the stage as its recipe says, under ZeRO-2 on accelerators."""
    chosen: Setting | None
    """The cheapest setting that fits; None where nothing does, and on a CPU."""
    chosen_need: Need | None
    flops: float
    """Of one sample, forward and backward, as ``chosen``, or else ``given``, computes it."""
    samples: int | None
    """Samples of the whole stage; None where a data set says no ``count`` and is not at hand."""
    hours: float | None
    """All ranks together busy; None on a CPU and where ``samples`` is."""


@dataclass(frozen=True)
class _Walked:
    """Costs at a batch of 1 and of 2, by checkpointing; what lies between and beyond goes straight."""

    one: trace.Cost
    two: trace.Cost

    def activations(self, batch_size: int) -> float:
        """Bytes of a micro-batch."""
        # The two were other samples where the data are at hand: a smaller pair says nothing of a third one.
        more = max(0, self.two.activations - self.one.activations)
        return self.one.activations + (batch_size - 1) * more

    @property
    def flops(self) -> float:
        """Of one sample."""
        return self.two.flops / 2


class Subject:
    """A stage's model without weights, and batches for it."""

    def __init__(self, stage: Stage, on_cpu: bool) -> None:
        """Raises UserError for what is wrong in the stage; data that cannot be read are replaced by typical ones."""
        self.stage, self.on_cpu = stage, on_cpu
        self.data, self.basis = _data(stage)
        self.program = resident()
        self.config = assemble.configuration(stage, self.data) if self.data else _sizes(stage)
        self.model = assemble.skeleton(self.config, stage.recipe.adapters)
        optim.select(self.model, stage.recipe.trainable)
        adapters.check_learns(self.model, stage.recipe.adapters or {})
        self.parameters = sum(p.numel() for p in self.model.parameters())
        learnt = {n: p.numel() for n, p in self.model.named_parameters() if p.requires_grad}
        self.trained = sum(learnt.values())
        hidden = muon.matrices(self.model) if stage.recipe.muon else set()
        self.moments = sum(size * (1 if name in hidden else 2) for name, size in learnt.items())
        """Values that the optimiser keeps: AdamW two of each parameter that learns, Muon one."""
        self.precision = launch.choose_precision(stage.recipe) if on_cpu else "bf16"
        self.mode = trace.fake(self.model, torch.bfloat16 if self.precision == "bf16" else torch.float32)
        is_thing = self.data.categories.is_thing if self.data and self.data.categories else (True,) * LABELS
        self.criterion = Criterion(stage.recipe.loss, is_thing, trace.in_order)
        self._walked: dict[bool, _Walked] = {}

    def batches(self, size: int) -> Iterator[Batch]:
        """The largest of the first micro-batches of ``size`` of every data set, or a typical one."""
        if self.data is None:
            yield typical_batch(self.config, _views(self.config), size)
            return
        recipe = self.stage.recipe
        lengths = [len(d) for d in self.data.datasets]
        plan = Plan(lengths, self.data.factors, size, seed=recipe.seed, alike=self.data.alike)
        found: dict[int, list[Batch]] = {}
        micros = MicroBatches(self.data.datasets, plan, 0)
        for step in range(min(LOOKED * len(self.data.datasets), plan.steps_per_epoch)):
            batch = micros[step, 0]
            if isinstance(batch, UserError):
                raise batch
            found.setdefault(plan.batch(step)[0][0][0].dataset, []).append(batch)
        for several in found.values():
            yield max(several, key=lambda b: (len(b.query_image), len(b.target_masks), b.input_ids.numel()))

    def walked(self, checkpointing: bool) -> _Walked:
        """The costs by batch size; every kind is walked once."""
        if checkpointing not in self._walked:
            self._walked[checkpointing] = _Walked(*(self.walk(size, checkpointing) for size in (1, 2)))
        return self._walked[checkpointing]

    def walk(self, size: int, checkpointing: bool) -> trace.Cost:
        """The worst memory over data sets, and their mean FLOPs, of a micro-batch."""
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        autocast = self.precision == "autocast"
        costs = [
            trace.walk(self.mode, self.model, self.criterion, batch, on_cpu=self.on_cpu, autocast=autocast)
            for batch in self.batches(size)
        ]
        return trace.Cost(
            max(c.activations for c in costs), max(c.together for c in costs), sum(c.flops for c in costs) // len(costs)
        )


def need_of(stage: Stage, asked: Asked, zero: int) -> Need:
    """What one rank of a stage needs, launched as its recipe says under this ZeRO stage (0 on a CPU).

    Raises UserError for what is wrong in its recipes.
    """
    subject, given = Subject(stage, on_cpu=asked.gpus == 0), _as_given(stage, zero)
    if asked.gpus:
        return on_gpus(subject, given, asked)
    return on_cpu(subject, subject.walk(given.batch_size, given.checkpointing), given.accumulate)


def predict(stage: Stage, asked: Asked) -> Prediction:
    """Walk a stage and say what it needs on a machine. Raises UserError for what is wrong in its recipes."""
    optim.check(stage.recipe.muon, True, asked.gpus)
    subject, given = Subject(stage, on_cpu=asked.gpus == 0), _as_given(stage, 2 if asked.gpus else 0)
    if not asked.gpus:
        cost = subject.walk(given.batch_size, given.checkpointing)
        need = on_cpu(subject, cost, given.accumulate)
        return _prediction(subject, given, need, (None, None), cost.flops / given.batch_size, None)
    need = on_gpus(subject, given, asked)
    chosen = choose(subject, given, asked)
    flops = subject.walked((chosen[0] or given).checkpointing).flops
    return _prediction(subject, given, need, chosen, flops, asked)


def _as_given(stage: Stage, zero: int) -> Setting:
    recipe = stage.recipe
    return Setting(zero, recipe.batch_size, recipe.accumulate, recipe.gradient_checkpointing)


def _prediction(
    subject: Subject,
    given: Setting,
    need: Need,
    chosen: tuple[Setting | None, Need | None],
    flops: float,
    asked: Asked | None,
) -> Prediction:
    samples = total_samples(subject.stage, subject.data, max(1, asked.gpus) if asked else 1)
    hours = None
    if asked is not None and samples is not None:
        hours = flops * samples / (asked.gpus * asked.flops) / 3600
    counts = subject.parameters, subject.trained
    return Prediction(*counts, subject.basis, given, need, *chosen, flops, samples, hours)


def on_cpu(subject: Subject, cost: trace.Cost, accumulate: int) -> Need:
    """Bytes of one process without DeepSpeed: float32 weights, gradients and moments."""
    gradients = 4.0 * subject.trained
    # Gradients come in while activations go; where micro-batches add up, those of the first are there all along.
    together = cost.together if accumulate == 1 else cost.activations + gradients
    most = max(HEAP * together, gradients)
    return Need(4.0 * subject.parameters, gradients, 4.0 * subject.moments, most - gradients, subject.program)


def on_gpus(subject: Subject, setting: Setting, asked: Asked) -> Need:
    """Bytes of one rank under DeepSpeed (ZeRO, Rajbhandari et al. 2020, section 3), or of a whole copy without it."""
    learnt, all_of_it, ranks = subject.trained, subject.parameters, asked.gpus
    shards = ranks if setting.zero else 1
    coarse = _four_bits(subject.model, subject.stage)
    weights = 2.0 * (all_of_it - coarse) + FOUR_BITS * coarse
    gradients = 2.0 * learnt / (ranks if setting.zero > 1 else 1)
    bucket = 2.0 * min(learnt if setting.zero < 3 else all_of_it, BUCKET) * (ranks > 1)
    if setting.zero == 3:
        weights /= ranks
    # At the step, when no activation is left, the gradients of a rank's part are cast to float32.
    activations = max(
        subject.walked(setting.checkpointing).activations(setting.batch_size) + bucket, 4.0 * learnt / shards
    )
    return Need(weights, gradients, 4.0 * (learnt + subject.moments) / shards, activations)


def _four_bits(model: XSegModel, stage: Stage) -> int:
    """Values of the layers that ``quantize`` stores in 4 bits."""
    coarse = {part for part, adapter in (stage.recipe.adapters or {}).items() if adapter.quantize}
    prefixes = tuple("segmentor.sam." if part == "sam" else f"{part}." for part in coarse)
    wrapped = (".base_layer.weight",)
    return sum(
        p.numel()
        for n, p in model.named_parameters()
        if prefixes and n.startswith(prefixes) and n.endswith(wrapped) and ".token_adapter." not in n
    )


def choose(subject: Subject, given: Setting, asked: Asked) -> tuple[Setting | None, Need | None]:
    """The first setting that fits: without checkpointing before with, low ZeRO stages before high, large micro-batches.

    A rank's samples per step stay those of the recipe, so that the run stays the same.
    """
    samples = given.batch_size * given.accumulate
    sizes = [size for size in range(samples, 0, -1) if samples % size == 0]
    for checkpointing in (False, True):
        for zero in (1, 2, 3) if slim.splits(subject.stage.recipe.adapters) else (1, 2):
            for size in sizes:
                setting = Setting(zero, size, samples // size, checkpointing)
                need = on_gpus(subject, setting, asked)
                if need.total <= asked.memory * (1 - RESERVED):
                    return setting, need
    return None, None


def total_samples(stage: Stage, data: assemble.Data | None, ranks: int) -> int | None:
    """Samples of the whole stage, or None where a data set's length is not known."""
    recipe = stage.recipe
    if recipe.steps:
        return recipe.steps * recipe.batch_size * recipe.accumulate * ranks
    if data is not None:
        lengths: Sequence[int | None] = [len(d) for d in data.datasets]
    else:
        recipes = [load_recipe(DataRecipe, e.recipe, beside=stage.folder) for e in stage.mixture.datasets]
        lengths = [r.count if e.limit is None else e.limit for r, e in zip(recipes, stage.mixture.datasets)]
    if any(n is None for n in lengths):
        return None
    known = [n for n in lengths if n is not None]
    factors = repeat_factors(known, stage.mixture.balance)
    repeats = [f * e.repeat for f, e in zip(factors, stage.mixture.datasets, strict=True)]
    return round(recipe.epochs * sum(int(f * n) for f, n in zip(repeats, known, strict=True)))


def _data(stage: Stage) -> tuple[assemble.Data | None, str]:
    """The stage's data and what the plan rests on."""
    try:
        return assemble.load_data(stage), "the largest of the run's first batches"
    except UserError as error:
        reason = str(error).splitlines()[0]
        return None, f"a typical batch, because the stage's own cannot be read ({reason})"


def _sizes(stage: Stage) -> XSegConfig:
    return build_config(stage.model, stage.recipe.parts, stage.recipe.head, LABELS)


def _views(config: XSegConfig) -> ViewSizes:
    sam, siglip = config.sam_config, config.siglip_config
    return ViewSizes(sam.image_size if sam else 0, siglip.image_size if siglip else 0)


def resident() -> float:
    """Bytes of this process that lie in memory now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
