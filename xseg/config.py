"""Recipes: YAML -> pydantic models. Unknown keys are errors with a did-you-mean; ``base:`` makes a variant a diff.

A recipe is found by path, or by name under its folder: next to the working directory first, then the folders that
are shipped with xseg. Nothing in a recipe is evaluated or interpolated.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xseg.errors import UserError, did_you_mean
from xseg.paths import find

R = TypeVar("R", bound="Recipe")


class Recipe(BaseModel):
    """Base of all recipes: frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TaskSpec(BaseModel):
    """``task: refer_seg`` or ``task: {name: refer_seg, option: value}``; options are fields of that task's class."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    """Module under ``xseg.tasks``."""

    @property
    def options(self) -> dict[str, Any]:
        """The task's own options."""
        return dict(self.model_extra or {})


class DataRecipe(Recipe):
    """One data set: where it lies, which reader reads it, what it is used for."""

    source: str
    """Module under ``xseg.data.sources``."""
    options: dict[str, Any] = {}
    """Arguments of that module's ``Source``; path-like ones are relative to the data root."""
    task: TaskSpec
    split: str = "train"
    licence: str = ""
    download: str = ""
    """Where to get it, in words."""
    count: int | None = None
    """Expected number of samples; a different number is an error."""
    sha256: dict[str, str] = {}
    """Checksums of annotation files, by their paths in ``options``; another version is an error."""
    md5: dict[str, str] = {}
    """Likewise, where those who published the file give its MD5."""


class MixtureEntry(Recipe):
    """One data set in a mixture."""

    recipe: str
    task: TaskSpec | None = None
    """Replaces the recipe's own task."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first ``limit`` samples only."""
    repeat: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Multiplies the balance factor."""


class Mixture(Recipe):
    """Data sets that are trained on together."""

    datasets: list[MixtureEntry]
    balance: float | None = Field(default=0.1, ge=0, allow_inf_nan=False)
    """t of r = max(1, sqrt(t / f)) (X-SAM section 3.4); None = no resampling."""
    batches: Literal["source", "mixed"] = "source"
    """What stands together in the samples of a step: those of one data set (X-SAM), or any."""
    by_length: int = Field(default=0, ge=0)
    """Draws of this many global batches are sorted together by the length of their texts, so that micro-batches hold
    little padding and ranks have alike work (bench/padding.py): 50, say. 1 = every step keeps its samples, which helps
    steps of several micro-batches alone. 0 = as they were shuffled (X-SAM's stages 2 and 3)."""


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Part = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LrGroup(Recipe):
    """Parameters whose name matches ``match`` (regex, first group wins); the rest is frozen."""

    match: str
    lr: Weight
    weight_decay: Weight = 0.05
    decay_vectors: bool = True
    """False: biases, norms and other vectors of this group get no weight decay."""


class Schedule(Recipe):
    """Learning rate over the run, as a factor on every group's ``lr``."""

    kind: Literal["cosine", "step", "constant"] = "cosine"
    warmup: Part = 0.03
    """Part of all steps in which the factor rises linearly from 1e-5."""
    milestones: list[Part] = []
    """"step": parts of the run after which the factor is multiplied by ``gamma``."""
    gamma: Weight = 0.1
    floor: Part = 0.0
    """"cosine": final factor."""


class LossWeights(Recipe):
    """Weights and sampling of the criterion (X-SAM section 3.3; Mask2Former)."""

    lm: Weight = 1.0
    class_: Weight = Field(default=2.0, alias="class")
    match_class: Weight | None = None
    """Weight of the class in the matching alone; None = ``class``, as in X-SAM. Far above the masks' weights, the
    object query that is surest of a phrase learns its mask, whatever mask it has so far."""
    mask: Weight = 5.0
    dice: Weight = 5.0
    background: Weight = 0.1
    """Class weight of the background column in the cross-entropy."""
    points: Literal["sampled", "grid", "canvas"] = "sampled"
    """Where masks are compared: "sampled" = ``num_points`` points per mask (PointRend); "grid" = every pixel of the
    prediction grid, targets averaged down (cheap for small canvases); "canvas" = every pixel of the canvas,
    predictions upsampled."""
    num_points: int = Field(default=12544, ge=1)
    """"sampled": points per mask."""
    oversample: float = Field(default=3.0, ge=1)
    """"sampled": candidate points drawn per point used."""
    importance: float = Field(default=0.75, ge=0, le=1)
    """"sampled": part of the points taken from the least certain candidates; the rest is uniform."""
    pixel_class: Weight = 0.0
    """Weight of the dense class loss on mask features (not in X-SAM; needs ``segmentor.pixel_classifier``)."""
    pixel_thing: Weight = 1.0
    """Factor on thing pixels in the dense class loss."""


class Watch(Recipe):
    """Held-out figures during a stage: lines of metrics.jsonl, drawn by ``xseg report``. They never change a loss."""

    suite: str
    """Name or path of a suite (``eval/suites``); its rows that this stage's model can do are scored."""
    every: int = Field(default=100, ge=1)
    """Optimiser steps between two looks; the last step is always followed by one."""
    images: int = Field(default=64, ge=1)
    """Each row is scored on the samples of its first ``images`` images. Rank 0 scores while the others wait."""


class Adapter(Recipe):
    """LoRA beside the frozen weights of one part (Hu et al., 2021); ``nf4`` stores those in 4 bits (QLoRA, 2023)."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)  # over rank: the scale of what is added to a weight
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = "all-linear"  # or names, as q_proj; never the output layer
    quantize: Literal["nf4"] | None = None  # needs the extra ``qlora``


class StageRecipe(Recipe):
    """One training stage."""

    stage: str
    model: str
    """Name or path of a model recipe (``train_stages/models``)."""
    model_overrides: dict[str, Any] = {}
    """Merged over the model recipe, key by key."""
    parts: list[Literal["segmentor", "sam", "siglip", "llm"]]
    """What is built. "sam" = the SAM encoder alone; "segmentor" = SAM encoder, connector, decoders and head."""
    head: Literal["labels", "concepts"] = "concepts"
    """Class head: a linear layer over the data set's label list (stage 1) or concept embeddings."""
    init_from: list[str] = []
    """``final`` folders of earlier stages, overlaid in this order."""
    mixture: str | Mixture
    data_root: str = "data"
    out: str
    trainable: list[LrGroup] = Field(min_length=1)
    adapters: dict[Literal["llm", "siglip", "sam"], Adapter] | None = None  # there LoRA and rows of new words learn
    track: list[Literal["tensorboard", "wandb", "trackio"]] = []  # beside metrics.jsonl; each an extra
    steps: int | None = None
    """Optimiser steps; None = ``epochs`` over the resampled mixture."""
    epochs: float = Field(default=1.0, allow_inf_nan=False)
    batch_size: int = 4
    """Samples per rank and micro-batch."""
    accumulate: int = 1
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    muon: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Muon in place of AdamW for the matrices of hidden layers, at this multiple of their group's ``lr``. 0 = AdamW for
    all (X-SAM). It needs whole matrices: one process, or several without ZeRO and FSDP2."""
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Longest gradient of a step; longer ones are scaled down to it. None are with a large number (1e9)."""
    schedule: Schedule = Schedule()
    seg_warmup: Part = 0.0
    """Part of all steps in which ``<SEG>`` vectors grow linearly from nothing to their full length. They are added to
    object queries: at once, what the projector says before it has learnt anything spoils the masks of stage 1."""
    loss: LossWeights = LossWeights()
    jitter: tuple[Factor, Factor] | None = None
    """Large-scale jitter: factor range on the canvas side, then a centre crop (stage 1: 0.1 to 2.0)."""
    gradient_checkpointing: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """"auto": bf16 where the processor has instructions for it. The loss is always computed in fp32."""
    num_workers: int = Field(default=4, ge=0)
    seed: int = Field(default=1024, ge=0)
    log_every: int = 1
    save_every: int = 2000
    keep_checkpoints: int = 2
    skip_nonfinite: int = Field(default=0, ge=0)
    """Steps of a run whose loss or gradient may be no finite number: they change no weight, and their samples are told.
    One more ends the run. 0 = the first one does."""
    stall: float = Field(default=50.0, gt=0)
    """Seconds without progress after which a run is ended with a report of where each process stands; ten times the
    longest step so far, if that is longer."""
    watch: Watch | None = None
    """``{suite: shapes, every: 100, images: 64}``: figures on held-out images while the stage trains; None = none."""


class ModelRecipe(Recipe):
    """Sizes of a model; the dicts are the keyword arguments of the transformers configs of the parts."""

    sam: dict[str, Any]
    siglip: dict[str, Any] = {}
    llm: dict[str, Any] = {}
    """``{pretrained: DIR}`` or ``{model_type: phi3, hidden_size: …}`` (random weights)."""
    segmentor: dict[str, Any] = {}
    """Fields of ``SegmentorConfig``."""
    llm_sees: list[Literal["siglip", "sam"]] = ["siglip", "sam"]
    """Image encoders whose rows the language model reads; what it does not see may still feed the mask decoder."""
    llm_rows: Literal["concatenated", "interleaved"] = "concatenated"
    """Order of those rows: SigLIP's, then SAM's (X-SAM), or both of a square together."""
    llm_normed_rows: bool = False
    """Normalise those rows before their projectors; X-SAM does not."""
    region_encoder: Literal["sam", "siglip"] = "sam"
    """Image encoder whose rows a visual prompt is read from; X-SAM's is SAM."""
    region_rows: int = 1
    """Rows of a visual prompt: 1 = the maximum over its points (the paper), more = means of as many runs of them (64 on
    branch main)."""
    tokenizer: str = ""
    """Folder of a Hugging Face tokenizer, a name under ``train_stages/models`` or a path."""
    chat_template: str = "phi3"
    """Name under ``chat_templates`` or a path."""
    llm_view: Literal["squash", "pad_square"] = "squash"
    max_tokens: int = 2319
    """Longest text in ids, images not counted; longer conversations are cut on the right."""


class SuiteRow(Recipe):
    """One line of an evaluation suite."""

    recipe: str
    task: TaskSpec | None = None
    limit: int | None = Field(default=None, ge=1)
    headline: str = ""
    """The metric that stands for the row where there is room for one; "" = the first of its task."""
    published: dict[str, float] = {}
    """metric -> published value."""
    published_source: str = ""


class Suite(Recipe):
    """What ``xseg eval`` runs."""

    name: str
    rows: list[SuiteRow]


FOLDERS: dict[type[BaseModel], str] = {
    DataRecipe: "data_recipes",
    Mixture: "data_recipes/mixtures",
    StageRecipe: "train_stages",
    ModelRecipe: "train_stages/models",
    Suite: "eval/suites",
}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping and apply its ``base:`` chain (deep merge; lists are replaced).

    Raises UserError for a file that is no such mapping, and for a chain that comes back to one of its files.
    """
    return _with_bases(path, ())


def _with_bases(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """``above``: the files whose ``base:`` chain led here."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf8"))
    except (yaml.YAMLError, OSError, ValueError) as error:  # ValueError: not UTF-8, or a date of 31 February
        raise UserError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, this is a {type(data).__name__}")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise UserError(f"{path}: base: {base!r} must be the name of a file beside it; correct it or take it out")
    base_path, here = path.parent / base, path.resolve()
    if not base_path.exists():
        raise UserError(f"{path}: base: {base}: no such file (looked for {base_path})")
    if base_path.resolve() in (*above, here):
        raise UserError(f"{path}: base: {base}: leads back to itself; a chain of bases ends, take one of them out")
    return merge(_with_bases(base_path, (*above, here)), data)


def merge(base: dict[str, Any], diff: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``diff`` laid over it; mappings merge key by key, everything else is replaced."""
    out = dict(base)
    for key, value in diff.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def load_recipe(kind: type[R], name: str, overrides: Sequence[str] = (), beside: Path | None = None) -> R:
    """Find, read and check a recipe; ``overrides`` are ``key.sub=value`` strings whose values are YAML."""
    path = find(name, FOLDERS[kind], beside=beside)
    data = read_yaml(path)
    for item in overrides:
        data = merge(data, parse_override(item))
    return decode(kind, data, str(path))


def parse_override(item: str) -> dict[str, Any]:
    """``"a.b=3"`` -> ``{"a": {"b": 3}}``."""
    dotted, equals, value = item.partition("=")
    if not equals or not dotted:
        raise UserError(f"--set {item}: write key.sub=value, for example --set steps=100")
    try:
        out: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--set {item}: the value is no YAML ({reason}): mend it, or put it into a recipe") from error
    for part in reversed(dotted.split(".")):
        out = {part: out}
    return out  # type: ignore[no-any-return]


def decode(kind: type[R], data: dict[str, Any], where: str) -> R:
    """Check ``data`` against ``kind``; every fault is named with its place and the nearest known key."""
    try:
        return kind.model_validate(shorthand(kind, data))
    except ValidationError as error:
        lines = [_explain(kind, fault, where) for fault in error.errors()]
        raise UserError("\n".join(lines)) from error


def shorthand(kind: type[BaseModel], data: dict[str, Any]) -> dict[str, Any]:
    """Allow ``task: name`` for ``task: {name: name}`` and a bare recipe name as a mixture or suite entry."""
    out = dict(data)
    if isinstance(out.get("task"), str):
        out["task"] = {"name": out["task"]}
    for key in ("datasets", "rows"):
        if isinstance(out.get(key), list):
            out[key] = [
                shorthand(kind, {"recipe": e} if isinstance(e, str) else e) if isinstance(e, str | dict) else e
                for e in out[key]
            ]
    if isinstance(out.get("mixture"), dict):
        out["mixture"] = shorthand(kind, out["mixture"])
    return out


def _explain(kind: type[BaseModel], fault: Any, where: str) -> str:
    place = ".".join(str(p) for p in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _fields_at(kind, fault["loc"][:-1])
        return f"{where}: unknown key '{place}'{did_you_mean(str(fault['loc'][-1]), known)}"
    if fault["type"] == "missing":
        return f"{where}: key '{place}' is missing: it has no default, add it"
    return f"{where}: {place} = {fault['input']!r}: {fault['msg']}"


def _fields_at(kind: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    import typing

    model: Any = kind
    for part in loc:
        if isinstance(part, int) or not hasattr(model, "model_fields"):
            continue
        name = next((n for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        if name is None:
            continue
        queue = [model.model_fields[name].annotation]
        while queue:
            hint = queue.pop()
            if isinstance(hint, type) and issubclass(hint, BaseModel):
                model = hint
                break
            queue.extend(typing.get_args(hint))
    return [f.alias or n for n, f in model.model_fields.items()]
