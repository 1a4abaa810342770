"""Evaluation on two processes is evaluation on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from infer.oracle import encoder, shapes
from small_models import LLM, SAM, SEGMENTOR, SIGLIP

from xseg.geometry.views import ViewSizes
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
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


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
