"""What holds for every task: seeded text, as many <SEG> as queries, perfect output scores the maximum."""

import dataclasses
import pkgutil
import re
from typing import Any

import numpy as np
import pytest
from perfect import geometry_of, perfect_output

import xseg.tasks
from xseg.config import TaskSpec
from xseg.errors import UserError
from xseg.tasks import SHARED, load_task
from xseg.tokens import IMAGE, REGION, SEG
from xseg.types import Formatted, Sample

NAMES = sorted({m.name for m in pkgutil.iter_modules(xseg.tasks.__path__)} - SHARED)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed or [0])


def example(task: Any) -> Sample:
    return task.view(task.example())


def said(formatted: Formatted, role: str) -> str:
    return "\n".join(t.text for t in formatted.turns if t.role == role)


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Any:
    return load_task(TaskSpec(name=request.param))


def test_name_is_the_module_and_mode_is_known(task: Any) -> None:
    assert type(task).__module__ == f"xseg.tasks.{task.name}"
    assert task.eval_mode in {"forced", "generate"}


def test_same_seed_same_text_and_training_wording_varies(task: Any) -> None:
    sample = example(task)
    assert task.format(sample, rng(1, 2, 3)) == task.format(sample, rng(1, 2, 3))
    drawn = {task.format(sample, rng(1, 2, k)) for k in range(40)}
    assert len(drawn) > 5 or task.name == "conversation"
    fixed = {task.format(sample, rng(1, 2, k), train=False) for k in range(10)}
    assert len(fixed) == 1, "evaluation must not depend on a seed"


@pytest.mark.parametrize("train", [True, False])
def test_every_query_has_its_seg_and_every_concept_its_span(task: Any, train: bool) -> None:
    sample = example(task)
    for k in range(20):
        formatted = task.format(sample, rng(k), train=train)
        everything = "".join(t.text for t in formatted.turns)
        assert SEG not in said(formatted, "user")
        if train or task.eval_mode == "forced":
            assert said(formatted, "assistant").count(SEG) == len({q.seg for q in formatted.queries} - {None})
            assert everything.count("<p>") == len({c for q in formatted.queries for c in q.concepts})
        assert everything.count("<p>") == everything.count("</p>")
        assert everything.count(REGION) == len(formatted.prompts)
        for query in formatted.queries:
            assert len(query.instances) == len(query.classes)
            assert all(0 <= c < len(query.concepts) for c in query.classes)
            assert all(0 <= row < len(sample.masks) for row in query.instances)


def test_image_stands_first_once(task: Any) -> None:
    for train in (True, False):
        formatted = task.format(example(task), rng(0), train=train)
        assert formatted.turns[0].text.startswith(f"{IMAGE}\n")
        assert said(formatted, "user").count(IMAGE) == 1 and IMAGE not in said(formatted, "assistant")
        assert formatted.turns[-1].role == ("assistant" if train or task.eval_mode == "forced" else "user")


@pytest.mark.parametrize("pad", [0, 3])
def test_perfect_output_scores_the_maximum(task: Any, pad: int) -> None:
    if task.name == "gcg_seg":  # the published protocol gives one mask per span, the example has a span of two
        task = dataclasses.replace(task, join=0.5)
    sample = example(task)
    # what is generated is the annotated answer
    formatted = task.format(sample, rng(0), train=task.eval_mode == "generate")
    output = perfect_output(sample, formatted, pad=pad) if formatted.queries else None
    text = formatted.turns[-1].text if task.eval_mode == "generate" else ""
    shown = sample if sample.masks else dataclasses.replace(sample, size=(8, 12))
    prediction = task.decode(output, range(len(formatted.queries)), sample, geometry_of(shown), text)
    metrics = task.metrics()
    for metric in metrics:
        metric.update(prediction, sample)
    scores = [s for metric in metrics for s in metric.compute()]
    assert len(scores) >= len(metrics) > 0
    best = {s.metric: 0.0 if s.metric.startswith("selection gap") else 100.0 for s in scores}
    measured = {s.metric: round(s.value, 6) for s in scores}
    # a calibration error is read from bins of a thousandth, and any threshold parts what is there from what is not
    assert measured.pop("presence calibration error", 0) < 0.1 and 0 < measured.pop("presence threshold", 1) < 100
    assert measured == {name: value for name, value in best.items() if name in measured}
    assert all(s.protocol and s.n > 0 for s in scores)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "refer_sge"}, "did you mean 'refer_seg'"),
        ({"name": "phrasing"}, "no such module"),
        ({"name": "generic_seg", "full_lst": 0.5}, "unknown option 'full_lst'; did you mean 'full_list'"),
        ({"name": "generic_seg", "labels": "txt"}, "labels = 'txt'"),
        ({"name": "generic_seg", "max_concepts": "many"}, "max_concepts = 'many'"),
        ({"name": "refer_seg", "negatives": "none"}, "negatives = 'none'"),
        ({"name": "refer_seg", "reject": True}, "reject = True"),
        ({"name": "vgd_seg", "kinds": ["stroke"]}, "kinds.0 = 'stroke'"),
        ({"name": "interactive_seg", "kind": "point"}, "did you mean 'kinds'"),
        ({"name": "conversation", "x": 1}, "unknown option 'x'"),
    ],
)
def test_wrong_specs_are_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_task(TaskSpec(**spec))


def test_options_reach_the_task() -> None:
    task = load_task(TaskSpec(name="generic_seg", labels="fixed", outputs=["panoptic"], max_concepts=3))
    assert (task.labels, task.outputs, task.max_concepts) == ("fixed", ("panoptic",), 3)
    assert [type(m).__name__ for m in task.metrics()] == ["PanopticQuality", "OracleGap"]


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_the_wrong_kind_names_its_key(name: str) -> None:
    with pytest.raises(UserError, match="odd/7"):
        load_task(TaskSpec(name=name)).format(Sample("odd/7", ()), rng(0))
