"""The official states of both code lines, imported as a user imports them, are the models that all cases are run on."""

import json
from pathlib import Path

import golden
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xseg.infer.importing import Import, import_xsam
from xseg.models import checkpoint

pytestmark = pytest.mark.skipif(not golden.GOLDEN, reason=golden.SKIP)
WORDS = {0: "<pad>", 1: "<s>", 2: "<|end|>", 3: "<unk>", 4: "<|user|>", 5: "<|assistant|>"}
SPECIAL = {253: "<SEG>", 254: "<p>", 255: "</p>"}
FIELDS = (
    "width", "connector_width", "connector_layers", "connector_scales", "pixel_layers", "pixel_ffn", "num_queries",
    "decoder_layers", "heads", "ffn",
)  # fmt: skip


def tokenizer(folder: Path) -> Path:
    """256 words, xseg's three at the ids of the golden cases."""
    names = {i: (WORDS | SPECIAL).get(i, f"w{i}") for i in range(256)}
    core = Tokenizer(models.WordLevel({name: i for i, name in names.items()}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|end|>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=[*list(WORDS.values())[4:], *SPECIAL.values()],
    ).save_pretrained(folder / "words")  # fmt: skip
    return folder / "words"


def recipe(folder: str, place: Path) -> str:
    """The sizes of a golden folder as a model recipe."""
    sizes = json.loads((golden.ROOT / folder / "config.json").read_text())
    config = golden.config_from(folder)
    given = {
        "sam": sizes["sam"],
        "siglip": sizes.get("siglip", {}),
        "segmentor": {name: getattr(config.segmentor_config, name) for name in FIELDS},
        "tokenizer": str(tokenizer(place)),
    }
    if "phi3" in sizes:
        given["llm"] = {"model_type": "phi3", **{k: v for k, v in sizes["phi3"].items() if k != "vocab_after_resize"}}
    (place / "golden.yaml").write_text(yaml.safe_dump(given))
    return str(place / "golden.yaml")


@pytest.mark.parametrize("folder", ["archive", "main/full", "main/segmentor"])
def test_an_imported_state_is_the_model_of_the_cases(folder: str, tmp_path: Path) -> None:
    asked = Import(golden.ROOT / folder / "model.safetensors", tmp_path / "out", recipe(folder, tmp_path))
    report = import_xsam(asked)
    assert not report.fresh and not report.unexpected and not report.mismatched
    imported = checkpoint.load(tmp_path / "out").eval()
    wanted = golden.model_from(folder)
    ours = imported.state_dict()
    assert ours.keys() == wanted.state_dict().keys()
    assert all(torch.equal(ours[n], v) for n, v in wanted.state_dict().items())
    if folder != "main/segmentor":
        assert imported.config.seg_token_id == 253
