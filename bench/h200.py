"""The three stages of the paper preset with random weights: pictures a second, MFU, peak memory, data wait.

    python bench/h200.py --out bench/results/h200.json                       one accelerator
    python bench/h200.py --model scratch --side 96 --batch 2 --steps 3 --launch single     a rehearsal on CPU

Each stage is a real run of ``xseg.train`` on ShapeWorld pictures of the preset's size, so loading, loss and optimiser
are in the figures; weights, words (the vocabulary is ShapeWorld's) and pictures say nothing, and nothing depends on
them but the number of tokens. The floor is arithmetic: pictures a second of one H200 at 790 TFLOP/s.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from record import save

from xseg.config import FOLDERS, ModelRecipe, read_yaml
from xseg.data.shapeworld.write import write
from xseg.paths import find

ROOT = Path(__file__).parent.parent
STAGES = {"s1": "s1_segmentor", "s2": "s2_align", "s3": "s3_mixed"}
MIXTURES = {"s1": "shapes_s1", "s2": "shapes_s2", "s3": "shapes_s3"}
FLOOR = {"s1": 79.0, "s2": 17.2, "s3": 9.8}
"""Pictures a second; stages 2 and 3 with activation checkpointing, as their recipes have it."""
SKIPPED = 0.25
"""Part of the steps, at the start, that is left out: kernels are chosen and memory is found there."""
KEYS = ("images_per_s", "tokens_per_s", "tflops", "mfu", "memory_gb", "data_share")


def bare_model(name: str, folder: Path) -> Path:
    """The model recipe without pretrained parts, with ShapeWorld's words."""
    recipe = read_yaml(find(name, FOLDERS[ModelRecipe]))
    for part in ("sam", "siglip", "llm", "segmentor"):
        recipe.get(part, {}).pop("pretrained", None)
    path = folder / "model.yaml"
    recipe["llm"] |= {"bos_token_id": 1, "eos_token_id": 860, "pad_token_id": 860}
    recipe |= {"tokenizer": "examples/tiny_parts/phi", "chat_template": "phi3"}
    path.write_text(yaml.safe_dump(recipe), encoding="utf8")
    return path


def run_stage(stage: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train some steps in a process of its own; return medians over the later ones."""
    out = folder / stage
    settings = [
        f"model={folder / 'model.yaml'}", f"mixture={MIXTURES[stage]}", "init_from=[]", f"data_root={folder}",
        f"out={out}", f"steps={given.steps}", f"batch_size={given.batch}", "accumulate=1", "save_every=1000000",
        f"num_workers={given.workers}", "jitter=null",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(ROOT / f"train_stages/accelerate/{given.launch}.yaml"), "-m", "xseg.train"]
    recipe = str(ROOT / f"train_stages/{STAGES[stage]}.yaml")
    subprocess.run([*launch, recipe, "--set", *settings], cwd=ROOT, check=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
    later = lines[int(len(lines) * SKIPPED) :]
    row: dict[str, Any] = {"stage": stage, "batch_size": given.batch, "n": len(later)}
    for key in KEYS:
        values = [line[key] for line in later if key in line]
        if values:
            row[key] = max(values) if key == "memory_gb" else statistics.median(values)
    row["floor_images_per_s"] = FLOOR[stage] if given.model == "paper" else None
    return row


def main() -> None:
    """Run the stages, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="paper")
    parser.add_argument("--side", type=int, default=640, help="pixels of a picture")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--launch", default="zero2", help="a file of train_stages/accelerate")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder / "shapes/train", max(32, 4 * given.batch), 0, size=given.side)
        bare_model(given.model, folder)
        rows = [run_stage(stage, given, folder) for stage in STAGES]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    result = {
        "device": device, "model": given.model, "rows": rows,
        "protocol": f"median of the last {1 - SKIPPED:.0%} of {given.steps} steps, one process, ShapeWorld pictures of "
        f"{given.side} px, random weights; memory is the peak; floor: FLOPs of a step at 790 TFLOP/s",
    }  # fmt: skip
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if given.out is not None:
        packages = ["torch", "transformers", "accelerate", "deepspeed"]
        save(given.out.stem, result, packages, given.out.parent)


if __name__ == "__main__":
    main()
