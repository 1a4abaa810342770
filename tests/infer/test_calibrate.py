"""From which probability on a phrase is there: chosen on one split, kept with the model, used at inference."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from infer.oracle import Oracle, oracle, shapes
from PIL import Image

from xseg.config import Suite, SuiteRow, TaskSpec
from xseg.errors import UserError
from xseg.infer.calibrate import Asked, calibrate, write
from xseg.infer.evaluate import Evaluation, evaluate, open_row
from xseg.infer.predictor import Predictor
from xseg.infer.processing import FILE, Calibration, XSegProcessor
from xseg.types import Batch, ModelOutput

THERE, ABSENT = 0.35, 0.15


class Timid(Oracle):
    """Right about every mask, and never sure: what is there gets ``THERE``, what is not ``ABSENT``."""

    def forward(self, batch: Batch) -> ModelOutput:
        found = super().forward(batch)
        logits = found.class_logits
        for query in range(len(batch.query_image)):
            sure = THERE if (batch.target_query == query).any() else ABSENT
            logits[0, query, :, -1] = float(torch.tensor(1 - ABSENT).log())
            logits[0, query, :, 0] = float(torch.tensor(ABSENT).log())
            logits[0, query, 0, 0] = float(torch.tensor(sure).log())
            logits[0, query, 0, -1] = float(torch.tensor(1 - sure).log())
        return ModelOutput(found.mask_logits, logits, found.lm_logits, found.lm_labels)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes(tmp_path_factory.mktemp("data"), 8)


def timid() -> Predictor:
    plain = oracle()
    return Predictor(Timid(plain.model.encoder), plain.processor)


def test_the_threshold_parts_what_is_there_from_what_is_not(root: Path, tmp_path: Path) -> None:
    predictor, suite = timid(), Suite(name="s", rows=[SuiteRow(recipe="shapes/refer_val")])
    before = evaluate(predictor, suite, Evaluation(root, tmp_path / "before", blind=False))
    found = calibrate(predictor, Asked("shapes/refer_val", root, batch_size=3))
    assert ABSENT < found.reject < THERE and (found.n_acc, found.t_acc) == (100, 100)
    assert found.recipe == "shapes/refer_val" and found.split == "val" and found.phrases > 8
    predictor.processor.save_pretrained(tmp_path / "model")
    write(predictor, tmp_path / "model", found)
    after = evaluate(predictor, suite, Evaluation(root, tmp_path / "after", blind=False))
    values = [{r["metric"]: r for r in results["rows"]} for results in (before, after)]
    assert [v["T-acc"]["value"] for v in values] == [0, 100] and [v["N-acc"]["value"] for v in values] == [100, 100]
    assert values[1]["cIoU"]["value"] > 99.9
    assert "empty below probability 0.5" in values[0]["cIoU"]["protocol"]
    assert f"empty below probability {found.reject:.4g}" in values[1]["N-acc"]["protocol"]
    told = f"threshold chosen on {found.phrases} phrases of shapes/refer_val (val), which is this data set"
    assert told in values[1]["N-acc"]["protocol"] and "chosen" not in values[0]["N-acc"]["protocol"]
    # calibrating again does not see the threshold in force
    assert calibrate(predictor, Asked("shapes/refer_val", root)) == found


def test_it_is_kept_with_the_model_and_used_at_inference(root: Path, tmp_path: Path) -> None:
    predictor = timid()
    predictor.processor.save_pretrained(tmp_path)
    old = json.loads((tmp_path / FILE).read_text())
    assert XSegProcessor.from_pretrained(tmp_path).reject == 0.5
    write(predictor, tmp_path, Calibration(0.1, "r", "val", 9, 80.0, 90.0))
    again = XSegProcessor.from_pretrained(tmp_path)
    assert again.reject == 0.1 and again.calibration == predictor.processor.calibration
    assert {k: v for k, v in json.loads((tmp_path / FILE).read_text()).items() if k != "calibration"} == {
        k: v for k, v in old.items() if k != "calibration"
    }
    picture = Image.new("RGB", (64, 64))
    predictor.model.mask = torch.ones(64, 64, dtype=torch.bool)
    assert predictor.segment(picture, "the circle").found
    assert not predictor.segment(picture, "the circle", reject=0.5).found
    # folders of before know nothing of it
    (tmp_path / FILE).write_text(json.dumps({k: v for k, v in old.items() if k != "calibration"}))
    assert XSegProcessor.from_pretrained(tmp_path).calibration is None


def test_a_recipe_s_own_threshold_stays(root: Path) -> None:
    predictor = timid()
    predictor.processor.calibration = Calibration(0.2, "r", "val", 9, 80.0, 90.0)

    def reject(**options: float) -> float:
        row = SuiteRow(recipe="shapes/refer_val", task=TaskSpec(name="refer_seg", **options))
        dataset = open_row(predictor, row, root)
        assert dataset is not None
        return float(dataset.task.reject)

    assert (reject(), reject(reject=0.0), reject(reject=0.4)) == (0.2, 0.0, 0.4)


def test_what_cannot_be_calibrated_is_said(root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    options = "{images: shapes/val/images, refs: shapes/val/refs.json, instances: shapes/val/instances.json}"
    recipe.write_text(f"source: refer\noptions: {options}\ntask: refer_seg\nsplit: testA\n")
    with pytest.raises(UserError, match="split testA"):
        calibrate(timid(), Asked(str(recipe), root))
    recipe.write_text(f"source: refer\noptions: {options}\ntask: {{name: reason_seg, reject: 0.1}}\nsplit: val\n")
    for name in ("shapes/panoptic_val", str(recipe)):
        with pytest.raises(UserError, match="takes the model's threshold"):
            calibrate(timid(), Asked(name, root))
    with pytest.raises(UserError, match="not both"):
        calibrate(timid(), Asked("shapes/refer_val", root, limit=1))
    with pytest.raises(UserError, match="no xseg_processor"):
        write(SimpleNamespace(processor=None), tmp_path, Calibration(0.1, "r", "val", 9, 0, 0))  # type: ignore[arg-type]
