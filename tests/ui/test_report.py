import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "infer"))
from oracle import oracle, shapes

from xseg.config import Suite, SuiteRow
from xseg.errors import UserError
from xseg.infer.evaluate import Evaluation, evaluate
from xseg.metrics.oracle import SIZES
from xseg.ui import gaps
from xseg.ui.gallery import galleries
from xseg.ui.report import write_report

ROWS = ["shapes/panoptic_val", "shapes/refer_val", "shapes/talk_val"]


def curves(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = [{"step": i, "elapsed_s": i} for i in range(1, 40)]
    rows = [t | {"loss": 3 / t["step"], "lr": 1e-3, "source": f"set{t['step'] % 2}"} for t in times]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 40, "lo'
    path.write_text(text, encoding="utf8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    root = shapes(folder / "data", 3)
    predictor = oracle()
    predictor.model.answers = ["<b>bold</b> & \x1b[31m"]
    suite = Suite(name="test", rows=[SuiteRow(recipe=name) for name in ROWS])
    suite.rows[0].published["PQ"] = 54.7
    evaluate(predictor, suite, Evaluation(root, folder / "s3/eval"))
    curves(folder / "s3/metrics.jsonl")
    return folder


def test_page_is_whole_and_loads_nothing_from_outside(run: Path) -> None:
    page = write_report(run)
    text = page.read_text(encoding="utf8")
    assert "http" not in re.sub(r'lang="en"', "", text) and "<script" not in text
    files = re.findall(r'src="([^"]+)"', text)
    assert len(files) > 10 and all((page.parent / f).is_file() for f in files)
    assert "set0" in text and "training minutes" in text and (page.parent / "curves.svg").is_file()
    assert "54.7" in text and "Worst" in text and "blind" in text
    summary = text[text.index("From the blind guess") : text.index("Suite test")]
    assert summary.count("<tr>") == 1 + len(ROWS) and "100 %" in summary and "commonest answer" in summary
    assert "<b>bold" not in text and "&lt;b&gt;bold" in text
    again = write_report(run)
    assert again == page and not (run / "report.partial").exists()


def test_the_oracle_gap_has_tables_of_its_own(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf8")
    assert "by size" in text and "by length of the phrase" in text and "by category" in text
    assert "oracle IoU:small" not in text and "selection gap:" not in text
    assert text.index("Suite test") < text.index("Where masks fall short") < text.index("Training")
    results = json.loads((run / "s3/eval/results.json").read_text())
    rows = [r for r in results["rows"] if r["dataset"] == "shapes/refer_val"]
    found = gaps.groups(rows)
    assert [g.name for g in found["by size"]] == [
        n for n, _ in SIZES if any(r["metric"].endswith(f":{n}") for r in rows)
    ]
    for title in ("by size", "by length of the phrase", "by category"):
        assert sum(g.targets for g in found[title]) == found[""][0].targets
    assert gaps.section({"suite": "s", "rows": [r for r in rows if r["metric"] == "cIoU"]}) == ""


def test_chosen_gap_and_rest_make_a_hundred() -> None:
    rows = [
        {"metric": f"{name}{part}", "value": value, "n": 4, "dataset": "d", "protocol": "p"}
        for part in ("", ":small", ":6+ words", ":cat & dog")
        for name, value in (("oracle IoU", 90.0), ("selection gap", 20.0))
    ]
    found = gaps.groups(rows)
    assert list(found) == ["", "by size", "by length of the phrase", "by category"]
    assert all(g.chosen == 70 and g.oracle == 90 for members in found.values() for g in members)
    text = gaps.section({"suite": "s", "rows": rows})
    assert "width:70.0%" in text and "width:90.0%" in text and "cat &amp; dog" in text


def test_the_worst_fifty_are_drawn(tmp_path: Path) -> None:
    root = shapes(tmp_path / "data", 40)
    rows = [SuiteRow(recipe="shapes/refer_val", limit=130)]
    evaluate(oracle(), Suite(name="test", rows=rows), Evaluation(root, tmp_path / "eval", blind=False))
    [gallery] = galleries(tmp_path / "eval", root, tmp_path)
    assert (len(gallery.worst), len(gallery.best)) == (50, 8)
    assert len({card.key for card in gallery.worst}) == 50


def test_moved_data_leaves_the_tables(run: Path, tmp_path: Path) -> None:
    text = write_report(run, tmp_path).read_text(encoding="utf8")
    assert "No pictures" in text and "<table>" in text


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results\.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()
