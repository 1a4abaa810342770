import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stubs import coco_file, real

from xseg.config import TaskSpec
from xseg.data.records import Packed, read_records
from xseg.data.sources import load_source
from xseg.errors import UserError
from xseg.geometry.masks import area, iou
from xseg.tasks import load_task

OPTIONS = {"images": "pictures", "refs": "refs.json", "instances": "instances.json"}


def ref(number: int, objects: Any, *texts: str, split: str = "train", image: int = 7) -> dict[str, Any]:
    sentences = [{"sent": t, "sent_id": 10 * number + k, "raw": t, "tokens": t.split()} for k, t in enumerate(texts)]
    return {"ref_id": number, "ann_id": objects, "image_id": image, "split": split, "sentences": sentences}


def write(folder: Path, refs: list[dict[str, Any]]) -> None:
    coco_file(folder)
    (folder / "refs.json").write_text(json.dumps(refs))


def test_every_sentence_once_grouped_by_image(tmp_path: Path) -> None:
    many = [f"left {k}" for k in range(7)]
    write(
        tmp_path,
        [ref(1, 70, *many), ref(2, 71, "Right One", "right one", "the right"), ref(3, 70, "left 0", "far left")],
    )
    source = load_source("refer", tmp_path, "train", OPTIONS)
    samples = list(source)
    assert [len(s.phrases) for s in samples] == [5, 5]
    pairs = [(s.instances[p.instances[0]].id, p.text) for s in samples for p in s.phrases]
    wanted = {(70, t) for t in [*many, "far left"]} | {(71, "right one"), (71, "the right")}
    assert len(pairs) == len(set(pairs)) == len(wanted) and set(pairs) == wanted
    assert {i for i, _ in pairs[:2]} == {70, 71}, "different objects come first"
    assert len({s.key for s in samples}) == 2 and samples[0].key == "refer/train/7-0"


def test_a_sentence_may_have_a_kind_and_an_explanation(tmp_path: Path) -> None:
    told = ref(1, 70, "the left")
    told["sentences"][0] |= {"kind": "place", "explanation": "a1."}
    write(tmp_path, [told, ref(2, 71, "the right")])
    (sample,) = load_source("refer", tmp_path, "train", OPTIONS)
    assert [(p.kind, p.explanation) for p in sample.phrases] == [("place", "a1."), ("", "")]


def test_evaluation_has_one_sample_per_object_and_sentence(tmp_path: Path) -> None:
    refs = [ref(1, 70, "A cat", "a cat ", "cat", split="val"), ref(2, 71, "cat", split="val"), ref(3, 70, "x")]
    write(tmp_path, refs)
    source = load_source("refer", tmp_path, "val", {**OPTIONS, "name": "refcoco"})
    assert [(s.key, [p.text for p in s.phrases], s.phrases[0].id) for s in source] == [
        ("refcoco/val/7-1-10", ["a cat"], "1:10"),
        ("refcoco/val/7-1-12", ["cat"], "1:12"),
        ("refcoco/val/7-2-20", ["cat"], "2:20"),
    ]
    assert all(len(s.instances) == 1 for s in source)


def test_all_sentences_of_a_reference_may_be_one_sample(tmp_path: Path) -> None:
    refs = [ref(1, 70, "a cat", "grey cat", split="val"), ref(2, 71, "cat", split="val")]
    write(tmp_path, refs)
    source = load_source("refer", tmp_path, "val", {**OPTIONS, "grouping": "reference"})
    assert [(s.key, [p.text for p in s.phrases]) for s in source] == [
        ("refer/val/7-1", ["a cat", "grey cat"]),
        ("refer/val/7-2", ["cat"]),
    ]
    merged = load_task(TaskSpec(name="refer_seg", sentences="merged"))
    assert [p.text for s in source for p in merged.view(s).phrases] == ["a cat. grey cat", "cat"]
    with pytest.raises(UserError, match="grouping: 'ref' must be"):
        load_source("refer", tmp_path, "val", {**OPTIONS, "grouping": "ref"})


def test_references_to_nothing_may_be_left_out(tmp_path: Path) -> None:
    refs = [ref(1, 70, "a cat", split="val"), ref(2, [], "a dog", split="val"), ref(3, -1, "a cow", split="val")]
    write(tmp_path, refs)
    found = {only: load_source("refer", tmp_path, "val", {**OPTIONS, "targets_only": only}) for only in (False, True)}
    assert [[p.text for s in source for p in s.phrases] for source in found.values()] == [
        ["a cat", "a dog", "a cow"],
        ["a cat"],
    ]


def test_several_and_no_targets(tmp_path: Path) -> None:
    refs = [
        ref(1, [70, 71], "both"),
        ref(2, [], "a dog"),
        ref(3, -1, "a cow"),
        ref(4, [-1], "a pig"),
        ref(5, [71], "one"),
    ]
    write(tmp_path, refs)
    sample = load_source("refer", tmp_path, "train", OPTIONS)[0]
    found = {p.text: (tuple(sample.instances[i].id for i in p.instances), p.kind) for p in sample.phrases}
    assert found == {
        "both": ((70, 71), "several"),
        "a dog": ((), "no-target"),
        "a cow": ((), "no-target"),
        "a pig": ((), "no-target"),
        "one": ((71,), ""),
    }


@pytest.mark.parametrize(
    ("reference", "split", "message"),
    [
        (ref(4, 99, "x"), "train", r"refs\.json: reference 4: ann_id 99 is not in"),
        (ref(4, 70, "x", image=9), "train", r"ann_id 70 lies on image 7.*image 9"),
        (ref(4, 70, "x", image=8), "train", r"reference 4: image_id 8"),
        (ref(4, 70, "x", split="testA"), "testB", r"split 'testB' has no reference; did you mean 'testA'"),
        ({"ref_id": 4, "split": "train"}, "train", r"reference 4: key 'image_id' is missing"),
    ],
)
def test_a_wrong_reference_is_named(tmp_path: Path, reference: dict[str, Any], split: str, message: str) -> None:
    write(tmp_path, [reference])
    with pytest.raises(UserError, match=message):
        load_source("refer", tmp_path, split, OPTIONS)


def test_the_released_pickle_reads_like_json(tmp_path: Path) -> None:
    refs = [ref(1, 70, "left"), ref(2, np.int64(71), "right")]
    write(tmp_path, [ref(1, 70, "left"), ref(2, 71, "right")])
    for protocol in (0, 2, 4):
        (tmp_path / "refs.p").write_bytes(pickle.dumps(refs, protocol=protocol))
        as_pickle = load_source("refer", tmp_path, "train", {**OPTIONS, "refs": "refs.p"})[0]
        as_json = load_source("refer", tmp_path, "train", OPTIONS)[0]
        assert as_pickle.phrases == as_json.phrases and as_pickle.instances == as_json.instances


def test_plain_things_survive_the_safe_reader(tmp_path: Path) -> None:
    thing = {"a": [1, 2.5, None, True, (b"x", "y")], "s": {1, 2}, "n": [np.float32(0.5), np.int16(-3), np.bool_(True)]}
    for protocol in (0, 2, 5):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(thing, protocol=protocol))
        assert read_records(tmp_path / "a.pkl") == thing
    big_endian = np.array([258], ">i2")[0]
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(big_endian))
    assert read_records(tmp_path / "b.pkl") == 258


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("__import__('pathlib').Path('pwned').write_text('x')",)


@pytest.mark.parametrize("payload", [Evil(), np.array([None], object), np.zeros(3), Path("x")], ids=str)
def test_a_pickle_cannot_run_code(tmp_path: Path, payload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.p").write_bytes(pickle.dumps([payload]))
    with pytest.raises(UserError, match=r"a\.p: the pickle names .*convert the file to JSON"):
        read_records(tmp_path / "a.p")
    assert not (tmp_path / "pwned").exists()


def test_a_cut_pickle_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "a.p").write_bytes(pickle.dumps(list(range(1000)))[:50])
    with pytest.raises(UserError, match=r"a\.p: the annotation file cannot be read"):
        read_records(tmp_path / "a.p")


def test_packed_is_a_sequence() -> None:
    items = [{"a": i, "b": "x" * i} for i in range(5)]
    packed = pickle.loads(pickle.dumps(Packed(items)))
    assert list(packed) == items and packed[-1] == items[-1] and packed[1:3] == items[1:3] and len(packed) == 5
    with pytest.raises(IndexError):
        packed[5]
    assert list(Packed([])) == []


def talk(folder: Path, rows: list[dict[str, Any]]) -> Any:
    (folder / "talk.json").write_text(json.dumps(rows))
    return load_source("llava", folder, "train", {"json": "talk.json", "images": "pictures"})


def say(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def test_the_image_comes_first_and_text_rows_stay(tmp_path: Path) -> None:
    source = talk(
        tmp_path,
        [
            {"id": "a", "image": "7.png", "conversations": say("What is this?\n<image>", "A wall.", "Sure?", "Yes.")},
            {"id": "b", "conversations": say("Hi", "Use <p>text</p> and <SEG>"), "metadata": {"question_type": "talk"}},
            {
                "id": "c",
                "image": ["7.png", "9.png"],
                "conversations": say("<image>\n<image>\nSame?"),
                "question_type": "q",
            },
            {"id": "d", "conversations": [{"from": "gpt", "value": "Hello"}, *say("Hi", "Ho")]},
        ],
    )
    first, text, two, late = source
    assert [t.text for t in first.turns] == ["<image>\nWhat is this?", "A wall.", "Sure?", "Yes."]
    assert first.images == (tmp_path / "pictures/7.png",) and first.key == "llava/train/0000000"
    assert text.images == () and text.turns[1].text == "Use <p>text</p> and <SEG>" and text.kind == "talk"
    assert two.turns[0].text == "<image>\n<image>\nSame?" and len(two.images) == 2 and two.kind == "q"
    assert [t.role for t in late.turns] == ["user", "assistant"] and late.image_id == "d"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": say("<image> what?", "A.")}, "names no file"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "'system' must be 'human' or 'gpt'"),
        ({"conversations": [*say("a"), *say("b")]}, "turn 1: two turns of the same side"),
        ({"conversations": []}, "no question"),
        ({"id": 3}, "key 'conversations' is missing"),
        ("text", "expected a record"),
    ],
)
def test_a_wrong_conversation_is_named(tmp_path: Path, row: Any, message: str) -> None:
    good = {"conversations": say("a", "b")}
    with pytest.raises(UserError, match=rf"talk\.json: conversation 1.*{message}"):
        talk(tmp_path, [good, row])


def test_real_expressions() -> None:
    root = real("coco_refexp")
    options = {"images": "images", "refs": "refs.json", "instances": "instances.json"}
    each = load_source("refer", root, "val", options)
    grouped = load_source("refer", root, "val", {**options, "grouping": "image"})
    assert len(each) == 9 and len(grouped) == 8
    by_id = {p.id: (s, p) for s in grouped for p in s.phrases}
    for sample in each:
        assert sample.masks is not None and sample.images[0].is_file()  # type: ignore[union-attr]
        other, phrase = by_id[sample.phrases[0].id]
        assert other.masks is not None and phrase.text == sample.phrases[0].text
        mine, theirs = sample.masks.rles[0], other.masks.rles[other.instances[phrase.instances[0]].mask]
        assert area(mine) > 0 and iou(mine, theirs) == 1


def test_grefcoco_s_records(tmp_path: Path) -> None:
    common = {"category_id": [5], "file_name": "7.png"}
    refs = [
        {**ref(1, [71, 70], "the two of them", split="testA"), **common, "no_target": False},
        {**ref(2, [-1], "a dog that is not there", split="testA"), **common, "no_target": True},
        {**ref(3, [70], "one", split="testA"), **common, "no_target": False},
    ]
    write(tmp_path, refs)
    samples = list(load_source("refer", tmp_path, "testA", OPTIONS))
    found = [(s.phrases[0].kind, [s.instances[i].id for i in s.phrases[0].instances]) for s in samples]
    assert found == [("several", [71, 70]), ("no-target", []), ("", [70])]
    assert [len(s.masks or ()) for s in samples] == [2, 0, 1]
