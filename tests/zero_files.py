"""A checkpoint as DeepSpeed's ZeRO-3 writes it (layout of 0.19), without training one."""

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def cut(
    state: dict[str, Tensor], folder: Path, *, processes: int = 2, frozen: tuple[str, ...] = (),
    buffers: tuple[str, ...] = (), shared: dict[str, str] | None = None, sub_group: int = 10**9, extra: Any = None,
) -> Path:  # fmt: skip
    """Write ``state`` over ``processes``; ``sub_group``: most values of one flat tensor; the folder of the run."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    inner, shared = folder / "global_step7", shared or {}
    inner.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    trained = [n for n in state if n not in {*frozen, *buffers, *shared}]
    shapes = [OrderedDict((n, state[n].shape) for n in trained[k::2]) for k in range(2)]
    for rank in range(processes):
        parts = {n: _slice(state[n], rank, processes) for n in (*trained, *frozen)}
        flat = torch.cat([parts[n] for group in shapes for n in group])
        module = {n: state[n] if n in buffers else torch.zeros(0) for n in state}
        model = {
            "module": module, "buffer_names": list(buffers), "param_shapes": shapes, "shared_params": shared,
            "frozen_param_shapes": OrderedDict((n, state[n].shape) for n in frozen),
            "frozen_param_fragments": OrderedDict((n, parts[n].clone()) for n in frozen),
            "dp_world_size": processes, "ds_version": "0.19.8", "extra": extra,
        }  # fmt: skip
        optimizer = {
            "zero_stage": ZeroStageEnum(3), "loss_scaler": LossScaler(scale=1), "partition_count": processes,
            "optimizer_state_dict": {"state": {}}, "fp32_flat_groups": [t.clone() for t in flat.split(sub_group)],
        }  # fmt: skip
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save(model, inner / f"{name}_model_states.pt")
        torch.save({"optimizer_state_dict": optimizer, "ds_config": {}}, inner / f"bf16_{name}_optim_states.pt")
    return folder


def _slice(value: Tensor, rank: int, processes: int) -> Tensor:
    """A process's slice; the last one is filled up with what must not come back."""
    length = math.ceil(value.numel() / processes)
    padded = torch.cat([value.flatten(), value.new_full((length * processes - value.numel(),), 77.0)])
    return padded[rank * length : (rank + 1) * length]
