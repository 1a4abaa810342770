import json
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import SIDE, oracle
from PIL import Image

from xseg.errors import UserError
from xseg.geometry import masks as rle
from xseg.infer.session import Session


@pytest.fixture
def session() -> Session:
    made = Session(oracle())
    made.set_image(Image.new("RGB", (40, 20)))
    made.predictor.model.mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    made.predictor.model.mask[:, :32] = True  # the left half of the canvas = of the image
    return made


def test_the_image_is_encoded_once_however_many_turns(session: Session) -> None:
    model = session.predictor.model
    for text in ("the circle", "how many?", "segment: circle, square"):
        session.ask(text)
    assert model.encoded == 1
    session.set_image(Image.new("RGB", (40, 20)))
    assert model.encoded == 2 and session.answers == []


def test_mask_comes_in_original_pixels_with_its_coverage(session: Session) -> None:
    answer = session.ask("the circle")
    [segment] = answer.segments
    assert segment.label == "the circle"
    mask = rle.decode(segment.mask)
    assert mask.shape == (20, 40) and mask[:, :20].all() and not mask[:, 20:].any()
    assert answer.coverage == (50.0,)


def test_absent_phrase_has_an_empty_mask(session: Session) -> None:
    session.predictor.model.mask = None  # every object query says background
    answer = session.ask("the moon")
    assert answer.coverage == (0.0,)


def test_names_that_compete_are_told_apart(session: Session) -> None:
    session.predictor.model.concept = 1
    answer = session.ask("segment: circle, square, star")
    assert [s.label for s in answer.segments] == ["circle", "square", "star"]
    assert answer.coverage == (0.0, 50.0, 0.0)


def test_no_mask_without_exactly_one_seg(session: Session) -> None:
    session.predictor.model.answers = ["no", "<SEG> and <SEG>", "it is <SEG>."]
    assert [len(session.ask("the circle").segments) for _ in range(3)] == [0, 0, 1]


def test_a_question_that_is_answered_by_a_mask_gets_it(session: Session) -> None:
    """Asked once more with the question as the phrase; answered in words it is asked once."""
    model = session.predictor.model
    model.answers = ["A circle can: <SEG>."]
    answer = session.ask("What could roll?")
    [segment] = answer.segments
    assert segment.label == "What could roll?" and answer.coverage == (50.0,) and answer.question == "What could roll?"
    assert model.said == 2 and len(session.answers) == 1
    tokenizer = session.predictor.processor.encoder.tokenizer
    batch = model.seen[-1]
    first, last = batch.concept_span[batch.query_concepts[0, 0]].tolist()[1:]
    assert "roll?" in tokenizer.decode(batch.input_ids[0, first:last])
    for said in ("two", "<p>one</p> is <SEG>.", "<SEG> and <SEG>"):
        model.answers, model.said = [said], 0
        session.ask("What else?")
        assert model.said == 1, said


def test_later_turns_point_at_their_own_phrase(session: Session) -> None:
    session.ask("segment: circle, square")
    session.ask("how many?")
    session.ask("the star")
    batch = session.predictor.model.seen[-1]
    first, last = batch.concept_span[batch.query_concepts[0, 0]].tolist()[1:]
    tokenizer = session.predictor.processor.encoder.tokenizer
    assert tokenizer.decode(batch.input_ids[0, first:last]).replace(" ", "") == "<p>thestar</p>"
    assert batch.query_concepts.shape == (1, 1)
    assert batch.image_slot.shape[0] == 1


def test_undo_takes_back_one_turn(session: Session) -> None:
    assert not session.undo()
    session.ask("the circle")
    session.ask("the square")
    before = session.predictor.model.seen[-1].input_ids
    assert session.undo()
    session.ask("the square")
    assert torch.equal(session.predictor.model.seen[-1].input_ids, before)


def test_a_bad_generated_answer_does_not_break_the_next_turn(session: Session) -> None:
    session.predictor.model.answers = ["<p> it </p> is </p> <image> <SEG>."]
    session.ask("the circle")
    assert len(session.ask("the square").segments) == 1


def test_bad_input_leaves_the_history_alone(session: Session, tmp_path: Path) -> None:
    session.ask("the circle")
    for text in ("", "<image>"):
        with pytest.raises(UserError):
            session.ask(text)
    broken = tmp_path / "broken.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:700])
    for path in (broken, tmp_path / "missing.png"):
        with pytest.raises(UserError, match=path.name):
            session.set_image(path)
    assert len(session.answers) == 1
    with pytest.raises(UserError, match="no image"):
        Session(session.predictor).ask("the circle")


def test_saved_conversation_reads_back(session: Session, tmp_path: Path) -> None:
    session.ask("the circle")
    found = json.loads(session.save(tmp_path).read_text())
    mask = rle.decode(rle.from_json(found["turns"][0]["segments"][0]["mask"]))
    assert mask.sum() == 400
    assert [p.name for p in tmp_path.iterdir()] == ["conversation.json"]


def test_a_conversation_is_never_saved_over_another(session: Session, tmp_path: Path) -> None:
    session.ask("the circle")
    first = session.save(tmp_path / "c1")
    kept = first.read_text()
    session.set_image(Image.new("RGB", (40, 20)))
    session.ask("the square")
    session.undo()
    second = session.save(tmp_path / "c1")
    assert (first.name, second.name) == ("conversation.json", "conversation-02.json") and first.read_text() == kept
    session.ask("the star")
    assert session.save(tmp_path / "c1") == second, "its own file, which grows with it"
    assert json.loads(second.read_text())["turns"][0]["question"] == "the star"
    assert session.save(tmp_path / "c2").name == "conversation.json"
    session.set_image(Image.new("RGB", (40, 20)))
    assert session.save(tmp_path / "c1").name == "conversation-03.json"
    assert first.read_text() == kept and len(list((tmp_path / "c1").iterdir())) == 3


def test_bytes_that_are_no_text_are_refused(session: Session) -> None:
    with pytest.raises(UserError, match="no UTF-8 text"):
        session.ask("the \udcff box")
    assert session.answers == []
