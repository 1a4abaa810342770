"""No golden case is forgotten: every file has a kind by its name, and a test of that kind runs it."""

import re
from pathlib import Path

import golden
import pytest
import test_losses_through_the_model as losses
import test_models_forward as forward
import test_models_pieces as pieces
import test_post_golden as post

pytestmark = pytest.mark.skipif(not golden.GOLDEN, reason=golden.SKIP)

KINDS = {
    r"s\d_\w+_loss(_dense|_pointsample)?|s1_loss_(dense|pointsample)": "loss",
    r"s\d_(\w+_)?infer(_tensor(_b1|_point|_scribble|_box|_mask)?)?": "inference",
    r"s\d_\w+_generate": "generation",
    r"(modules|sampler|splice)_golden": "piece",
    r"post_golden": "post-processing",
    r"images": "input",
}
"""Name of a case file -> what kind it is; the first that fits counts."""
BESIDE = re.compile(r"README\.md|config\.json|param_names\.json|full_keys\.txt|.*\.safetensors|.*segments\.json")
"""Weights, sizes and parts of cases that lie beside the case files."""


def names(folder: str, cases: list[str]) -> set[str]:
    return {f"{folder}/{name}" for name in cases}


def run_by_tests() -> dict[str, set[str]]:
    """Kind -> the cases that the tests of this folder run, as those tests themselves found them."""
    inference = names("archive", forward.ARCHIVE) | names("main/full", forward.MAIN) | {"main/segmentor/s1_infer"}
    return {
        "loss": set(losses.CASES),
        "inference": inference,
        "generation": {f"{folder}/{name}" for folder, name in pieces.GENERATE},
        "piece": names("archive", ["modules_golden", "sampler_golden", "splice_golden"]),
        "post-processing": names("archive", [case[0] for case in post.CASES]),
    }


def kind_of(stem: str) -> str | None:
    return next((kind for pattern, kind in KINDS.items() if re.fullmatch(pattern, stem)), None)


CASES = sorted(golden.ROOT.rglob("*.npz")) if golden.GOLDEN else []


def case_name(path: Path) -> str:
    return path.relative_to(golden.ROOT).with_suffix("").as_posix()


@pytest.mark.parametrize("path", CASES, ids=case_name)
def test_a_case_has_a_kind_and_a_test_runs_it(path: Path) -> None:
    kind = kind_of(path.stem)
    assert kind is not None, f"{case_name(path)}: of no known kind: name it in KINDS and write the test that runs it"
    if kind != "input":
        assert case_name(path) in run_by_tests()[kind], f"{case_name(path)}: a case of {kind} that no test runs"


def test_every_post_processed_result_is_compared() -> None:
    groups = (post.PANOPTIC, post.SEMANTIC, post.BEST, post.CAPTION, post.INSTANCE, post.POINTED)
    run = {id(case) for group in groups for case in group}
    assert not [f"{case[0]}: {case[1]} ({case[2]})" for case in post.CASES if id(case) not in run]


def test_nothing_else_lies_among_the_cases() -> None:
    files = [p.name for p in golden.ROOT.rglob("*") if p.is_file() and p.suffix != ".npz"]
    strange = [name for name in files if not BESIDE.fullmatch(name)]
    assert not strange, "files of no known kind: read them in a test, or name them in BESIDE"


@pytest.mark.parametrize("stem", ["s3_vidseg_track", "s4_new", "attention_golden"])
def test_an_unknown_kind_is_seen(stem: str) -> None:
    assert kind_of(stem) is None
