"""Checkpoints: written under a temporary name, sealed by a manifest and renamed, so that what has its real name was
complete; what was damaged since is found by its checksums and passed over.

A run is a function of (recipe, step): a checkpoint holds weights, optimiser state, the step and the recipe. The place
in the data is the step; loaders, and every random generator that a step uses, are made anew from (seed, step, rank).
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

from xseg.config import Mixture, ModelRecipe
from xseg.errors import UserError
from xseg.train import manifest, slim

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
    "skip_nonfinite",
    "stall",
    "track",
    "watch",
}
"""Keys of a stage that may change when a run is resumed. ``steps`` and ``epochs`` move the end, and the schedule with
it: a lengthened run takes up the rate that the longer schedule has at that step."""


def checkpoints(out: Path) -> dict[int, Path]:
    """Return the folders of a run's checkpoints by step, oldest first; damage is not looked for."""
    found = {}
    for path in (out / "checkpoints").glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdigit():
            found[int(number)] = path
    return dict(sorted(found.items()))


def layout(acc: Accelerator) -> dict[str, Any]:
    """Say how states lie in a checkpoint: number of processes, ZeRO stage (None without DeepSpeed), FSDP if it is."""
    plugin = acc.state.deepspeed_plugin
    precision = "bf16" if plugin is not None and acc.mixed_precision == "bf16" else "fp32"
    zero = None if plugin is None else plugin.zero_stage
    split = {"processes": acc.num_processes, "zero": zero, "weights": precision}
    return split | ({"fsdp": 2} if acc.is_fsdp2 else {})


def save(acc: Accelerator, out: Path, step: int, recipe: Mapping[str, Any], keep: int, skipped: int = 0) -> None:
    """Write ``out/checkpoints/step_N`` of all ranks, then drop all but the newest ``keep``.

    ``skipped``: steps so far that changed no weight (``skip_nonfinite``). Raises UserError when the disk is full;
    checkpoints that were complete before stay loadable.
    """
    final = out / "checkpoints" / f"step_{step}"
    with writing(final, acc) as folder:
        acc.save_state(str(folder), **slim.saving(acc, recipe))
        acc.wait_for_everyone()
        if acc.is_main_process:
            fields = {"step": step, "skipped": skipped, "layout": layout(acc), "recipe": dict(recipe)}
            (folder / STATE).write_text(json.dumps(fields, indent=1), encoding="utf8")
            manifest.write(folder)
    if acc.is_main_process:
        for old in list(checkpoints(out).values())[: -max(keep, 1)]:
            _drop(old)


def restore(acc: Accelerator, path: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Load a checkpoint into the prepared model and optimiser; return what it says of itself (``step``, ``skipped``).

    Raises UserError when it was written by another recipe or on another number of processes.
    """
    state = read_state(path)
    check_same(state["recipe"], recipe, path)
    written, now = state["layout"], layout(acc)
    if written != now:
        keys = [k for k in sorted({*written, *now}) if written.get(k) != now.get(k)]
        names = [f"{k} = {written.get(k)}, now {now.get(k)}" for k in keys]
        raise UserError(
            f"{path}: written with {'; '.join(names)}: optimiser states cannot be split anew; resume with the "
            "accelerate config and the number of processes of the first launch, or (without adapters) go on from the "
            "weights alone: `xseg consolidate STAGE --set ... --out DIR`, then this launch with another out and "
            "--resume DIR"
        )
    acc.load_state(str(path), **slim.loading(acc, recipe))
    return state


def read_state(path: Path) -> dict[str, Any]:
    """Return the step, layout and recipe of a checkpoint."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf8"))
    return state


def check_same(written: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raise UserError naming the keys in which a resumed run's recipe differs from the checkpoint's."""
    now = json.loads(json.dumps(now))
    for name, kind in (("model", ModelRecipe), ("mixture", Mixture)):
        if isinstance(written.get(name), dict):
            # What the recipe could not say yet stood at its default.
            defaults = {k: f.default for k, f in kind.model_fields.items() if k in now[name]}
            written = {**written, name: {**defaults, **written[name]}}
    changed = [k for k in sorted({*written, *now} - FREE) if written.get(k) != now.get(k)]
    if changed:
        lines = "\n".join(f"  {k}: {written.get(k)!r} -> {now.get(k)!r}" for k in changed)
        raise UserError(
            f"{path}: the recipe changed since this checkpoint, so the run would be neither the old nor the new one:\n"
            f"{lines}\nrestore these keys, or start anew with another out (and init_from, to keep the weights)"
        )


def newest(acc: Accelerator, out: Path) -> Path | None:
    """Return the newest whole checkpoint as rank 0 sees it, so that all ranks load the same one; None without any.

    Damaged ones that are newer are told, and renamed to ``step_N.damaged`` so that they count no more. Raises
    UserError when there are checkpoints and none of them is whole: starting anew in silence would overwrite the run.
    """
    seen: list[tuple[Path | None, list[str]]] = [(None, [])]
    if acc.is_main_process:
        seen = [_newest(out)]
    broadcast_object_list(seen)
    found, faults = seen[0]
    if faults and found is None:
        lines = "\n".join(f"  {line}" for line in faults)
        raise UserError(
            f"{out / 'checkpoints'}: no checkpoint is whole, so there is nothing to resume from:\n{lines}\n"
            "fetch a copy of one, or start anew with another out"
        )
    for line in faults:
        acc.print(f"passed over {line}", flush=True)
    return found


def _newest(out: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each newer one that is damaged."""
    faults: dict[Path, str] = {}
    for path in reversed(checkpoints(out).values()):
        fault = manifest.fault(path)
        if not fault:
            for damaged in faults:
                aside = damaged.with_name(f"{damaged.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                damaged.rename(aside)
            return path, [f"{damaged}: {text}; it is now {damaged.name}.damaged" for damaged, text in faults.items()]
        faults[path] = fault
    return None, [f"{damaged}: {text}" for damaged, text in faults.items()]


@contextmanager
def writing(final: Path, acc: Accelerator) -> Iterator[Path]:
    """Give a temporary folder to all ranks; flushed to disk and renamed to ``final`` when all have written."""
    temporary = final.parent / f".{final.name}.tmp"
    with full_disk(final):
        if acc.is_main_process:
            # What a killed run left half-written or half-removed, under whatever name.
            for kind in ("tmp", "old"):
                for left in final.parent.glob(f".{final.name.split('_')[0]}*.{kind}"):
                    shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
        acc.wait_for_everyone()
        yield temporary
        acc.wait_for_everyone()
        if acc.is_main_process:
            for file in temporary.rglob("*"):
                _flush(file)
            older = _aside(final) if final.exists() else None
            temporary.rename(final)
            _flush(final.parent)
            if older is not None:
                shutil.rmtree(older, ignore_errors=True)
        acc.wait_for_everyone()


def _aside(path: Path) -> Path:
    """Give a folder a hidden name: killed before it is gone, it must not look like a whole one."""
    older = path.parent / f".{path.name}.old"
    shutil.rmtree(older, ignore_errors=True)
    return path.rename(older)


def _drop(path: Path) -> None:
    shutil.rmtree(_aside(path))


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
        older = sorted(p.name for p in final.parent.glob("step_*") if (p / manifest.FILE).is_file())
        kept = f"complete before it and still loadable: {', '.join(older)}" if older else "no earlier one is complete"
        raise UserError(
            f"{final}: cannot be written: {error}; {kept}. Free some space (`df -h {final.parent}`) or lower "
            "keep_checkpoints, then run the same command with --resume auto"
        ) from error
