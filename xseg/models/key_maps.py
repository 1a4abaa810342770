"""Names of the same tensor in other people's files."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from xseg.models.xseg import XSegModel

PART_PREFIX = {"sam": "segmentor.sam.", "siglip": "siglip."}
IGNORED = ("criterion.", "segmentor.criterion.", "segmentor.shared_image_embedding.", "n_points_scale")
"""Tensors of released files that carry no weights of the model."""

RULES = [
    (r"^segmentor\.sam\.", "segmentor.encoder."),
    (r"^segmentor\.connector\.levels\.(\d+)\.conv1\.", r"seg_connector.model.\1.model.0."),
    (r"^segmentor\.connector\.levels\.(\d+)\.norm1\.", r"seg_connector.model.\1.model.1."),
    (r"^segmentor\.connector\.levels\.(\d+)\.conv2\.", r"seg_connector.model.\1.model.2."),
    (r"^segmentor\.connector\.levels\.(\d+)\.norm2\.", r"seg_connector.model.\1.model.3."),
    (r"^segmentor\.connector\.levels\.(\d+)\.conv3\.", r"seg_connector.model.\1.model.4."),
    (r"^segmentor\.connector\.levels\.(\d+)\.norm3\.", r"seg_connector.model.\1.model.5."),
    (r"^segmentor\.pixel_decoder\.projections\.", "segmentor.pixel_decoder.input_projections."),
    (r"^segmentor\.pixel_decoder\.layers\.", "segmentor.pixel_decoder.encoder.layers."),
    (r"^segmentor\.pixel_decoder\.lateral\.", "segmentor.pixel_decoder.adapter_1."),
    (r"^segmentor\.pixel_decoder\.output\.", "segmentor.pixel_decoder.layer_1."),
    (r"^segmentor\.mask_decoder\.(queries_|level_)", r"segmentor.decoder.\1"),
    (
        r"^segmentor\.mask_decoder\.mask_embedder\.(\d)\.",
        r"segmentor.decoder.decoder.mask_predictor.mask_embedder.\1.0.",
    ),
    (r"^segmentor\.mask_decoder\.", "segmentor.decoder.decoder."),
    (r"^segmentor\.class_head\.", "segmentor.class_predictor."),
    (r"^siglip\.", "vision_encoder.vision_model."),
    (r"^siglip_projector\.first\.", "visual_projector.model.0."),
    (r"^siglip_projector\.second\.", "visual_projector.model.2."),
    (r"^sam_projector\.first\.", "seg_projector.model.0."),
    (r"^sam_projector\.second\.", "seg_projector.model.2."),
    (r"^llm_projector\.first\.", "llm_projector.model.0."),
    (r"^llm_projector\.second\.", "llm_projector.model.2."),
    (r"^background$", "bg_embeds.weight"),
]
SAM_RULES = [
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"layers.\1.layer_norm\2."),
    (r"^blocks\.", "layers."),
    (r"^neck\.0\.", "neck.conv1."),
    (r"^neck\.1\.", "neck.layer_norm1."),
    (r"^neck\.2\.", "neck.conv2."),
    (r"^neck\.3\.", "neck.layer_norm2."),
]
"""Image encoder of SAM's own files -> the same in transformers."""
MASK2FORMER_RULES = [
    (r"^model\.pixel_level_module\.decoder\.", "segmentor.pixel_decoder."),
    (r"^model\.transformer_module\.", "segmentor.decoder."),
]
"""Decoders of Mask2Former in transformers -> the same in X-SAM, which took its names over."""
ADAPTED = "llm.base_model.model."
CROSS = re.compile(r"(.*\.cross_attn)\.([qkv])_proj\.(weight|bias)$")


def official_name(name: str) -> tuple[str, int | None]:
    """Our parameter name -> (official name on branch main, which third of it or None).

    Query, key and value of cross-attention are one tensor there.
    """
    name = _first(RULES, name)
    cross = CROSS.match(name)
    if cross:
        return f"{cross[1]}.in_proj_{cross[3]}", "qkv".index(cross[2])
    return name, None


def _first(rules: Sequence[tuple[str, str]], name: str) -> str:
    """The name by the first rule that fits, or as it was."""
    for pattern, replacement in rules:
        changed, hits = re.subn(pattern, replacement, name)
        if hits:
            return changed
    return name


def unified(name: str) -> str:
    """An official name of either branch -> that of branch main."""
    name = re.sub(r"^(module|model)\.(?=llm[._]|segmentor\.|visual_|vision_|seg_|bg_|criterion\.|n_points)", "", name)
    name = name.replace("visual_encoder.", "vision_encoder.")
    name = re.sub(r"^vision_encoder\.(?!vision_model\.)", "vision_encoder.vision_model.", name)
    name = name.replace("segmentor.logit_scale", "segmentor.class_predictor.logit_scale")
    return re.sub(r"^segmentor\.class_predictor\.(weight|bias)$", r"segmentor.class_predictor.predictor.\1", name)


def from_official(state: Mapping[str, Tensor], model: "XSegModel") -> dict[str, Tensor]:
    """Rename a released state; what the model has no place for keeps its official name."""
    there = {unified(n): v for n, v in state.items() if not unified(n).startswith(IGNORED)}
    out, used = {}, set()
    for name in model.state_dict():
        official, third = official_name(name)
        if official in there:
            value = there[official]
            out[name] = value if third is None else value.chunk(3)[third]
            used.add(official)
    return out | {n: v for n, v in there.items() if n not in used}


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of branch main, cross-attention joined; also good for gradients and on ``meta``."""
    joined: dict[str, list[Tensor]] = {}
    for name, value in state.items():
        # Parameters come in the order query, key, value.
        joined.setdefault(official_name(name)[0], []).append(value)
    return {n: v[0] if len(v) == 1 else torch.cat(v) for n, v in joined.items()}


def without_adapter(name: str) -> tuple[str, str]:
    """A name of peft's -> (the name without LoRA, "weight", "A", "B" or "replaced").

    ``modules_to_save`` holds whole layers that were trained beside the adapter; the ones they replace are not wanted.
    """
    if not name.startswith(ADAPTED):
        return name, "weight"
    name = "llm." + name.removeprefix(ADAPTED)
    for pattern, role in (
        (r"\.lora_A(\.default)?\.weight$", "A"),
        (r"\.lora_B(\.default)?\.weight$", "B"),
        (r"\.original_module\.(\w+)$", "replaced"),
    ):
        if re.search(pattern, name):
            return re.sub(pattern, ".weight", name), role
    return re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.(?=\w+$)", ".", name), "weight"


def from_mask2former(state: Mapping[str, Tensor], model: "XSegModel") -> dict[str, Tensor]:
    """The decoders of a Mask2Former file under our names; its backbone and heads are left out."""
    named = {_first(MASK2FORMER_RULES, n): v for n, v in state.items()}
    decoders = ("segmentor.pixel_decoder.", "segmentor.decoder.")
    return from_official({n: v for n, v in named.items() if n.startswith(decoders)}, model)


def vision_tower(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The image encoder's tensors of a SAM or SigLIP file, under our names."""
    inner = "vision_encoder." if part == "sam" else "vision_model."
    if part == "sam" and any(n.startswith("image_encoder.") for n in state):
        own = {n.removeprefix("image_encoder."): v for n, v in state.items() if n.startswith("image_encoder.")}
        state = {inner + _first(SAM_RULES, n): v for n, v in own.items()}
    # Keys of other towers are dropped only where the file says which tower is which.
    whole = any(n.startswith(inner) for n in state)
    return {PART_PREFIX[part] + n.removeprefix(inner): v for n, v in state.items() if not whole or n.startswith(inner)}


def part_of(name: str) -> str:
    """The part of the model a parameter belongs to: ``segmentor.sam``, ``llm``, …"""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "segmentor" else words[0]
