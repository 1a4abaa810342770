"""Runs as users start them: `accelerate launch` with DeepSpeed or FSDP2 on CPU, one process or two, killed or not."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from small_runs import SAMPLED, finished, launch, losses, metrics, pictures, untimed

from xseg.data.shapeworld.write import write
from xseg.models import checkpoint

pytestmark = pytest.mark.slow
FSDP2 = "fsdp2 --num_processes 2"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = pictures(tmp_path_factory.mktemp("data"))
    write(root / "shapes/val", 3, seed=3, size=48, split="val")
    return root


@pytest.mark.parametrize("muon", [0, 4])
def test_kill_nine_under_zero2(muon: int, data: Path, tmp_path: Path) -> None:
    settings = ("steps=40", "save_every=5", f"muon={muon}", *SAMPLED)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finished(launch("zero2", data, whole, *settings), whole)
    process = launch("zero2", data, cut, *settings)
    deadline = time.monotonic() + 250
    while not (cut / "checkpoints/step_10").is_dir():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (cut / "final").exists()
    assert "resumed from" in finished(launch("zero2", data, cut, *settings, flags=("--resume", "auto")), cut)
    assert untimed(metrics(cut)) == untimed(metrics(whole))


@pytest.mark.parametrize(
    ("kind", "batch_size", "muon"),
    [
        ("zero1", 4, 0),
        ("zero3", 4, 0),
        ("cpu2", 2, 0),
        (FSDP2, 2, 0),
        ("zero2", 4, 4),
        ("torchrun", 2, 0),
        ("torchrun", 2, 4),
    ],
)
def test_every_launcher_trains_the_same_run(kind: str, batch_size: int, muon: int, data: Path, tmp_path: Path) -> None:
    settings = ("steps=4", "loss.points=grid", "clip=1.0", f"muon={muon}")
    alone, other = tmp_path / "single", tmp_path / "other"
    finished(launch("single", data, alone, *settings, "batch_size=4"), alone)
    finished(launch(kind, data, other, *settings, f"batch_size={batch_size}"), other)
    # Muon's steps are computed in bfloat16, where another order of sums shows more
    assert losses(other) == pytest.approx(losses(alone), rel=1e-3 if muon else 2e-4)
    assert [row["grad_norm"] for row in metrics(other)] == pytest.approx(
        [row["grad_norm"] for row in metrics(alone)], rel=2e-3
    )
    first, second = (checkpoint.read_weights(run / "final") for run in (alone, other))
    assert first.keys() == second.keys()
    apart = torch.cat([(first[name] - second[name]).abs().flatten() for name in first])
    if muon:  # its four steps are 2e-3 long
        assert apart.mean() < 1e-4
    else:
        assert apart.max() < 1e-3


@pytest.mark.parametrize("kind", ["zero2", "cpu2"])
def test_all_ranks_stay_in_step_while_one_looks(kind: str, data: Path, tmp_path: Path) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    looks = ("watch.suite=shapes", "watch.every=2", "watch.images=2")
    finished(launch(kind, data, plain, "steps=5", *SAMPLED), plain)
    finished(launch(kind, data, watched, "steps=5", *SAMPLED, *looks), watched)
    rows = untimed(metrics(watched))
    assert [row["step"] for row in rows if row.pop("held_out", None)] == [2, 4, 5]
    assert rows == untimed(metrics(plain))


def test_the_trouble_of_one_rank_is_told(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = launch("cpu2", tmp_path, out, "steps=4")
    assert process.wait(timeout=250) != 0
    said = (tmp_path / "run.log").read_text()
    lines = [line for line in said.splitlines() if line.startswith("xseg.train:")]
    assert len(lines) == 1 and "panoptic.json" in lines[0] and "exitcode  : 2" in said


@pytest.mark.parametrize("kind", ["zero2", "zero3", "cpu2"])
def test_adapters_go_on_from_checkpoints_without_the_frozen_weights(kind: str, data: Path, tmp_path: Path) -> None:
    lora = ("adapters={sam: {rank: 2, dropout: 0.1}}", "schedule.kind=constant", "save_every=3", *SAMPLED)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finished(launch(kind, data, whole, "steps=6", *lora), whole)
    finished(launch(kind, data, cut, "steps=3", *lora), cut)
    assert "resumed from" in finished(launch(kind, data, cut, "steps=6", *lora, flags=("--resume", "auto")), cut)
    assert untimed(metrics(cut)) == untimed(metrics(whole))
    first, second = (checkpoint.read_weights(run / "final/adapter.safetensors") for run in (whole, cut))
    assert any("lora_B" in name and value.any() for name, value in first.items())
    assert first.keys() == second.keys() and all(torch.equal(v, second[n]) for n, v in first.items())
