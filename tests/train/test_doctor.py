"""Planted faults: each is found under its own name, with a message that says which, and nothing else is said."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_runs import COMMON, SMALL, TINY, pictures

from xseg.models import pixel_decoder
from xseg.train import doctor, plan
from xseg.train.stage import read_stage
from xseg.ui.cli import main

S3 = str(TINY / "s3_mixed.yaml")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> list[str]:
    return [SMALL, f"data_root={data}", f"out={tmp_path / 'out'}", "init_from=[]", *COMMON]


def faults(settings: list[str], stage: str = S3, launch: str | None = None) -> dict[str, str]:
    return {f.check: f.fault for f in doctor.examine(stage, settings, launch) if f.fault}


def test_a_sound_stage_passes_every_check(settings: list[str], tmp_path: Path) -> None:
    found = list(doctor.examine(S3, settings, "single"))
    assert [f for f in found if f.fault] == []
    assert {f.check for f in found} == {
        "libraries", "deformable attention", "launch", "recipe", "tokenizer and chat template", "pretrained parts",
        "vocabulary", "data", "trainable", "embeddings", "memory",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def old_library(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    there = doctor.metadata.version
    patch.setattr(doctor.metadata, "version", lambda name: "4.57.1" if name == "transformers" else there(name))
    return faults(settings)


def lost_library(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    there = doctor.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise doctor.metadata.PackageNotFoundError(name)
        return there(name)

    patch.setattr(doctor.metadata, "version", version)
    return faults(settings)


def wrong_kernel(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    sampled = pixel_decoder.multi_scale_deformable_attention

    def shifted(value: Any, shapes: Any, places: Any, weights: Any) -> Any:
        return sampled(value, shapes, places + 0.01, weights)

    patch.setattr(pixel_decoder, "multi_scale_deformable_attention", shifted)
    return faults(settings)


def typo(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    return faults([*settings, "step=3"])


def tokenizer_without_special_words(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    """``<SEG>`` is a word of its vocabulary, but text is cut before it is looked up."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<unk>", "</s>", "<SEG>", "<p>", "</p>", "a"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    made.save_pretrained(tmp_path / "words")
    return faults([*settings, f"model_overrides.tokenizer={tmp_path / 'words'}"])


def no_template(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    return faults([*settings, "model_overrides.chat_template=phi4"])


def template_without_marks(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    (tmp_path / "bare.jinja").write_text("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    return faults([*settings, f"model_overrides.chat_template={tmp_path / 'bare.jinja'}"])


def lost_part(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    return faults([*settings, f"model_overrides.sam.pretrained={tmp_path / 'sam'}"])


def other_words(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    config = {"model_type": "xseg", "text_config": {"model_type": "phi3", "vocab_size": 32014}}
    (tmp_path / "s2").mkdir()
    (tmp_path / "s2/config.json").write_text(json.dumps(config))
    return faults([*settings, f"init_from=[{tmp_path / 's2'}]"])


def lost_data(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    return faults([*settings, f"data_root={tmp_path / 'nowhere'}"])


def useless_regex(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    return faults([*settings, "trainable=[{match: 'segmentr', lr: 1.0e-4}, {match: '.*', lr: 1.0e-4}]"])


def frozen_words(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    return faults([*settings, "trainable=[{match: 'segmentor', lr: 1.0e-4}, {match: 'llm_projector', lr: 1.0e-4}]"])


def parted_matrices(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    return faults([*settings, "muon=4"], launch="cpu2")


def little_memory(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    patch.setattr(doctor, "memory", lambda: 1e6)
    return faults(settings)


def alone_in_silence(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    patch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"distributed_type": "NO", "num_processes": 2}))
    return faults(settings, launch=str(tmp_path / "two.yaml"))


def too_many_processes(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    patch.setattr(torch.cuda, "device_count", lambda: 4)
    (tmp_path / "eight.yaml").write_text(yaml.safe_dump({"distributed_type": "MULTI_GPU", "num_processes": 8}))
    return faults(settings, launch=str(tmp_path / "eight.yaml"))


def other_world(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    patch.setenv("WORLD_SIZE", "4")
    return faults(settings, launch="single")


def unsaved_weights(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    given = {"distributed_type": "DEEPSPEED", "num_processes": 1, "deepspeed_config": {"zero_stage": 3}}
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(given))
    return faults(settings, launch=str(tmp_path / "three.yaml"))


def another_fsdp(settings: list[str], tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    given = {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 1}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(given))
    return faults(settings, launch=str(tmp_path / "one.yaml"))


PLANTED = [
    (old_library, "libraries", "transformers 4.57.1 (needs <6,>=5.20)"),
    (lost_library, "libraries", "peft none"),
    (wrong_kernel, "deformable attention", "is off by"),
    (typo, "recipe", "did you mean 'steps'"),
    (tokenizer_without_special_words, "tokenizer and chat template", "splits <SEG> into pieces"),
    (no_template, "tokenizer and chat template", "did you mean 'phi3'"),
    (template_without_marks, "tokenizer and chat template", "generation"),
    (lost_part, "pretrained parts", "sam"),
    (other_words, "vocabulary", "32014 rows"),
    (lost_data, "data", "nowhere"),
    (useless_regex, "trainable", "did you mean 'segmentor'"),
    (parted_matrices, "trainable", "muon = 4 on 2 processes under ZeRO"),
    (frozen_words, "embeddings", "would stay random"),
    (little_memory, "memory", "activations 0."),
    (alone_in_silence, "launch", "one process in silence"),
    (too_many_processes, "launch", "this one has 4 devices"),
    (other_world, "launch", "WORLD_SIZE is 4"),
    (unsaved_weights, "launch", "zero3_save_16bit_model"),
    (another_fsdp, "launch", "set fsdp_version: 2 in the launch file"),
]


@pytest.mark.parametrize("more", [-0.5, 0.5])
def test_activations_count_as_memory(settings: list[str], monkeypatch: pytest.MonkeyPatch, more: float) -> None:
    """Weights, gradients and optimiser state fit; half of the activations would not, or all of them and a half do."""
    need = plan.need_of(read_stage(S3, settings), plan.Asked(0, 1.0, 1.0), 0)
    monkeypatch.setattr(doctor, "memory", lambda: need.total + more * need.activations)
    assert ("activations" in faults(settings).get("memory", "")) is (more < 0)


@pytest.mark.parametrize(("plant", "check", "said"), PLANTED, ids=lambda p: getattr(p, "__name__", None))
def test_a_planted_fault_is_named(
    plant: Callable[..., dict[str, str]], check: str, said: str, settings: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = plant(settings, tmp_path, monkeypatch)
    assert set(found) == {check}, found
    assert said in found[check]


def test_sampling_by_definition_of_one_point_between_cells() -> None:
    value = torch.tensor([1.0, 2.0, 3.0, 5.0]).reshape(1, 4, 1, 1)
    places = torch.tensor([0.5, 0.5]).reshape(1, 1, 1, 1, 1, 2)
    weight = torch.ones(1, 1, 1, 1, 1)
    assert doctor.by_definition(value, [(2, 2)], places, weight).item() == pytest.approx(11 / 4)
    corner = doctor.by_definition(value, [(2, 2)], torch.zeros_like(places), weight)
    assert corner.item() == pytest.approx(1 / 4), "three of four corners are outside"


def test_the_command_ends_with_2_when_something_is_wrong(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for setting in settings for word in ("--set", setting)]
    for extra, status in (((), 0), (("--set", "data_root=nowhere"), 2)):
        monkeypatch.setattr(sys, "argv", ["xseg", "doctor", S3, *given, *extra])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == status
        out = capsys.readouterr().out
        assert ("fault  data" in out) == bool(status) and "Traceback" not in out
        assert ("faults: 1" in out) == bool(status) and "ok     libraries" in out
