"""Recipes that say what cannot be: one message with the file, the key and the rule."""

from pathlib import Path

import pytest

from xseg.config import Mixture, Suite, load_recipe, parse_override, read_yaml
from xseg.errors import UserError, did_you_mean


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (Suite, "name: a\nrows: [{recipe: b, limit: -1}]\n", r"rows\.0\.limit = -1: .*greater than or equal to 1"),
        (Suite, "name: a\nrows: [{recipe: b, limit: 0}]\n", r"rows\.0\.limit = 0: .*greater than or equal to 1"),
        (Mixture, "datasets: [{recipe: b, limit: 0}]\n", r"datasets\.0\.limit = 0: .*greater than or equal to 1"),
        (Mixture, "datasets: [{recipe: b, repeat: .nan}]\n", r"datasets\.0\.repeat = nan: .*finite"),
        (Mixture, "datasets: [{recipe: b, repeat: .inf}]\n", r"datasets\.0\.repeat = inf: .*finite"),
        (Mixture, "datasets: [{recipe: b, repeat: -1}]\n", r"datasets\.0\.repeat = -1: .*greater than 0"),
        (Mixture, "datasets: [{recipe: b, repeat: 0}]\n", r"datasets\.0\.repeat = 0: .*greater than 0"),
        (Mixture, "datasets: [b]\nbalance: .nan\n", "balance = nan: .*finite"),
        (Mixture, "base: a.yaml\n", r"base: a\.yaml: leads back to itself"),
        (Mixture, "base: 3\n", "base: 3 must be the name of a file"),
        (Mixture, "base: [a.yaml]\n", r"base: \['a\.yaml'\] must be the name of a file"),
        (Mixture, "datasets: [b]\nbalance: 2024-02-31\n", "not a readable YAML file: day"),
    ],
)
def test_a_wrong_value_is_told_with_file_and_rule(tmp_path: Path, kind: type, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"a\.yaml: {message}") as told:
        load_recipe(kind, str(tmp_path / "a.yaml"))
    assert "\n" not in str(told.value)


def test_bases_that_go_round_in_a_circle(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "sub/../c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n{name}: 1\n")
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match=r"c\.yaml: base: a\.yaml: leads back to itself"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("c: 1\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": 1, "b": 1, "c": 1}


def test_an_override_that_is_no_value() -> None:
    with pytest.raises(UserError, match="--set steps=2024-02-31: the value is no YAML"):
        parse_override("steps=2024-02-31")


def test_a_word_that_yaml_read_as_no_text_has_its_neighbours_too() -> None:
    assert did_you_mean(False, ["cat", 3]) == " (known: 3, cat)"
    assert did_you_mean(31, [3, 311]) == "; did you mean '311'?"
