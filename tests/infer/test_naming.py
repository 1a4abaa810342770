"""``xseg names``: a model with a SigLIP of its own that names what no mask was trained for."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import LOUD, oracle, shapes
from PIL import Image

from xseg.config import Suite, SuiteRow, TaskSpec
from xseg.data.shapeworld.draw import draw
from xseg.data.shapeworld.world import SHAPES, split_scene
from xseg.errors import UserError
from xseg.geometry.views import ViewSizes
from xseg.infer import naming
from xseg.infer.evaluate import Evaluation, evaluate
from xseg.infer.predictor import Predictor
from xseg.infer.processing import XSegProcessor
from xseg.models import names
from xseg.models.configuration import XSegConfig
from xseg.types import Batch, Formatted, ModelOutput, Query, Turn

TINY = Path(__file__).parents[2] / "examples/tiny_parts/siglip"
SIDE = 96
SEEN = [shape for shape in SHAPES if shape not in ("heart", "arrow")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a stage 3 leaves, but for its weights, which are not read."""
    processor = XSegProcessor(oracle().processor.encoder, ViewSizes(SIDE, SIDE), named=SEEN)
    processor.save_pretrained(tmp_path / "final")
    text = {"model_type": "phi3", "pad_token_id": 0}
    config = XSegConfig(sam_config={}, siglip_config={}, text_config=text, segmentor_config={})
    config.save_pretrained(tmp_path / "final")
    return tmp_path / "final"


class Blind(torch.nn.Module):
    """True masks of a scene, and no idea what they are: classes as they come to someone who knows only what is SEEN."""

    def __init__(self, masks: np.ndarray) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.masks = torch.from_numpy(np.where(masks, LOUD, -LOUD).astype(np.float32))[None, None]

    def forward(self, batch: Batch) -> ModelOutput:
        classes = torch.zeros(1, 1, self.masks.shape[2], batch.query_concepts.shape[1] + 1)
        classes[..., :8] = 3.0
        return ModelOutput(self.masks, classes, torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))


def test_unseen_shapes_get_their_names(folder: Path) -> None:
    naming.add(folder, TINY, "{}")
    processor, right, without = XSegProcessor.from_pretrained(folder), [], []
    for number in range(12):
        scene = split_scene(0, "val_open", number, side=SIDE)
        model = Blind(np.stack([scene.visible(k) for k in range(len(scene.things))]))
        views = processor.sizes.views(Image.fromarray(draw(scene)))
        text = "<image>\nSegment " + ", ".join(f"<p>{name}</p>" for name in SHAPES)
        turns = (Turn("user", text), Turn("assistant", "<SEG>"))
        batch = processor.batch([processor.encode([views], Formatted(turns, (Query(0, tuple(range(10))),)))])
        predictor = Predictor(model, processor)
        output = predictor.recognised(batch, model(batch), [SHAPES])
        wanted = [SHAPES.index(thing.shape) for thing in scene.things]
        right += (output.class_logits[-1, 0, :, :10].argmax(-1) == torch.tensor(wanted)).tolist()
        untouched = predictor.recognised(batch, model(batch), [()])
        without += (untouched.class_logits[-1, 0, :, :10].argmax(-1) == torch.tensor(wanted)).tolist()
        assert torch.equal(untouched.class_logits, model(batch).class_logits)
    assert np.mean(right) > 0.9 > 0.5 > np.mean(without)


def test_padding_and_other_queries_stay_as_they_are(folder: Path) -> None:
    made = names.load(naming.add(folder, TINY, "{}"))
    processor = XSegProcessor.from_pretrained(folder)
    views = processor.sizes.views(Image.new("RGB", (40, 20)))
    batch = processor.batch([processor.encode([views], Formatted((), (Query(None, ()), Query(None, ()))))])
    classes = torch.randn(2, 2, 3, 6)
    classes[..., 2:5] = -1e9
    output = ModelOutput(torch.randn(2, 2, 3, 24, 24), classes, torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))
    found = naming.recognised(made, SEEN, batch, output, [(), ("heart", "bar")]).class_logits
    assert torch.equal(found[:, 0], classes[:, 0]) and torch.equal(found[0], classes[0])
    assert (found[1, 1, :, 2:5] == -1e9).all(), "columns that no name has"
    both = found[1, 1][:, [0, 1, 5]].softmax(-1)
    torch.testing.assert_close(both[:, -1], classes[1, 1].softmax(-1)[:, -1])
    assert not torch.allclose(both, classes[1, 1][:, [0, 1, 5]].softmax(-1), atol=1e-3)


def test_a_copy_of_the_model_keeps_its_names(folder: Path, tmp_path: Path) -> None:
    place = naming.add(folder, TINY, "a {}")
    assert names.load(place).template == "a {}"
    naming.add(folder, TINY, "the {}")
    XSegProcessor.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    copy = XSegProcessor.from_pretrained(tmp_path / "copy")
    assert copy.names == tmp_path / "copy/names" and names.load(copy.names).template == "the {}"


def _no_text(folder: Path) -> None:
    XSegConfig(sam_config={}, segmentor_config={}).save_pretrained(folder)


def _other_size(folder: Path) -> None:
    fields = json.loads((folder / "xseg_processor.json").read_text()) | {"llm_size": 64}
    (folder / "xseg_processor.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("harm", "template", "message"),
    [
        (lambda f: None, "a photo", "must hold one {}"),
        (lambda f: None, "{} and {}", "must hold one {}"),
        (lambda f: None, "{0} {}", "no other brace"),
        (_no_text, "{}", "lacks SigLIP, words or masks"),
        (_other_size, "{}", "reads pictures of 96 pixels, the model in .* shows 64"),
        (lambda f: shutil.rmtree(f), "{}", "config.json: cannot read it"),
    ],
)
def test_what_cannot_get_names_is_told_and_left_as_it_was(
    folder: Path, harm: object, template: str, message: str
) -> None:
    harm(folder)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        naming.add(folder, TINY, template)
    assert not list(folder.parent.rglob("*names*"))


def test_a_missing_siglip_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--from .*gone: no such folder"):
        naming.add(folder, tmp_path / "gone", "{}")


def test_only_open_vocabulary_is_scored_with_names(folder: Path, tmp_path: Path) -> None:
    """Their protocol says so; the masks, and so the oracle's perfect score of what it knows, stay."""
    naming.add(folder, TINY, "{}")
    predictor = oracle()
    predictor.processor = XSegProcessor.from_pretrained(folder)
    root, kept = shapes(tmp_path), ("oracle IoU", "PQ")
    tasks = [TaskSpec(name=name, outputs=["panoptic"]) for name in ("generic_seg", "open_vocab_seg")]
    rows = [SuiteRow(recipe="shapes/panoptic_val", task=task) for task in tasks]
    results = evaluate(predictor, Suite(name="test", rows=rows), Evaluation(root, tmp_path / "out", blind=False))
    for row in (r for r in results["rows"] if r["metric"] in kept):
        assert (naming.NOTE in row["protocol"]) == (row["task"] == "open_vocab_seg")
        assert row["value"] == pytest.approx(100, abs=0.01) or row["task"] == "open_vocab_seg"
    assert predictor.names is predictor.names, "opened once"
