"""Post-processing from low-resolution logits against upsampling every prediction first; same result, time and ratio.

    python bench/postprocess.py [--threads N] [--pairs N]

Released sizes: 200 predictions at 128 x 128, canvas 1024, a 480 x 640 image, 133 classes. "first" upsamples all to the
canvas, crops and resizes all to the original, then applies the same rule.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from hotcoco import mask as coco_mask
from record import save
from torch import Tensor

from xseg import postprocess
from xseg.losses.points import generator
from xseg.types import ViewGeometry

QUERIES, GRID, LABELS, SEGMENTS = 200, 128, 133, 15
VIEW = ViewGeometry((480, 640), (768, 1024), 1024)
THINGS = [label < 80 for label in range(LABELS)]


def inputs() -> tuple[Tensor, Tensor]:
    """A picture of ``SEGMENTS`` regions, one sure prediction for each; the other predictions are background."""
    g = generator("cpu", 0)
    noise = F.interpolate(torch.randn(1, SEGMENTS, 7, 7, generator=g), GRID, mode="bicubic")[0]
    owner = noise.argmax(0)
    masks = torch.full((QUERIES, GRID, GRID), -6.0) + torch.randn(QUERIES, GRID, GRID, generator=g)
    classes = torch.randn(QUERIES, LABELS + 1, generator=g)
    classes[:, -1] += 7
    for k, query in enumerate(torch.randperm(QUERIES, generator=g)[:SEGMENTS].tolist()):
        masks[query] += 12 * F.avg_pool2d((owner == k).float()[None], 3, 1, 1)[0]
        classes[query, (7 * k) % LABELS] += 14
    return masks, classes


def upsample_all(masks: Tensor) -> Tensor:
    canvas = F.interpolate(masks[None], (VIEW.canvas, VIEW.canvas), mode="bilinear")
    return F.interpolate(canvas[..., : VIEW.scaled[0], : VIEW.scaled[1]], VIEW.original, mode="bilinear")[0]


def panoptic_first(masks: Tensor, classes: Tensor, threshold: float) -> np.ndarray:
    """The rule of ``postprocess.panoptic`` after upsampling everything."""
    full = upsample_all(masks)
    scores, labels = classes.softmax(-1)[:, :-1].max(-1)
    kept = scores > threshold
    prob = full[kept].sigmoid() * scores[kept][:, None, None]
    owner = prob.argmax(0)
    out = torch.zeros(VIEW.original, dtype=torch.int32)
    stuff: dict[int, int] = {}
    last = 0
    for k, label in enumerate(labels[kept].tolist()):
        mine = owner == k
        won, area = int(mine.sum()), int((prob[k] >= 0.5).sum())
        if not won or not area or won / area <= 0.8:
            continue
        if label not in stuff:
            last += 1
        out[mine] = stuff.get(label, last)
        if not THINGS[label]:
            stuff.setdefault(label, last)
    return out.numpy()


def panoptic_ours(masks: Tensor, classes: Tensor, threshold: float) -> np.ndarray:
    return postprocess.panoptic(masks, classes, VIEW, is_thing=THINGS, score_threshold=threshold)[0]


def best_first(masks: Tensor, classes: Tensor) -> np.ndarray:
    prob = upsample_all(masks).sigmoid()
    return (prob[classes.softmax(-1)[:, 0].argmax()] > 0.5).numpy()


def best_ours(masks: Tensor, classes: Tensor) -> np.ndarray:
    return np.asarray(coco_mask.decode(dict(postprocess.best(masks, classes, VIEW).mask))).astype(bool)


def compare(first: Callable[[], np.ndarray], ours: Callable[[], np.ndarray], pairs: int) -> dict[str, float]:
    """Medians of ``pairs`` alternating runs after one warm-up of each, and the part of pixels that differ."""
    differ = float((first() != ours()).mean())
    seconds: list[tuple[float, float]] = []
    for _ in range(pairs):
        pair = []
        for run in (first, ours):
            start = time.process_time()
            run()
            pair.append(time.process_time() - start)
        seconds.append((pair[0], pair[1]))
    return {
        "first_ms": 1e3 * statistics.median(a for a, _ in seconds),
        "xseg_ms": 1e3 * statistics.median(b for _, b in seconds),
        "ratio": statistics.median(a / b for a, b in seconds),
        "pixels_differ": differ,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    masks, classes = inputs()
    rows = {
        "referring": compare(lambda: best_first(masks, classes), lambda: best_ours(masks, classes), args.pairs),
        **{
            f"panoptic, score > {threshold}": compare(
                lambda threshold=threshold: panoptic_first(masks, classes, threshold),
                lambda threshold=threshold: panoptic_ours(masks, classes, threshold),
                args.pairs,
            )
            for threshold in (0.5, 0.0)
        },
    }
    print(f"{'what':24s}{'first ms':>12s}{'xseg ms':>12s}{'ratio':>9s}{'pixels differ':>16s}")
    for name, row in rows.items():
        first, xseg, ratio, differ = row.values()
        print(f"{name:24s}{first:12.1f}{xseg:12.1f}{ratio:9.1f}{differ:16.2g}")
    about = {
        "claim": "equal to upsampling everything first; referring at least 100 times, panoptic at least twice as fast",
        "pairs": args.pairs,
        "threads": args.threads,
        "method": "medians of alternating runs, processor time",
    }
    save("postprocess", {**about, "rows": rows}, ["torch"], args.out)


if __name__ == "__main__":
    main()
