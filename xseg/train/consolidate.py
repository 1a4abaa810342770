"""From a run on some number of processes to one on another: a checkpoint's shards become one model, which starts a run.

The states of the optimiser lie split over the processes that wrote them, so they stay behind: a run that starts from
the consolidated folder has the weights and the step, and its data and its schedule go on where they were.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load

from xseg.errors import UserError
from xseg.models import checkpoint
from xseg.train import assemble, manifest, state
from xseg.train.stage import Stage
from xseg.train.watchdog import listed

SHARDS = "pytorch_model"
"""Folder of DeepSpeed's shards in a checkpoint; without DeepSpeed the weights are one safetensors file."""
CUT = "pytorch_model_fsdp_0"
"""Folder of FSDP2's weights, as torch.distributed.checkpoint writes them."""
SPLIT = {"batch_size", "accumulate"}
"""Keys that may change with the number of processes, as long as their product with it, the global batch, stays."""


def consolidate(stage: Stage, out: Path) -> int:
    """Write the newest whole checkpoint of a run as a model folder, weights in float32; return its step.

    ``xseg.load`` opens the folder, and ``--resume FOLDER`` starts from it. Raises UserError when ``out`` is there, for
    a run without a whole checkpoint, and for one with adapters.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; nothing is overwritten: choose another name or remove it")
    found = next((p for p in reversed(state.checkpoints(stage.out).values()) if not manifest.fault(p)), None)
    if found is None:
        raise UserError(f"{stage.out}: no whole checkpoint in {stage.out / 'checkpoints'}; is it the run's `out`?")
    written = state.read_state(found)
    state.check_same(written["recipe"], stage.resolved(), found)
    if stage.recipe.adapters:
        raise UserError(
            f"{found}: of a run with adapters, which keeps what learns alone: such a run goes on with the accelerate "
            "config and the number of processes of its first launch only"
        )
    data = assemble.load_data(stage)
    model = assemble.skeleton(assemble.configuration(stage, data))
    _, unknown = model.load_state_dict(weights(found), strict=False, assign=True)
    model.tie_weights()  # of two names for one tensor a checkpoint may hold the first alone
    absent = [name for name, value in model.state_dict().items() if value.is_meta]
    if unknown or absent:
        raise UserError(
            f"{found}: does not hold the model of this stage: {len(absent)} tensors are not there ({listed(absent)}), "
            f"{len(unknown)} have no place ({listed(unknown)}); give the stage and the settings that wrote it"
        )
    with checkpoint.replacing(out) as partial:
        model.save_pretrained(partial)
        data.processor.save_pretrained(partial)
        (partial / state.STATE).write_text(json.dumps(written, indent=1), encoding="utf8")
    return int(written["step"])


def weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in float32, whatever split them."""
    if (path / CUT).is_dir():
        return _joined(path / CUT)
    if not (path / SHARDS).is_dir():
        return checkpoint.read_weights(path)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(path), tag=SHARDS))


def _joined(folder: Path) -> dict[str, Tensor]:
    """What all ranks wrote, read by one process."""
    reader = FileSystemReader(folder)
    entries: Any = reader.read_metadata().state_dict_metadata
    found = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        load(found, storage_reader=reader, no_dist=True)
    return {key.removeprefix("model."): value for key, value in found.items()}


def begin(stage: Stage, folder: Path, processes: int) -> int:
    """Return the step from which a run on ``processes`` goes on from a consolidated folder.

    Raises UserError for another folder, for another recipe, and for another global batch, because the plan of batches
    would be another one and a step no place in it.
    """
    if not (folder / state.STATE).is_file():
        raise UserError(
            f"--resume {folder}: no {state.STATE} there; give auto, or a folder that `xseg consolidate` wrote"
        )
    written = state.read_state(folder)
    was, now = written["recipe"], stage.resolved()
    state.check_same(was, now | {key: was[key] for key in SPLIT}, folder)
    before = was["batch_size"] * was["accumulate"] * written["layout"]["processes"]
    after = now["batch_size"] * now["accumulate"] * processes
    if before != after:
        raise UserError(
            f"--resume {folder}: its run had {before} samples a step, this one has batch_size {now['batch_size']} x "
            f"accumulate {now['accumulate']} x {processes} processes = {after}, and step {written['step']} would be "
            "another place in the data; choose batch_size and accumulate so that the product stays"
        )
    return int(written["step"])
