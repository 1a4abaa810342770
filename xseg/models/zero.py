"""Checkpoints of ZeRO-3, which cuts every tensor over all processes: found, checked and put together.

DeepSpeed's own ``zero_to_fp32.py`` does the same, but runs what the pickles hold, and joins the whole model in memory.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xseg.errors import UserError
from xseg.models import pickles

RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt$")
COMMAND = "python zero_to_fp32.py . merged"


@dataclass(frozen=True)
class Cut:
    """Where the slices of one tensor lie."""

    files: tuple[Path, ...]
    """One per process, in order: model states of frozen tensors, else optimiser states, which hold float32 weights."""
    key: str
    start: int | None
    """First value of the slice in a process's flat groups, laid end to end; None = frozen, a tensor of its own."""
    shape: tuple[int, ...]
    dtype: torch.dtype


def is_cut(names: Sequence[str]) -> bool:
    """Whether files of these names are model states of ZeRO-3 (or of model parallelism, which is refused)."""
    return any(RANK.search(name) for name in names) or len(names) > 1


def catalog(folder: Path) -> tuple[dict[str, Cut], list[str], Path]:
    """Every cut tensor by name; names of the buffers, which are whole; and the file they lie in.

    Raises UserError for model parallelism, and when slices or processes are missing.
    """
    models, optims = (_by_rank(folder, kind) for kind in ("model", "optim"))
    for file in (*models, *optims):
        pickles.check_sums(file)
    first, flat = pickles.load(models[0]), groups(optims[0])
    count = int(_optimizer(optims[0])["partition_count"])
    if not len(models) == len(optims) == count:
        raise UserError(
            f"{folder}: incomplete: written by {count} processes, and there are model states of {len(models)} and "
            f"optimiser states of {len(optims)} of them; copy every file"
        )
    if "param_shapes" not in first:
        raise UserError(f"{models[0]}: no model state of ZeRO-3: name the folder of one checkpoint (global_step…)")
    out: dict[str, Cut] = {}
    at = 0
    for name, shape in (item for group in first["param_shapes"] for item in group.items()):
        out[name] = Cut(optims, name, at, tuple(shape), flat[0].dtype)
        at += math.ceil(shape.numel() / count)
    there = sum(len(group) for group in flat)
    if at != there:
        raise UserError(
            f"{folder}: its tensors need {at} values of every process, and there are {there}; copy it again"
        )
    fragments = first.get("frozen_param_fragments") or {}
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        out[name] = Cut(models, name, None, tuple(shape), fragments[name].dtype)
    out |= {name: out[other] for name, other in first.get("shared_params", {}).items() if other in out}
    return out, [name for name in first["buffer_names"] if name in first["module"]], models[0]


def _by_rank(folder: Path, kind: str) -> tuple[Path, ...]:
    found = {}
    for path in folder.glob(f"*_{kind}_states.pt"):
        match = RANK.search(path.name)
        if match is None:
            raise UserError(
                f"{folder}: a model-parallel checkpoint ({path.name}): join it with DeepSpeed's own tool, which lies "
                f"beside its folder ({COMMAND}), where you trust it, and name what that writes"
            )
        found[int(match[1])] = path
    if not found:
        raise UserError(f"{folder}: no *_{kind}_states.pt, which hold a part of the weights; copy every file")
    return tuple(found[rank] for rank in sorted(found))


def _optimizer(file: Path) -> Mapping[str, Any]:
    state = pickles.load(file)
    inner = state.get("optimizer_state_dict") if isinstance(state, dict) else None
    if not isinstance(inner, dict) or "fp32_flat_groups" not in inner:
        raise UserError(f"{file}: no optimiser state of ZeRO-3: name the folder of one checkpoint (global_step…)")
    return inner


def groups(file: Path) -> list[Tensor]:
    """A process's float32 weights: flat tensors, mapped from the disk."""
    return list(_optimizer(file)["fp32_flat_groups"])


def joined(wanted: Mapping[str, Cut]) -> dict[str, Tensor]:
    """Put tensors together, every file opened once."""
    flat = {file: groups(file) for file in _files(wanted, frozen=False)}
    frozen = {file: pickles.load(file)["frozen_param_fragments"] for file in _files(wanted, frozen=True)}
    out = {}
    for name, cut in wanted.items():
        size = torch.Size(cut.shape).numel()
        if cut.start is None:
            slices = [frozen[file][cut.key] for file in cut.files]
        else:
            length = math.ceil(size / len(cut.files))
            slices = [part for file in cut.files for part in _between(flat[file], cut.start, cut.start + length)]
        # The last process's slice is filled up with what is no part of the tensor.
        out[name] = torch.cat(slices)[:size].reshape(cut.shape)
    return out


def _files(wanted: Mapping[str, Cut], *, frozen: bool) -> list[Path]:
    return list(dict.fromkeys(file for cut in wanted.values() for file in cut.files if (cut.start is None) == frozen))


def _between(flat: Sequence[Tensor], start: int, end: int) -> list[Tensor]:
    """The values ``start`` to ``end`` of flat groups laid end to end."""
    begins = [0, *accumulate(len(group) for group in flat)]
    pairs = zip(flat, begins, strict=False)
    return [group[max(start - at, 0) : max(end - at, 0)] for group, at in pairs if start < at + len(group) and end > at]
