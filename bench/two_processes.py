"""The data path of a run on two processes against one: images per second, workers included.

One process prepares global batches of 8 as its rank's micro-batches, two prepare 4 each of the same global batches;
every process has one data worker, as a stage on CPU has. What is timed is the whole walk from annotation files to
collated batches on COCO-like ShapeWorld pictures, in wall time, from the moment that all processes are ready. Needs two
cores that nothing else uses. Prints a table and writes bench/results/two_processes.json.

    OMP_NUM_THREADS=1 python bench/two_processes.py [--steps 40] [--rounds 5]
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch.multiprocessing

from xseg.data.loader import loader
from xseg.data.shapeworld.write import write
from xseg.train import assemble
from xseg.train.stage import read_stage

RESULTS = Path(__file__).parent / "results/two_processes.json"
STAGE = Path(__file__).parent.parent / "train_stages/tiny/s1_segmentor.yaml"
TARGET = 1.6
GLOBAL, PICTURES, SIDE = 8, 200, 480


def prepare(rank: int, root: str, world: int, steps: int, ready: Barrier, done: Any) -> None:
    """One process: its rank's batches of ``steps`` steps; tells the images and the seconds they took."""
    torch.set_num_threads(1)
    sizes = ["model=scratch", "model_overrides={sam: {image_size: 1024}}"]
    settings = [f"data_root={root}", f"batch_size={GLOBAL // world}", *sizes]
    stage = read_stage(str(STAGE), settings)
    data = assemble.load_data(stage)
    batches = loader(data.datasets, assemble.plan(stage, data, world), rank, 0, steps + 1, num_workers=1)
    next(batches)  # the worker has started
    ready.wait()
    begin = time.monotonic()
    images = sum(len(micro.geometry) for micros in batches for micro in micros)
    done.put((images, time.monotonic() - begin))


def rate(root: str, world: int, steps: int) -> float:
    """Images per second of all processes together."""
    context: Any = multiprocessing.get_context("spawn")
    ready, done = context.Barrier(world), context.SimpleQueue()
    torch.multiprocessing.spawn(prepare, (root, world, steps, ready, done), nprocs=world)
    told: Sequence[tuple[int, float]] = [done.get() for _ in range(world)]
    return sum(images for images, _ in told) / max(seconds for _, seconds in told)


def main() -> None:
    """Measure, print, write; status 1 when the target is missed, 2 where there are no two cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 4:
        print("note: fewer than four cores, so two processes and their two workers share them")
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("bench/two_processes.py: one core: two processes cannot be faster than one here")
    with tempfile.TemporaryDirectory() as root:
        write(Path(root) / "shapes/train", PICTURES, seed=0, size=SIDE)
        rounds = [{world: rate(root, world, given.steps) for world in (1, 2)} for _ in range(given.rounds)]
    one, two = (statistics.median(r[world] for r in rounds) for world in (1, 2))
    ratio = statistics.median(r[2] / r[1] for r in rounds)
    print(f"images/s on the data path: one process {one:.1f}, two {two:.1f}: {ratio:.2f}x")
    report = {
        "claim": f"two processes prepare at least {TARGET:g}x the images per second of one",
        "command": f"OMP_NUM_THREADS=1 python bench/two_processes.py --steps {given.steps} --rounds {given.rounds}",
        "cpu_count": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "method": f"median over {given.rounds} rounds of wall time, one process and two by turns; n = "
        f"{given.steps * GLOBAL} images a round",
        "rows": [{"processes": 1, "images_per_s": one}, {"processes": 2, "images_per_s": two}],
        "ratio": ratio,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    if ratio < TARGET:
        raise SystemExit(f"below {TARGET:g}x")


if __name__ == "__main__":
    main()
