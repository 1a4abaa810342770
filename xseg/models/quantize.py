"""Four-bit weights of linear layers (NF4, QLoRA section 3) through bitsandbytes, which is an extra."""

import importlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from xseg.errors import UserError

STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")


def installed() -> Any:
    """bitsandbytes. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"adapters: quantize: nf4 needs bitsandbytes ({error}): pip install xseg[qlora], or drop quantize"
        ) from error


def to_four_bits(module: nn.Module, names: Collection[str]) -> None:
    """Replace the linear layers ``names`` of a part by 4-bit ones, rounded in blocks of 64 values.

    On an accelerator they are rounded when they are moved there, else at once. Sets ``is_loaded_in_4bit``, by which
    peft knows such parts.
    """
    nn4 = installed().nn
    for name in names:
        old = module.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = nn4.Linear4bit(old.in_features, old.out_features, bias=old.bias is not None, quant_type="nf4")
        new.weight = nn4.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.data, requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, new.to(old.weight.device))
    module.is_loaded_in_4bit = True  # type: ignore[assignment]


def is_coarse(layer: nn.Module) -> bool:
    """Whether a layer's weight is stored in 4 bits."""
    return hasattr(layer.weight, "quant_state") if hasattr(layer, "weight") else False


def is_statistic(name: str) -> bool:
    """Whether a tensor of a state only says how a 4-bit weight was rounded."""
    return name.endswith(STATISTICS)


def restored(layer: Any) -> Any:
    """A linear layer with the float32 weight that a 4-bit one stands for; any other layer as it is."""
    if not is_coarse(layer):
        return layer
    weight: Tensor = installed().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    out, columns = weight.shape
    with torch.device("meta"):
        new = nn.Linear(columns, out, bias=layer.bias is not None)
    new.weight = nn.Parameter(weight.float())
    if layer.bias is not None:
        new.bias = layer.bias
    return new


def to_floats(model: nn.Module) -> None:
    """Forget that parts were stored in 4 bits, after ``restored`` replaced their layers."""
    for module in model.modules():
        if getattr(module, "is_loaded_in_4bit", False):
            module.is_loaded_in_4bit = False  # type: ignore[assignment]
