"""What ``xseg plan --gpus 0`` foresees against what a process holds: three small CPU stages, two batch sizes each.

    python bench/plan_memory.py --out bench/results/plan_memory.json

Each stage trains a few steps in a process of its own, whose greatest resident size is taken; the plan is made in
another one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import save

from xseg.data.shapeworld.write import write

ROOT = Path(__file__).parent.parent
STAGES = {"s1_segmentor": (32, 8), "s2_align": (48, 16), "s3_mixed": (32, 8)}
"""Stages under train_stages/tiny, and samples of a batch."""
STEPS = 4
GIGABYTE = 1e9
PLAN = (
    "import sys\nfrom xseg.train import loop, plan\nfrom xseg.train.stage import read_stage\n"
    "print(plan.predict(read_stage(sys.argv[1], sys.argv[2:]), plan.Asked(0, 1e12, 1.0)).need.total)"
)


def row(name: str, batch_size: int, folder: Path) -> dict[str, Any]:
    """Train and plan one stage."""
    stage = str(ROOT / f"train_stages/tiny/{name}.yaml")
    settings = ["model=scratch", f"data_root={folder}", "init_from=[]", "precision=fp32", f"batch_size={batch_size}"]
    settings += ["num_workers=1", "watch=null", f"out={folder / f'{name}_{batch_size}'}", f"steps={STEPS}"]
    subprocess.run([sys.executable, "-m", "xseg.train", stage, "--set", *settings], cwd=ROOT, check=True)
    lines = (folder / f"{name}_{batch_size}/metrics.jsonl").read_text(encoding="utf8").splitlines()
    measured = max(json.loads(line)["memory_gb"] for line in lines)
    done = subprocess.run(
        [sys.executable, "-c", PLAN, stage, *settings], cwd=ROOT, check=True, capture_output=True, text=True
    )
    foreseen = float(done.stdout.split()[-1]) / GIGABYTE
    return {
        "stage": name, "batch_size": batch_size, "n": STEPS, "foreseen_gb": round(foreseen, 3),
        "measured_gb": round(measured, 3), "ratio": round(foreseen / measured, 3),
    }  # fmt: skip


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary) / "shapes/train", 64, 3, size=96)
        rows = [row(name, size, Path(temporary)) for name in given.stages for size in STAGES[name]]
    for found in rows:
        print("  ".join(f"{key} {value}" for key, value in found.items()))
    protocol = "greatest resident size of the training process, one process, float32, model scratch"
    if given.out is not None:
        save(given.out.stem, {"protocol": protocol, "rows": rows}, ["torch", "deepspeed"], given.out.parent)


if __name__ == "__main__":
    main()
