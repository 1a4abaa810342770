"""What is wrong in a stage is told in one message before a heavy library is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from xseg.errors import UserError
from xseg.train import stage as stages
from xseg.train.__main__ import parse
from xseg.train.log import MetricsFile

ROOT = Path(__file__).parent.parent.parent
S1, S2, S3 = (str(ROOT / f"train_stages/{n}.yaml") for n in ("s1_segmentor", "s2_align", "s3_mixed"))


def test_the_paper_numbers() -> None:
    """X-SAM section 3.4 and its released settings."""
    s1, s2 = stages.read_stage(S1).recipe, stages.read_stage(S2).recipe
    s3 = stages.read_stage(S3, ["init_from=[]"]).recipe
    assert [s.batch_size * s.accumulate * 16 for s in (s1, s2, s3)] == [64, 256, 64]
    assert [s.epochs for s in (s1, s2, s3)] == [36, 1, 1]
    assert [s.clip for s in (s1, s2, s3)] == [0.01, 1, 1]
    assert [[g.lr for g in s.trainable] for s in (s1, s2, s3)] == [[1e-5, 1e-4], [1e-3], [4e-6, 4e-5]]
    assert [{g.weight_decay for g in s.trainable} for s in (s1, s2, s3)] == [{0.05}, {0.0}, {0.05}]
    assert [s.schedule.kind for s in (s1, s2, s3)] == ["step", "cosine", "cosine"]
    assert s1.schedule.milestones == pytest.approx([24 / 36, 30 / 36], abs=1e-4) and s1.jitter == (0.1, 2.0)
    assert (s1.loss.class_, s1.loss.mask, s1.loss.dice, s1.loss.num_points) == (2, 5, 5, 12544)
    assert {s.seed for s in (s1, s2, s3)} == {1024} and {s.schedule.warmup for s in (s1, s2, s3)} == {0.03}


def test_settings_may_be_given_in_any_number() -> None:
    given = parse(["x.yaml", "--set", "steps=3", "out=a", "--set", "seed=1", "--resume", "auto"])
    assert given.set == ["steps=3", "out=a", "seed=1"] and given.resume == "auto"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["stepz=3"], "did you mean 'steps'"),
        (["steps=0"], "at least one step"),
        (["batch_size=0"], "batch_size = 0"),
        (["trainable=[{match: '(', lr: 1}]"], "no regular expression"),
        (["init_from=[runs/nowhere/final]"], "run that one first"),
        (["out=[a, b"], "the value is no YAML"),
        (["mixture=coco_s2"], "did you mean 'coco_s1'"),
    ],
)
def test_a_wrong_stage_is_one_message_and_status_2(settings: list[str], words: str) -> None:
    code = (
        "import sys\nfrom xseg.train.__main__ import main\nstatus = main(sys.argv[1:])\n"
        "assert not {'torch', 'accelerate', 'transformers'} & set(sys.modules)\nsys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, S1, "--set", *settings], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_resolved_recipe_holds_contents_instead_of_names() -> None:
    fields = stages.read_stage(S2).resolved()
    assert fields["mixture"]["datasets"][0]["recipe"] == "llava/llava_558k"
    assert fields["model"]["llm_view"] == "pad_square" and "model_overrides" not in fields


def test_stage_3_keeps_the_sam_that_stage_1_trained() -> None:
    """Stage 2 starts from no stage 1: its folder holds SAM as it was downloaded."""
    assert not stages.read_stage(S2).recipe.init_from
    from xseg.config import StageRecipe, load_recipe

    assert load_recipe(StageRecipe, S3).init_from == ["runs/s2/final", "runs/s1/final"], "the last one stays"


@pytest.mark.parametrize(
    "setting",
    [
        "clip=0", "num_workers=-1", "seed=-1", "betas=[0.9, 1.5]", "jitter=[0, 1]", "jitter=[2, 0.1]", "trainable=[]",
        "epochs=.nan", "trainable=[{match: .*, lr: -1}]", "schedule.warmup=2", "loss.mask=-1", "skip_nonfinite=-1",
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_named(setting: str) -> None:
    with pytest.raises(UserError, match=setting.split("=")[0].split(".")[-1]):
        stages.read_stage(S1, [setting])


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path: Path) -> None:
    stage = stages.read_stage(S1, [f"out={tmp_path}"])
    stages.check_fresh(stage, resume=False)
    (tmp_path / "checkpoints/step_7").mkdir(parents=True)
    with pytest.raises(UserError, match="step_7"):
        stages.check_fresh(stage, resume=False)
    stages.check_fresh(stage, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_model_without_checkpoints_is_not_overwritten(tmp_path: Path, resume: bool) -> None:
    stage = stages.read_stage(S1, [f"out={tmp_path}"])
    (tmp_path / "final").mkdir()
    (tmp_path / "final/config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a finished model"):
        stages.check_fresh(stage, resume=resume)


def test_metrics_go_on_after_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "elapsed_s": 2.5}\n{"step": 2, "elapsed_s": 5.0}\n{"step": 3}\n{"step": 4, "lo')
    metrics = MetricsFile(tmp_path, 2)
    metrics.write({"step": 3, "loss": 1 / 3})
    assert file.read_text().splitlines() == [
        '{"step": 1, "elapsed_s": 2.5}',
        '{"step": 2, "elapsed_s": 5.0}',
        '{"step": 3, "loss": 0.3333333}',
    ]
    assert metrics.elapsed == 5.0
