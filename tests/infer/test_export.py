"""Half precision in folders, float32 in memory; exports that answer as their source does, or are not written."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from oracle import encoder
from safetensors.torch import load_file
from small_models import LLM, SEGMENTOR, SIGLIP

from xseg.config import ModelRecipe
from xseg.errors import UserError
from xseg.geometry.masks import encode
from xseg.infer import card
from xseg.infer import export as module
from xseg.infer.export import Export, compare, export, final_folder
from xseg.infer.language import export_language
from xseg.infer.predictor import load
from xseg.infer.processing import XSegProcessor
from xseg.models import checkpoint
from xseg.models.build import build_config, build_model
from xseg.types import Prediction, Segment

SAM = {**small_models.SAM, "stem": "residual"}
STAGE = {
    "stage": "s3_mixed", "model": "tiny", "steps": 7, "batch_size": 4, "accumulate": 2, "seed": 5, "init_from": [],
    "mixture": {"datasets": [{"recipe": "shapes/refer_train"}]}, "data_root": "nowhere",
}  # fmt: skip
ROW = {
    "task": "refer_seg", "dataset": "shapes/refer_val", "split": "val", "metric": "cIoU", "value": 71.26, "n": 43,
    "ci95": [70.04, 72.96], "protocol": "sum over sentences",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose last stage holds random weights that bf16 can say exactly, so that a copy must agree wholly."""
    monkeypatch.setattr(module, "PICTURES", 2)
    final = tmp_path / "run/s3/final"
    recipe = ModelRecipe(
        sam=SAM, siglip=SIGLIP, llm=LLM, segmentor=SEGMENTOR, tokenizer="examples/tiny_parts/phi", max_tokens=512
    )
    parts = ("segmentor", "siglip", "llm")
    processor = XSegProcessor.from_recipe(recipe, parts)
    torch.manual_seed(0)
    made = build_model(build_config(recipe, parts, "concepts", 0, len(encoder().tokenizer)))
    checkpoint.save(made.bfloat16().float(), final)
    processor.save_pretrained(final)
    (final / "stage.yaml").write_text(json.dumps(STAGE))
    (tmp_path / "run/s3/metrics.jsonl").write_text('{"step": 6}\n{"step": 7, "elapsed_s": 183.0}\n')
    guess = {**ROW, "value": 9.5, "ci95": None, "protocol": "blind: a random object"}
    rows = [{"model": "s3", **ROW}, {"model": "s3", **guess}, {"model": "s1", **ROW, "value": 11.1}]
    results = {"suite": "shapes", "commit": "0123456789abcdef", "rows": rows}
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    return tmp_path / "run"


def test_an_export_is_bf16_in_the_file_and_float32_in_memory(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    agreement = export(Export(run, out, limit_mb=1))
    assert agreement.masks > 10 and agreement.iou == 1.0
    assert agreement.texts > 0 and agreement.same == agreement.texts
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    half, whole = load(out, "cpu")[0].model, load(run / "s3/final", "cpu")[0].model
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), whole.parameters(), strict=True))


def test_a_later_stage_starts_in_float32_from_a_half_precision_folder(run: Path, tmp_path: Path) -> None:
    export(Export(run, tmp_path / "out"))
    made = build_model(checkpoint.load(tmp_path / "out").config)
    (report,) = checkpoint.overlay(made, [tmp_path / "out"])
    assert not report.fresh and {p.dtype for p in made.parameters()} == {torch.float32}


def test_pretrained_parts_in_half_precision_give_float32_weights(tmp_path: Path) -> None:
    from transformers import (
        Phi3Config,
        Phi3ForCausalLM,
        SamVisionConfig,
        SamVisionModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    vision = {k: v for k, v in SAM.items() if k != "stem"}
    sources = {
        "sam": SamVisionModel(SamVisionConfig(**vision)),
        "siglip": SiglipVisionModel(SiglipVisionConfig(**SIGLIP)),
        "llm": Phi3ForCausalLM(Phi3Config(**LLM)),
    }
    for part, source in sources.items():
        source.bfloat16().save_pretrained(tmp_path / part)
    given = {part: {"pretrained": str(tmp_path / part)} for part in sources}
    recipe = ModelRecipe(**given, segmentor=SEGMENTOR)
    made = build_model(build_config(recipe, ("segmentor", "siglip", "llm")), recipe)
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    theirs = sources["llm"].get_input_embeddings().weight
    assert torch.equal(made.llm.get_input_embeddings().weight, theirs.float())


def damage(save: Any) -> Any:
    """A save that loses one sign."""

    def broken(model: Any, folder: Path, **options: Any) -> None:
        with torch.no_grad():
            model.segmentor.mask_decoder.queries_features.weight.neg_()
            model.llm.get_output_embeddings().weight.neg_()
        save(model, folder, **options)

    return broken


def test_a_copy_that_answers_otherwise_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xseg.models.xseg import XSegModel

    out = tmp_path / "out"
    export(Export(run, out))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(XSegModel, "save_pretrained", damage(XSegModel.save_pretrained))
    with pytest.raises(UserError, match=r"bf16 copy answers otherwise.*texts equal"):
        export(Export(run, out))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"], "no half-made folder is left"


@pytest.mark.parametrize(("dtype", "noise"), [("fp32", 1e-4), ("bf16", 0.3)])
def test_logits_that_differ_are_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, noise: float
) -> None:
    """Also where masks and words come out the same: here they are not looked at."""
    from xseg.models.xseg import XSegModel

    save = XSegModel.save_pretrained

    def noisy(model: Any, folder: Path, **options: Any) -> None:
        with torch.no_grad():
            weight = model.segmentor.mask_decoder.queries_features.weight
            weight.add_(noise * torch.randn_like(weight))
        save(model, folder, **options)

    monkeypatch.setattr(module, "check", lambda agreement, asked: None)
    export(Export(run, tmp_path / "sound", dtype))
    monkeypatch.setattr(XSegModel, "save_pretrained", noisy)
    with pytest.raises(UserError, match=rf"{dtype} copy gives other logits"):
        export(Export(run, tmp_path / "out", dtype))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "sound"]


def test_an_export_opens_with_automodel(run: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    export(Export(run, tmp_path / "out", "fp32"))
    opened = AutoModel.from_pretrained(tmp_path / "out")
    assert type(opened).__name__ == "XSegModel" and AutoConfig.from_pretrained(tmp_path / "out").model_type == "xseg"
    ours = load(tmp_path / "out", "cpu")[0].model.state_dict()
    assert all(torch.equal(v, ours[n]) for n, v in opened.state_dict().items())


def test_the_language_part_is_a_plain_transformers_folder(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert export_language(Export(run, tmp_path / "llm", "fp32")) <= 1e-5
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "llm"),
        AutoTokenizer.from_pretrained(tmp_path / "llm"),
    )
    ours = load(run / "s3/final", "cpu")[0]
    assert type(model).__name__ == "Phi3ForCausalLM"
    assert all(torch.equal(v, ours.model.llm.state_dict()[n]) for n, v in model.state_dict().items())
    said = tokenizer.apply_chat_template([{"role": "user", "content": "how many?"}], tokenize=False)
    assert said == "<|user|>\nhow many?<|end|>\n"
    assert tokenizer.convert_tokens_to_ids("<SEG>") == ours.model.config.seg_token_id
    export_language(Export(run, tmp_path / "half"))
    assert {t.dtype for t in load_file(tmp_path / "half/model.safetensors").values()} == {torch.bfloat16}


def test_a_model_without_words_has_no_language_part(tmp_path: Path) -> None:
    recipe = ModelRecipe(sam=SAM, segmentor=SEGMENTOR)
    checkpoint.save(build_model(build_config(recipe, ["segmentor"], "labels", 3)), tmp_path / "s1")
    XSegProcessor.from_recipe(recipe, ["segmentor"]).save_pretrained(tmp_path / "s1")
    with pytest.raises(UserError, match="no language part"):
        export_language(Export(tmp_path / "s1", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_above_its_limit_is_not_written_and_other_files_stay(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"--limit-mb 0\.01.*would have"):
        export(Export(run, out, limit_mb=0.01))
    assert not out.exists()
    export(Export(run, out, limit_mb=1))
    (out / card.EXAMPLE).write_bytes(b"x" * 2_000_000)
    with pytest.raises(UserError, match="limit-mb"):
        export(Export(run, out, limit_mb=1))
    export(Export(run, out, limit_mb=4))
    assert (out / card.EXAMPLE).stat().st_size == 2_000_000 and (out / "model.safetensors").is_file()


def test_what_cannot_be_exported_is_named(run: Path, tmp_path: Path) -> None:
    assert final_folder(run) == final_folder(run / "s3") == final_folder(run / "s3/final") == run / "s3/final"
    with pytest.raises(UserError, match="no model here"):
        export(Export(tmp_path, tmp_path / "out"))
    with pytest.raises(UserError, match="did you mean 'bf16'"):
        export(Export(run, tmp_path / "out", "bf61"))
    with pytest.raises(UserError, match="source itself"):
        export(Export(run, run / "s3/final"))


def test_agreement_counts_lost_masks_and_changed_words() -> None:
    left, right = torch.zeros(4, 4).bool(), torch.zeros(4, 4).bool()
    left[:, :2], right[:, 1:3] = True, True
    masks = [encode(m.numpy().astype("uint8")) for m in (left, right, left & ~left)]
    one = [Prediction("a", (Segment(masks[0]), Segment(masks[2]))), Prediction("b", text="two")]
    assert compare(one, one).iou == 1.0 and compare(one, one).same == 1
    other = [Prediction("a", (Segment(masks[1]), Segment(masks[2]))), Prediction("b", text="three")]
    found = compare(one, other)
    assert (found.masks, found.texts, found.same) == (2, 1, 0)
    assert found.iou == pytest.approx((1 / 3 + 1) / 2)
    assert compare(one, [Prediction("a", (Segment(masks[2]), Segment(masks[0]))), one[1]]).iou == 0.0


def test_the_card_says_what_the_run_left(run: Path, tmp_path: Path) -> None:
    export(Export(run, tmp_path / "mine"))
    text = (tmp_path / "mine" / card.FILE).read_text()
    for said in (
        "license: apache-2.0",
        "| s3_mixed | 7 | 8 | 5 | 3 | shapes/refer_train |",
        "## Held-out figures",
        "| shapes/refer_val | cIoU | 71.3 | 70.0-73.0 | 9.5 | 43 | sum over sentences |",
        "commit `0123456789ab`",
        "a random object",
        "mean IoU 1.0000",
        "No figure here is a number of COCO",
        "Weights: Apache-2.0",
    ):
        assert said in text, said
    assert "11.1" not in text, "the figures of another stage"
    assert "example.png" not in text, "there is none in the folder"


def test_the_card_of_other_data_promises_no_licence(run: Path) -> None:
    final = run / "s3/final"
    (final / "stage.yaml").write_text(
        json.dumps({**STAGE, "mixture": {"datasets": [{"recipe": "coco/panoptic_train"}]}})
    )
    made = card.Copy("mine", "bf16", 1, load(final, "cpu")[1].sizes, card.Agreement(1, 1, 1.0, 1, 1))
    text = card.write(final, made)
    assert "license: other" in text and "Weights: Apache-2.0" not in text and "coco/panoptic_train" in text


def test_the_summary_of_a_part_is_its_first_paragraph(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    part = tmp_path / "part"
    part.mkdir()
    (part / "README.md").write_text("---\nlicense: x\n---\n\n# Part\n\nIoU 0.9\nfrom one click.\n\nMore.\n")
    (tmp_path / "m.yaml").write_text(f"sam: {{pretrained: {part}}}\n")
    stage = {**STAGE, "model": str(tmp_path / "m.yaml")}
    (run / "s3/final/stage.yaml").write_text(json.dumps(stage))
    made = card.Copy("mine", "bf16", 1, load(run / "s3/final", "cpu")[1].sizes, card.Agreement(1, 1, 1.0, 1, 1))
    assert f"- sam: `{part}`. IoU 0.9 from one click." in card.write(run / "s3/final", made)
