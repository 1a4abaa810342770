"""``xseg names``: a model with a SigLIP of its own that names what no mask was trained for."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import LOUD, Oracle, oracle, shapes
from PIL import Image

from xseg.config import Suite, SuiteRow, TaskSpec
from xseg.data.shapeworld.draw import draw
from xseg.data.shapeworld.world import SHAPES, split_scene
from xseg.encode import Encoder
from xseg.errors import UserError
from xseg.geometry.views import ViewSizes
from xseg.infer import card, naming
from xseg.infer.evaluate import Evaluation, evaluate
from xseg.infer.export import Export, check_size
from xseg.infer.predictor import Predictor
from xseg.infer.processing import XSegProcessor
from xseg.infer.session import Session
from xseg.models import checkpoint, names
from xseg.models.configuration import XSegConfig
from xseg.types import Batch, Formatted, ModelOutput, Query, Turn
from xseg.ui.cli import main

TINY = Path(__file__).parents[2] / "examples/tiny_parts/siglip"
SIDE = 96
SEEN = [shape for shape in SHAPES if shape not in ("heart", "arrow")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a stage 3 leaves, but for its weights, which are not read."""
    processor = XSegProcessor(oracle().processor.encoder, ViewSizes(SIDE, SIDE), categories=SEEN)
    processor.save_pretrained(tmp_path / "final")
    text = {"model_type": "phi3", "pad_token_id": 0}
    config = XSegConfig(sam_config={}, siglip_config={}, text_config=text, segmentor_config={})
    config.save_pretrained(tmp_path / "final")
    return tmp_path / "final"


class Blind(Oracle):
    """True masks of a scene, and no idea what they are: classes as they come to someone who knows only what is SEEN."""

    def __init__(self, encoder: Encoder | None, masks: np.ndarray) -> None:
        super().__init__(encoder)
        self.things = torch.from_numpy(np.where(masks, LOUD, -LOUD).astype(np.float32))[None, None]

    def forward(self, batch: Batch) -> ModelOutput:
        classes = torch.zeros(1, 1, self.things.shape[2], batch.query_concepts.shape[1] + 1)
        classes[..., :8] = 3.0
        return ModelOutput(self.things, classes, torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))


def test_unseen_shapes_get_their_names(folder: Path) -> None:
    naming.add(folder, TINY, "{}")
    processor, right, without = XSegProcessor.from_pretrained(folder), [], []
    for number in range(12):
        scene = split_scene(0, "val_open", number, side=SIDE)
        model = Blind(processor.encoder, np.stack([scene.visible(k) for k in range(len(scene.things))]))
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
    made = names.load(naming.add(folder, TINY, "{}"), SIDE)
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
    assert names.load(place, SIDE).template == "a {}"
    naming.add(folder, TINY, "the {}")
    XSegProcessor.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    copy = XSegProcessor.from_pretrained(tmp_path / "copy")
    assert copy.names == tmp_path / "copy/names" and names.load(copy.names, SIDE).template == "the {}"


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
        (_other_size, "{}", "reads pictures of 96 pixels, the model shows 64"),
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
    with pytest.raises(UserError, match=r"gone: no config.json here"):
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
        note = naming.note(predictor.processor) in row["protocol"]
        assert note == (row["task"] == "open_vocab_seg") == ("0.8 for others" in row["protocol"])
        assert row["metric"] == "PQ" or row["value"] == pytest.approx(100, abs=0.01), "masks stay what they are"
    changed = {row["task"]: row["value"] for row in results["rows"] if row["metric"] == "PQ"}
    assert changed["generic_seg"] == pytest.approx(100, abs=0.01) and changed["open_vocab_seg"] > 90
    assert set(results["names"]) == {"template", "sha256"}
    assert predictor.names is predictor.names, "opened once"


def test_another_siglip_takes_the_place_of_the_first(folder: Path, tmp_path: Path) -> None:
    """Nothing of the first stays: a vocabulary left behind would be read with the other's words."""
    place = naming.add(folder, TINY, "{}")
    (place / "spiece.model").write_bytes(b"of the first")
    naming.add(folder, TINY, "{}")
    assert not (place / "spiece.model").exists()
    (place / "names.json").write_text("{")
    with pytest.raises(UserError, match="run `xseg names` again"):
        names.load(place, SIDE)
    naming.add(folder, TINY, "{}")
    shutil.rmtree(place)
    place.mkdir()
    (place / "mine.txt").write_text("no SigLIP")
    with pytest.raises(UserError, match="nothing is overwritten"):
        naming.add(folder, TINY, "{}")


def test_each_query_is_recognised_on_its_own_picture(folder: Path) -> None:
    """Three queries of two pictures, the first picture last; a list of one name changes nothing."""
    made, processor = names.load(naming.add(folder, TINY, "{}"), SIDE), XSegProcessor.from_pretrained(folder)
    scenes = [split_scene(0, "val_open", number, side=SIDE) for number in (0, 1)]
    views = [processor.sizes.views(Image.fromarray(draw(scene))) for scene in scenes]
    queries = tuple(Query(None, (), image=image) for image in (1, 0, 0))
    batch = processor.batch([processor.encode(views, Formatted((), queries))])
    things = [scenes[image].things[0] for image in (1, 0, 0)]
    drawn = torch.tensor(np.stack([scenes[image].visible(0) for image in (1, 0, 0)]))[None, :, None]
    masks = torch.where(drawn, LOUD, -LOUD)
    output = ModelOutput(masks, torch.zeros(1, 3, 1, 11), torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))
    found = naming.recognised(made, [], batch, output, [SHAPES, SHAPES, SHAPES[:1]]).class_logits[-1, :, 0, :10]
    assert [SHAPES[int(k)] for k in found[:2].argmax(-1)] == [thing.shape for thing in things[:2]]
    assert torch.equal(found[2], torch.zeros(10))


def test_segment_and_chat_ask_siglip_too(folder: Path) -> None:
    """A picture of one shape that no mask was trained for, its mask found and not named by the model."""
    naming.add(folder, TINY, "{}")
    processor, scene = XSegProcessor.from_pretrained(folder), split_scene(0, "val_open", 0, side=SIDE)
    (new,) = {thing.shape for thing in scene.things} & {"heart", "arrow"}
    thing = next(k for k, found in enumerate(scene.things) if found.shape == new)
    predictor = Predictor(Blind(processor.encoder, scene.visible(thing)[None]), processor)
    picture = Image.fromarray(draw(scene))
    assert {s.label for s in predictor.segment(picture, [*SEEN, "heart", "arrow"]).segments} == {new}
    session = Session(predictor)
    session.set_image(picture)
    (told,) = [s for s in session.ask("segment: " + ", ".join([*SEEN, "heart", "arrow"])).segments if s.score]
    assert told.label == new


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["xseg", "names", str(folder), "--from", str(TINY), "--template"]
    monkeypatch.setattr("sys.argv", [*words, "{}"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "its training data list 8" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("sys.argv", [*words, "thing"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "must hold one {}" in capsys.readouterr().err


def test_an_export_counts_and_replaces_names(folder: Path, tmp_path: Path) -> None:
    naming.add(folder, TINY, "{}")
    with pytest.raises(UserError, match=r"--limit-mb 1: .* would have [34]\.\d MB"):
        check_size(folder, Export(tmp_path, tmp_path / "out", limit_mb=1))
    made = card.Copy("mine", "bf16", 1, ViewSizes(SIDE, SIDE), card.Agreement(1, 1, 1.0, 1, 1), names=True)
    assert "the SigLIP in `names/`" in card.write(folder, made)
    (tmp_path / "next").mkdir()
    assert folder / "names" not in checkpoint.staying(folder, tmp_path / "next"), "another model's names"


def test_a_damaged_siglip_stops_what_asks_it_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    (naming.add(folder, TINY, "{}") / "names.json").write_text("{")
    root = shapes(tmp_path)
    for name in ("generic_seg", "open_vocab_seg"):
        predictor, out = oracle(), tmp_path / name
        predictor.processor = XSegProcessor.from_pretrained(folder)
        task = TaskSpec(name=name, outputs=["panoptic"])
        suite = Suite(name="test", rows=[SuiteRow(recipe="shapes/panoptic_val", task=task)])
        if name == "generic_seg":
            assert "names" not in evaluate(predictor, suite, Evaluation(root, out, blind=False))
        else:
            with pytest.raises(UserError, match="run `xseg names` again"):
                evaluate(predictor, suite, Evaluation(root, out, blind=False))
            assert predictor.model.forwards == 0 and not out.exists()
