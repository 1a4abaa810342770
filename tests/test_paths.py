"""Places that users name: made, or refused in one message."""

import os
from pathlib import Path

import pytest

from xseg.errors import UserError
from xseg.paths import LONGEST, check_folder, file_name, make_folder, partial_folder


def test_a_folder_is_made_with_those_above_it_and_taken_as_it_is(tmp_path: Path) -> None:
    check_folder(tmp_path / "a/b")
    assert not (tmp_path / "a").exists(), "a check leaves nothing behind"
    assert make_folder(tmp_path / "a/b") == tmp_path / "a/b" and (tmp_path / "a/b").is_dir()
    make_folder(tmp_path / "a/b")
    assert list((tmp_path / "a/b").iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below/it", "dangling", "a" * 400, "zero\0byte"])
def test_a_bad_place_is_one_message_and_nothing_is_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(os.listdir(tmp_path))
    for make in (make_folder, lambda path: partial_folder(path / "out")):
        with pytest.raises(UserError, match=r"nothing can be written there.*; name a folder"):
            make(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["/proc", "/proc/x", "/proc/x/y"])
def test_what_takes_no_file_is_told_before_work_begins(name: str) -> None:
    with pytest.raises(UserError, match=name):
        check_folder(Path(name))


def test_names_out_of_the_data_fit_into_a_folder(tmp_path: Path) -> None:
    assert file_name("train2017/0001") == "train2017-0001"
    long = [file_name(text) for text in ("x" * 400, "x" * 401, "ä" * 300, "\udcff" * 300)]
    assert len(set(long)) == 4 and all(len(name.encode()) <= LONGEST for name in long)
    for name in long:
        (tmp_path / f"{name}.png").touch()
