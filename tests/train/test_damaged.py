"""Folders that are damaged, incomplete or of something else: ``xseg.load`` and ``init_from`` refuse each by name."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from small_runs import COMMON, SMALL, TINY, pictures
from torch import Tensor

import xseg
from xseg.errors import UserError
from xseg.models import checkpoint
from xseg.models.build import build_model
from xseg.train import assemble
from xseg.train.__main__ import main
from xseg.train.stage import read_stage

S3 = str(TINY / "s3_mixed.yaml")
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sound(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a stage 3 of these sizes leaves."""
    stage = read_stage(S3, [SMALL, f"data_root={data}", "out=none", "init_from=[]", *COMMON])
    loaded = assemble.load_data(stage)
    folder = tmp_path_factory.mktemp("earlier") / "final"
    checkpoint.save(build_model(assemble.configuration(stage, loaded)), folder)
    assert loaded.processor.speaks_first == ["refer_seg"], "as its expressions are trained"
    assert loaded.processor.learnt == ["conversation", "generic_seg", "refer_seg"]
    assert loaded.processor.categories is not None and {"circle", "grass"} <= set(loaded.processor.categories)
    assert "heart" not in loaded.processor.categories, "the shapes that are held out"
    loaded.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def train(data: Path, tmp_path: Path) -> Iterator[Callable[[Path], int]]:
    """Train one step from an earlier stage, as the command line does; returns the exit status."""

    def run(earlier: Path) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = [SMALL, f"out={tmp_path / 'out'}", f"data_root={data}", *COMMON, "steps=1", f"init_from=[{earlier}]"]
        return main([S3, "--set", *settings])

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / FILE)
    change(state)
    save_file(state, folder / FILE, {"format": "pt"})


def corrupted(folder: Path) -> None:
    changed(folder, lambda state: state["llm_projector.first.weight"][0].fill_(torch.inf))


def incomplete(folder: Path) -> None:
    changed(folder, lambda state: state.pop("segmentor.mask_decoder.level_embed.weight"))


def other_words(folder: Path) -> None:
    """A word more in the tokenizer, and a row more for it."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))

    name = "llm.model.embed_tokens.weight"
    changed(folder, lambda state: state.update({name: torch.cat([state[name], state[name][:1]])}))


def other_sizes(folder: Path) -> None:
    changed(folder, lambda state: state.update({"background": torch.zeros(1, 7)}))


def other_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))


def other_weights(folder: Path) -> None:
    save_file({"vision_tower.weight": torch.ones(3)}, folder / FILE, {"format": "pt"})


def cut_short(folder: Path) -> None:
    path = folder / FILE
    path.write_bytes(path.read_bytes()[:-5000])


class Bomb:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("bomb"),)


def with_code(folder: Path) -> None:
    torch.save({"state_dict": load_file(folder / FILE), "extra": Bomb()}, folder / "pytorch_model.bin")
    (folder / FILE).unlink()


FAULTS = [
    (corrupted, "corrupted tensor llm_projector.first.weight"),
    (incomplete, "incomplete"),
    (other_words, "wrong vocabulary"),
    (other_sizes, "other sizes"),
    (other_model, "model_type = 'llava'"),
    (other_weights, "another architecture"),
    (cut_short, "damaged or cut short"),
    (with_code, "holds code"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS, ids=lambda f: getattr(f, "__name__", ""))
def test_each_fault_is_refused_by_its_name_and_nothing_is_written(
    fault: Callable[[Path], None], said: str, sound: Path, train: Callable[[Path], int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "given"
    shutil.copytree(sound, folder)
    fault(folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=said):
        xseg.load(folder, "cpu")
    assert train(folder) == 2
    message = capsys.readouterr().err
    assert said in message and str(folder) in message and "Traceback" not in message
    assert not (tmp_path / "out").exists() and not list((tmp_path / "here").iterdir())


def test_the_sound_folder_itself_is_taken(sound: Path, train: Callable[[Path], int], tmp_path: Path) -> None:
    xseg.load(sound, "cpu")
    assert train(sound) == 0
    assert (tmp_path / "out/final" / FILE).is_file()
