"""A step walked without values costs what the same step costs with them."""

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console
from small_runs import COMMON, SMALL, TINY, pictures

from xseg.errors import UserError
from xseg.losses.criterion import Criterion
from xseg.losses.points import generator
from xseg.models.build import build_model
from xseg.train import muon, optim, plan, trace
from xseg.train.meter import Flops
from xseg.train.stage import Stage, read_stage
from xseg.ui import planning
from xseg.ui.planning import parse_memory

GPUS = plan.Asked(4, 80e9, 100e12)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data"))


def stage(name: str, data: Path, *settings: str) -> Stage:
    given = [SMALL, "out=nowhere", f"data_root={data}", "init_from=[]", *COMMON, *settings]
    return read_stage(str(next(TINY.glob(f"{name}_*.yaml"))), given)


@pytest.fixture(scope="module")
def third(data: Path) -> plan.Subject:
    return plan.Subject(stage("s3", data, "loss.points=grid"), on_cpu=True)


def test_flops_are_those_of_the_real_step(third: plan.Subject) -> None:
    model = build_model(third.config).train()
    optim.select(model, third.stage.recipe.trainable)
    for batch in third.batches(2):
        walked = trace.walk(third.mode, third.model, third.criterion, batch, on_cpu=True, autocast=False)
        with Flops() as counted:
            Criterion(third.stage.recipe.loss)(model(batch), batch, draw=generator("cpu", 0)).total.backward()
        assert walked.flops == pytest.approx(counted.total, rel=0.01)


def test_checkpointing_trades_memory_for_flops(third: plan.Subject) -> None:
    without, with_it = third.walk(2, False), third.walk(2, True)
    assert with_it.activations < without.activations and with_it.flops > without.flops
    again = third.walk(2, False)
    assert (again.activations, again.flops) == (without.activations, without.flops), "a walk leaves nothing behind"


def test_what_a_launch_would_refuse_is_not_planned(data: Path) -> None:
    with pytest.raises(UserError, match=r"muon = 4 on 4 processes under ZeRO"):
        plan.predict(stage("s1", data, "muon=4"), GPUS)


def test_muon_keeps_one_moment_of_a_matrix(data: Path) -> None:
    both = [plan.Subject(stage("s1", data, f"muon={rate}"), on_cpu=True) for rate in (0, 4)]
    assert both[0].moments == 2 * both[0].trained == 2 * both[1].trained
    names = muon.matrices(both[1].model)
    saved = sum(p.numel() for n, p in both[1].model.named_parameters() if n in names and p.requires_grad)
    assert saved > both[1].trained / 2 and both[0].moments - both[1].moments == saved
    one = plan.on_gpus(both[1], plan.Setting(1, 4, 1, False), plan.Asked(1, GPUS.memory, GPUS.flops))
    assert one.optimizer == 12 * both[1].trained - 4 * saved, "float32 weights and moments"


def test_the_settings_that_fit_are_tried_from_the_cheapest(data: Path) -> None:
    subject = plan.Subject(stage("s1", data, "batch_size=4"), on_cpu=False)
    given = plan.Setting(2, 4, 1, False)
    needs = {zero: plan.on_gpus(subject, plan.Setting(zero, 4, 1, False), GPUS) for zero in (1, 2, 3)}
    assert needs[1].gradients == 4 * needs[2].gradients and needs[3].weights == needs[2].weights / 4
    assert needs[1].optimizer == needs[3].optimizer == 12 * subject.trained / 4
    roomy, need = plan.choose(subject, given, GPUS)
    assert roomy == plan.Setting(1, 4, 1, False) and need == needs[1]
    small = plan.on_gpus(subject, plan.Setting(1, 2, 2, False), GPUS).total
    tight = plan.Asked(4, small / (1 - plan.RESERVED) * 1.0001, 1e12)
    chosen, less = plan.choose(subject, given, tight)
    assert chosen is not None and less is not None and chosen.batch_size < 4
    assert chosen.batch_size * chosen.accumulate == 4 and less.total <= small * 1.001
    assert plan.choose(subject, given, plan.Asked(4, 1.0, 1e12)) == (None, None)


def test_hours_follow_from_samples_and_flops(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stage("s1", data, "steps=10", "batch_size=2", "accumulate=3")
    found = plan.predict(asked, plan.Asked(2, 80e9, 1e9))
    assert found.samples == 10 * 2 * 3 * 2
    assert found.hours == pytest.approx(found.flops * found.samples / 2e9 / 3600)
    assert found.trained <= found.parameters and "first batches" in found.basis
    monkeypatch.setattr(planning, "predict", lambda stage, asked: found)
    console, name = Console(record=True, width=200), str(next(TINY.glob("s1_*.yaml")))
    planning.show_plan(name, ["init_from=[nowhere]"], plan.Asked(2, 80e9, 1e9), console)
    said = console.export_text()
    assert f"{found.samples} samples: {found.hours:.1f} hours" in said and "2 x 80 GB" in said
    lost = dataclasses.replace(found, chosen=None, chosen_need=None)
    monkeypatch.setattr(planning, "predict", lambda stage, asked: lost)
    with pytest.raises(UserError, match="nothing fits into 80 GB"):
        planning.show_plan(name, [], plan.Asked(2, 80e9, 1e9), console)


def test_without_data_a_typical_batch_is_walked(tmp_path: Path) -> None:
    given = stage("s2", tmp_path, "steps=null", "epochs=1")
    subject = plan.Subject(given, on_cpu=False)
    assert subject.data is None and "typical" in subject.basis
    (batch,) = subject.batches(3)
    assert len(batch.mask_pixels) == 3 and subject.walk(1, False).flops > 0
    assert plan.total_samples(given, None, 1) is None, "ShapeWorld's recipes have no count"


def test_adapters_need_less(data: Path) -> None:
    whole = plan.Subject(stage("s1", data), on_cpu=False)
    adapted = plan.Subject(stage("s1", data, "adapters={sam: {rank: 2, quantize: nf4}}"), on_cpu=False)
    one, other = (plan.on_gpus(s, plan.Setting(2, 2, 1, False), GPUS) for s in (whole, adapted))
    assert other.optimizer < one.optimizer and other.weights < one.weights
    names = {n for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in names)


def test_memory_is_read_with_its_unit() -> None:
    assert parse_memory("80GB") == 80e9 and parse_memory("24 GiB") == 24 * 2**30 and parse_memory("1.5tb") == 1.5e12
    for wrong in ("80", "GB", "1.2.3GB", "0GB", "-4GB"):
        with pytest.raises(UserError, match="write a number and a unit"):
            parse_memory(wrong)
