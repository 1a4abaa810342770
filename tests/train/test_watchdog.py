"""Who is behind, who is gone, who gave no gradient: told by name."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from xseg.errors import RunError
from xseg.train import launch, watchdog
from xseg.train.trouble import check_gradients, explained, told
from xseg.train.watchdog import Watchdog, alive, behind

STALLED = """
import sys, time
from pathlib import Path
from xseg.train.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), 0, 1, 0.2) as dog:
    dog.step(3, "shapes/refer", lambda: ["a/1", "a/2"])
    dog.done(0.01)
    time.sleep(60)
"""


def record(rank: int, at: int, gradients: int = 0, **fields: Any) -> dict[str, Any]:
    given = {
        "rank": rank, "pid": os.getpid(), "host": "here", "step": 4, "at": at, "gradients": gradients, "doing": "waits",
        "source": f"set{rank}", "batch": {"samples": [f"set{rank}/7", f"set{rank}/9"]},
    }  # fmt: skip
    return given | fields


def test_the_rank_with_fewer_signs_of_life_is_behind() -> None:
    text = behind([record(0, 9), record(1, 8, doing="sleeps"), record(2, 9)], own=0)
    assert text.startswith(f"rank 1 (process {os.getpid()} on here) sleeps in step 4 of set1: set1/7, set1/9, while")
    assert "rank 2" not in text


def test_the_rank_with_fewer_gradients_at_the_same_place_is_behind() -> None:
    text = behind([record(0, 9, 120), record(1, 9, 117)], own=0)
    assert text.startswith("rank 1") and "117 gradients had come" in text and "120 gradients" in text


def test_a_process_that_is_gone_is_named() -> None:
    ended = subprocess.Popen(["true"])
    while alive(ended.pid):
        time.sleep(0.01)
    zombie = behind([record(0, 9), record(1, 9, pid=ended.pid)], own=0)
    ended.wait()
    assert zombie.startswith("rank 1") and zombie.endswith("that process is gone")
    elsewhere = behind([record(0, 9), record(1, 9, pid=ended.pid, host="there")], own=0)
    assert elsewhere.startswith("all ranks stand at the same place"), "processes of other machines cannot be asked"


def test_a_stall_ends_the_process_with_a_report(tmp_path: Path) -> None:
    begin = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", STALLED, str(tmp_path)], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1 and time.monotonic() - begin < 50
    assert "no progress for" in ended.stderr and "step 3 of shapes/refer: a/1, a/2" in ended.stderr
    assert (tmp_path / "post_mortem.txt").read_text().strip() in ended.stderr


def test_slow_work_and_slow_steps_have_more_time(tmp_path: Path) -> None:
    """The patience is 0.1 s; a process that ran out of it would end this test with it."""
    with Watchdog(tmp_path, 0, 1, 0.1) as dog:
        dog.step(1, "a", list)
        time.sleep(0.5)  # the first step
        dog.done(0.01)
        with dog.slow("saves"):
            time.sleep(0.5)
        dog.done(1.0)
        dog.step(2, "a", list)
        time.sleep(0.5)
    assert not (tmp_path / "post_mortem.txt").exists()


def test_only_one_rank_tells(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 2, 60.0) as first, Watchdog(tmp_path, 1, 2, 60.0) as second:
        with pytest.raises(RunError) as early, told(second):
            raise RunError("x/3: broken")
        with pytest.raises(RunError) as late, told(first):
            raise RuntimeError("[/gloo/pair.cc] Connection closed by peer")
    assert early.value.__notes__ == ["on rank 1"] and late.value.__notes__ == ["told by another rank"]
    assert (tmp_path / "post_mortem.txt").read_text() == "rank 1: x/3: broken\n"
    with Watchdog(tmp_path, 0, 1, 60.0):
        assert not (tmp_path / "post_mortem.txt").exists(), "a new run starts with a clean slate"
        assert [p.name for p in (tmp_path / "ranks").iterdir()] == ["0.json"]


def test_a_bug_keeps_its_traceback_and_says_where(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 1, 60.0) as dog:
        dog.step(2, "a", list)
        with pytest.raises(KeyError) as caught, told(dog):
            raise KeyError("no such field")
    assert "rank 0" in caught.value.__notes__[0] and "step 2" in caught.value.__notes__[0]


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = (torch.nn.Linear(2, 2) for _ in range(3))
        self.frozen.requires_grad_(False)


def test_a_parameter_without_a_gradient_is_named(tmp_path: Path) -> None:
    net, dog = Two(), Watchdog(tmp_path, 0, 1, 60.0)
    dog.listen(net)
    batch: Any = type("Batch", (), {"keys": ("x/1", "x/2")})
    net.used(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RunError, match=r"step 5: 2 .*unused\.bias, unused\.weight.*x/1, x/2"):
        check_gradients(dog, 4, batch)
    (net.used(torch.ones(1, 2)).sum() + 0 * net.unused(torch.ones(1, 2)).sum()).backward()
    check_gradients(dog, 4, batch)


@pytest.mark.parametrize("size", [2**50])
def test_memory_that_does_not_do_names_the_batch(tmp_path: Path, size: int) -> None:
    dog = Watchdog(tmp_path, 1, 2, 60.0)
    dog.step(7, "refcoco", list)
    dog.record["batch"] = {
        "samples": ["refcoco/3"], "images": [[480, 640]], "tokens": [1753], "queries": 2, "masks": 3
    }  # fmt: skip
    with pytest.raises(RuntimeError) as caught:
        torch.empty(size)
    text = str(explained(caught.value, dog))
    for word in (
        "rank 1",
        "step 7 of refcoco: refcoco/3",
        "480x640",
        "[1753] tokens",
        "halve batch_size",
        "zero3.yaml",
    ):
        assert word in text
    assert "refcoco/3" in str(explained(torch.OutOfMemoryError("CUDA out of memory. Tried"), dog))
    assert explained(ValueError("something else"), dog) is None


def test_the_record_is_read_by_others_at_any_time(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 1, 60.0) as dog:
        for step in range(50):
            dog.step(step, "a", list)
            dog.write()
            assert json.loads((tmp_path / "ranks/0.json").read_text())["step"] == step
        assert watchdog.place(dog.records()[0]).endswith("in step 49")


class Pair:
    """Two ranks, the second of which gathers something else by ``other``."""

    device = "cpu"

    def __init__(self, *other: int) -> None:
        self.other = torch.tensor([other])

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        return torch.cat([mine, mine + self.other])


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 5, 0)], ids=["another step", "another batch"])
def test_ranks_at_other_work_are_named(other: tuple[int, ...]) -> None:
    pair: Any = Pair(*other)
    with pytest.raises(RunError, match=r"not at the same work \(rank 0: step 4, batch \w{8}, rank 1: step [45], batch"):
        launch.together(pair, 3, [[1, 2]], 0)


def test_one_rank_that_stops_stops_all() -> None:
    same: Any = Pair(0, 0, 0)
    stops: Any = Pair(0, 0, 15)
    assert launch.together(same, 3, [[1, 2]], 0) and not launch.together(same, 3, [[1, 2]], 2)
    assert not launch.together(stops, 3, [[1, 2]], 0)
