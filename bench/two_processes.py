"""The data path of a run on two processes against one: images per second.

Every process prepares micro-batches of 8 by itself, without a data worker, so that one process has one core's work:
with a worker each, one process alone already fills most of two cores. What is timed is the whole walk from annotation
files to collated batches on COCO-like ShapeWorld pictures, in wall time, from the moment that all processes are ready.
Needs two cores that nothing else uses. Prints a table and writes bench/results/two_processes.json.

    OMP_NUM_THREADS=1 python bench/two_processes.py [--steps 40] [--rounds 5]
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch.multiprocessing
from record import save

from xseg.data.loader import loader
from xseg.data.shapeworld.write import write
from xseg.train import assemble
from xseg.train.stage import read_stage

STAGE = Path(__file__).parent.parent / "train_stages/tiny/s1_segmentor.yaml"
TARGET = 1.6
LEAST_STEPS, LEAST_ROUNDS = 20, 3
BATCH, PICTURES, SIDE = 8, 200, 480


def prepare(rank: int, root: str, world: int, steps: int, ready: Barrier, done: Any) -> None:
    """One process: its rank's batches of ``steps`` steps; tells the images and the seconds they took."""
    torch.set_num_threads(1)
    sizes = ["model=scratch", "model_overrides={sam: {image_size: 1024}}"]
    settings = [f"data_root={root}", f"batch_size={BATCH}", *sizes]
    stage = read_stage(str(STAGE), settings)
    data = assemble.load_data(stage)
    batches = loader(data.datasets, assemble.plan(stage, data, world), rank, 0, steps + 1, num_workers=0)
    next(batches)  # files are open
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


def not_written(ratio: float, cores: int, steps: int, rounds: int) -> str:
    """Why a ratio is no measurement of the claim; "" = it is one."""
    if cores < 2:
        return "one core: two processes cannot be faster than one here"
    if steps < LEAST_STEPS or rounds < LEAST_ROUNDS:
        return f"{steps} steps in {rounds} rounds: a measurement has at least {LEAST_STEPS} in {LEAST_ROUNDS}"
    return f"below {TARGET:g}x" if ratio < TARGET else ""


def main() -> None:
    """Measure, print, and write what is a measurement; status 1 where it is none, or the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as root:
        write(Path(root) / "shapes/train", PICTURES, seed=0, size=SIDE)
        rounds = [{world: rate(root, world, given.steps) for world in (1, 2)} for _ in range(given.rounds)]
    one, two = (statistics.median(r[world] for r in rounds) for world in (1, 2))
    ratio = statistics.median(r[2] / r[1] for r in rounds)
    print(f"images/s on the data path: one process {one:.1f}, two {two:.1f}: {ratio:.2f}x")
    print(f"cores: {cores}; load before the start: {load:.1f} (0 = nothing else uses them)")
    reason = not_written(ratio, cores, given.steps, given.rounds)
    if reason:
        raise SystemExit(f"bench/two_processes.py: {reason}; nothing is written")
    report = {
        "claim": f"two processes prepare at least {TARGET:g}x the images per second of one",
        "load_before": round(load, 2),
        "method": f"median over {given.rounds} rounds of wall time, one process and two by turns; n = "
        f"{given.steps * BATCH} images a process and round",
        "rows": [{"processes": 1, "images_per_s": round(one, 2)}, {"processes": 2, "images_per_s": round(two, 2)}],
        "ratios": [round(r[2] / r[1], 3) for r in rounds],
        "ratio": round(ratio, 3),
    }
    save("two_processes", report, ["numpy", "pillow", "torch"])


if __name__ == "__main__":
    main()
