"""A stage of a few thousand weights on a handful of pictures, and how its run is read."""

import json
import os
import subprocess
import sys
from pathlib import Path

from xseg.data.shapeworld.write import write

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "train_stages/tiny"
SMALL = (
    "model_overrides={sam: {image_size: 48, hidden_size: 32, mlp_dim: 64, num_hidden_layers: 2, global_attn_indexes: "
    "[0, 1], num_attention_heads: 2, stem: patch}, siglip: {stem: patch, image_size: 48, hidden_size: 32, "
    "intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}, llm: {hidden_size: 32, "
    "intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2}, "
    "segmentor: {width: 32, connector_width: 32, connector_layers: "
    "[1, 1, 2], num_queries: 12, decoder_layers: 2, heads: 2, ffn: 64, seg_gain: 1.0, pixel_classifier: true}}"
)
COMMON = [
    "model=scratch",
    "watch=null",
    "num_workers=0",
    "precision=fp32",
    "schedule.warmup=0",
    "batch_size=2",
    "save_every=2",
    "muon=0",
]
SAMPLED = ("loss.points=sampled", "loss.num_points=64")


TIMINGS = {"data_s", "data_share", "images_per_s", "tokens_per_s", "tflops", "memory_gb", "elapsed_s"}


def pictures(root: Path) -> Path:
    """Write twelve ShapeWorld pictures; return the data root."""
    write(root / "shapes/train", 12, seed=3, size=48)
    return root


def a_minute() -> float:
    """Sixty seconds on processors of one's own: more where others wait for the same ones."""
    return 60 * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    """The loss of every step."""
    return [row["loss"] for row in metrics(out)]


def untimed(rows: list[dict]) -> list[dict]:
    """Metrics without what the clock says."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def launch(kind: str, data: Path, out: Path, *settings: str, flags: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start stage 1 in a process group of its own; ``kind``: a launch file's name, and options of the launcher; or
    "torchrun", two processes of it."""
    name, *options = kind.split()
    config = str(ROOT / f"train_stages/accelerate/{name}.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, *options]
    if name == "torchrun":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "xseg.train"]
    stage = [str(TINY / "s1_segmentor.yaml"), "--set", SMALL, f"out={out}", f"data_root={data}", *COMMON, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = (out.parent / f"{out.name}.log").open("a")
    return subprocess.Popen(
        [*command, *stage, *flags], env=environment, stdout=log, stderr=log, start_new_session=True, cwd=ROOT
    )


def finished(process: subprocess.Popen, out: Path) -> str:
    """Wait for a run that should do well; return what it said."""
    status = process.wait(timeout=500)
    said = (out.parent / f"{out.name}.log").read_text()
    assert status == 0, said
    return said
