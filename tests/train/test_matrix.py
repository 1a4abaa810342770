"""Any mix on any rank: DDP, FSDP2 and ZeRO-1 to 3, one and two processes, accumulation, against one process alone.

One case alone: ``pytest tests/train/test_matrix.py -k "zero3 and 2_processes and divergent and accumulate_2"``.
"""

from pathlib import Path

import pytest
import torch
from matrix_runs import FSDP2, Mix, Split, train
from small_runs import metrics, pictures, untimed

from xseg.train.consolidate import weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NAMES = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3", FSDP2: "fsdp2"}
RATE = "trainable=[{match: .*, lr: 0.02}]"
CASES: list[tuple[Split, Mix]] = [
    (Split(zero, world, accumulate), mix)
    for zero in NAMES
    for world in (1, 2)
    for accumulate in (1, 2)
    for mix in ("same", "divergent", "mixed")
    if (world > 1 or mix != "divergent") and (zero, world, accumulate) != (0, 1, 1)  # the last is the reference itself
]


def name(value: object) -> str:
    if isinstance(value, Split):
        return f"{NAMES[value.zero]}-{value.world}_processes-accumulate_{value.accumulate}"
    return str(value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and the runs of one process that the others are compared with, as they are asked for."""
    return pictures(tmp_path_factory.mktemp("data"))


def reference(folder: Path, mix: Mix, laid: Split) -> Path:
    """Only the divergent mix depends on how the batches are laid out."""
    out = folder / f"{mix}_{laid.world}_{laid.accumulate}" if mix == "divergent" else folder / mix
    if not (out / "final").exists():
        train(folder, out, Split(), mix, laid, "steps=20", RATE)
    return out


@pytest.mark.parametrize(("split", "mix"), CASES, ids=name)
def test_equal_to_one_process(folder: Path, tmp_path: Path, split: Split, mix: Mix) -> None:
    out = tmp_path / "run"
    train(folder, out, split, mix, split, "steps=20", RATE)
    alone = untimed(metrics(reference(folder, mix, split)))
    found = untimed(metrics(out))
    assert len(found) == len(alone) == 20
    for row, wanted in zip(found, alone, strict=True):
        terms = {k: v for k, v in wanted.items() if isinstance(v, float)}
        assert {k: row[k] for k in terms} == pytest.approx(terms, rel=1e-4), f"step {row['step']}"
    assert len({row["loss"] for row in alone}) == 20


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("zero", NAMES, ids=NAMES.get)
def test_what_got_no_gradient_does_not_move(folder: Path, tmp_path: Path, zero: int, world: int) -> None:
    """Masks in the first step, conversation in the next two: with SGD the decoder stays, bit by bit."""
    out, split = tmp_path / "run", Split(zero, world)
    train(folder, out, split, "parted", split, "steps=3", "save_every=1", "keep_checkpoints=3", RATE)
    first, last = (weights(out / f"checkpoints/step_{step}") for step in (1, 3))
    assert first.keys() == last.keys()
    moved = {name for name, value in first.items() if not torch.equal(value, last[name])}
    parts = ("segmentor.mask_decoder.", "segmentor.pixel_decoder.", "segmentor.connector.", "llm_projector.")
    assert not [name for name in moved if name.startswith(parts)]
    assert any(name.startswith("llm.") for name in moved) and any(name.startswith("siglip.") for name in moved)
    assert all(any(name.startswith(part) for name in first) for part in parts)


@pytest.mark.parametrize(("zero", "world"), [(0, 2), (1, 1), (2, 2), (3, 2), (FSDP2, 2)])
def test_a_step_without_a_number_moves_nothing_on_any_rank(folder: Path, tmp_path: Path, zero: int, world: int) -> None:
    """The second of three steps is of a data set whose pixels are no numbers; its samples are named."""
    out, split = tmp_path / "run", Split(zero, world)
    settings = ("steps=3", "save_every=1", "keep_checkpoints=3", "skip_nonfinite=1", RATE)
    train(folder, out, split, "same", split, *settings, poisoned="refer")
    said = out.with_suffix(".log").read_text()
    assert (
        said.count("step 2: loss is nan") == 1
        and "(skipped, 1 of 1)" in said
        and "samples: shapes_refer/train/" in said
    )
    first, second, third = (weights(out / f"checkpoints/step_{step}") for step in (1, 2, 3))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, third[name]) for name, value in second.items())
    assert all(value.isfinite().all() for value in third.values())
