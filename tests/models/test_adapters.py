"""LoRA beside the weights: nothing changes at first, nothing is lost by merging, and words of xseg's own learn."""

import importlib.util

import pytest
import torch
from model_cases import CLOSE, OPEN, SEG, config, kinds, model

from xseg.config import Adapter, ModelRecipe, load_recipe
from xseg.errors import UserError
from xseg.models import adapters, quantize
from xseg.models.build import build_config, build_model
from xseg.models.xseg import XSegModel

PARTS = ("llm", "siglip", "sam")
SMALL = Adapter(rank=2, alpha=4)
FOUR_BITS = importlib.util.find_spec("bitsandbytes") is not None


def adapted(language: str, **given: Adapter) -> XSegModel:
    made = model(language=language)
    adapters.attach(made, given or dict.fromkeys(PARTS, SMALL))
    return made.eval()


def moved(made: XSegModel) -> XSegModel:
    """As if trained: every tensor of an adapter is somewhere else."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if adapters.is_adapter(name):
                parameter += torch.randn_like(parameter) * 0.1
    return made


def answers(made: XSegModel) -> list[torch.Tensor]:
    out = []
    for batch in kinds().values():
        given = made(batch)
        out += [given.mask_logits, given.class_logits.clamp(-1e3, 1e3), given.lm_logits]
    return [tensor.detach() for tensor in out if tensor.numel()]


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).item() for a, b in pairs)


@pytest.mark.parametrize("language", ["phi3", "llama"])
def test_an_adapter_starts_as_nothing_and_merges_without_loss(language: str) -> None:
    plain = answers(model(language=language).eval())
    made = adapted(language)
    assert distance(plain, answers(made)) == 0
    beside = answers(moved(made))
    assert distance(plain, beside) > 1e-2, "an adapter that is moved must be read"
    names = set(model(language=language).state_dict())
    merged = adapters.merge(made)
    assert set(merged.state_dict()) == names
    assert distance(beside, answers(merged)) < 1e-5
    assert adapters.merge(merged) is merged and distance(beside, answers(merged)) < 1e-5


@pytest.mark.parametrize(("language", "tables"), [("phi3", 2), ("llama", 1)])
def test_only_lora_and_the_rows_of_new_words_learn_in_an_adapted_part(language: str, tables: int) -> None:
    made = adapted(language, llm=SMALL)
    learns = {name for name, p in made.llm.named_parameters() if p.requires_grad}
    rows = {name for name in learns if "trainable_tokens_delta" in name}
    assert len(rows) == tables and all("lora_" in name for name in learns - rows)
    assert any("lora_" in name for name in learns)
    assert all(p.requires_grad for p in made.siglip_projector.parameters())
    before = made.llm.get_input_embeddings().weight.detach().clone()
    moved(made)
    after = made.llm.get_input_embeddings().weight
    changed = (before != after).any(1).nonzero().flatten().tolist()
    assert changed == sorted([SEG, OPEN, CLOSE])


def test_every_adapter_gets_a_gradient() -> None:
    made = moved(adapted("phi3")).train()
    for name, batch in kinds().items():
        made.zero_grad()
        out = made(batch)
        (out.touch + out.mask_logits.sum() + out.lm_logits.sum() + out.class_logits[..., -1].sum()).backward()
        silent = [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None]
        assert not silent, f"{name}: {silent[:3]}"


def test_layers_that_are_never_read_get_no_adapter() -> None:
    made = adapted("phi3")
    last = made.config.siglip_config.num_hidden_layers - 1
    names = [n for n, _ in made.siglip.named_parameters() if "lora_" in n]
    assert names and not any(f"layers.{last}." in n or n.startswith("head.") for n in names)


def test_targets_are_named_or_refused() -> None:
    made = adapted("llama", llm=Adapter(rank=2, targets=["q_proj", "v_proj"]))
    layers = {n.split(".lora_")[0].rsplit(".", 1)[1] for n, _ in made.named_parameters() if "lora_" in n}
    assert layers == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match=r"'q_prog' is no linear layer that llm reads.*'q_proj'"):
        adapted("llama", llm=Adapter(targets=["q_prog"]))
    bare = build_model(config(parts=["segmentor"]))
    with pytest.raises(UserError, match="adapters: llm: this stage does not build it"):
        adapters.attach(bare, {"llm": SMALL})


def test_an_adapter_without_a_rate_is_refused() -> None:
    made = adapted("phi3", sam=SMALL)
    adapters.check_learns(made, {"sam": SMALL})
    made.segmentor.requires_grad_(False)
    with pytest.raises(UserError, match=r"adapters: sam: no entry of trainable .*segmentor\.sam\."):
        adapters.check_learns(made, {"sam": SMALL})


def test_a_skeleton_has_the_same_tensors() -> None:
    with torch.device("meta"):
        bare = build_model(config())
        adapters.attach(bare, dict.fromkeys(PARTS, SMALL))
    made = adapted("phi3")
    assert {n: v.shape for n, v in bare.state_dict().items()} == {n: v.shape for n, v in made.state_dict().items()}
    assert {p.device.type for p in bare.parameters()} == {"meta"}


def test_of_the_paper_preset_what_learns_is_under_five_percent() -> None:
    """LoRA on all three parts, projectors and decoders in full: what a checkpoint of the full model's kind holds."""
    sizes = build_config(load_recipe(ModelRecipe, "paper"), ["segmentor", "siglip", "llm"])
    with torch.device("meta"):
        made = build_model(sizes)
        whole = sum(p.numel() for p in made.parameters())
        adapters.attach(made, dict.fromkeys(PARTS, Adapter(rank=16)))
    learns = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert 0.01 * whole < learns < 0.05 * whole


@pytest.mark.skipif(FOUR_BITS, reason="bitsandbytes is installed")
def test_four_bits_without_the_library_are_refused() -> None:
    with pytest.raises(UserError, match=r"pip install xseg\[qlora\]"):
        adapted("phi3", llm=Adapter(quantize="nf4"))


@pytest.mark.skipif(not FOUR_BITS, reason="needs the extra qlora (bitsandbytes)")
@pytest.mark.parametrize("language", ["phi3", "llama"])
def test_four_bits_answer_alike_train_and_merge(language: str) -> None:
    plain = answers(model(language=language).eval())
    made = adapted(language, llm=Adapter(rank=2, alpha=4, quantize="nf4"))
    coarse = [m for m in made.llm.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "quant_state")]
    assert coarse or any(quantize.is_coarse(m) for m in made.llm.modules())
    rounded = answers(made)
    assert 0 < distance(plain, rounded) < 0.5
    made.train()
    out = made(kinds()["mixed"])
    (out.touch + out.lm_logits.sum()).backward()
    assert all(p.grad is not None for n, p in made.llm.named_parameters() if "lora_" in n)
    beside = answers(moved(made).eval())
    assert distance(beside, answers(adapters.merge(made))) < 1e-4
    assert set(made.state_dict()) == set(model(language=language).state_dict())
    assert {p.dtype for p in made.parameters()} == {torch.float32}
