"""The suite of every task on ShapeWorld: whoever knows the answers reaches the maximum of every row with masks."""

import json
from typing import Any

import pytest
from oracle import SIDE, oracle

from xseg.config import Suite, load_recipe
from xseg.data.shapeworld.tasks import write_tasks
from xseg.data.shapeworld.write import write
from xseg.infer.evaluate import Evaluation, evaluate
from xseg.infer.summary import is_blind

ROWS = {
    "generic_seg": "PQ",
    "open_vocab_seg": "PQ unseen",
    "refer_seg": "cIoU",
    "reason_seg": "gIoU",
    "gcg_seg": "recall",
    "interactive_seg": "mIoU",
    "vgd_seg": "AP",
    "conversation": "exact match",
}
GENERATED = ("gcg_seg", "conversation")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("data")
    write(root / "shapes/val", 10, 0, size=SIDE, split="val")
    write_tasks(root / "shapes/val", 10)
    write(root / "shapes/val_open", 5, 0, size=SIDE, split="val_open")
    out = root / "out"
    found = evaluate(oracle(), load_recipe(Suite, "shapes_all"), Evaluation(root, out))
    assert json.loads((out / "results.json").read_text()) == found
    return found


def test_every_task_has_its_row(results: dict[str, Any]) -> None:
    assert {r["task"]: r["metric"] for r in results["summary"]} == ROWS
    assert [r["dataset"] for r in results["summary"]].count("shapes/vgd_cross_val") == 1
    for row in results["summary"]:
        assert row["n"] > 0 and row["protocol"] and len(row["ci95"]) == 2 and row["maximum"] == 100


def test_right_masks_reach_the_maximum(results: dict[str, Any]) -> None:
    for row in results["summary"]:
        if row["task"] not in GENERATED:
            assert row["value"] == pytest.approx(100, abs=0.1), row
            assert row["closed"] == pytest.approx(100, abs=0.1)
            assert row["oracle IoU"] == pytest.approx(100, abs=0.1)
            assert row["selection gap"] == pytest.approx(0, abs=0.1)


def test_every_row_has_a_blind_baseline_below_the_maximum(results: dict[str, Any]) -> None:
    for row in results["summary"]:
        assert row["blind_protocol"].startswith("blind: ") and row["blind"] < 75, row
    blind = {r["dataset"] for r in results["rows"] if is_blind(r)}
    assert blind == {r["dataset"] for r in results["rows"]}
