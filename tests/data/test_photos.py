"""What `make photos` trains on: examples/photos.py makes a data root that every recipe of the real tasks reads."""

import importlib.util
from pathlib import Path

import pytest
from data_stubs import real

from xseg.config import DataRecipe, Mixture, load_recipe
from xseg.data.lint import lint
from xseg.errors import UserError

SCRIPT = Path(__file__).parent.parent.parent / "examples/photos.py"
spec = importlib.util.spec_from_file_location("photos", SCRIPT)
assert spec is not None and spec.loader is not None
photos = importlib.util.module_from_spec(spec)
spec.loader.exec_module(photos)


def test_real_photographs_of_every_task_are_without_fault(tmp_path: Path) -> None:
    photos.build(real(""), tmp_path)
    photos.build(real(""), tmp_path)  # a second run changes nothing
    names = [entry.recipe for entry in load_recipe(Mixture, "photos_tasks").datasets]
    reports, _ = lint({name: load_recipe(DataRecipe, name) for name in names}, tmp_path)
    assert [(r.recipe, r.samples, r.faults) for r in reports] == [(name, 8, []) for name in names]


def test_records_that_do_not_fit_are_named(tmp_path: Path) -> None:
    from xseg.types import Sample

    with pytest.raises(UserError, match="annotation 7 is not one of val/1"):
        photos.named(Sample("val/1", ()), [[7]], "reasoning.json")
    with pytest.raises(UserError, match="no masks for 'a dog'"):
        row = {"image_id": 1, "tagged": "<p>a dog</p>", "groups": []}
        photos.caption_samples([row], {1: Sample("val/1", ())}, "gcg.json")
