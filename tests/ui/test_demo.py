import json
from pathlib import Path

import pytest
import typer
from rich.console import Console

from xseg.config import StageRecipe, load_recipe
from xseg.errors import UserError
from xseg.ui import demo as module
from xseg.ui.demo import Demo, Step, clock, run, stage_name


def made(tmp_path: Path) -> Demo:
    return Demo(tmp_path / "out", "tiny", 10, 0, Console(quiet=True))


def test_commands_are_those_of_the_readme(tmp_path: Path) -> None:
    steps = made(tmp_path).training()
    assert [s.name for s in steps] == ["data", "s1", "s2", "s3"]
    last = " ".join(steps[-1].command)
    assert last.startswith("accelerate launch --config_file") and "-m xseg.train" in last and "--resume auto" in last
    assert f"init_from=[{tmp_path}/out/s1/final, {tmp_path}/out/s2/final]" in last
    assert "seed=" not in last
    seeded = Demo(tmp_path / "out", "tiny", 10, 7, Console(quiet=True)).training()
    assert "seed=7" in seeded[1].command and "--seed 7" in " ".join(seeded[0].command)


FOLDERS = sorted(p.parent.name for p in (Path(__file__).parent.parent.parent / "train_stages").glob("*/s1*.yaml"))


@pytest.mark.parametrize("recipe", FOLDERS)
def test_any_folder_of_stages_is_a_recipe(recipe: str, tmp_path: Path) -> None:
    demo = Demo(tmp_path / "out", recipe, 10, 0, Console(quiet=True))
    steps = demo.training()
    assert [s.name for s in steps] == ["data", *(stage_name(path) for path in demo.stages)]
    made = {str(step.makes.parent) for step in steps}
    for step in steps:
        starts = [word for word in step.command if word.startswith("init_from=")]
        assert all(place in made for word in starts for place in word[len("init_from=[") : -1].split(", "))
    last = demo.evaluation()[-1]
    assert str(steps[-1].makes.parent) in last.command, "the last stage is scored"


def test_every_task_is_written_trained_and_scored(tmp_path: Path) -> None:
    demo = Demo(tmp_path / "out", "all", 10, 0, Console(quiet=True))
    data, *_, last = demo.training()
    assert "--tasks" in data.command and "--tasks" not in made(tmp_path).training()[0].command
    stage = load_recipe(StageRecipe, str(demo.stages[-1]))
    assert stage.mixture == "shapes_s3_all" and str(last.makes.parent).endswith("s3/final")
    suites = [step.command[step.command.index("--suite") + 1] for step in demo.evaluation()]
    assert suites == ["shapes", "shapes_all"], "a fixed label list cannot name what is not on it"
    (naming,) = demo.naming()
    assert naming.command[2] == str(last.makes.parent) and naming.makes.parent.parent == last.makes.parent
    assert not made(tmp_path).naming(), "no name of the plain demo is new"


def test_new_weights_of_a_pretrained_part_do_the_stages_anew(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"one")
    (tmp_path / "s1_a.yaml").write_text(
        f"base: {Path(__file__).parent.parent.parent}/train_stages/tiny/s1_segmentor.yaml\n"
        f"model_overrides: {{sam: {{pretrained: {part}}}}}\n"
    )

    def made_by() -> str:
        return Demo(tmp_path / "out", str(tmp_path), 10, 0, Console(quiet=True)).made_by

    before = made_by()
    assert made_by() == before
    (part / "model.safetensors").write_bytes(b"two")
    assert made_by() != before


def test_finished_steps_are_skipped_until_one_has_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def fake(command: tuple[str, ...], log: Path) -> int:
        ran.append(command[-1])
        (tmp_path / command[-1]).touch()
        return 0

    monkeypatch.setattr(module, "run", fake)
    steps = [Step(name, ("xseg", name), tmp_path / name) for name in ("a", "b", "c")]

    def go() -> list[str]:
        demo = made(tmp_path)
        demo.out.mkdir(exist_ok=True)
        ran.clear()
        for step in steps:
            demo.do(step)
        return list(ran)

    assert go() == ["a", "b", "c"]
    assert go() == []
    (tmp_path / "b").unlink()
    assert go() == ["b", "c"]
    monkeypatch.setattr(module, "fingerprint", lambda recipes: "another recipe")
    assert go() == ["a", "b", "c"], "what another recipe made is no result of this one"


@pytest.mark.parametrize(("status", "makes", "expected"), [(2, True, 2), (1, True, 1), (-9, True, 1), (0, False, 1)])
def test_a_failure_names_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, makes: bool, expected: int
) -> None:
    monkeypatch.setattr(module, "run", lambda command, log: status)
    console = Console(record=True, width=300)
    demo = Demo(tmp_path / "out", "tiny", 10, 0, console)
    demo.out.mkdir()
    target = tmp_path / "there"
    if makes:
        target.touch()
    with pytest.raises(typer.Exit) as failure:
        demo.do(Step("eval s1", ("xseg", "eval"), target))
    assert failure.value.exit_code == expected
    assert "logs/eval-s1.log" in console.export_text()
    assert not demo.record.exists()


def test_output_is_shown_and_kept(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run(("xseg", "--version"), tmp_path / "logs/a.log") == 0
    kept = (tmp_path / "logs/a.log").read_bytes()
    assert kept and capfdbinary.readouterr().out == kept
    assert run(("xseg", "report", str(tmp_path / "none")), tmp_path / "b.log") == 2


def test_results_of_both_models_stand_in_one_file(tmp_path: Path) -> None:
    demo = made(tmp_path)
    for step, value in zip(demo.evaluation(), (1.0, 3.0), strict=True):
        step.makes.parent.mkdir(parents=True)
        row = {"metric": "PQ", "value": value}
        step.makes.write_text(
            json.dumps({"suite": "shapes", "commit": None, "versions": {}, "rows": [row], "summary": []})
        )
    assert [(r["model"], r["value"]) for r in demo.merge()["rows"]] == [("s3", 3.0), ("s1", 1.0)]
    assert json.loads((demo.out / "results.json").read_text())["suite"] == "shapes"


def test_the_machine_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_DISK", 1 << 60)
    with pytest.raises(UserError, match="GiB free"):
        made(tmp_path).run()
    assert not (tmp_path / "out").exists()


def test_names() -> None:
    assert stage_name(Path("a/s2_align.yaml")) == "s2" and clock(125.9) == "2:05 min"
    with pytest.raises(UserError, match="named s1"):
        stage_name(Path("a/align.yaml"))


@pytest.mark.parametrize("place", ["FILE", "FILE/below"])
def test_a_bad_out_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "FILE").write_text("mine")
    monkeypatch.setattr(Demo, "do", lambda self, step: pytest.fail("a step began"))
    with pytest.raises(UserError, match=f"{place}: nothing can be written there"):
        Demo(tmp_path / place, "tiny", 10, 0, Console(quiet=True)).run()
    assert [p.name for p in tmp_path.iterdir()] == ["FILE"]
