"""Evaluation on two processes is evaluation on one."""

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from infer.oracle import encoder, oracle, shapes
from small_models import LLM, SAM, SEGMENTOR, SIGLIP

from xseg.config import Suite, SuiteRow
from xseg.errors import UserError
from xseg.geometry.views import ViewSizes
from xseg.infer.evaluate import Evaluation, evaluate
from xseg.infer.processing import XSegProcessor
from xseg.infer.ranks import ALONE, Ranks
from xseg.models import checkpoint
from xseg.models.build import build_model
from xseg.models.configuration import XSegConfig

SUITE = """
name: two
rows: [shapes/panoptic_val, {recipe: shapes/panoptic_val, task: {name: generic_seg, outputs: [instance]}},
  shapes/refer_val, {recipe: shapes/panoptic_val, task: interactive_seg}, shapes/talk_val]
"""


@pytest.mark.parametrize(("count", "world"), [(7, 2), (1, 3), (0, 2), (12, 5)])
def test_stretches_are_all_there_is_in_order(count: int, world: int) -> None:
    stretches = [Ranks(rank, world).stretch(count) for rank in range(world)]
    assert [k for stretch in stretches for k in stretch] == list(range(count))
    assert max(map(len, stretches)) - min(map(len, stretches)) <= 1


def test_a_process_that_is_alone_asks_nobody() -> None:
    assert ALONE.agreed(lambda: 3) == 3 and ALONE.gathered("a") == ["a"] and ALONE.tell(1) == 1
    assert ALONE.first and ALONE.device is None


class Desk:
    """Where threads that stand for processes lay what they tell each other, as bytes."""

    def __init__(self, world: int) -> None:
        self.slots: list[bytes] = [b""] * world
        self.barrier = threading.Barrier(world, timeout=200)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = pickle.dumps(value)
        self.barrier.wait()
        found = [pickle.loads(slot) for slot in self.slots]
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Threads(Ranks):
    """Ranks whose processes are threads of this one."""

    desk: Any = None

    def agreed(self, work: Callable[[], Any]) -> Any:
        found, trouble = None, None
        try:
            found = work()
        except UserError as error:
            trouble = error
        for told in self.desk.exchange(self.rank, trouble):
            if told is not None:
                raise told
        return found

    def gathered(self, value: Any) -> list[Any] | None:
        values = self.desk.exchange(self.rank, value)
        return values if self.first else None

    def tell(self, value: Any) -> Any:
        return self.desk.exchange(self.rank, value)[0]


def shared(world: int, root: Path, out: Path) -> list[Any]:
    """What ``evaluate`` returns, or raises, on each of ``world`` threads."""
    suite = Suite(name="s", rows=[SuiteRow(recipe=f"shapes/{name}_val") for name in ("panoptic", "refer", "talk")])
    desk = Desk(world)

    def work(rank: int) -> Any:
        ranks = ALONE if world == 1 else Threads(rank, world, desk)
        try:
            return evaluate(oracle(), suite, Evaluation(root, out, 2, ranks=ranks))
        except UserError as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, range(world)))


@pytest.mark.parametrize("world", [2, 3])
def test_stretches_add_up_to_the_whole(world: int, tmp_path: Path) -> None:
    root = shapes(tmp_path / "data", 5)
    [alone] = shared(1, root, tmp_path / "alone")
    together = shared(world, root, tmp_path / "together")
    assert all(results == together[0] for results in together)
    assert together[0]["rows"] == alone["rows"]
    written = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("alone", "together")]
    assert written[0] == written[1] and written[0].count(b"\n") > 10
    assert json.loads((tmp_path / "together/results.json").read_text()) == together[0]
    assert [row["samples"] for row in together[0]["speed"]] == [row["samples"] for row in alone["speed"]]


def test_the_trouble_of_one_is_that_of_all(tmp_path: Path) -> None:
    told = shared(2, tmp_path / "nothing", tmp_path / "out")
    assert [type(error) for error in told] == [UserError, UserError] and "panoptic.json" in str(told[1])
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a few thousand weights."""
    folder, words = tmp_path_factory.mktemp("model") / "final", encoder()
    torch.manual_seed(0)
    config = XSegConfig(
        sam_config=SAM,
        siglip_config=SIGLIP,
        text_config={**LLM, "vocab_size": len(words.tokenizer)},
        segmentor_config=SEGMENTOR,
        seg_token_id=words.special.seg,
        p_open_token_id=words.special.p_open,
        p_close_token_id=words.special.p_close,
    )
    checkpoint.save(build_model(config), folder)
    XSegProcessor(words, ViewSizes(64, 32)).save_pretrained(folder)
    return folder


def launched(processes: int, model: Path, root: Path, suite: Path, out: Path) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = ["eval", "--model", model, "--suite", suite, "--root", root, "--out", out, "--batch-size", "2"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "xseg.ui.cli", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one_bit_for_bit(model: Path, tmp_path: Path) -> None:
    root, suite = shapes(tmp_path / "data", 7), tmp_path / "suite.yaml"
    suite.write_text(SUITE)
    written = []
    for processes in (1, 2):
        done = launched(processes, model, root, suite, tmp_path / str(processes))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("results.json") == 1
        results = json.loads((tmp_path / str(processes) / "results.json").read_text())
        samples = [{k: row[k] for k in ("dataset", "samples")} for row in results["speed"]]
        written.append((results["rows"], samples, (tmp_path / str(processes) / "samples.jsonl").read_bytes()))
        assert not list((tmp_path / str(processes)).glob("*.partial"))
    assert written[0] == written[1]
    assert {row["metric"] for row in written[0][0]} >= {"PQ", "AP", "cIoU", "mIoU", "exact match", "oracle IoU"}


@pytest.mark.slow
def test_wrong_input_is_told_once_by_all_processes(model: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(SUITE)
    done = launched(2, model, tmp_path / "nothing", suite, tmp_path / "out")
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("xseg: ")]) == 1
    assert not (tmp_path / "out").exists()
