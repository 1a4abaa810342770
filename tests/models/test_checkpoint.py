"""Saving, loading, overlays between stages, and what is said when something does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from model_cases import kinds, model
from safetensors.torch import load_file, save_file
from transformers import SamConfig, SamModel, SiglipConfig, SiglipModel

from xseg.config import ModelRecipe, load_recipe
from xseg.errors import UserError
from xseg.models import adapters, checkpoint, key_maps
from xseg.models.build import build_config, build_model

torch.set_num_threads(1)


@pytest.mark.parametrize("language", ["phi3", "llama"])
def test_saved_and_loaded_models_answer_alike(tmp_path: Path, language: str) -> None:
    made = model(language=language).eval()
    checkpoint.save(made, tmp_path / "final")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final"]
    again = checkpoint.load(tmp_path / "final").eval()
    with torch.no_grad():
        a, b = (m(kinds()["phrases"]) for m in (made, again))
    assert torch.equal(a.mask_logits, b.mask_logits) and torch.equal(a.lm_logits, b.lm_logits)
    frozen = [{n for n, p in m.named_parameters() if not p.requires_grad} for m in (made, again)]
    assert frozen[0] == frozen[1]


def test_saving_again_keeps_other_files_and_drops_old_weights(tmp_path: Path) -> None:
    checkpoint.save(model(), tmp_path / "final")
    (tmp_path / "final/notes.txt").write_text("mine")
    (tmp_path / "final/model-00001-of-00002.safetensors").write_bytes(b"old")
    checkpoint.save(model(), tmp_path / "final")
    assert (tmp_path / "final/notes.txt").read_text() == "mine"
    assert not (tmp_path / "final/model-00001-of-00002.safetensors").exists()
    checkpoint.load(tmp_path / "final")


def test_what_is_kept_is_kept_as_it_is_and_an_old_adapter_is_not(tmp_path: Path) -> None:
    final = tmp_path / "final"
    checkpoint.save(model(), final)
    mine = ("my_other.safetensors", "sub/config.json", "sub/model.safetensors")
    (final / "sub").mkdir()
    for name in mine:
        (final / name).write_text("mine")
    (final / "link").symlink_to("nowhere")
    for name in (adapters.FILE, adapters.WEIGHTS, "model.safetensors.index.json"):
        (final / name).write_text("old")
    with checkpoint.replacing(final, checkpoint.MODEL) as partial:
        model().save_pretrained(partial)
    assert {(final / name).read_text() for name in mine} == {"mine"} and (final / "link").is_symlink()
    left = {p.name for p in final.iterdir()}
    assert left == {"config.json", "model.safetensors", "my_other.safetensors", "sub", "link"}
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_folder_of_anything_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "home.partial").mkdir()
    monkeypatch.chdir(home)
    for place, why in ((home, "working directory"), (Path("."), "working directory"), (tmp_path, "working directory")):
        with pytest.raises(UserError, match=why):
            checkpoint.save(model(), place)
    monkeypatch.chdir(tmp_path)
    for place, why in ((home, "nothing is overwritten"), (home / "config.json/x", "no folder"), (Path("/proc/x"), "")):
        with pytest.raises(UserError, match=f"{place}.*{why}"):
            checkpoint.save(model(), place)
    for place in (Path("home/config.json"), Path("/dev/null")):
        with pytest.raises(UserError, match="no folder"):
            checkpoint.check_place(place)
    assert (home / "config.json").read_text() == '{"model_type": "llava"}'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "home.partial"]
    (home / "config.json").unlink()
    checkpoint.save(model(), Path("home/../home"))
    checkpoint.load(home)


def test_a_move_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(model(), tmp_path / "final")
    before = {p.name: p.read_bytes() for p in (tmp_path / "final").iterdir()}
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(UserError, match="resource busy; nothing was written"):
        checkpoint.save(model(), tmp_path / "final")
    assert {p.name: p.read_bytes() for p in (tmp_path / "final").iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    checkpoint.save(made, tmp_path / "final")
    before = {p.name: p.read_bytes() for p in (tmp_path / "final").iterdir()}

    def full(folder: Path) -> None:
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(made, "save_pretrained", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(made, tmp_path / "final")
    assert {p.name: p.read_bytes() for p in (tmp_path / "final").iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 1


def test_stages_follow_each_other(tmp_path: Path) -> None:
    first = model(parts=("segmentor",), head="labels", num_labels=4)
    second = model(parts=("sam", "siglip", "llm"))
    with torch.no_grad():
        second.llm.lm_head.weight.fill_(7)
    checkpoint.save(first, tmp_path / "s1")
    checkpoint.save(second, tmp_path / "s2")
    torch.manual_seed(1)
    third = build_model(model().config)
    reports = checkpoint.overlay(third, [tmp_path / "s1", tmp_path / "s2"])
    assert {key_maps.part_of(n) for n in reports[0].unexpected} == {"segmentor.class_head"}
    assert torch.equal(
        third.segmentor.mask_decoder.queries_features.weight, first.segmentor.mask_decoder.queries_features.weight
    )
    assert (third.llm.lm_head.weight == 7).all()
    untouched = set(reports[0].fresh) & set(reports[1].fresh)
    assert {key_maps.part_of(n) for n in untouched} == {"segmentor.class_head", "llm_projector", "background"}
    assert "segmentor.mask_decoder" in str(reports[0]) and "fresh" in str(reports[0])


def test_what_a_later_folder_changes_of_an_earlier_one_is_told(tmp_path: Path) -> None:
    for seed, (name, parts) in enumerate({"s1": ("segmentor",), "s2": ("sam", "siglip", "llm")}.items()):
        torch.manual_seed(seed)
        checkpoint.save(model(parts=parts), tmp_path / name)
    third = model()
    first, second = checkpoint.overlay(third, [tmp_path / "s2", tmp_path / "s1"])
    assert not first.replaced and {key_maps.part_of(n) for n in second.replaced} == {"segmentor.sam"}
    assert "replaced" in str(second)
    kept = checkpoint.read_weights(tmp_path / "s1")
    assert all(torch.equal(third.state_dict()[n], kept[n]) for n in second.replaced), "the last one stays"
    assert not any(r.replaced for r in checkpoint.overlay(third, [tmp_path / "s1", tmp_path / "s1"]))


def test_tied_embeddings_are_one_tensor_in_a_file(tmp_path: Path) -> None:
    made = model(language="llama")
    checkpoint.save(made, tmp_path / "s2")
    assert "llm.lm_head.weight" not in load_file(tmp_path / "s2/model.safetensors")
    torch.manual_seed(1)
    again = build_model(made.config)
    (report,) = checkpoint.overlay(again, [tmp_path / "s2"])
    assert report.fresh == [] and torch.equal(again.llm.lm_head.weight, made.llm.get_input_embeddings().weight)


def test_other_sizes_are_an_error_with_names(tmp_path: Path) -> None:
    checkpoint.save(model(decoder_layers=2), tmp_path / "s1")
    with pytest.raises(UserError, match=r"segmentor\.mask_decoder: segmentor\.mask_decoder\.layers\.2"):
        checkpoint.overlay(model(), [tmp_path / "s1"])
    checkpoint.save(model(num_queries=6), tmp_path / "wide")
    with pytest.raises(UserError, match=r"\(6, 32\) there, \(5, 32\) here"):
        checkpoint.overlay(model(), [tmp_path / "wide"])


def test_another_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(UserError, match=r"config\.json: model_type = 'llava'.*xseg import x-sam"):
        checkpoint.load(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        checkpoint.load(tmp_path / "nowhere")


def test_damaged_and_incomplete_weights_are_named(tmp_path: Path) -> None:
    checkpoint.save(model(), tmp_path / "a")
    file = tmp_path / "a/model.safetensors"
    state = load_file(file)
    lost = state.pop("background")
    assert lost.shape == (1, 32)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match="background"):
        checkpoint.load(tmp_path / "a")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged or cut short"):
        checkpoint.read_weights(tmp_path / "a")


def test_sam_and_siglip_folders_of_transformers_are_read(tmp_path: Path) -> None:
    sizes = {
        "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "mlp_dim": 32, "output_channels": 8, "window_size": 2, "global_attn_indexes": [1],
    }  # fmt: skip
    decoder = {"hidden_size": 8, "num_attention_heads": 2, "mlp_dim": 8, "num_multimask_outputs": 1}
    sam = SamModel(
        SamConfig(
            vision_config=sizes,
            prompt_encoder_config={"hidden_size": 8, "image_size": 32, "patch_size": 8},
            mask_decoder_config=decoder,
        )
    )
    vision = {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    words = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    siglip = SiglipModel(SiglipConfig(vision_config=vision, text_config=words))
    torch.manual_seed(0)
    for parameter in sam.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sam.save_pretrained(tmp_path / "sam")
    siglip.save_pretrained(tmp_path / "siglip")
    given = {"sam": {"pretrained": str(tmp_path / "sam")}, "siglip": {"pretrained": str(tmp_path / "siglip")}}
    text = model().config.text_config.to_dict()
    recipe = ModelRecipe(**given, llm=text, segmentor={"width": 32})
    made = build_model(build_config(recipe, ["sam", "siglip", "llm"]), recipe).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        theirs = sam.vision_encoder(pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(made.segmentor.sam(pixels, [2])[0], theirs[2], rtol=1e-4, atol=1e-5)
        ours = made.siglip(pixels[..., :16, :16])
        theirs = siglip.vision_model(pixels[..., :16, :16], output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"sam\.pretrained"):
        wrong = ModelRecipe(sam={**sizes, "num_hidden_layers": 3, **given["sam"]}, llm=text)
        build_model(build_config(wrong, ["sam", "llm"]), wrong)
    shutil.rmtree(tmp_path / "sam")
    with pytest.raises(UserError):
        build_model(made.config, recipe)


@pytest.mark.parametrize(("name", "millions"), [("tiny", 6.4), ("small", 580.5), ("paper", 4624.6)])
def test_recipes_build_without_memory(name: str, millions: float) -> None:
    recipe = load_recipe(ModelRecipe, name)
    with torch.device("meta"):
        made = build_model(build_config(recipe, ["segmentor", "siglip", "llm"]))
    assert round(sum(p.numel() for p in made.parameters()) / 1e6, 1) == millions
