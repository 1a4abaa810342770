"""Checkpoints: written under a temporary name and renamed, so that what has its real name is complete.

A run is a function of (recipe, step): a checkpoint holds weights, optimiser state, the step and the recipe, and needs
no state of loaders or random generators, because both are made anew from (seed, step).
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from xseg.config import ModelRecipe
from xseg.errors import UserError
from xseg.train import slim

STATE = "state.json"
TORCH_WRITE_FAULTS = ("PytorchStreamWriter", "write failed", "inline_container")
"""What torch's zip writer says, as a RuntimeError without an error number, when the disk takes no more."""
FREE = {
    "stage",
    "steps",
    "epochs",
    "out",
    "data_root",
    "init_from",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "num_workers",
    "track",
    "watch",
}
"""Keys of a stage that may change when a run is resumed. ``steps`` and ``epochs`` move the end, and the schedule with
it: a lengthened run takes up the rate that the longer schedule has at that step."""


def checkpoints(out: Path) -> dict[int, Path]:
    """Return the complete checkpoints of a run by step, oldest first."""
    found = {}
    for path in (out / "checkpoints").glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdigit() and (path / STATE).is_file():
            found[int(number)] = path
    return dict(sorted(found.items()))


def layout(acc: Accelerator) -> dict[str, Any]:
    """Say how states lie in a checkpoint: number of processes and ZeRO stage (None without DeepSpeed)."""
    plugin = acc.state.deepspeed_plugin
    precision = "bf16" if plugin is not None and acc.mixed_precision == "bf16" else "fp32"
    return {"processes": acc.num_processes, "zero": None if plugin is None else plugin.zero_stage, "weights": precision}


def save(acc: Accelerator, out: Path, step: int, recipe: Mapping[str, Any], keep: int) -> None:
    """Write ``out/checkpoints/step_N`` of all ranks, then drop all but the newest ``keep``.

    Raises UserError when the disk is full; checkpoints that were complete before stay loadable.
    """
    final = out / "checkpoints" / f"step_{step}"
    with writing(final, acc) as folder:
        acc.save_state(str(folder), **slim.saving(acc, recipe))
        if acc.is_main_process:
            fields = {"step": step, "layout": layout(acc), "recipe": dict(recipe)}
            (folder / STATE).write_text(json.dumps(fields, indent=1), encoding="utf8")
    if acc.is_main_process:
        for old in list(checkpoints(out).values())[: -max(keep, 1)]:
            shutil.rmtree(old)


def restore(acc: Accelerator, path: Path, recipe: Mapping[str, Any]) -> int:
    """Load a checkpoint into the prepared model and optimiser; return its step.

    Raises UserError when it was written by another recipe or on another number of processes.
    """
    state = read_state(path)
    check_same(state["recipe"], recipe, path)
    written, now = state["layout"], layout(acc)
    if written != now:
        names = [f"{k} = {written.get(k)}, now {v}" for k, v in now.items() if written.get(k) != v]
        raise UserError(
            f"{path}: written with {'; '.join(names)}: optimiser states cannot be split anew; resume with the "
            "accelerate config and the number of processes of the first launch"
        )
    acc.load_state(str(path), **slim.loading(acc, recipe))
    return int(state["step"])


def read_state(path: Path) -> dict[str, Any]:
    """Return the step, layout and recipe of a checkpoint."""
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path / STATE}: damaged ({error}); delete {path} to resume from the one before") from error
    return state


def check_same(written: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raise UserError naming the keys in which a resumed run's recipe differs from the checkpoint's."""
    now = json.loads(json.dumps(now))
    if isinstance(written.get("model"), dict):
        # What the model recipe could not say yet stood at its default.
        defaults = {k: f.default for k, f in ModelRecipe.model_fields.items() if k in now["model"]}
        written = {**written, "model": {**defaults, **written["model"]}}
    changed = [k for k in sorted({*written, *now} - FREE) if written.get(k) != now.get(k)]
    if changed:
        lines = "\n".join(f"  {k}: {written.get(k)!r} -> {now.get(k)!r}" for k in changed)
        raise UserError(
            f"{path}: the recipe changed since this checkpoint, so the run would be neither the old nor the new one:\n"
            f"{lines}\nrestore these keys, or start anew with another out (and init_from, to keep the weights)"
        )


def newest(acc: Accelerator, out: Path) -> Path | None:
    """Return the newest complete checkpoint as rank 0 sees it, so that all ranks load the same one."""
    seen = [str(list(checkpoints(out).values())[-1]) if checkpoints(out) else None]
    broadcast_object_list(seen)
    return Path(seen[0]) if seen[0] else None


@contextmanager
def writing(final: Path, acc: Accelerator) -> Iterator[Path]:
    """Give a temporary folder to all ranks; flushed to disk and renamed to ``final`` when all have written."""
    temporary = final.parent / f".{final.name}.tmp"
    with full_disk(final):
        if acc.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        acc.wait_for_everyone()
        yield temporary
        acc.wait_for_everyone()
        if acc.is_main_process:
            for file in temporary.rglob("*"):
                _flush(file)
            older = final.parent / f".{final.name}.old"
            if final.exists():
                # Moved aside, not removed: a kill between the two lines must not cost both.
                shutil.rmtree(older, ignore_errors=True)
                final.rename(older)
            temporary.rename(final)
            shutil.rmtree(older, ignore_errors=True)
            _flush(final.parent)
        acc.wait_for_everyone()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def full_disk(final: Path) -> Iterator[None]:
    """Turn a failed write into one message; torch and safetensors report it as errors of their own."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(final.parent / f".{final.name}.tmp", ignore_errors=True)
        written = isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
        if not (written or any(word in str(error) for word in TORCH_WRITE_FAULTS)):
            raise
        older = sorted(p.name for p in final.parent.glob("step_*") if (p / STATE).is_file())
        kept = f"complete before it and still loadable: {', '.join(older)}" if older else "no earlier one is complete"
        raise UserError(
            f"{final}: cannot be written: {error}; {kept}. Free some space (`df -h {final.parent}`) or lower "
            "keep_checkpoints, then run the same command with --resume auto"
        ) from error
