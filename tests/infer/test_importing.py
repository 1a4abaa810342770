"""Released checkpoints of every form give the same folder; what is wrong with one is said, and nothing is written."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_models import LLM, SAM, SEGMENTOR, SIGLIP
from torch import Tensor
from zero_files import cut

from xseg import load
from xseg.config import ModelRecipe, load_recipe
from xseg.errors import UserError
from xseg.infer.importing import REPORT, Import, import_xsam
from xseg.infer.processing import XSegProcessor
from xseg.models import checkpoint, key_maps, shards
from xseg.models.build import build_config, build_model
from xseg.models.xseg import XSegModel
from xseg.ui.cli import main

PHI = "examples/tiny_parts/phi"
DECODER = {**SEGMENTOR, "pixel_decoder": "deformable", "pixel_layers": 1, "pixel_ffn": 16}
UNUSED = {
    "segmentor.shared_image_embedding.positional_embedding": torch.ones(2, 8),
    "segmentor.criterion.empty_weight": torch.ones(3),
}
WHOLE = ("segmentor", "siglip", "llm")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """Small sizes as a recipe file; its object queries are wrong, because a checkpoint tells its own."""
    sizes = {"sam": SAM, "siglip": SIGLIP, "llm": LLM, "segmentor": {**DECODER, "num_queries": 9}, "tokenizer": PHI}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(sizes))
    return str(tmp_path / "mine.yaml")


def made(recipe: str, parts: tuple[str, ...] = WHOLE, head: str = "concepts", labels: int = 0) -> XSegModel:
    """A bfloat16 model in which every parameter is random."""
    sizes = load_recipe(ModelRecipe, recipe, ["segmentor.num_queries=4"])
    encoder = XSegProcessor.from_recipe(sizes, parts).encoder
    config = build_config(
        sizes, parts, head, labels, len(encoder.tokenizer) if encoder else None, encoder.special if encoder else None
    )
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.bfloat16().eval()


def official(model: XSegModel) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in key_maps.to_official(model.state_dict()).items()} | UNUSED


def archive(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {n.replace("vision_encoder.", "visual_encoder."): v for n, v in state.items()}
    out["segmentor.logit_scale"] = out.pop("segmentor.class_predictor.logit_scale")
    return out


def bare_siglip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.replace("vision_encoder.vision_model.", "vision_encoder."): v for n, v in state.items()}


def as_bin(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def as_wrapped(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"state_dict": {f"module.{n}": v for n, v in archive(state).items()}}, folder / "epoch.pth")
    return folder


def as_old_file(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


def as_shards(state: dict[str, Tensor], folder: Path) -> Path:
    names = sorted(bare_siglip(state))
    table = {n: f"pytorch_model-{1 + (i % 3)}-of-3.bin" for i, n in enumerate(names)}
    for file in set(table.values()):
        torch.save({n: v for n, v in bare_siglip(state).items() if table[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def as_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    save_file({n: v.contiguous() for n, v in archive(state).items()}, folder / "model.safetensors")
    return folder


def as_zero_2(state: dict[str, Tensor], folder: Path) -> Path:
    (folder / "global_step7").mkdir()
    (folder / "latest").write_text("global_step7")
    torch.save({"module": state, "dp_world_size": 2}, folder / "global_step7/mp_rank_00_model_states.pt")
    (folder / "global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"not read")
    return folder


def as_zero_3(state: dict[str, Tensor], folder: Path) -> Path:
    frozen = tuple(n for n in state if n.startswith("vision_encoder."))
    return cut({n: v for n, v in state.items() if n not in UNUSED}, folder, frozen=frozen)


FORMS = [as_bin, as_wrapped, as_old_file, as_shards, as_safetensors, as_zero_2, as_zero_3]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_every_form_gives_the_same_model(form: Callable[..., Path], recipe: str, tmp_path: Path) -> None:
    model = made(recipe)
    (tmp_path / "src").mkdir()
    report = import_xsam(Import(form(official(model), tmp_path / "src"), tmp_path / "out", recipe))
    assert not report.fresh and not report.unexpected and not report.mismatched
    predictor, processor = load(tmp_path / "out", "cpu")
    for name, value in predictor.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].float()), name
    assert checkpoint.load(tmp_path / "out", None).dtype == torch.bfloat16
    assert processor.encoder.special.seg == predictor.model.config.seg_token_id
    assert predictor.model.config.segmentor_config.num_queries == 4
    assert json.loads((tmp_path / "out" / REPORT).read_text())[0]["loaded"] == report.loaded
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml", "out", "src"]


def test_many_small_shards_open_as_one_model(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(recipe)
    monkeypatch.setattr(shards, "LIMIT", 20_000)
    source = as_bin(official(model), tmp_path)
    import_xsam(Import(source, tmp_path / "out", recipe))
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(written) > 3 and all(p.stat().st_size < 60_000 for p in written)
    state = checkpoint.load(tmp_path / "out", None).state_dict()
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in state.items())


def test_stage_one_alone_tells_its_labels(recipe: str, tmp_path: Path) -> None:
    model = made(recipe, ("segmentor",), "labels", 5)
    state = official(model)
    for kind in ("weight", "bias"):
        name = f"segmentor.class_predictor.{kind}"
        state[name] = state.pop(name.replace("predictor.", "predictor.predictor."))
    import_xsam(Import(as_bin(state, tmp_path), tmp_path / "out", recipe))
    again = checkpoint.load(tmp_path / "out", None)
    assert again.config.segmentor_config.num_labels == 5 and not hasattr(again, "llm")
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in again.state_dict().items())


def test_the_export_for_chat_has_no_decoder(recipe: str, tmp_path: Path) -> None:
    model = made(recipe, ("sam", "siglip", "llm"))
    prefixes = {
        "llm": "llm.", "visual_encoder": "vision_encoder.vision_model.", "visual_projector": "visual_projector.",
        "segmentor_encoder": "segmentor.encoder.", "segmentor_projector": "seg_projector.",
    }  # fmt: skip
    for folder, prefix in prefixes.items():
        (tmp_path / "hf" / folder).mkdir(parents=True)
        part = {n.removeprefix(prefix): v for n, v in official(model).items() if n.startswith(prefix)}
        save_file({n: v.contiguous() for n, v in part.items()}, tmp_path / "hf" / folder / "model.safetensors")
    import_xsam(Import(tmp_path / "hf", tmp_path / "out", recipe))
    again = checkpoint.load(tmp_path / "out", None)
    assert again.config.segmentor_config is None
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in again.state_dict().items())


def test_lora_is_merged_into_the_base_of_the_recipe(recipe: str, tmp_path: Path) -> None:
    model = made(recipe)
    model.llm.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.llm.get_input_embeddings().weight.normal_()
    state, target = official(model), "model.layers.0.self_attn.qkv_proj"
    frozen = [n for n in state if n.startswith("llm.")]
    adapted = {n: v for n, v in state.items() if n not in frozen}
    down, up = torch.randn(2, 16), torch.randn(48, 2)
    saved = "llm.base_model.model.model.embed_tokens.modules_to_save.default.weight"
    adapted |= {
        f"llm.base_model.model.{target}.lora_A.weight": down,
        f"llm.base_model.model.{target}.lora_B.default.weight": up,
        saved: state["llm.model.embed_tokens.weight"],
        "llm.base_model.model.model.embed_tokens.original_module.weight": torch.zeros(3),
        "llm.base_model.model.model.norm.base_layer.weight": state["llm.model.norm.weight"],
    }
    source = as_bin(adapted, tmp_path)
    with_base = ModelRecipe(**yaml.safe_load(Path(recipe).read_text())).model_dump()
    with_base["llm"]["pretrained"] = str(tmp_path / "base")
    Path(recipe).write_text(yaml.safe_dump(with_base))
    with pytest.raises(UserError, match="--lora-alpha"):
        import_xsam(Import(source, tmp_path / "out", recipe))
    import_xsam(Import(source, tmp_path / "out", recipe, lora_alpha=4.0))
    merged = checkpoint.load(tmp_path / "out", None).state_dict()
    wanted = model.state_dict()[f"llm.{target}.weight"].float() + 2 * up @ down
    assert torch.equal(merged.pop(f"llm.{target}.weight"), wanted.bfloat16())
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in merged.items())


def corrupted(state: dict[str, Tensor], folder: Path) -> Path:
    state["seg_connector.model.0.model.2.weight"][0, 0, 0, 0] = torch.nan
    return as_bin(state, folder)


def flipped(state: dict[str, Tensor], folder: Path) -> Path:
    path = as_bin(state, folder)
    with zipfile.ZipFile(path) as stored:
        biggest = max(stored.infolist(), key=lambda i: i.file_size)
    bytes_ = bytearray(path.read_bytes())
    bytes_[biggest.header_offset + biggest.file_size // 2] ^= 1
    path.write_bytes(bytes_)
    return path


def missing(state: dict[str, Tensor], folder: Path) -> Path:
    del state["segmentor.decoder.level_embed.weight"]
    return as_bin(state, folder)


def missing_shard(state: dict[str, Tensor], folder: Path) -> Path:
    as_shards(state, folder)
    (folder / "pytorch_model-2-of-3.bin").unlink()
    return folder


def other_words(state: dict[str, Tensor], folder: Path) -> Path:
    for name in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"):
        state[name] = state[name][:-1].clone()
    return as_bin(state, folder)


def other_output_words(state: dict[str, Tensor], folder: Path) -> Path:
    state["llm.lm_head.weight"] = state["llm.lm_head.weight"][:-1].clone()
    return as_bin(state, folder)


def other_model(state: dict[str, Tensor], folder: Path) -> Path:
    return as_bin({"vision_tower.weight": torch.ones(3), "language_model.weight": torch.ones(3)}, folder)


def other_sizes(state: dict[str, Tensor], folder: Path) -> Path:
    state["bg_embeds.weight"] = torch.ones(1, 7)
    return as_bin(state, folder)


def one_more(state: dict[str, Tensor], folder: Path) -> Path:
    return as_bin({**state, "segmentor.memory.weight": torch.ones(2)}, folder)


def cut_short(state: dict[str, Tensor], folder: Path) -> Path:
    path = as_bin(state, folder)
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def cut_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    path = as_safetensors(state, folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])
    return path


class Bomb:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("bomb"),)


def with_code(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"state_dict": state, "extra": Bomb()}, folder / "pytorch_model.bin")
    return folder


def no_tensors(state: dict[str, Tensor], folder: Path) -> Path:
    return as_bin({"step": 7}, folder)  # type: ignore[dict-item]


def half_of_zero_3(state: dict[str, Tensor], folder: Path) -> Path:
    next(as_zero_3(state, folder).glob("*/zero_pp_rank_1_*model_states.pt")).unlink()
    return folder


def nothing(state: dict[str, Tensor], folder: Path) -> Path:
    return folder


FAULTS = [
    (corrupted, r"corrupted tensor seg_connector\.model\.0\.model\.2\.weight"),
    (flipped, "check sum"),
    (missing, r"1 tensors are missing(.|\n)*segmentor\.mask_decoder\.level_embed"),
    (missing_shard, r"pytorch_model-2-of-3\.bin, not there"),
    (other_words, r"wrong vocabulary: llm\.model\.embed_tokens"),
    (other_output_words, r"wrong vocabulary: llm\.lm_head"),
    (other_model, r"another architecture: .*vision_tower\.weight"),
    (other_sizes, r"other sizes(.|\n)*background: \(1, 7\) there, \(1, 16\) here"),
    (one_more, r"no model here has(.|\n)*segmentor\.memory"),
    (cut_short, "cut short"),
    (cut_safetensors, "cut short"),
    (with_code, "holds code"),
    (no_tensors, "no table of tensors"),
    (half_of_zero_3, r"written by 2 processes"),
    (nothing, r"no \*\.safetensors"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS, ids=lambda f: getattr(f, "__name__", ""))
def test_what_is_wrong_is_said_and_nothing_is_written(
    fault: Callable[..., Path], said: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "src").mkdir()
    source = fault(official(made(recipe)), tmp_path / "src")
    tokenizer = str(Path(PHI).resolve())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=said):
        import_xsam(Import(source, tmp_path / "out", recipe, tokenizer))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "mine.yaml", "src"]
    assert not list((tmp_path / "here").iterdir()), "code of the pickle ran"


def test_tied_embeddings_must_agree(recipe: str, tmp_path: Path) -> None:
    sizes = yaml.safe_load(Path(recipe).read_text())
    sizes["llm"]["tie_word_embeddings"] = True
    Path(recipe).write_text(yaml.safe_dump(sizes))
    model = made(recipe)
    state = official(model)
    import_xsam(Import(as_bin(state, tmp_path), tmp_path / "out", recipe))
    assert "llm.lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    again = checkpoint.load(tmp_path / "out", None)
    assert torch.equal(again.llm.lm_head.weight, model.llm.get_input_embeddings().weight)
    state["llm.lm_head.weight"] = state["llm.lm_head.weight"] + 1
    with pytest.raises(UserError, match="differ, but the model recipe ties them"):
        import_xsam(Import(as_bin(state, tmp_path), tmp_path / "other", recipe))


def test_the_command_reports_by_part_and_ends_with_2_for_a_bad_source(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = as_bin(official(made(recipe)), tmp_path)
    words = ["xseg", "import", "x-sam", str(source), "--out", str(tmp_path / "out"), "--recipe", recipe]
    for given, status in ((words, 0), ([*words[:3], str(tmp_path / "nowhere"), *words[4:]], 2)):
        monkeypatch.setattr("sys.argv", given)
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == status
        said = capsys.readouterr()
        assert ("segmentor.pixel_decoder" in said.out) == (not status) and ("no such file" in said.err) == bool(status)


def test_an_import_replaces_nothing(recipe: str, tmp_path: Path) -> None:
    source, out = as_bin(official(made(recipe)), tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    with pytest.raises(UserError, match="is there already; nothing is overwritten"):
        import_xsam(Import(source, out, recipe))
    assert [p.read_text() for p in out.iterdir()] == ["mine"]


def test_groups_hold_every_name_once_and_keep_to_the_limit() -> None:
    sizes = {"a": 4, "b": 5, "c": 20, "d": 1, "e": 9, "f": 1}
    assert shards.grouped(sizes, 10) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
