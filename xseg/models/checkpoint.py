"""Save, load and overlay weights; every file is read against a strict report."""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xseg.errors import UserError
from xseg.models import key_maps, positions, shards
from xseg.models.configuration import XSegConfig
from xseg.models.xseg import XSegModel
from xseg.paths import check_folder, writing_to

SHOWN = 8
LOADING_FAULTS = {
    "mismatched_keys": "other sizes than those of",
    "unexpected_keys": "another architecture than that of",
    "missing_keys": "incomplete: tensors are missing for",
}
"""What transformers found when it opened a folder -> how it is said; the first that is there counts."""
Mark = tuple[str, str]
"""(file, what its text holds): by this a folder is known as one that may be replaced."""
MODEL: Mark = ("config.json", f'"model_type": "{XSegConfig.model_type}"')
"""Of every folder with an xseg model, an adapter's too."""
WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?|adapter)\.safetensors(\.index\.json)?|adapter\.json|names")
"""Weights that xseg writes, and what `xseg names` adds: an earlier model's must not stay beside a new one."""
HEADS = ("segmentor.class_head.", "segmentor.pixel_classifier.")


@dataclass
class LoadReport:
    """What a source gave to a model; ``str()`` prints it part by part."""

    source: str
    loaded: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    """Parameters of the model that the source does not have."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors of the source that the model has no place for."""
    mismatched: list[str] = field(default_factory=list)
    """``name: shape in the source, shape in the model``."""
    resized: list[str] = field(default_factory=list)
    """Position tables that were interpolated to another resolution, written like ``mismatched``; also in ``loaded``."""
    replaced: list[str] = field(default_factory=list)
    """Tensors of an earlier stage's folder that this one, laid over it, holds with other values; also in ``loaded``."""

    def __str__(self) -> str:
        lines = [self.source]
        for title in ("loaded", "resized", "replaced", "fresh", "unexpected", "mismatched"):
            parts: dict[str, list[str]] = defaultdict(list)
            for name in getattr(self, title):
                parts[".".join(name.split(".")[: 2 if name.startswith("segmentor.") else 1])].append(name)
            for part, names in sorted(parts.items()):
                few = "" if title == "loaded" else ": " + ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)
                lines.append(f"  {title:10} {len(names):5} {part}{few}")
        return "\n".join(lines)


def save(model: XSegModel, folder: str | Path) -> None:
    """Write config and safetensors; the folder appears whole or not at all. UserError as ``replacing``."""
    with replacing(Path(folder), MODEL) as partial:
        model.save_pretrained(partial)


@contextmanager
def replacing(folder: Path, mark: Mark | None = None, *, keep: bool = True) -> Iterator[Path]:
    """Give a temporary folder that takes the place of ``folder`` at the end; after an error nothing has changed.

    Files of ``folder`` that are not written anew are kept, unless ``keep`` is off; the weights of its model are not.
    Raises UserError as ``check_place``, and when the disk is full.
    """
    check_place(folder, mark)
    whole = folder.resolve()
    partial, older = (whole.with_name(f".{whole.name}.{kind}") for kind in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        _swap(partial, whole, older, keep)
    except OSError as error:
        raise UserError(f"{folder}: cannot save the model: {error}; nothing was written there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_place(folder: Path, mark: Mark | None = None) -> None:
    """Raise UserError where no model may be written, before the work for it begins.

    A folder that holds anything is replaced only where it bears ``mark``; None: never.
    """
    whole = folder.resolve()
    if whole in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{folder}: the working directory lies there and would be replaced; name another folder")
    with writing_to(folder):
        filled = whole.is_dir() and any(whole.iterdir())
        if filled and not (mark and _bears(whole, *mark)):
            rule = f" without a {mark[0]} that holds {mark[1]!r}" if mark else ""
            raise UserError(
                f"{folder}: is there already{rule}; nothing is overwritten: choose another folder or remove this one"
            )
        check_folder(whole.parent if whole.is_dir() else folder)


def _bears(folder: Path, name: str, text: str) -> bool:
    return (folder / name).is_file() and text in (folder / name).read_text(encoding="utf8", errors="replace")


def staying(folder: Path, partial: Path) -> list[Path]:
    """What of ``folder`` is kept when ``partial`` takes its place: all but weights and what is written anew."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if not WEIGHTS.fullmatch(path.name) and not (partial / path.name).exists()]


def _swap(partial: Path, folder: Path, older: Path, keep: bool) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    for path in staying(folder, partial) if keep else ():
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, partial / path.name, symlinks=True)
        else:
            shutil.copy2(path, partial / path.name, follow_symlinks=False)
    shutil.copystat(folder, partial)
    shutil.rmtree(older, ignore_errors=True)
    folder.rename(older)
    try:
        partial.rename(folder)
    except OSError:
        older.rename(folder)
        raise
    shutil.rmtree(older, ignore_errors=True)


def load(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> XSegModel:
    """Open a folder that ``save`` wrote, its weights cast to ``dtype`` (None: as they are stored).

    Raises UserError when it holds no whole xseg model.
    """
    folder = Path(folder)
    read_config(folder)
    shards.catalog(folder)  # names damaged files and pickles with code, which transformers would show as tracebacks
    opened: Any = XSegModel.from_pretrained(
        folder, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, info = opened
    for kind, what in LOADING_FAULTS.items():
        if info[kind]:
            names = ", ".join(sorted(map(str, info[kind]))[:SHOWN])
            raise UserError(f"{folder}: {what} its own config.json: {names}; copy it again, or save the model anew")
    for name, value in model.state_dict().items():
        shards.check_finite(folder, name, value)
    model.freeze_unread()
    return model  # type: ignore[no-any-return]


def read_config(folder: Path) -> XSegConfig:
    """The configuration beside a checkpoint. Raises UserError for a missing one, or one of another architecture."""
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read it ({error}); name a folder that training or import wrote") from error
    kind = stored.get("model_type")
    if kind != XSegConfig.model_type:
        raise UserError(
            f"{path}: model_type = {kind!r}: only '{XSegConfig.model_type}' folders open here; convert a released "
            "X-SAM checkpoint with `xseg import x-sam`, and name other language models in a model recipe under llm"
        )
    return XSegConfig.from_pretrained(folder)


def overlay(
    model: XSegModel, folders: Sequence[str | Path], read: Callable[[Path], Mapping[str, Tensor]] | None = None
) -> list[LoadReport]:
    """Lay earlier stages over a model, in order, and report each; ``read`` gets a folder's tensors in another way.

    A tensor with no place or of another shape is an error, and so is a part that is filled by half, but for what this
    stage replaces: a class head of another kind, and parts that are not built here. Raises UserError for that, for
    another vocabulary, and for damaged folders.
    """
    reports: list[LoadReport] = []
    for folder in folders:
        config = read_config(Path(folder))
        if model.config.text_config is not None:
            check_vocabulary(folder, config, model.config.text_config.vocab_size)
        state = (read or read_weights)(Path(folder))
        replaced = _replaced_by(state, model, [name for earlier in reports for name in earlier.loaded])
        report = assign(model, state, str(folder))
        report.replaced = replaced
        what = _misfit(model, report)
        if what:
            raise UserError(f"{folder}: {what}: use the model recipe that made it, or copy it again\n{report}")
        reports.append(report)
    return reports


def _replaced_by(state: Mapping[str, Tensor], model: XSegModel, names: Sequence[str]) -> list[str]:
    """Those of the model's tensors that ``state`` holds with other values."""
    own = model.state_dict()
    shared = [name for name in dict.fromkeys(names) if name in state and state[name].shape == own[name].shape]
    return [name for name in shared if not torch.equal(state[name].to(own[name]), own[name])]


def _misfit(model: XSegModel, report: LoadReport) -> str:
    """Why an earlier stage must not be laid over this model; empty = it fits."""
    given = {key_maps.part_of(n) for n in report.loaded}
    missing = [n for n in report.fresh if key_maps.part_of(n) in given and not n.startswith(HEADS)]
    if report.mismatched:
        return "other sizes than this model's"
    if missing:
        return f"incomplete: {len(missing)} tensors of this model are missing in parts that it has"
    if not report.loaded or any(not _replaced(model, n) for n in report.unexpected):
        return "another architecture: it holds tensors that have no place in this model"
    return ""


def check_vocabulary(folder: str | Path, config: XSegConfig, words: int) -> None:
    """Raise UserError when the language model in a folder has another embedding than one row for each of ``words``."""
    if config.text_config is not None and config.text_config.vocab_size != words:
        raise UserError(
            f"{folder}: wrong vocabulary: its embedding has {config.text_config.vocab_size} rows and the tokenizer "
            f"{words} words (<SEG>, <p>, </p> included): use the tokenizer that it was trained with"
        )


def _replaced(model: XSegModel, name: str) -> bool:
    here = {key_maps.part_of(n) for n in model.state_dict()}
    return key_maps.part_of(name) not in here or name.startswith(HEADS)


def assign(model: XSegModel, state: Mapping[str, Tensor], source: str) -> LoadReport:
    """Copy every tensor that has a place of the same shape, and report the rest."""
    own, report = model.state_dict(), LoadReport(source)
    # Files hold one of two tied parameters.
    identity = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    given = {identity[n] for n in state if n in identity}
    report.fresh = [n for n in own if n not in state and identity.get(n) not in given]
    fits = {}
    for name, value in state.items():
        if name not in own:
            report.unexpected.append(name)
        elif own[name].shape != value.shape:
            report.mismatched.append(f"{name}: {tuple(value.shape)} there, {tuple(own[name].shape)} here")
        else:
            report.loaded.append(name)
            fits[name] = value
    model.load_state_dict(fits, strict=False)
    return report


def load_official(model: XSegModel, state: Mapping[str, Tensor], source: str = "X-SAM checkpoint") -> LoadReport:
    """Load a released X-SAM state (branch main or archive). Raises UserError when a shape differs."""
    renamed = key_maps.from_official(state, model)
    report = assign(model, renamed, source)
    if report.mismatched:
        raise UserError(f"{source}: sizes differ from the model recipe\n{report}")
    return report


def load_part(model: XSegModel, part: str, folder: Path) -> LoadReport:
    """Load SAM's or SigLIP's image encoder: transformers' layout, whole model or vision tower, or SAM's own file.

    Position tables of another resolution are resized. Raises UserError for whatever else does not fit.
    """
    state, own = key_maps.vision_tower(read_weights(folder), part), model.state_dict()
    resized = []
    for name, value in state.items():
        if name in own and own[name].shape != value.shape:
            table = positions.fitted(name, value, own[name].shape)
            if table is not None:
                resized.append(f"{name}: {tuple(value.shape)} there, {tuple(table.shape)} here")
                state[name] = table
    prefix = key_maps.PART_PREFIX[part]
    # a model built without the pooling head, which it never reads, needs none
    report = assign(
        model, {n: v for n, v in state.items() if n in own or not n.startswith(f"{prefix}head.")}, str(folder)
    )
    report.resized = resized
    report.fresh = [n for n in report.fresh if n.startswith(prefix) and ".neck." not in n and ".head." not in n]
    if report.mismatched or report.unexpected or report.fresh:
        raise UserError(f"{part}.pretrained: {folder} is no {part} encoder of these sizes\n{report}")
    return report


BACKBONE_BOUND = ("segmentor.pixel_decoder.projections.", "segmentor.pixel_decoder.lateral.")
"""Convolutions that read a backbone's channels: those of Mask2Former's own backbone are of no use behind SAM."""


def load_mask2former(model: XSegModel, folder: Path) -> LoadReport:
    """Start pixel decoder and mask decoder from a Mask2Former in transformers' layout; the rest of it is left out.

    Raises UserError when they do not fit; what reads the backbone stays as it is here where the channels differ.
    """
    state, own = key_maps.from_mask2former(read_weights(folder), model), model.state_dict()
    foreign = [n for n in state if n.startswith(BACKBONE_BOUND) and n in own and own[n].shape != state[n].shape]
    # A convolution and its norm belong together.
    foreign = [n for n in state if n.rsplit(".", 2)[0] in {f.rsplit(".", 2)[0] for f in foreign}]
    report = assign(model, {n: v for n, v in state.items() if n not in foreign}, str(folder))
    decoders = ("segmentor.pixel_decoder.", "segmentor.mask_decoder.")
    report.fresh = [n for n in report.fresh if n.startswith(decoders)]
    if report.mismatched or report.unexpected or set(report.fresh) - set(foreign):
        raise UserError(f"segmentor.pretrained: {folder} is no Mask2Former with decoders of these sizes\n{report}")
    return report


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder or file: safetensors, or a .bin or .pth that holds nothing but tensors.

    Raises UserError for damaged files, for code in a pickle, and for values that are not finite.
    """
    state = shards.read(shards.catalog(folder))
    for name, value in state.items():
        shards.check_finite(folder, name, value)
    return state
