"""Preparing one training sample: xseg against the plain way through the transformers image processors.

Plain: SamImageProcessor on the image and on every mask (int64 masks), SiglipImageProcessor on the image, as the
official X-SAM data path does it. Both get the decoded image and the decoded annotation. Results must be equal: masks
bit by bit, pixels to 1e-5. Each way runs in a worker process of its own, set up as its data loader sets it up; what
is compared is CPU time, because it does not depend on what else the machine does. "plain, kept memory" gives the
plain way the allocator setting of xseg's workers as well. Prints a table and writes bench/results/data_path.json.

    OMP_NUM_THREADS=1 python bench/data_path.py [--pairs 15]
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import save
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from xseg.data.loader import keep_memory
from xseg.geometry.masks import dense, encode_many, on_canvas
from xseg.geometry.views import ViewSizes
from xseg.types import ImageViews, Masks

HEIGHT, WIDTH, COUNT, CANVAS, LLM = 480, 640, 15, 1024, 384
TARGET = 5.0

Result = tuple[np.ndarray, np.ndarray, np.ndarray]


def scene() -> tuple[Image.Image, Masks]:
    """An image and a partition of it into 15 segments."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    centres = rng.random((COUNT, 2)) * (HEIGHT, WIDTH)
    nearest = np.argmin([(rows - y) ** 2 + (columns - x) ** 2 for y, x in centres], axis=0)
    ids = rng.choice(1 << 24, COUNT, replace=False)
    return image, Masks((HEIGHT, WIDTH), id_map=ids[nearest].astype(np.int32), ids=tuple(ids.tolist()))


def plain_way() -> Callable[[Image.Image, list[np.ndarray]], Result]:
    """The two processors at X-SAM's sizes."""
    square = {"height": CANVAS, "width": CANVAS}
    edge = {"longest_edge": CANVAS}
    sam = SamImageProcessorPil(size=edge, pad_size=square, mask_size=edge, mask_pad_size=square)
    siglip = SiglipImageProcessorPil(size={"height": LLM, "width": LLM})

    def prepare(image: Image.Image, masks: list[np.ndarray]) -> Result:
        views = sam(image, segmentation_maps=masks or None, return_tensors=None)
        labels = np.stack(views["labels"]) if masks else np.zeros((0, CANVAS, CANVAS), np.int64)
        return siglip(image, return_tensors="np")["pixel_values"][0], views["pixel_values"][0], labels

    return prepare


def ours(image: Image.Image, masks: Masks) -> Result:
    """The same three arrays from xseg."""
    views: ImageViews = ViewSizes(CANVAS, LLM).views(image)
    return views.llm, views.mask, on_canvas(masks, range(len(masks)), views.geometry)


def compare(plain: Result, xseg: Result) -> None:
    """Stop when the two ways do not agree."""
    for name, a, b in zip(("llm view", "mask view"), plain, xseg, strict=False):
        difference = float(np.abs(a - b).max())
        assert difference < 1e-5, f"{name} differs by {difference}"
    assert (plain[2] == xseg[2]).all(), "masks differ"


def cases() -> dict[str, tuple[Image.Image, list[np.ndarray], Masks]]:
    """Name -> image, its masks as bitmaps for the plain way, its masks as xseg holds them."""
    image, as_map = scene()
    bitmaps = list(dense(as_map))
    as_rle = Masks(as_map.size, tuple(encode_many(dense(as_map))))
    return {
        f"image + {COUNT} masks, panoptic id map": (image, bitmaps, as_map),
        f"image + {COUNT} masks, RLE": (image, bitmaps, as_rle),
        "image only": (image, [], Masks(as_map.size)),
    }


def serve(pipe: Connection, way: str, keep: bool) -> None:
    """Worker process: prepare the sample named by each message; answer with CPU and wall milliseconds."""
    torch.set_num_threads(1)
    if keep:
        keep_memory()
    plain, inputs = plain_way(), cases()
    while name := pipe.recv():
        image, bitmaps, masks = inputs[name]
        cpu, wall = time.process_time(), time.perf_counter()
        result = ours(image, masks) if way == "xseg" else plain(image, bitmaps)
        pipe.send(((time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3))
        del result


class Worker:
    """One way in its own process."""

    def __init__(self, way: str, keep: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, way, keep), daemon=True)
        self.process.start()

    def time(self, name: str) -> tuple[float, float]:
        """(CPU, wall) milliseconds of one preparation."""
        self.pipe.send(name)
        return self.pipe.recv()  # type: ignore[no-any-return]

    def stop(self) -> None:
        """End the process."""
        self.pipe.send("")
        self.process.join()


def run(pairs: int) -> list[dict[str, Any]]:
    """One row per kind of annotation."""
    ways = {"plain": Worker("plain", False), "plain_kept": Worker("plain", True), "xseg": Worker("xseg", True)}
    plain, rows = plain_way(), []
    for name, (image, bitmaps, masks) in cases().items():
        compare(plain(image, bitmaps), ours(image, masks))
        for worker in ways.values():
            worker.time(name)
        times = [{way: worker.time(name) for way, worker in ways.items()} for _ in range(pairs)]
        row: dict[str, Any] = {"case": name}
        for way in ways:
            row[f"{way}_cpu_ms"] = round(statistics.median(t[way][0] for t in times), 2)
            row[f"{way}_wall_ms"] = round(statistics.median(t[way][1] for t in times), 2)
        for way in ("plain", "plain_kept"):
            row[f"ratio_to_{way}"] = round(statistics.median(t[way][0] / t["xseg"][0] for t in times), 2)
        rows.append(row)
    for worker in ways.values():
        worker.stop()
    return rows


def main() -> None:
    """Measure, print, write; status 1 when the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    rows = run(pairs)
    print(f"{'CPU ms per sample':38s} {'plain':>8s} {'plain, kept memory':>19s} {'xseg':>8s} {'ratio':>7s}")
    for row in rows:
        print(
            f"{row['case']:38s} {row['plain_cpu_ms']:8.1f} {row['plain_kept_cpu_ms']:19.1f} {row['xseg_cpu_ms']:8.1f} "
            f"{row['ratio_to_plain']:6.1f}x"
        )
    mask_bytes = {"plain": COUNT * CANVAS**2 * 8, "xseg": COUNT * CANVAS**2}
    print(f"mask bytes per sample: plain {mask_bytes['plain']:,}, xseg {mask_bytes['xseg']:,}")
    report = {
        "claim": f"a sample of {WIDTH}x{HEIGHT} px with {COUNT} masks is prepared at least {TARGET:g}x faster, equal",
        "threads": 1,
        "method": f"medians over {pairs} rounds, the ways one after the other in each; ratio = median of the rounds' "
        f"CPU time ratios",
        "mask_bytes": mask_bytes,
        "rows": rows,
    }
    save("data_path", report, ["numpy", "pillow", "transformers", "hotcoco", "torch"])
    missed = [row["case"] for row in rows[:2] if row["ratio_to_plain"] < TARGET]
    if missed:
        raise SystemExit(f"below {TARGET:g}x: {', '.join(missed)}")


if __name__ == "__main__":
    main()
