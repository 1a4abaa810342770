"""Checkpoints of ZeRO-3: every tensor comes back whole, as DeepSpeed's own tool gives it, and no code of it runs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from zero_files import cut

from xseg.errors import UserError
from xseg.models import pickles, shards

PIECES = {"frozen": ("c.weight",), "buffers": ("steps",), "shared": {"head.weight": "b.weight"}}


def state() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (5, 7), "b.weight": (3, 7), "scale": (), "c.weight": (3, 3), "d": (11,), "steps": (3,)}
    made = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return made | {"head.weight": made["b.weight"]}


@pytest.mark.parametrize(("processes", "sub_group"), [(1, 10**9), (2, 10**9), (3, 10), (12, 2)])
def test_every_tensor_comes_back_as_deepspeed_gives_it(tmp_path: Path, processes: int, sub_group: int) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    wanted = state()
    cut(wanted, tmp_path, processes=processes, sub_group=sub_group, **PIECES)
    found = shards.catalog(tmp_path)
    assert {n: s.shape for n, s in found.items()} == {n: tuple(v.shape) for n, v in wanted.items()}
    given = shards.read(found)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert set(given) == set(theirs) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(given[name], value) and torch.equal(theirs[name], value), name


def test_one_tensor_costs_no_more_than_its_slices(tmp_path: Path) -> None:
    wanted = state() | {"large": torch.randn(4096, 64)}
    found = shards.catalog(cut(wanted, tmp_path, **PIECES))
    (value,) = shards.read({"d": found["d"]}).values()
    assert torch.equal(value, wanted["d"])
    assert value.untyped_storage().nbytes() <= 2 * (value.numel() + 1) * value.element_size()


def test_classes_of_deepspeed_stay_asleep(tmp_path: Path) -> None:
    cut(state(), tmp_path)
    (file, _) = sorted(tmp_path.glob("*/*_optim_states.pt"))
    inner = pickles.load(file)["optimizer_state_dict"]
    assert type(inner["loss_scaler"]) is type(inner["zero_stage"]) is pickles.Inert


class Bomb:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("bomb"),)


def lose_a_process(folder: Path) -> None:
    next(folder.glob("*/zero_pp_rank_1_*")).unlink()


def lose_the_optimizer(folder: Path) -> None:
    for file in folder.glob("*/*optim_states.pt"):
        file.unlink()


def lose_a_value(folder: Path) -> None:
    for file in folder.glob("*/*optim_states.pt"):
        content = torch.load(file, weights_only=False)
        flat = content["optimizer_state_dict"]["fp32_flat_groups"]
        flat[0] = flat[0][:-1].clone()
        torch.save(content, file)


def cut_short(folder: Path) -> None:
    file = next(folder.glob("*/*optim_states.pt"))
    file.write_bytes(file.read_bytes()[:-500])


def by_model_too(folder: Path) -> None:
    file = next(folder.glob("*/zero_pp_rank_1_*model_states.pt"))
    file.rename(file.with_name("zero_pp_rank_0_mp_rank_01_model_states.pt"))


def of_another_stage(folder: Path) -> None:
    for file in folder.glob("*/*optim_states.pt"):
        torch.save({"optimizer_state_dict": {"zero_stage": 2}}, file)


@pytest.mark.parametrize(("fault", "said"), [
    (lose_a_process, r"written by 2 processes, and there are model states of 1"),
    (lose_the_optimizer, r"no \*_optim_states\.pt"),
    (lose_a_value, r"need 36 values of every process, and there are 35"),
    (cut_short, "cut short"),
    (by_model_too, "model-parallel"),
    (of_another_stage, "no optimiser state of ZeRO-3"),
], ids=lambda f: getattr(f, "__name__", ""))  # fmt: skip
def test_what_is_missing_is_said(fault: object, said: str, tmp_path: Path) -> None:
    fault(cut(state(), tmp_path, **PIECES))  # type: ignore[operator]
    with pytest.raises(UserError, match=said):
        shards.catalog(tmp_path)


def test_code_beside_the_slices_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cut(state(), tmp_path / "run", extra=Bomb())
    with pytest.raises(UserError, match="holds code"):
        shards.catalog(tmp_path / "run")
    assert not (tmp_path / "bomb").exists()
