"""FSDP2 on CPU: what is cut, a run that goes on where it was, half precision, recomputed layers, and what is refused.

The mixes of data on two ranks are those of ``test_matrix.py``.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from matrix_runs import FSDP2, Split, start, train
from small_runs import COMMON, SAMPLED, SMALL, TINY, losses, metrics, pictures, untimed

from xseg import load
from xseg.errors import UserError
from xseg.train import assemble, launch
from xseg.train.__main__ import main
from xseg.train.consolidate import CUT, consolidate, weights
from xseg.train.stage import check_fsdp, read_stage

TWO = Split(FSDP2, 2)
slow = pytest.mark.slow
WORDS = [{"role": "user", "text": "what shapes are there ?"}, {"role": "assistant", "text": "a red circle"}]
HEADS = "segmentor|.*projector|background"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data"))


def run(data: Path, out: Path, split: Split, *settings: str) -> str:
    """Train with AdamW; return what the run said."""
    processes = start(data, out, split, *settings)
    for process in processes:
        process.join(500)
    said = out.with_suffix(".log").read_text()
    assert [p.exitcode for p in processes] == [0] * split.world, said
    return said


def test_every_layer_of_the_language_model_is_a_unit(data: Path) -> None:
    stage = read_stage(str(next(TINY.glob("s3_*"))), [SMALL, *COMMON, f"data_root={data}", "init_from=[]"])
    model = assemble.skeleton(assemble.configuration(stage, assemble.load_data(stage)))
    units = launch.layers(model.llm)
    assert units == list(model.llm.get_decoder().layers) and len(units) == 2


@slow
def test_a_run_goes_on_exactly(data: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = ("steps=6", "save_every=3", "keep_checkpoints=2", "trainable=[{match: .*, lr: 5.0e-4}]", *SAMPLED)
    run(data, whole, TWO, *settings)
    shutil.copytree(whole / "checkpoints/step_3", cut / "checkpoints/step_3")
    assert "resumed from" in run(data, cut, TWO, *settings, "--resume", "auto")
    rows = untimed(metrics(whole))
    assert untimed(metrics(cut)) == rows[3:] and len({row["loss"] for row in rows}) == 6
    assert {"llm", "segmentor.sam"} <= rows[-1]["grad_norms"].keys()
    last = [weights(folder / "checkpoints/step_6") for folder in (whole, cut)]
    assert all(torch.equal(value, last[1][name]) for name, value in last[0].items())
    opened = load(whole / "final")[0].model.state_dict()
    assert opened.keys() == last[0].keys() and all(torch.equal(value, last[0][name]) for name, value in opened.items())
    assert consolidate(read_stage(str(whole / "final/stage.yaml")), tmp_path / "joined") == 6
    joined = load(tmp_path / "joined")[0].model.state_dict()
    assert joined.keys() == opened.keys() and all(torch.equal(value, opened[name]) for name, value in joined.items())
    sealed = json.loads((whole / "checkpoints/step_6/manifest.json").read_text())["files"]
    assert {
        f"{CUT}/.metadata",
        f"{CUT}/__1_0.distcp",
        "optimizer_0/__0_0.distcp",
        "random_states_1.pkl",
    } < sealed.keys()

    other = start(data, cut, Split(world=2), *settings, "--resume", "auto")
    for process in other:
        process.join(500)
    assert [process.exitcode for process in other] == [2, 2]
    assert "written with fsdp = 2, now None" in cut.with_suffix(".log").read_text()


@slow
@pytest.mark.parametrize(
    ("setting", "tolerance"), [("gradient_checkpointing=true", 1e-4), ("precision=bf16", 2e-2)], ids=["again", "half"]
)
def test_layers_computed_again_or_in_half(data: Path, tmp_path: Path, setting: str, tolerance: float) -> None:
    settings = ("steps=3", setting, "trainable=[{match: .*, lr: 0.05}]")
    train(data, tmp_path / "alone", Split(), "divergent", TWO, *settings)
    train(data, tmp_path / "two", TWO, "divergent", TWO, *settings)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=tolerance)
    assert len(set(losses(tmp_path / "alone"))) == 3


@slow
def test_a_frozen_language_model_is_walked_on_every_rank(data: Path, tmp_path: Path) -> None:
    """One rank has texts without a picture: nothing that learns stands before its language model."""
    (data / "words.jsonl").write_text(json.dumps({"turns": WORDS}) + "\n", encoding="utf8")
    words = {"source": "jsonl", "options": {"jsonl": "words.jsonl"}, "task": "conversation", "split": "train"}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(words | {"licence": "none", "download": "none"}))
    recipes = ["shapes/refer_train", str(tmp_path / "words.yaml")]
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"datasets": recipes, "balance": None}))
    settings = ("steps=4", f"mixture={tmp_path / 'mixture.yaml'}", f"trainable=[{{match: '{HEADS}', lr: 0.05}}]")
    train(data, tmp_path / "alone", Split(), "divergent", TWO, *settings)
    train(data, tmp_path / "two", TWO, "divergent", TWO, *settings)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


@pytest.mark.parametrize("given", [{}, {"fsdp_version": "2", "fsdp_offload_params": "true"}], ids=["1", "offload"])
def test_another_fsdp_is_refused(given: dict[str, str]) -> None:
    check_fsdp({"fsdp_version": "2", "fsdp_auto_wrap_policy": "NO_WRAP"})
    with pytest.raises(UserError, match=r"fsdp_\w+: \w+: FSDP is supported as version 2.*zero3\.yaml"):
        check_fsdp(given)


def test_a_run_under_fsdp1_ends_with_one_message(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    settings = [SMALL, *COMMON, f"data_root={data}", f"out={tmp_path / 'run'}"]
    assert main([str(next(TINY.glob("s1_*"))), "--set", *settings]) == 2
    assert "fsdp_version: 1" in capsys.readouterr().err and not (tmp_path / "run").exists()
