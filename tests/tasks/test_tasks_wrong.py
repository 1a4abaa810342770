"""A hand-made wrong output of every task scores what a hand counts; ``test_tasks_all`` has the perfect one."""

import pkgutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from perfect import LOUD, geometry_of, perfect_output

import xseg.tasks
from xseg.config import TaskSpec
from xseg.tasks import SHARED, load_task
from xseg.types import ModelOutput

Spoil = Callable[[ModelOutput], None]


def first_gets_the_second_s_mask(output: ModelOutput) -> None:
    output.mask_logits[0, 0, 0] = output.mask_logits[0, 1, 0].clone()


def square_is_called_a_circle(output: ModelOutput) -> None:
    output.class_logits[0, 0, 4, 1], output.class_logits[0, 0, 4, 0] = 0, LOUD


def second_is_not_found(output: ModelOutput) -> None:
    output.class_logits[0, 0, 1] = 0
    output.class_logits[0, 0, 1, -1] = LOUD


def half_of_the_first(output: ModelOutput) -> None:
    output.mask_logits[0, 0, 0, 5:] = -LOUD


def nothing(output: ModelOutput) -> None:
    """The masks are right; the answer is not."""


# circles: 2 found, 1 false (the square); square: missed; grass and sky: right. Pixels of circles: 14 right, 12 wrong.
GENERIC = {"PQ": 100 * (2 / 2.5 + 0 + 1 + 1) / 4, "PQ things": 40.0, "mIoU": 100 * (14 / 26 + 0 + 1 + 1) / 4}
CASES: dict[str, tuple[dict[str, Any], Spoil, str, dict[str, float]]] = {
    "generic_seg": ({"outputs": ["panoptic", "semantic"]}, square_is_called_a_circle, "", GENERIC),
    "open_vocab_seg": ({"outputs": ["panoptic", "semantic"]}, square_is_called_a_circle, "", GENERIC),
    # of three phrases the first (9 pixels) gets the 20 of the second, which is right; the third is rightly absent
    "refer_seg": (
        {},
        first_gets_the_second_s_mask,
        "",
        {"cIoU": 100 * 20 / 49, "gIoU": 200 / 3, "P@0.5": 50.0, "N-acc": 100.0, "T-acc": 100.0},
    ),
    # the long question (20 pixels) gets the 9 of the short one, which is right
    "reason_seg": (
        {},
        first_gets_the_second_s_mask,
        "",
        {"cIoU": 100 * 9 / 38, "gIoU": 50.0, "gIoU:long": 0.0, "gIoU:short": 100.0, "oracle IoU": 50.0},
    ),
    # 18 of 36 pixels, and all of 80
    "interactive_seg": ({}, half_of_the_first, "", {"mIoU": 75.0, "cIoU": 100 * 98 / 116, "P@0.9": 50.0}),
    # bar: right; blocks: one of two, so precision 1 up to a recall of a half: 51 of COCO's 101 places
    "vgd_seg": (
        {"score_threshold": 0.5},
        second_is_not_found,
        "",
        {"AP": 100 * (1 + 51 / 101) / 2, "AP50": 100 * (1 + 51 / 101) / 2},
    ),
    # two of three annotated masks, because the second span is not said
    "gcg_seg": (
        {"join": 0.6},
        nothing,
        "there are <p> two circles</p> . They are marked by <SEG>.",
        {"recall": 200 / 3, "AP50": 100 * 67 / 101, "mIoU": 100.0, "masked spans": 100.0},
    ),
    "conversation": ({}, nothing, "Blue", {"exact match": 0.0}),
}


def test_every_task_has_a_wrong_output() -> None:
    assert {m.name for m in pkgutil.iter_modules(xseg.tasks.__path__)} - SHARED >= set(CASES)
    assert len(CASES) == 8


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_output_scores_what_a_hand_counts(name: str) -> None:
    options, spoil, text, expected = CASES[name]
    task = load_task(TaskSpec(name=name, **options))
    sample = task.view(task.example())
    formatted = task.format(sample, np.random.default_rng(0), train=task.eval_mode == "generate")
    output = perfect_output(sample, formatted) if formatted.queries else None
    if output is not None:
        spoil(output)
    geometry = geometry_of(sample) if sample.masks else None
    prediction = task.decode(output, range(len(formatted.queries)), sample, geometry, text)
    found = {}
    for metric in task.metrics():
        metric.update(prediction, sample)
        found |= {score.metric: score.value for score in metric.compute()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
