"""Runs with adapters: what they leave is small, opens, goes on after a kill, and can be built upon."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from small_runs import COMMON, SAMPLED, SMALL, TINY, metrics, pictures, untimed

from xseg import load
from xseg.config import Adapter
from xseg.errors import UserError
from xseg.models import adapters, checkpoint, quantize
from xseg.train import loop, slim
from xseg.train.__main__ import main
from xseg.ui.cli import main as command_line

LORA = (
    "adapters={llm: {rank: 2, alpha: 4}, siglip: {rank: 2}, sam: {rank: 2, targets: [qkv, proj]}}",
    "trainable=[{match: .*, lr: 5.0e-4}]",
)
Run = Callable[..., int]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def train(data: Path) -> Iterator[Run]:
    """``train("s3", out, *settings)`` runs a stage as the command line does and returns its exit status."""

    def run(stage: str, out: Path, *settings: str, resume: bool = False, sizes: str = SMALL) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        given = ["--set", sizes, f"out={out}", f"data_root={data}", *COMMON, *settings]
        return main([str(next(TINY.glob(f"{stage}_*.yaml"))), *given, *(["--resume", "auto"] if resume else [])])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def base(train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole stage 3 that adapters start from."""
    out = tmp_path_factory.mktemp("base") / "s3"
    assert train("s3", out, "steps=1", "init_from=[]") == 0
    return out / "final"


@pytest.fixture(scope="module")
def run(train: Run, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "s3"
    assert train("s3", out, f"init_from=[{base}]", *LORA, "steps=4", *SAMPLED) == 0
    return out


def changed(base: Path, out: Path) -> Path:
    """A copy of a base with one norm that differs."""
    made = checkpoint.load(base)
    with torch.no_grad():
        made.llm.model.norm.weight.mul_(1.5)
    checkpoint.save(made, out)
    return out


def test_what_is_frozen_comes_out_bit_by_bit_as_it_was(
    train: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after: dict[str, torch.Tensor] = {}
    learns: set[str] = set()
    monkeypatch.setattr(
        loop,
        "export",
        lambda acc, model, *rest: (
            after.update(model.state_dict()),
            learns.update(n for n, p in model.named_parameters() if p.requires_grad),
        ),
    )
    assert train("s3", tmp_path / "run", f"init_from=[{base}]", *LORA, "steps=3") == 0
    before = checkpoint.read_weights(base)
    frozen = [n for n in after if n not in learns and adapters.plain(n) in before]
    wrapped = [n for n in frozen if ".base_layer." in n]
    assert len(wrapped) > 10 and all(torch.equal(after[n], before[adapters.plain(n)]) for n in frozen)
    moved = [n for n in learns if "lora_B" in n]
    assert moved and all(after[n].any() for n in moved), "what learns has left zero"


def test_the_folder_holds_the_adapter_alone_and_opens(run: Path, base: Path) -> None:
    saved = set(checkpoint.read_weights(run / "final/adapter.safetensors"))
    assert not [n for n in saved if n.startswith(("llm.", "siglip.", "segmentor.sam.")) and not adapters.is_adapter(n)]
    assert "llm_projector.first.weight" in saved and not (run / "final/model.safetensors").exists()
    merged, beside = adapters.load(run / "final"), adapters.load(run / "final", merged=False)
    assert set(merged.state_dict()) == set(checkpoint.load(base).state_dict())
    assert any("lora_" in n for n in beside.state_dict())
    predictor, _ = load(run / "final")
    assert all(torch.equal(v, merged.state_dict()[n]) for n, v in predictor.model.state_dict().items())


def test_a_killed_run_goes_on_from_a_small_checkpoint(
    train: Run, run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, out = loop.Trainer.step, tmp_path / "cut"

    def until_three(self: loop.Trainer, number: int, micros: list) -> dict:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number, micros)

    given = (f"init_from=[{base}]", *LORA, "steps=4", *SAMPLED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Trainer, "step", until_three)
        train("s3", out, *given)
    stored = checkpoint.read_weights(out / "checkpoints/step_2/model.safetensors")
    assert any("lora_" in n for n in stored) and not any("base_layer" in n for n in stored)
    other = changed(base, tmp_path / "other")
    assert train("s3", out, f"init_from=[{other}]", *given[1:], resume=True) == 2, "another base is refused"
    assert train("s3", out, *given, resume=True) == 0
    assert untimed(metrics(out)) == untimed(metrics(run))
    first, second = (checkpoint.read_weights(r / "final/adapter.safetensors") for r in (out, run))
    assert first.keys() == second.keys() and all(torch.equal(v, second[n]) for n, v in first.items())


def test_a_run_with_adapters_is_not_consolidated(
    run: Run, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (SMALL, f"out={run}", f"data_root={data}", *COMMON, f"init_from=[{base}]", *LORA, "steps=4", *SAMPLED)
    given = [word for setting in settings for word in ("--set", setting)]
    stage = str(next(TINY.glob("s3_*.yaml")))
    monkeypatch.setattr(sys, "argv", ["xseg", "consolidate", stage, "--out", str(tmp_path / "whole"), *given])
    with pytest.raises(SystemExit) as end:
        command_line()
    assert end.value.code == 2 and "a run with adapters" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()


def test_a_changed_or_lost_base_is_told(run: Path, base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "x/final"
    shutil.copytree(run / "final", copy)
    fields = json.loads((copy / "adapter.json").read_text())
    fields["base"]["init_from"] = [str(tmp_path / "gone/final")]
    (copy / "adapter.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"gone/final is not there"):
        adapters.load(copy)
    changed(base, tmp_path / "gone/final")
    with pytest.raises(UserError, match="base has changed since"):
        adapters.load(copy)
    (copy / "adapter.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter.json: damaged"):
        adapters.load(copy)


def test_a_later_stage_starts_from_an_adapter(train: Run, run: Path, tmp_path: Path) -> None:
    assert train("s3", tmp_path / "next", f"init_from=[{run}/final]", "steps=1") == 0
    (report,) = json.loads((tmp_path / "next/final/load_report.json").read_text())
    assert "llm.model.layers.0.self_attn.qkv_proj.weight" in report["loaded"] and not report["unexpected"]


def test_chat_and_export_take_an_adapter(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = str(next((data / "shapes/train/images").iterdir()))
    for line in (
        ["chat", "--model", f"{run}/final", "--image", image, "--say", "hello", "--out", f"{tmp_path}/chat"],
        ["export", f"{run}/final", "--out", f"{tmp_path}/whole", "--dtype", "fp32"],
        ["export", f"{run}/final", "--out", f"{tmp_path}/llm", "--dtype", "fp32", "--language"],
    ):
        monkeypatch.setattr(sys, "argv", ["xseg", *line])
        with pytest.raises(SystemExit) as ended:
            command_line()
        assert (ended.value.code or 0) == 0, line
    merged, written = adapters.load(run / "final").state_dict(), checkpoint.read_weights(tmp_path / "whole")
    assert written and all((v - merged[n]).abs().max() <= 1e-6 for n, v in written.items())


def test_a_stage_that_gives_the_adapter_no_rate_is_told(
    train: Run, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = (f"init_from=[{base}]", *LORA, "trainable=[{match: 'llm|segmentor', lr: 1.0e-4}]")
    assert train("s3", tmp_path / "run", *given) == 2
    assert "adapters: siglip: no entry of trainable matches it" in capsys.readouterr().err
    assert train("s3", tmp_path / "run", "adapters={llm: {rnak: 2}}") == 2
    assert "did you mean 'rank'" in capsys.readouterr().err


def test_an_adapter_is_under_five_percent_of_the_model(train: Run, tmp_path: Path) -> None:
    """The tiny model as shipped; the projectors, which learn in full, are a large part of a model of this size."""
    whole, small = tmp_path / "s2", tmp_path / "lora"
    tiny = ("model=tiny", "steps=1")
    assert train("s2", whole, *tiny, "init_from=[]", sizes="seed=1") == 0
    rates = "trainable=[{match: 'llm', lr: 1.0e-3}, {match: 'sam_projector', lr: 1.0e-3}]"
    given = (*tiny, f"init_from=[{whole}/final]", "adapters={llm: {rank: 2, alpha: 4}}", rates)
    assert train("s2", small, *given, sizes="seed=1") == 0
    all_of_it, own = (sum(p.stat().st_size for p in run.glob("final/*.safetensors")) for run in (whole, small))
    assert 0 < own < 0.05 * all_of_it
    stored = (small / "checkpoints/step_1/model.safetensors").stat().st_size
    assert 0 < stored < 0.05 * all_of_it


def test_what_cannot_be_split_is_refused() -> None:
    lora, coarse = Adapter(rank=2), Adapter(rank=2, quantize="nf4")
    slim.check("ZeRO-3", {"sam": lora, "siglip": lora})
    slim.check("", {"llm": coarse})
    slim.check("ZeRO-3", None)
    slim.check("FSDP2", None)
    for given in ({"llm": lora}, {"sam": coarse}):
        with pytest.raises(UserError, match=r"under ZeRO-3 .*zero2.yaml"):
            slim.check("ZeRO-3", given)
    with pytest.raises(UserError, match=r"adapters: sam: FSDP2 .*zero2.yaml"):
        slim.check("FSDP2", {"sam": lora})


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs the extra qlora (bitsandbytes)")
def test_a_four_bit_run_saves_goes_on_and_opens(
    train: Run, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lora, out = "adapters={llm: {rank: 2, alpha: 4, quantize: nf4}}", tmp_path / "run"
    assert train("s3", out, "init_from=[]", lora, "steps=1") == 2
    assert "its weights are random" in capsys.readouterr().err
    given = (f"init_from=[{base}]", lora, "schedule.kind=constant")
    assert train("s3", out, *given, "steps=2") == 0
    assert train("s3", out, *given, "steps=3", resume=True) == 0
    assert [row["step"] for row in metrics(out)] == [1, 2, 3]
    beside, merged = adapters.load(out / "final", merged=False), adapters.load(out / "final")
    assert any(quantize.is_coarse(module) for module in beside.modules())
    assert set(merged.state_dict()) == set(checkpoint.load(base).state_dict())
    name = "llm.model.layers.0.mlp.down_proj.weight"
    change = (merged.state_dict()[name] - checkpoint.read_weights(base)[name]).abs().max().item()
    assert 1e-4 < change < 0.1, "what training saw was rounded, and stays so"
