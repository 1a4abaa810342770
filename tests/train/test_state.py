"""A checkpoint is complete or it is not there, and it is only continued by the run that wrote it."""

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from xseg.config import Mixture, MixtureEntry, ModelRecipe, Recipe
from xseg.errors import UserError
from xseg.train import state

RECIPE = {"steps": 10, "seed": 1, "trainable": [{"match": ".*", "lr": 0.001}], "out": "a"}


@pytest.fixture
def acc() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(acc: Accelerator, size: int = 4) -> torch.nn.Module:
    net = torch.nn.Linear(size, size)
    net, optimizer = acc.prepare(net, torch.optim.AdamW(net.parameters()))
    net(torch.ones(1, size)).sum().backward()
    optimizer.step()
    return net


def test_round_trip_keeps_the_newest(acc: Accelerator, tmp_path: Path) -> None:
    net = prepared(acc)
    assert state.newest(acc, tmp_path) is None
    for step in (2, 4, 10):
        torch.nn.init.constant_(net.weight, step)
        state.save(acc, tmp_path, step, RECIPE, keep=2)
    assert list(state.checkpoints(tmp_path)) == [4, 10]
    torch.nn.init.zeros_(net.weight)
    found = state.newest(acc, tmp_path)
    assert found == tmp_path / "checkpoints/step_10"
    assert state.restore(acc, found, RECIPE | {"steps": 20, "out": "b"})["step"] == 10
    assert (net.weight == 10).all()


def test_an_unfinished_checkpoint_is_not_seen(acc: Accelerator, tmp_path: Path) -> None:
    prepared(acc)
    state.save(acc, tmp_path, 3, RECIPE, keep=2)
    for name in ("step_9", ".step_9.tmp", ".step_2.old"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert state.newest(acc, tmp_path) == tmp_path / "checkpoints/step_3"
    assert list(state.checkpoints(tmp_path)) == [3]
    state.save(acc, tmp_path, 5, RECIPE, keep=2)
    assert left(tmp_path) == ["step_3", "step_5", "step_9.damaged"], "what a killed run left half-done goes"


DAMAGE: dict[str, Callable[[Path], object]] = {
    "model.safetensors has 10 of": lambda folder: os.truncate(folder / "model.safetensors", 10),
    "optimizer.bin: not the bytes": lambda folder: flip(folder / "optimizer.bin"),
    "state.json: not the bytes": lambda folder: flip(folder / "state.json"),
    "random_states_0.pkl is missing": lambda folder: (folder / "random_states_0.pkl").unlink(),
    "manifest.json cannot be read": lambda folder: os.truncate(folder / "manifest.json", 30),
    "it has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
}


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def left(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(
    acc: Accelerator, tmp_path: Path, words: str, capsys: pytest.CaptureFixture
) -> None:
    net = prepared(acc)
    for step in (2, 4, 6):
        torch.nn.init.constant_(net.weight, step)
        state.save(acc, tmp_path, step, RECIPE, keep=3, skipped=step)
    folder = tmp_path / "checkpoints"
    DAMAGE[words](folder / "step_6")
    found = state.newest(acc, tmp_path)
    assert found == folder / "step_4"
    said = capsys.readouterr().out
    assert f"passed over {folder / 'step_6'}: " in said and words in said
    assert left(tmp_path) == ["step_2", "step_4", "step_6.damaged"], "it must not push whole ones out"
    assert state.restore(acc, found, RECIPE)["skipped"] == 4 and (net.weight == 4).all()


def test_nothing_whole_is_an_error_and_no_new_start(acc: Accelerator, tmp_path: Path) -> None:
    prepared(acc)
    for step in (2, 4):
        state.save(acc, tmp_path, step, RECIPE, keep=2)
        flip(tmp_path / f"checkpoints/step_{step}/optimizer.bin")
    with pytest.raises(UserError, match=r"no checkpoint is whole(.|\n)*step_4: opt(.|\n)*step_2: opt"):
        state.newest(acc, tmp_path)
    assert left(tmp_path) == ["step_2", "step_4"]


def test_another_recipe_or_layout_is_refused_by_name(acc: Accelerator, tmp_path: Path) -> None:
    prepared(acc)
    state.save(acc, tmp_path, 3, RECIPE, keep=2)
    path = tmp_path / "checkpoints/step_3"
    with pytest.raises(UserError, match=r"trainable: \[.*0.001.*\] -> \[.*0.01"):
        state.restore(acc, path, RECIPE | {"trainable": [{"match": ".*", "lr": 0.01}]})
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"processes": 1', '"processes": 2'))
    with pytest.raises(UserError, match="processes = 2, now 1"):
        state.restore(acc, path, RECIPE)


def test_a_full_disk_leaves_the_last_checkpoint_loadable(acc: Accelerator, tmp_path: Path) -> None:
    net = prepared(acc, 300)
    state.save(acc, tmp_path, 3, RECIPE, keep=1)
    before = net.weight.clone()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # files beyond 100 kB fail as on a full disk
    try:
        with pytest.raises(UserError, match=r"step_6: cannot be written.*still loadable: step_3.*--resume auto"):
            state.save(acc, tmp_path, 6, RECIPE, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left(tmp_path) == ["step_3"], "nothing half-written stays"
    torch.nn.init.zeros_(net.weight)
    assert state.restore(acc, state.newest(acc, tmp_path) or tmp_path, RECIPE)["step"] == 3
    assert torch.equal(net.weight, before)


def test_errors_that_are_no_full_disk_pass(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), state.full_disk(tmp_path):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize(
    ("part", "recipe", "field", "value"),
    [
        ("model", ModelRecipe(sam={"patch_size": 8}), "llm_sees", ["siglip"]),
        ("mixture", Mixture(datasets=[MixtureEntry(recipe="a")]), "by_length", 50),
    ],
)
def test_a_checkpoint_older_than_a_field_resumes(
    tmp_path: Path, part: str, recipe: Recipe, field: str, value: object
) -> None:
    now = {"model": {}, "mixture": {}, part: recipe.model_dump(mode="json")}
    older = {**now, part: {k: v for k, v in now[part].items() if k != field}}
    state.check_same(older, now, tmp_path)
    now[part][field] = value
    with pytest.raises(UserError, match=field):
        state.check_same(older, now, tmp_path)
