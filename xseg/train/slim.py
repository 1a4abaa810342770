"""Checkpoints of a run with adapters leave out what is frozen: a resumed run builds it anew from its recipe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.constants import SAFE_WEIGHTS_NAME
from safetensors.torch import load_file

from xseg.errors import UserError
from xseg.models import adapters
from xseg.models.xseg import XSegModel

FILE = "base.json"


def splits(given: adapters.Adapters | None) -> bool:
    """Whether ZeRO-3 may split an adapted model: peft reads an embedding with learnt rows past ZeRO-3's gathering, and
    4-bit weights lose what they were rounded by."""
    return not any(part == "llm" or adapter.quantize for part, adapter in (given or {}).items())


def check(split_by: str, given: adapters.Adapters | None) -> None:
    """Raise UserError for adapters that ZeRO-3 cannot split, and for any under FSDP2, whose checkpoints hold all."""
    if split_by == "FSDP2" and given:
        raise UserError(
            f"adapters: {', '.join(given)}: FSDP2 trains whole models: launch with train_stages/accelerate/zero2.yaml; "
            "what adapters train is small enough for it"
        )
    if split_by == "ZeRO-3" and not splits(given):
        raise UserError(
            "adapters: under ZeRO-3 neither an adapter of the language model nor 4-bit weights work: launch with "
            "train_stages/accelerate/zero2.yaml; what adapters train is small enough for it"
        )


def register(acc: Accelerator, model: XSegModel) -> None:
    """Make ``save_state`` and ``load_state`` of ``acc`` pass over frozen weights; ``model`` is not yet prepared.

    A digest of them is written instead, and a checkpoint whose base has changed is refused with a UserError.
    """
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    mark = adapters.fingerprint(model.state_dict(), learns)

    def save(models: list[Any], weights: list[dict[str, Any]], folder: str) -> None:
        if acc.is_main_process:
            (Path(folder) / FILE).write_text(json.dumps({"fingerprint": mark}), encoding="utf8")
        for given, state in zip(models, weights, strict=False):
            trained = {name for name, p in given.named_parameters() if p.requires_grad}
            for name in set(state) - trained:
                del state[name]

    def load(models: list[Any], folder: str) -> None:
        written = json.loads((Path(folder) / FILE).read_text(encoding="utf8"))["fingerprint"]
        if written != mark:
            raise UserError(
                f"{folder}: the weights that the adapters stand beside (pretrained parts, init_from) are others than "
                "when it was written, so the run would be neither the old nor the new one: bring them back, or start "
                "anew with another out"
            )
        while models:
            given = models.pop()
            trained = {name for name, p in given.named_parameters() if p.requires_grad}
            state = load_file(Path(folder) / SAFE_WEIGHTS_NAME)
            if set(state) != trained:
                raise UserError(f"{folder}: holds other tensors than the run trains; delete it to resume from an older")
            given.load_state_dict(state, strict=False)

    acc.register_save_state_pre_hook(save)
    acc.register_load_state_pre_hook(load)


def saving(acc: Accelerator, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What ``save_state`` has to be told: DeepSpeed writes its own files."""
    return {"exclude_frozen_parameters": True} if _deepspeed(acc, recipe) else {}


def loading(acc: Accelerator, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Likewise ``load_state``."""
    return {"load_module_strict": False} if _deepspeed(acc, recipe) else {}


def _deepspeed(acc: Accelerator, recipe: Mapping[str, Any]) -> bool:
    return bool(recipe.get("adapters")) and acc.distributed_type == DistributedType.DEEPSPEED
