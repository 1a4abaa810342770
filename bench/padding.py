"""Padding in micro-batches, with draws as they are shuffled and sorted by length (``by_length`` of a mixture).

What is counted are rows of the language model: text tokens, and the rows of a picture. Padding is the share of rows
that are computed for nothing, because a micro-batch is as wide as its longest sample. Lost is what is padding on the
rank with the widest micro-batch, on all ranks: the others wait for it. ShapeWorld's texts are encoded as in training.
The conversations of "like LLaVA" are drawn: its sets have the sizes published for LLaVA-1.5's mixture, the numbers and
lengths of their turns are assumed. "known" sorts by the true number of rows, for which a run would have to encode every
text. Prints a table and writes bench/results/padding.json.

    OMP_NUM_THREADS=1 python bench/padding.py [--pictures 200] [--conversations 20000]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from record import save

from xseg.config import TaskSpec
from xseg.data.dataset import Dataset, Preparation
from xseg.data.lengths import lengths
from xseg.data.mixture import Alike, Plan, repeat_factors
from xseg.data.shapeworld.tasks import write_tasks
from xseg.data.shapeworld.write import write
from xseg.data.sources import load_source
from xseg.geometry.views import ViewSizes
from xseg.tasks import load_task
from xseg.tokens import IMAGE
from xseg.train import assemble
from xseg.train.stage import read_stage

ROOT = Path(__file__).parent.parent
RANKS, SIZE, EPOCHS = 8, 4, 2
X_SAM_ROWS = 1753
"""Rows of a picture: 27 x 27 of SigLIP and 32 x 32 of SAM."""
WINDOWS = (0, 1, 50)
SETS = {
    "conversation": (58, 4.5, 55, 110),
    "detail": (23, 1, 70, 550),
    "reasoning": (77, 1, 90, 600),
    "text alone": (40, 3.5, 300, 1100),
    "VQAv2": (83, 5.3, 40, 6),
    "GQA": (72, 13, 45, 6),
    "OKVQA": (9, 2, 50, 8),
    "OCRVQA": (80, 5, 45, 20),
    "A-OKVQA": (66, 1, 160, 2),
    "TextCaps": (22, 1, 160, 60),
    "RefCOCO": (48, 8, 60, 25),
    "VG": (86, 10, 60, 25),
}
"""Set -> thousands of conversations (published); pairs of turns, characters of a question, of an answer (assumed)."""


class Subject(NamedTuple):
    """A mixture to be measured."""

    name: str
    estimated: list[np.ndarray]
    """Per data set, what ``by_length`` sorts by."""
    tokens: list[np.ndarray]
    """Per data set (epochs, samples): text tokens in each epoch's wording."""
    pictures: list[np.ndarray]
    """Per data set (samples,): rows of its pictures."""
    balance: float | None
    batches: str = "source"


def shapes(root: str, stage_name: str, batches: str) -> Subject:
    """A ShapeWorld mixture, its texts encoded."""
    stage = read_stage(str(ROOT / stage_name), [f"data_root={root}", "init_from=[]", "watch=null", "model=scratch"])
    data = assemble.load_data(stage)
    config, encoder = assemble.configuration(stage, data), data.processor.encoder
    assert encoder is not None
    sides = [config.siglip_config.image_size // config.siglip_config.patch_size]  # type: ignore[union-attr]
    sides += [config.sam_config.image_size // config.sam_config.patch_size // config.sam_shuffle]  # type: ignore[union-attr]
    tokens = [
        np.array(
            [[len(encoder.encode(d.format(i, e).turns).input_ids) - 1 for i in range(len(d))] for e in range(EPOCHS)]
        )
        for d in data.datasets
    ]
    rows = [np.full(len(d), sum(side**2 for side in sides)) for d in data.datasets]
    name = f"ShapeWorld, {len(data.datasets)} sets"
    return Subject(name, [lengths(d) for d in data.datasets], tokens, rows, stage.mixture.balance, batches)


def conversations(root: str, count: int) -> Subject:
    """Conversations like LLaVA's; a token is four characters or so."""
    rng = np.random.default_rng(0)
    thousands = np.array([row[0] for row in SETS.values()], float)
    rows: list[dict[str, Any]] = []
    for kind in rng.choice(list(SETS), count, p=thousands / thousands.sum()):
        _, pairs, *sides = SETS[kind]
        turns = []
        for _ in range(1 + rng.poisson(pairs - 1)):
            sizes = (max(1, int(mean * rng.lognormal(-0.125, 0.5))) for mean in sides)
            turns += [{"from": side, "value": "x" * n} for side, n in zip(("human", "gpt"), sizes, strict=True)]
        rows.append({"id": len(rows), "conversations": turns, **({} if kind == "text alone" else {"image": "no.jpg"})})
    (Path(root) / "talk.json").write_text(json.dumps(rows))
    source: Any = load_source("llava", root, "train", {"json": "talk.json"})
    dataset = Dataset(source, load_task(TaskSpec(name="conversation")), Preparation(None, ViewSizes(1024, 384)))
    said = [source.texts(i) for i in range(count)]
    # 4.2 characters a token, more or fewer by what is spoken about, and 4 tokens of the template a turn
    spoken = [sum(map(len, texts)) / (4.2 * rng.lognormal(0, 0.08)) + 4 * len(texts) for texts in said]
    pictures = np.array([X_SAM_ROWS * sum(t.count(IMAGE) for t in texts) for texts in said])
    tokens = np.minimum(np.array(spoken), 2048).astype(int)
    return Subject("like LLaVA", [lengths(dataset)], [np.tile(tokens, (EPOCHS, 1))], [pictures], None)


def measure(subject: Subject, window: int, known: bool) -> dict[str, float]:
    """Percent over an epoch."""
    counts = [len(p) for p in subject.pictures]
    true = [t[0] + p for t, p in zip(subject.tokens, subject.pictures, strict=True)]
    order = Alike(window, tuple(true if known else subject.estimated)) if window else None
    factors = repeat_factors(counts, subject.balance)
    plan = Plan(counts, factors, SIZE, RANKS, seed=1, mixed=subject.batches == "mixed", alike=order)
    text, rows = [], []
    for step in range(plan.steps_per_epoch):
        items = [item for rank in plan.batch(step) for micro in rank for item in micro]
        text.append([subject.tokens[i.dataset][i.epoch % EPOCHS, i.sample] for i in items])
        rows.append([words + subject.pictures[i.dataset][i.sample] for words, i in zip(text[-1], items, strict=True)])
    shape = (-1, RANKS, SIZE)
    widths = {"text": np.reshape(text, shape), "rows": np.reshape(rows, shape)}
    longest = {name: found.max(axis=-1) for name, found in widths.items()}
    shares = {f"padding_{name}": 1 - found.sum() / (SIZE * longest[name].sum()) for name, found in widths.items()}
    shares["lost_rows"] = 1 - widths["rows"].sum() / (RANKS * SIZE * longest["rows"].max(axis=1).sum())
    return {name: round(100 * float(share), 1) for name, share in shares.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--conversations", type=int, default=20000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        write(Path(root) / "shapes/train", given.pictures, seed=0, size=96)
        write_tasks(Path(root) / "shapes/train", given.pictures // 2)
        subjects = [
            shapes(root, "train_stages/tiny/s3_mixed.yaml", "source"),
            shapes(root, "train_stages/tiny/s3_mixed.yaml", "mixed"),
            shapes(root, "train_stages/all/s3_mixed.yaml", "mixed"),
            conversations(root, given.conversations),
        ]
    found = []
    print(f"{'percent':28s} {'by_length':>10s} {'padding, text':>14s} {'padding, all':>13s} {'lost':>8s}")
    for subject in subjects:
        for window, known in [*((w, False) for w in WINDOWS), (WINDOWS[-1], True)]:
            row = measure(subject, window, known)
            label = f"{window}{', known' if known else ''}"
            print(
                f"{subject.name}, {subject.batches}".ljust(28),
                f"{label:>10s} {row['padding_text']:14.1f} {row['padding_rows']:13.1f} {row['lost_rows']:8.1f}",
            )
            found.append(
                {"mixture": subject.name, "batches": subject.batches, "by_length": window, "known": known, **row}
            )
    report = {
        "method": f"{RANKS} ranks x {SIZE} samples, one epoch, seed 1; percent of the language model's rows",
        "assumed": {
            "set: thousands, pairs, characters of a question, of an answer": SETS,
            "rows of a picture": X_SAM_ROWS,
        },
        "pictures": given.pictures,
        "conversations": given.conversations,
        "rows": found,
    }
    save("padding", report, ["numpy"])


if __name__ == "__main__":
    main()
