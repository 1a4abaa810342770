"""Files of other people's tensors: found, checked and read without running what a pickle may hold.

Tensors are mapped from the disk, not copied: a file of any size costs only what is looked at.
"""

import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from xseg.errors import UserError

WRAPPERS = ("state_dict", "module", "model")
"""Keys under which training frameworks keep the state."""
KINDS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
"""Looked for in this order; the first kind that a folder has is taken."""
ZIP = b"PK\x03\x04"
LIMIT = 1_000_000_000
"""Most bytes of one written file. Reading and writing one at a time bounds the memory."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def catalog(source: Path) -> dict[str, Stored]:
    """Every tensor of a file or folder by name, with nothing read but headers and check sums.

    Raises UserError for a missing, damaged or incomplete source, and for pickles that hold more than tensors.
    """
    out: dict[str, Stored] = {}
    for file in files(source):
        check_sums(file)
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
            return _whole(source, found)
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


def _whole(folder: Path, found: list[Path]) -> list[Path]:
    """ZeRO-1 and -2 keep the whole model in one file; ZeRO-3 and model parallelism cut every tensor."""
    states = [p for p in found if p.name.endswith("_model_states.pt")]
    if any(p.name.startswith("zero_pp_rank") for p in states) or len(states) > 1:
        raise UserError(
            f"{folder}: a ZeRO-3 or model-parallel checkpoint, whose tensors are cut over {len(states)} files: join "
            "them with DeepSpeed's own zero_to_fp32.py, which lies beside them, and name what it writes"
        )
    return states or found


def check_sums(file: Path) -> None:
    """Compare a torch file's records with the sums it was written with. Raises UserError for a difference."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{file}: damaged or cut short ({error}); copy it again") from error
    if bad:
        raise UserError(f"{file}: damaged: the bytes of {bad} do not fit the check sum beside them; copy it again")


def opened(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, unwrapped and mapped from the disk. Raises UserError for everything but tensors."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with file.open("rb") as stream:
            is_zip = stream.read(len(ZIP)) == ZIP
        if is_zip and not zipfile.is_zipfile(file):
            raise EOFError("its end is not there")
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise UserError(_refused(file, error)) from error
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(f"{file}: damaged or cut short ({error}); copy it again") from error
    return _unwrapped(file, state)


def _refused(file: Path, error: Exception) -> str:
    said = str(error)
    if "global" not in said.lower():
        return f"{file}: damaged, or no file of weights ({said.splitlines()[0]}); copy it again"
    word = next((w for line in said.splitlines() if "GLOBAL" in line for w in _behind(line)), "an object")
    return (
        f"{file}: holds code ({word}) beside its tensors, which is never run here: write its tensors alone with "
        "torch.save or safetensors where you trust it, and name that file"
    )


def _behind(line: str) -> list[str]:
    return line.split("GLOBAL", 1)[1].split()[:1]


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
    handles = {file: opened(file) for file in dict.fromkeys(s.file for s in wanted.values())}
    return {name: handles[stored.file][stored.key] for name, stored in wanted.items()}


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
