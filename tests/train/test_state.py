"""A checkpoint is complete or it is not there, and it is only continued by the run that wrote it."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from xseg.config import ModelRecipe
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
    assert state.restore(acc, found, RECIPE | {"steps": 20, "out": "b"}) == 10
    assert (net.weight == 10).all()


def test_an_unfinished_checkpoint_is_not_seen(acc: Accelerator, tmp_path: Path) -> None:
    prepared(acc)
    state.save(acc, tmp_path, 3, RECIPE, keep=2)
    for name in ("step_9", ".step_9.tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert list(state.checkpoints(tmp_path)) == [3]


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
    (path / "state.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
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
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_3"], "nothing half-written stays"
    torch.nn.init.zeros_(net.weight)
    assert state.restore(acc, state.newest(acc, tmp_path) or tmp_path, RECIPE) == 3
    assert torch.equal(net.weight, before)


def test_errors_that_are_no_full_disk_pass(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), state.full_disk(tmp_path):
        raise RuntimeError("shapes differ")


def test_a_checkpoint_older_than_a_field_of_the_model_resumes(tmp_path: Path) -> None:
    now = {"model": ModelRecipe(sam={"patch_size": 8}).model_dump(mode="json")}
    older = {"model": {k: v for k, v in now["model"].items() if k != "llm_sees"}}
    state.check_same(older, now, tmp_path)
    now["model"]["llm_sees"] = ["siglip"]
    with pytest.raises(UserError, match="llm_sees"):
        state.check_same(older, now, tmp_path)
