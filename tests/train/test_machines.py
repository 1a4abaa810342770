"""Two machines in the place of two processes: each its own launcher, met at an address of the loopback."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import COMMON, ROOT, SMALL, TINY, losses, metrics, pictures

MACHINE = ROOT / "train_stages/slurm/machine.sh"


def test_the_examples_are_shell_and_name_what_is_there() -> None:
    for name in ("machine.sh", "stage.sbatch"):
        subprocess.run(["bash", "-n", str(MACHINE.parent / name)], check=True)
    text = MACHINE.read_text() + (MACHINE.parent / "stage.sbatch").read_text()
    named = [
        word.strip("\"'}") for word in text.replace("-}", " ").replace(":-", " ").split() if "train_stages/" in word
    ]
    assert named and all((ROOT / word).is_file() for word in named), named


def test_a_machine_without_its_number_is_told() -> None:
    given = {"PATH": os.environ["PATH"], "MACHINES": "2"}
    done = subprocess.run(["bash", str(MACHINE)], env=given, capture_output=True, text=True)
    assert done.returncode != 0 and "MACHINE" in done.stderr


def test_deepspeed_on_cpu_needs_no_compiler(tmp_path: Path) -> None:
    code = (
        "from deepspeed.comm.torch import build_shm_op\n"
        "from xseg.train import launch\n"
        "launch._compile_nothing()\n"
        "assert build_shm_op() is None"
    )
    given = {**os.environ, "PATH": str(tmp_path), "CXX": "none", "DS_ACCELERATOR": "cpu", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_two_machines_train_the_run_of_one(tmp_path: Path) -> None:
    """Each reads a copy of the data on a disk of its own; what is written lies on the disk they share."""
    data = pictures(tmp_path / "0")
    shutil.copytree(data, tmp_path / "1")
    settings = [SMALL, *COMMON, "steps=3", "loss.points=grid"]
    stage = str(TINY / "s1_segmentor.yaml")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    common = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MACHINES": "2"}
    common |= {"HEAD": "127.0.0.2", "PORT": str(free_port()), "PROCESSES": "1"}
    running = []
    for number in range(2):
        own = {**common, "MACHINE": str(number), "CONFIG": str(ROOT / "train_stages/accelerate/cpu2.yaml")}
        given = ["--set", *settings, f"data_root={tmp_path / str(number)}", f"out={tmp_path / 'two'}", "batch_size=2"]
        log = (tmp_path / f"{number}.log").open("w")
        running.append(
            subprocess.Popen(["bash", str(MACHINE), stage, *given], env=own, cwd=ROOT, stdout=log, stderr=log)
        )
    statuses = [process.wait(timeout=1000) for process in running]
    said = [(tmp_path / f"{number}.log").read_text() for number in range(2)]
    assert statuses == [0, 0], said
    assert "step 3/3" in said[0] and "step 3/3" not in said[1], "rank 0 alone tells"
    assert [row["step"] for row in metrics(tmp_path / "two")] == [1, 2, 3]
    alone = [sys.executable, "-m", "xseg.train", stage, "--set", *settings, f"data_root={tmp_path / '0'}"]
    subprocess.run([*alone, f"out={tmp_path / 'one'}", "batch_size=4"], env=common, cwd=ROOT, check=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
