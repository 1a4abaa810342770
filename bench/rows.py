"""What a language model could read off the encoders' rows: ``python bench/rows.py --model DIR --data DIR``.

Probes on the frozen rows of SigLIP and of SAM, of each alone and of both, learn from ShapeWorld pictures which shape,
colour, texture and size stand on a square, whether it holds a thing's centre, and which of the 36 squares it then is.
What a probe does not find, stage 2 cannot align: its projectors are all that moves. Prints one row per probe, in
percent of the held-out squares.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from xseg.data.shapeworld.board import BARE, SQUARES, board
from xseg.data.shapeworld.world import COLOURS, GROUNDS, SHAPES, SIZES, TEXTURES, split_scene
from xseg.geometry.views import IMAGENET_MEAN, IMAGENET_STD
from xseg.models import checkpoint
from xseg.models.projector import unshuffle
from xseg.models.xseg import XSegModel

SIDE, SEED, BATCH = 96, 0, 64
FIELDS = {
    "what": (*SHAPES, *GROUNDS),
    "colour": (*COLOURS, ""),
    "texture": (*TEXTURES, ""),
    "centre": ("", *SIZES),
    "name": ("", *SQUARES),
}
"""Field -> its values; "" = a bare square has no colour or texture, a square without a centre no size and no name."""
SPLIT = [len(values) for values in FIELDS.values()]


def truth(split: str, number: int) -> list[list[int]]:
    """Return (36, 5) indices into the values of FIELDS."""
    rows = []
    for first, *words, name in board(split_scene(SEED, split, number, side=SIDE)):
        told = (words[0], "", "") if first == BARE else (words[2], words[0], words[1])
        told = (*told, *((first, name) if first in SIZES else ("", "")))
        rows.append([values.index(word) for values, word in zip(FIELDS.values(), told, strict=True)])
    return rows


@torch.no_grad()
def rows_of(model: XSegModel, folder: Path, split: str, count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the rows (n * 36, C) of each encoder, and the truth (n * 36, 5), of the first pictures of a split."""
    found: dict[str, list[Tensor]] = {"siglip": [], "sam": []}
    files = sorted((folder / split / "images").iterdir())[:count]
    for start in range(0, len(files), BATCH):
        pictures = [np.asarray(Image.open(f).convert("RGB"), np.float32) / 255 for f in files[start : start + BATCH]]
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        found["siglip"].append(model.siglip(x * 2 - 1).flatten(0, 1))
        cells = model.segmentor.sam((x - mean) / std, [model.config.sam_layer])[0]
        found["sam"].append(unshuffle(cells, model.config.sam_shuffle).flatten(0, 2))
    both = {name: torch.cat(parts) for name, parts in found.items()}
    labels = torch.tensor([truth(split, number) for number in range(len(files))]).flatten(0, 1)
    return both | {"both": torch.cat(list(both.values()), -1)}, labels


def probe(rows: Tensor, labels: Tensor, hidden: int, epochs: int = 4) -> nn.Module:
    """Train a linear map (``hidden`` 0) or one with a hidden layer."""
    torch.manual_seed(SEED)
    wide = rows.shape[1]
    middle = [nn.Linear(wide, hidden), nn.GELU()] if hidden else []
    net = nn.Sequential(nn.BatchNorm1d(wide, affine=False), *middle, nn.Linear(hidden or wide, sum(SPLIT)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows)).split(1024):
            parts = net(rows[chosen]).split(SPLIT, -1)
            loss = sum(F.cross_entropy(part, labels[chosen, k]) for k, part in enumerate(parts))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def figures(net: nn.Module, rows: Tensor, labels: Tensor) -> dict[str, float]:
    """Return percent right: on squares with a centre by field, whether a centre is seen, the ground of bare squares."""
    guess = torch.stack([part.argmax(-1) for part in net(rows).split(SPLIT, -1)], 1)
    right, centre = guess == labels, labels[:, 3] > 0
    bare = labels[:, 1] == len(COLOURS)
    found = {"shape": right[centre, 0], "colour": right[centre, 1], "texture": right[centre, 2]}
    found |= {
        "size": right[centre, 3],
        "name": right[centre, 4],
        "centre seen": guess[centre, 3] > 0,
        "no centre": guess[~centre, 3] == 0,
    }
    found["ground"] = right[bare, 0]
    return {name: round(100 * float(values.float().mean()), 1) for name, values in found.items()}


def main() -> None:
    """Print one JSON line per probe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="final/ of a stage with both encoders")
    parser.add_argument("--data", type=Path, required=True, help="folder of ShapeWorld: train/ and val/, seed 0")
    parser.add_argument("--images", type=int, default=1500, help="pictures that the probes learn from")
    given = parser.parse_args()
    model = checkpoint.load(given.model).eval()
    seen, labels = rows_of(model, given.data, "train", given.images)
    held, truths = rows_of(model, given.data, "val", 200)
    for name in seen:
        for hidden in (0, 256):
            net = probe(seen[name], labels, hidden)
            row = {"rows": name, "hidden": hidden, "images": given.images, **figures(net, held[name], truths)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
