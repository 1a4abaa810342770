"""The ablations of bench/: rows differ in what they name alone, trainings are shared and resumed, verdicts computed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from xseg.errors import UserError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import ablations  # noqa: E402
import ablations_plan  # noqa: E402
from ablations_table import markdown, summarise, verdict, verdict_of_group  # noqa: E402

PLAN = ablations_plan.read_plan()
SETTINGS = ablations_plan.read_settings(ablations_plan.HERE / "dry.yaml", ["seeds=[1, 2, 3]"])


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout may lack the pretrained parts, and their bytes are not what these tests are about."""
    monkeypatch.setattr(ablations_plan, "weights", lambda model: [])


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}.{key}".strip(".")).items()}


def changed(training: str, base: str) -> set[str]:
    mine, other = (flat(ablations_plan.stage_of(PLAN, SETTINGS, name, 1).resolved()) for name in (training, base))
    return {k for k in {*mine, *other} if mine.get(k) != other.get(k)}


@pytest.mark.parametrize(
    ("training", "base", "keys"),
    [
        ("s1_connector_none", "s1", {"model.segmentor.connector"}),
        ("s1_connector_linear", "s1", {"model.segmentor.connector"}),
        ("s1_connector_conv", "s1", {"model.segmentor.connector"}),
        ("s1_decoder_sam", "s1_connector_none", {"model.segmentor.mask_decoder"}),
        ("s2_siglip", "s2", {"model.llm_sees", "parts"}),
        ("s3_siglip", "s3", {"model.llm_sees"}),
        ("s3_alone", "s3", set()),
        ("s3_generic", "s3", {"mixture.datasets"}),
        ("s3_referring", "s3", {"mixture.datasets"}),
        ("s3_conversation", "s3", {"mixture.datasets"}),
    ],
)
def test_a_row_differs_in_what_it_names_alone(training: str, base: str, keys: set[str]) -> None:
    assert changed(training, base) - {"mixture.balance"} == keys


def test_a_task_alone_trains_on_its_data_of_the_mixture() -> None:
    entries = {n: ablations_plan.stage_of(PLAN, SETTINGS, n, 1).mixture.datasets for n in PLAN.trainings if "s3" in n}
    every = [entry.recipe for entry in entries["s3"]]
    for name in ("s3_generic", "s3_referring", "s3_conversation"):
        assert {entry.recipe for entry in entries[name]} < set(every), name


def bench(out: Path) -> ablations.Bench:
    return ablations.Bench(PLAN, SETTINGS, out)


def test_trainings_are_shared_and_come_after_what_they_need(tmp_path: Path) -> None:
    jobs = bench(tmp_path).needed(PLAN.chosen([]))
    assert len(jobs) == len(set(jobs)) == 14 * 3
    for place, job in enumerate(jobs):
        assert set(bench(tmp_path).before(job)) <= set(jobs[:place])
    assert [j.name for j in bench(tmp_path).needed(["connector-linear"])] == ["s1_connector_linear"] * 3
    with pytest.raises(UserError, match=r"no such row or group.*did you mean 'connector-linear'"):
        PLAN.chosen(["conector-linear"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Public commands are noted, and leave what they would leave."""
    made: list[list[str]] = []

    def fake(command: list[str], log: Path) -> None:
        made.append(list(command))
        if command[0] == "accelerate":
            out = Path(next(w for w in command if w.startswith("out="))[4:])
            (out / "checkpoints").mkdir(parents=True)
            (out / "metrics.jsonl").write_text(json.dumps({"step": 5, "elapsed_s": 7.0}) + "\n")
        elif command[1] == "eval":
            out = Path(command[command.index("--out") + 1])
            out.mkdir()
            row = {"dataset": "d", "metric": "PQ", "value": 50.0, "n": 6, "protocol": "p"}
            rows = [row, {**row, "value": 1.0, "protocol": "blind: p"}]
            (out / "results.json").write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(ablations, "call", fake)
    return made


def test_what_is_done_is_not_done_again_until_its_recipe_changes(tmp_path: Path, calls: list[list[str]]) -> None:
    one = ablations.Job("s1", 1)
    bench(tmp_path).do_all([one], 1)
    assert [c[0] for c in calls] == ["accelerate", "xseg"] and calls[0][-2:] == ["--resume", "auto"]
    stored = bench(tmp_path).result(one)
    assert stored is not None and [row["value"] for row in stored["rows"]] == [50.0]
    assert not (tmp_path / "seed_1/s1/checkpoints").exists()
    bench(tmp_path).do_all([one], 1)
    assert len(calls) == 2
    longer = ablations_plan.read_settings(ablations_plan.HERE / "dry.yaml", ["steps.s1=6"])
    assert ablations.Bench(PLAN, longer, tmp_path).result(one) is None
    (tmp_path / "seed_1/s1/old").touch()
    ablations.Bench(PLAN, longer, tmp_path).do_all([one], 1)
    assert len(calls) == 4 and not (tmp_path / "seed_1/s1/old").exists()


def test_a_change_reaches_the_trainings_behind_it_and_no_others() -> None:
    longer = ablations_plan.read_settings(ablations_plan.HERE / "dry.yaml", ["steps.s2=6"])
    prints = [{n: ablations_plan.fingerprint(PLAN, s, n, 1) for n in PLAN.trainings} for s in (SETTINGS, longer)]
    moved = {n for n in PLAN.trainings if prints[0][n] != prints[1][n]}
    assert moved == {n for n in PLAN.trainings if {"s2", "s2_siglip"} & set(PLAN.lineage(n))}


def test_a_training_that_was_cut_short_goes_on(tmp_path: Path, calls: list[list[str]]) -> None:
    one = ablations.Job("s1", 1)
    bench(tmp_path)._start(one)
    (tmp_path / "seed_1/s1/kept").touch()
    bench(tmp_path).do(one)
    assert (tmp_path / "seed_1/s1/kept").exists()


def test_what_a_training_starts_from_must_be_of_todays_recipes(tmp_path: Path, calls: list[list[str]]) -> None:
    bench(tmp_path).do(ablations.Job("s1", 1))
    bench(tmp_path).do(ablations.Job("s3_after_s1", 1))
    assert f"init_from=[{tmp_path}/seed_1/s1/final]" in calls[2]
    with pytest.raises(UserError, match="s3 seed 1: s2 is not what its recipes now say"):
        bench(tmp_path).do(ablations.Job("s3", 1))


def test_a_failure_ends_the_run_and_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)status 2: xseg eval --model nowhere.*all of it"):
        ablations.call(["xseg", "eval", "--model", "nowhere", "--suite", "s", "--out", "o"], tmp_path / "log")


def results(values: dict[str, list[float]]) -> dict[tuple[str, int], dict[str, Any]]:
    """PQ of trainings by seed, as stored results."""
    row = {"dataset": "d", "metric": "PQ", "n": 6, "protocol": "p"}
    common = {"seconds": {"train": 250.0}, "commit": "c"}
    return {
        (name, seed): {**common, "rows": [{**row, "value": v}]}
        for name, found in values.items()
        for seed, v in enumerate(found, 1)
    }


def test_verdicts_follow_from_the_numbers() -> None:
    assert verdict([2.0, 3.0, 2.5], 9.3) == "agrees" and verdict([-2.0, -3.0, -2.5], 9.3) == "disagrees"
    assert verdict([2.0, -3.0, 2.5], 9.3) == verdict([2.0], 9.3) == verdict([], 9.3) == "undecided"
    assert verdict_of_group(["agrees", "agrees"]) == "agrees with the paper (2 agrees)"
    assert verdict_of_group(["disagrees", "undecided"]).startswith("does not agree")
    assert verdict_of_group([]).startswith("undecided")


def test_the_table_is_computed_from_the_results() -> None:
    found = results({"s1_decoder_sam": [30, 31, 32], "s1_connector_none": [40, 42, 41]})
    summary = summarise(PLAN, SETTINGS, found)
    decoder = summary["groups"]["decoder"]
    pq = next(pair for pair in decoder["differences"] if pair["metric"] == "PQ")
    assert (pq["ours"], pq["spread"], pq["paper"], pq["verdict"]) == (10.0, 1.0, 9.2, "agrees")
    assert decoder["rows"]["decoder-sam"]["metrics"]["PQ"]["by_seed"] == {1: 30, 2: 31, 3: 32}
    text = markdown(json.loads(json.dumps(summary)))
    assert "| decoder-sam | 31.0 ± 1.0 (40.9) | (26.3) | (49.5) | 5 | 250 | 3 |" in text
    assert "6 of 42 trainings done" in text and "s1_connector_none, seed 1: 250 s" in text
    worse = summarise(PLAN, SETTINGS, results({"s1_decoder_sam": [50, 51, 52], "s1_connector_none": [40, 42, 41]}))
    assert "## Mask decoder (stage 1 alone, as in the paper): does not agree with the paper" in markdown(worse)
