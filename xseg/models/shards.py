"""Files of other people's tensors: found, checked and read without running what a pickle may hold.

Tensors are mapped from the disk, not copied: a file of any size costs only what is looked at.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from xseg.errors import UserError
from xseg.models import pickles, zero
from xseg.models.zero import Cut

WRAPPERS = ("state_dict", "module", "model")
"""Keys under which training frameworks keep the state."""
KINDS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
"""Looked for in this order; the first kind that a folder has is taken."""
LIMIT = 1_000_000_000
"""Most bytes of one written file. Reading and writing one at a time bounds the memory."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    cut: Cut | None = None
    """Its slices, where ZeRO-3 cut it; None = it lies whole under ``key``."""

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def catalog(source: Path) -> dict[str, Stored]:
    """Every tensor of a file or folder by name, with nothing read but headers and check sums.

    Raises UserError for a missing, damaged or incomplete source, and for pickles that hold more than tensors.
    """
    out: dict[str, Stored] = {}
    found = files(source)
    states = [file for file in found if file.name.endswith("_model_states.pt")]
    if zero.is_cut([file.name for file in states]):
        cuts, whole, file = zero.catalog(states[0].parent)
        out = {name: Stored(cut.files[0], name, cut.shape, cut.dtype, cut) for name, cut in cuts.items()}
        buffers = opened(file)
        return out | {n: Stored(file, n, tuple(buffers[n].shape), buffers[n].dtype) for n in whole}
    for file in found:
        pickles.check_sums(file)
        for name, tensor in opened(file).items():
            if name in out:
                raise UserError(f"{file}: {name} also lies in {out[name].file.name}: keep one copy of the weights here")
            out[name] = Stored(file, name, tuple(tensor.shape), tensor.dtype)
    return out


def files(source: Path) -> list[Path]:
    """The weight files of a file or folder: as its index lists them, or all of one kind, or a ZeRO checkpoint's."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder: name the weights, or the folder that holds them")
    for index in sorted(source.glob("*.index.json")):
        return _listed(index)
    for pattern in KINDS:
        found = sorted(p for p in source.glob(pattern) if "optim_states" not in p.name)
        if found:
            # ZeRO keeps what else a run needs beside the weights.
            return [p for p in found if p.name.endswith("_model_states.pt")] or found
    nested = sorted(source.glob("*/*_model_states.pt"))
    latest = source / "latest"
    if nested and latest.is_file():
        return files(source / latest.read_text(encoding="utf8").strip())
    raise UserError(f"{source}: no *.safetensors (or *.bin, *.pth) in it: name the folder that holds the weights")


def _listed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: not a readable index of weights ({error!r}); copy it again") from error
    lost = [name for name in names if not (index.parent / name).is_file()]
    if lost:
        raise UserError(f"{index}: lists {', '.join(lost)}, not there: copy every file of the checkpoint")
    return [index.parent / name for name in names]


def opened(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, unwrapped and mapped from the disk. Raises UserError for everything but tensors."""
    if file.suffix != ".safetensors":
        return _unwrapped(file, pickles.load(file))
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: damaged or cut short ({error}); copy it again") from error


def _unwrapped(file: Path, state: Any) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    strange = [k for k, v in state.items() if not isinstance(v, Tensor)] if isinstance(state, dict) else [state]
    if strange:
        raise UserError(
            f"{file}: no table of tensors (found {strange[:3]!r}): name a file whose entries are tensors, plain or "
            f"under one of {', '.join(WRAPPERS)}"
        )
    return dict(state)


def read(wanted: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The tensors of ``wanted``, each file opened once."""
    cut = zero.joined({name: stored.cut for name, stored in wanted.items() if stored.cut is not None})
    handles = {file: opened(file) for file in dict.fromkeys(s.file for n, s in wanted.items() if n not in cut)}
    return {n: cut[n] if n in cut else handles[stored.file][stored.key] for n, stored in wanted.items()}


def check_finite(place: Path, name: str, value: Tensor) -> None:
    """Raise UserError for a tensor of ``place`` that holds infinities or no numbers: no training leaves such."""
    if not torch.isfinite(value).all():
        raise UserError(f"{place}: corrupted tensor {name}: it holds values that are not finite; copy it again")


def grouped(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into groups of at most ``limit`` bytes (one larger tensor stands alone)."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def file_name(number: int, count: int) -> str:
    """``model.safetensors``, or the ``number``-th (from 0) of several, as transformers calls them."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def write(folder: Path, number: int, count: int, tensors: Mapping[str, Tensor]) -> None:
    """One of ``count`` safetensors files, readable by everybody who may read the folder."""
    path = folder / file_name(number, count)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, {"format": "pt"})
    path.chmod(0o644)


def write_index(folder: Path, groups: Iterable[Iterable[str]], total: int) -> None:
    """Which name lies in which file, where there are several."""
    listed = [list(group) for group in groups]
    if len(listed) > 1:
        table = {name: file_name(i, len(listed)) for i, group in enumerate(listed) for name in group}
        index = {"metadata": {"total_size": total}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf8")
