"""Attention on CPU in bfloat16, as autocast would run it, against float32, as xseg runs it: time and ratio.

    python bench/attention.py [--threads N] [--pairs N]

Forward and backward of the fused kernel at the sizes of the tiny model's stages: SigLIP's and SAM's cells, and texts of
the language model, without a mask and with the one that padding makes.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from record import save
from torch import Tensor

from xseg.losses.points import generator

SIZES = {
    "siglip": (8, 4, 36, 32),
    "sam": (8, 4, 144, 32),
    "text of 200": (8, 5, 200, 32),
    "text of 400": (8, 5, 400, 32),
}
"""Images or texts, heads, rows, width of a head."""


def heads(size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value."""
    g = generator("cpu", 0)
    return [torch.randn(size, generator=g).to(dtype).requires_grad_() for _ in range(3)]


def seconds(size: tuple[int, ...], dtype: torch.dtype, mask: Tensor | None) -> tuple[float, float]:
    """Processor time of one forward and one backward; float32's includes the casts from and to bfloat16."""
    given = heads(size, torch.bfloat16)
    start = time.process_time()
    out = F.scaled_dot_product_attention(*(t.to(dtype) for t in given), attn_mask=mask)
    middle = time.process_time()
    out.backward(torch.ones_like(out))
    return middle - start, time.process_time() - middle


def compare(size: tuple[int, ...], mask: Tensor | None, pairs: int) -> dict[str, float]:
    """Medians in ms of alternating runs after one warm-up of each, and the ratio of both together."""
    runs: dict[torch.dtype, list[tuple[float, float]]] = {torch.bfloat16: [], torch.float32: []}
    for number in range(pairs + 1):
        for dtype, found in runs.items():
            spent = seconds(size, dtype, mask)
            if number:
                found.append(spent)
    row = {}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        row |= {
            f"{name}_{way}_ms": 1e3 * statistics.median(s[k] for s in runs[dtype])
            for k, way in enumerate(("fwd", "bwd"))
        }
    ratios = [sum(a) / sum(b) for a, b in zip(runs[torch.bfloat16], runs[torch.float32], strict=True)]
    return row | {"ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = {}
    for name, size in SIZES.items():
        rows[name] = compare(size, None, args.pairs)
        if name.startswith("text"):
            causal = torch.ones(size[2], size[2], dtype=torch.bool).tril().expand(size[0], 1, -1, -1)
            rows[f"{name}, padded"] = compare(size, causal, args.pairs)
    print(f"{'what':22s}" + "".join(f"{key:>14s}" for key in next(iter(rows.values()))))
    for name, row in rows.items():
        print(f"{name:22s}" + "".join(f"{value:14.2f}" for value in row.values()))
    about = {
        "claim": "float32, casts included, is at least as fast as bfloat16 at every size",
        "pairs": args.pairs,
        "threads": args.threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "method": "medians of alternating runs, processor time",
    }
    save("attention", {**about, "rows": rows}, ["torch"], args.out)


if __name__ == "__main__":
    main()
