"""``xseg doctor``: what would stop a run or spoil it in silence, found before the run. Nothing is written."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from packaging.requirements import Requirement
from torch import Tensor

from xseg.errors import UserError
from xseg.infer.processing import XSegProcessor
from xseg.models import adapters, pixel_decoder
from xseg.models.build import build_config, location
from xseg.models.checkpoint import check_vocabulary, read_config
from xseg.models.xseg import XSegModel
from xseg.paths import find
from xseg.train import assemble, optim, plan
from xseg.train.stage import Stage, check_fsdp, read_stage

T = TypeVar("T")
TOLERANCE = 1e-4
LAUNCH = "train_stages/accelerate"
GIGABYTE = 1e9


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    fault: str = ""
    """What is wrong, why and how to mend it; empty = nothing is."""


def examine(stage: str | None, overrides: Sequence[str] = (), launch: str | None = None) -> Iterator[Finding]:
    """Check the installation, then a stage recipe and a launch file, where they are named; one finding a check.

    A check whose ground another one has found missing is left out.
    """
    yield _tried("libraries", libraries)[0]
    yield _tried("deformable attention", deformable_attention)[0]
    processes, zero = 1, 0
    if launch is not None:
        finding, launched = _tried("launch", partial(launch_file, launch))
        yield finding
        processes, zero = launched or (1, 0)
    if stage is None:
        return
    finding, read = _tried("recipe", partial(read_stage, stage, overrides))
    yield finding
    if read is not None:
        yield from _stage(read, processes, zero)


def _tried(check: str, run: Callable[[], T]) -> tuple[Finding, T | None]:
    """The finding, and what the check returned where it found no fault."""
    try:
        return Finding(check), run()
    except UserError as error:
        return Finding(check, str(error)), None


def _stage(stage: Stage, processes: int, zero: int) -> Iterator[Finding]:
    finding, processor = _tried("tokenizer and chat template", partial(_processor, stage))
    yield finding
    parts, _ = _tried("pretrained parts", partial(pretrained, stage))
    yield parts
    if processor is None:
        return
    yield _tried("vocabulary", partial(vocabulary, stage, processor))[0]
    yield _tried("data", partial(assemble.load_data, stage))[0]
    if parts.fault:
        return
    finding, model = _tried("trainable", partial(selected, stage, processor, processes, zero))
    yield finding
    if model is not None:
        yield _tried("embeddings", partial(embeddings, stage, model))[0]
        yield _tried("memory", partial(fits, stage, processes, zero))[0]


def _processor(stage: Stage) -> XSegProcessor:
    return XSegProcessor.from_recipe(stage.model, stage.recipe.parts)


def libraries() -> None:
    """Raise UserError for libraries that are missing or out of the range that xseg is made for."""
    wrong = []
    for line in metadata.requires("xseg") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            there = "none"
        if there == "none" or not wanted.specifier.contains(there, prereleases=True):
            wrong.append(f"{wanted.name} {there} (needs {wanted.specifier})")
    if wrong:
        raise UserError(f"libraries out of range: {', '.join(wrong)}: pip install --constraint constraints.txt xseg")


def deformable_attention() -> None:
    """Raise UserError when the deformable sampling of this machine differs from its definition."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (2, 3)]
    value = torch.rand(2, 30, 2, 8, generator=generator)
    places = torch.rand(2, 5, 2, 2, 3, 2, generator=generator) * 1.4 - 0.2
    weights = torch.rand(2, 5, 2, 2, 3, generator=generator)
    given = (value.to(device), shapes, places.to(device), weights.to(device))
    found = pixel_decoder.multi_scale_deformable_attention(*given).cpu()
    wanted = by_definition(value, shapes, places, weights)
    off = ((found - wanted).abs().max() / wanted.abs().max()).item()
    if not off <= TOLERANCE:
        raise UserError(
            f"deformable attention on {device} is off by {off:.1e} of its maximum (at most {TOLERANCE:.0e}): masks "
            "would be wrong in silence; uninstall the `kernels` package, or update transformers and torch"
        )


def by_definition(value: Tensor, shapes: Sequence[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
    """Multi-scale deformable attention from four corners a point (Deformable DETR, section 4.1).

    ``value`` (I, cells, heads, d), ``places`` (I, n, heads, levels, points, 2) x, y in 0..1, ``weights`` without the
    last axis -> (I, n, heads * d). Outside of the map is zero.
    """
    images, _, heads, width = value.shape
    out = value.new_zeros(images, places.shape[1], heads, width)
    image, head = torch.arange(images)[:, None, None, None], torch.arange(heads)[:, None]
    for level, cells in enumerate(value.split([h * w for h, w in shapes], 1)):
        height, wide = shapes[level]
        x, y = (places[:, :, :, level] * places.new_tensor([wide, height]) - 0.5).unbind(-1)
        for down in (0, 1):
            for right in (0, 1):
                row, column = y.floor() + down, x.floor() + right
                share = (1 - (y - row).abs()) * (1 - (x - column).abs()) * weights[:, :, :, level]
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < wide)
                at = (row * wide + column).long().clamp(0, height * wide - 1)
                out += (cells[image, at, head] * (share * inside)[..., None]).sum(3)
    return out.flatten(2)


def pretrained(stage: Stage) -> None:
    """Raise UserError for pretrained parts that are not where the model recipe says."""
    built = {"sam": {"sam", "segmentor"}, "siglip": {"siglip"}, "llm": {"llm"}, "segmentor": {"segmentor"}}
    for part, needed_by in built.items():
        given: dict[str, Any] = getattr(stage.model, part)
        if "pretrained" in given and needed_by & set(stage.recipe.parts):
            location(given, part)


def vocabulary(stage: Stage, processor: XSegProcessor) -> None:
    """Raise UserError when an earlier stage's embedding has other rows than the tokenizer has words."""
    if processor.encoder is None:
        return
    for earlier in stage.recipe.init_from:
        folder = Path(earlier).expanduser()
        check_vocabulary(folder, read_config(folder), len(processor.encoder.tokenizer))


def selected(stage: Stage, processor: XSegProcessor, processes: int, zero: int) -> XSegModel:
    """The stage's model without memory for its weights, frozen as the stage says.

    UserError for a regex in vain, and for Muon where the launch parts matrices.
    """
    optim.check(stage.recipe.muon, zero > 0, processes)
    recipe, encoder = stage.recipe, processor.encoder
    special = encoder.special if encoder else None
    words = len(encoder.tokenizer) if encoder else None
    # The number of labels is the data's; one stands for any here.
    config = build_config(stage.model, recipe.parts, recipe.head, 1, words, special)
    model = assemble.skeleton(config, recipe.adapters)
    optim.select(model, recipe.trainable)
    adapters.check(model, recipe.adapters or {})
    return model


def embeddings(stage: Stage, model: XSegModel) -> None:
    """Raise UserError when ``<SEG>``, ``<p>`` and ``</p>`` would keep the vectors they started with."""
    reads_masks = hasattr(model, "llm_projector")
    learnt = [read_config(Path(p).expanduser()) for p in stage.recipe.init_from]
    if not reads_masks or any(c.text_config is not None and c.segmentor_config is not None for c in learnt):
        return
    if not model.llm.get_input_embeddings().weight.requires_grad:
        raise UserError(
            "embeddings: <SEG>, <p> and </p> are new words, and no entry of trainable matches the embedding, so they "
            r"would stay random: add {match: 'llm\.model\.embed_tokens', lr: 4.0e-5}"
        )


def fits(stage: Stage, processes: int, zero: int) -> None:
    """Raise UserError when the worst moment of a step exceeds the memory of a device (or of RAM).

    ``zero``: the ZeRO stage of the launch, 0 without DeepSpeed. The batch is the largest of the run's first ones.
    """
    there, on_gpu = memory(), torch.cuda.is_available()
    need = plan.need_of(stage, plan.Asked(processes if on_gpu else 0, there, 1.0), zero)
    # On a CPU all processes share the memory.
    together = 1 if on_gpu else processes
    if need.total * together > there:
        parts = {"weights": need.weights, "gradients": need.gradients, "optimizer": need.optimizer}
        listed = ", ".join(f"{name} {size / GIGABYTE:.1f}" for name, size in parts.items())
        raise UserError(
            f"memory: {together} process(es) a device need {need.total / GIGABYTE:.1f} GB each ({listed}, activations "
            f"{need.activations / GIGABYTE:.1f}), and there are {there / GIGABYTE:.1f} GB: `xseg plan` says which ZeRO "
            "stage, micro-batch and checkpointing would fit; or freeze more (trainable), or take a smaller model recipe"
        )


def memory() -> float:
    """Bytes of the first accelerator, or of this machine."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def launch_file(name: str) -> tuple[int, int]:
    """(processes, ZeRO stage: 0 without DeepSpeed). Raises UserError when it does not fit the machine."""
    path = find(name, LAUNCH)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf8"))
        count, machines = int(given["num_processes"]), int(given.get("num_machines", 1))
        kind = str(given["distributed_type"])
    except (yaml.YAMLError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a launch file of accelerate ({error!r}); take one of {LAUNCH}/") from error
    deepspeed = given.get("deepspeed_config", {}) if kind == "DEEPSPEED" else {}
    devices, here = torch.cuda.device_count(), max(1, count // machines)
    if devices and here > devices:
        raise UserError(f"{path}: num_processes = {count} on {machines} machine(s), but this one has {devices} devices")
    fsdp = kind == "FSDP"
    if fsdp:
        check_fsdp({key: str(value).lower() for key, value in given.get("fsdp_config", {}).items()})
    if not devices and count > 1 and not (deepspeed or fsdp):
        raise UserError(
            f"{path}: num_processes = {count} without an accelerator, DeepSpeed or FSDP: accelerate would start one "
            "process in silence; use cpu2.yaml"
        )
    world = os.environ.get("WORLD_SIZE")
    if world is not None and int(world) != count:
        raise UserError(f"{path}: num_processes = {count}, but WORLD_SIZE is {world}: each would train alone")
    if deepspeed.get("zero_stage") == 3 and not deepspeed.get("zero3_save_16bit_model"):
        raise UserError(f"{path}: ZeRO-3 without zero3_save_16bit_model: true cannot save `final`; add it")
    # FSDP2 keeps all but the language model's layers whole until backward has ended: nearest to ZeRO-2.
    zero = 2 if deepspeed or fsdp else 0
    return count, int(deepspeed.get("zero_stage", zero))
