"""LoRA and QLoRA through peft: put beside the weights of a part, saved without them, opened again, merged.

An adapted model keeps its modules and their calls; the names of what peft wraps get longer (``.base_layer``). A folder
with an adapter holds what training changed or no file has, and says how the rest is built (``adapter.json``).
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from xseg.config import Adapter, ModelRecipe, decode
from xseg.errors import UserError, did_you_mean
from xseg.models import build, checkpoint, quantize, shards
from xseg.models.checkpoint import SHOWN, LoadReport
from xseg.models.xseg import XSegModel

FILE, WEIGHTS = "adapter.json", "adapter.safetensors"
Adapters = Mapping[Any, Adapter]
"""{part: adapter}; parts are "llm", "siglip" and "sam"."""
ADAPTERS = ("lora_", "trainable_tokens_delta")
"""What peft's own tensors are called."""
SAMPLED = 64
"""Values of each tensor that the fingerprint of a base reads."""


@dataclass(frozen=True)
class Base:
    """How the weights that an adapter stands beside are built."""

    model: Mapping[str, Any]
    """The model recipe, with its ``pretrained`` parts."""
    init_from: Sequence[str]
    seed: int


def attach(model: XSegModel, given: Adapters) -> None:
    """Put LoRA beside linear layers of parts; what else these parts hold is frozen, but for the rows of new words.

    LoRA starts as zero, so the model answers as before (but for 4-bit rounding). Works on ``meta``. Raises UserError
    for parts that are not built and for targets that are not there.
    """
    for part, adapter in given.items():
        module = _part(model, part)
        names = targets(module, part, adapter)
        if adapter.quantize and not any(p.is_meta for p in module.parameters()):
            quantize.to_four_bits(module, names)
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=names,
            trainable_token_indices=_new_rows(model) if part == "llm" else None,
        )
        # The wrapper is left aside: the layers are changed in place, and their callers need not know.
        get_peft_model(module, config)


def _part(model: XSegModel, part: str) -> PreTrainedModel:
    holder = getattr(model, "segmentor", None) if part == "sam" else model
    found = getattr(holder, part, None)
    if found is None:
        raise UserError(f"adapters: {part}: this stage does not build it; add it to parts, or drop the adapter")
    return found  # type: ignore[no-any-return]


def targets(module: PreTrainedModel, part: str, adapter: Adapter) -> list[str]:
    """Names of the linear layers that get LoRA: those that are read, as frozen ones are not; never the output layer."""
    output = module.get_output_embeddings() if part == "llm" else None
    known = {
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad and layer is not output
    }
    if adapter.targets == "all-linear":
        return sorted(known)
    found: set[str] = set()
    for target in adapter.targets:
        hits = {name for name in known if name == target or name.endswith(f".{target}")}
        if not hits:
            near = did_you_mean(target, {name.rsplit(".", 1)[-1] for name in known})
            raise UserError(f"adapters: {part}: targets: {target!r} is no linear layer that {part} reads{near}")
        found |= hits
    return sorted(found)


def _new_rows(model: XSegModel) -> dict[str, list[int]] | None:
    """Rows of ``<SEG>``, ``<p>``, ``</p>`` in the embedding and, where it has weights of its own, the output layer."""
    config, llm = model.config, model.llm
    rows = [i for i in (config.seg_token_id, config.p_open_token_id, config.p_close_token_id) if i >= 0]
    tables = [llm.get_input_embeddings()]
    if llm.get_output_embeddings().weight is not tables[0].weight:
        tables.append(llm.get_output_embeddings())
    names = {id(module): name for name, module in llm.named_modules()}
    return {names[id(table)]: rows for table in tables} if rows else None


def check_learns(model: XSegModel, given: Adapters) -> None:
    """Raise UserError for an adapter that no entry of ``trainable`` gives a learning rate."""
    for part in given:
        if not any(p.requires_grad for n, p in _part(model, part).named_parameters() if is_adapter(n)):
            prefix = "segmentor.sam." if part == "sam" else f"{part}."
            raise UserError(
                f"adapters: {part}: no entry of trainable matches it, so it would stay zero: add "
                f"{{match: '{prefix}', lr: 2.0e-4}}"
            )


def check(model: XSegModel, given: Adapters) -> None:
    """Raise UserError for adapters that would learn nothing, and where the library for 4 bits is missing."""
    check_learns(model, given)
    if any(adapter.quantize for adapter in given.values()):
        quantize.installed()


def check_loaded(model: XSegModel, given: Adapters, reports: Sequence[LoadReport]) -> None:
    """Raise UserError for weights that are to be rounded to 4 bits and came from no file: they could not be rebuilt."""
    loaded = {name for report in reports for name in report.loaded}
    for part, adapter in given.items():
        prefix = "segmentor.sam." if part == "sam" else f"{part}."
        names = [f"{prefix}{name}.weight" for name in targets(_part(model, part), part, adapter)]
        if adapter.quantize and not set(names) <= loaded:
            raise UserError(
                f"adapters: {part}: quantize: its weights are random: name {part}.pretrained in the model recipe, or "
                "an earlier stage in init_from"
            )


def is_adapter(name: str) -> bool:
    """Whether a parameter is peft's own."""
    return any(word in name for word in ADAPTERS)


def plain(name: str) -> str:
    """The name that a weight had before peft wrapped it."""
    return name.replace(".base_layer", "").replace(".token_adapter", "")


def merge(model: XSegModel) -> XSegModel:
    """Add adapters to the weights they stand beside and put the plain layers back, in place.

    Four-bit weights become float32 first. A model without adapters stays as it is.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            _replace(model, name, _merged(module))
        elif isinstance(module, TrainableTokensWrapper):
            _replace(model, name, module.unload_and_optionally_merge_module(True, False, None))
    quantize.to_floats(model)
    return model.requires_grad_(True).eval()


@torch.no_grad()
def _merged(layer: Any) -> nn.Module:
    base = quantize.restored(layer.get_base_layer())
    (name,) = layer.active_adapters
    base.weight += layer.get_delta_weight(name).to(base.weight)
    return base


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def kept(model: XSegModel, reports: Sequence[LoadReport]) -> dict[str, str]:
    """Tensors that the adapter's file must hold, name -> name in the file: what learns, and what came from no file."""
    given = {name for report in reports for name in report.loaded}
    given |= _tied(model, given)
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    given |= _tied(model, learns) - learns
    out: dict[str, str] = {}
    for name in model.state_dict():
        if name in learns or not ({name, plain(name)} & given or is_adapter(name) or quantize.is_statistic(name)):
            out[name] = name if is_adapter(name) else plain(name)
    return out


def _tied(model: XSegModel, given: Collection[str]) -> set[str]:
    """Other names of given parameters: files hold one of two that are tied."""
    named = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    there = {key for name, key in named if {name, plain(name)} & set(given)}
    return {found for name, key in named if key in there for found in (name, plain(name))}


def fingerprint(state: Mapping[str, Tensor], left_out: Collection[str]) -> str:
    """A digest of some values of every weight by plain name, but those ``left_out``; the same in bf16 and float32."""
    digest = hashlib.sha256()
    named = {plain(n): v for n, v in state.items() if not is_adapter(n)}
    for name in sorted(named):
        value = named[name]
        if name in left_out or quantize.is_statistic(name) or not value.is_floating_point():
            continue
        some = value.flatten()[:: max(1, value.numel() // SAMPLED)][:SAMPLED].bfloat16().float()
        digest.update(name.encode() + some.cpu().numpy().tobytes())
    return digest.hexdigest()


def save(state: Mapping[str, Tensor], names: Mapping[str, str], given: Adapters, base: Base, out: Path) -> None:
    """Write ``adapter.safetensors`` and ``adapter.json``; ``state`` is the trained model's, ``names`` are ``kept``'s.

    A 4-bit weight is told from the others by its dtype and does not take part in the fingerprint.
    """
    coarse = {plain(n) for n, v in state.items() if not v.is_floating_point()}
    mark = fingerprint(state, coarse | set(names.values()))
    tensors = {file: state[name].detach().cpu().contiguous().clone() for name, file in names.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS)
    fields = {
        "adapters": {part: adapter.model_dump(mode="json") for part, adapter in given.items()},
        "base": {"model": dict(base.model), "init_from": list(base.init_from), "seed": base.seed},
        "coarse": sorted(coarse),
        "fingerprint": mark,
    }
    (out / FILE).write_text(json.dumps(fields, indent=1), encoding="utf8")


def load(folder: str | Path, dtype: torch.dtype | None = torch.float32, *, merged: bool = True) -> XSegModel:
    """Open a folder that training wrote, whole or an adapter, its weights cast to ``dtype`` (None: as stored).

    ``merged=False`` leaves adapters beside the weights. Raises UserError for damaged folders, and for an adapter whose
    base is not where it was or is another one now.
    """
    folder = Path(folder)
    if not (folder / FILE).is_file():
        return checkpoint.load(folder, dtype)
    model = _opened(folder)
    if not merged:
        return model
    merge(model).freeze_unread()
    return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]


def _opened(folder: Path) -> XSegModel:
    """Base, then what is saved, the adapters' own last."""
    try:
        fields = json.loads((folder / FILE).read_text(encoding="utf8"))
        given = {part: Adapter.model_validate(a) for part, a in fields["adapters"].items()}
        base, mark, coarse = Base(**fields["base"]), fields["fingerprint"], set(fields["coarse"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / FILE}: damaged ({error!r}); copy the folder again, or train it anew") from error
    saved = shards.read(shards.catalog(folder / WEIGHTS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base.seed)
        model = build.build_model(checkpoint.read_config(folder))
        build.load_parts(model, decode(ModelRecipe, dict(base.model), str(folder / FILE)))
        overlay(model, [_earlier(folder, name) for name in base.init_from])
        if fingerprint(model.state_dict(), coarse | set(saved)) != mark:
            raise UserError(
                f"{folder}: its base has changed since it was trained ({', '.join(_sources(base))}): the adapter would "
                "stand beside other weights; bring the old ones back, or train again"
            )
        _put(model, {n: v for n, v in saved.items() if not is_adapter(n)}, folder)
        attach(model, given)
    own = {n for n in model.state_dict() if is_adapter(n) and "trainable_tokens_original" not in n}
    missing = own - set(saved) - _tied(model, set(saved))
    if missing:
        raise UserError(f"{folder / WEIGHTS}: incomplete: {', '.join(sorted(missing)[:SHOWN])} missing; copy it again")
    _put(model, {n: v for n, v in saved.items() if is_adapter(n)}, folder)
    return model


def _put(model: XSegModel, state: Mapping[str, Tensor], folder: Path) -> None:
    report = checkpoint.assign(model, state, str(folder / WEIGHTS))
    if report.unexpected or report.mismatched:
        report.fresh = []
        raise UserError(f"{folder / WEIGHTS}: does not fit the model beside it\n{report}")


def _sources(base: Base) -> list[str]:
    parts = [part["pretrained"] for part in base.model.values() if isinstance(part, dict) and "pretrained" in part]
    return [*map(str, parts), *base.init_from]


def _earlier(folder: Path, name: str) -> Path:
    """An earlier stage where it was, or beside this one for runs that were moved."""
    given = Path(name).expanduser()
    beside = folder.parent.parent / given.parent.name / given.name
    for place in (given, beside):
        if (place / "config.json").is_file():
            return place
    raise UserError(
        f"{folder}: an adapter without its base: {name} is not there (nor {beside}): bring it back; a folder that "
        "needs no other is made by `xseg export`"
    )


def overlay(model: XSegModel, folders: Sequence[str | Path]) -> list[LoadReport]:
    """``checkpoint.overlay`` of earlier stages, adapters merged into their base."""
    return checkpoint.overlay(model, folders, weights)


def weights(folder: Path) -> Mapping[str, Tensor]:
    """All tensors of a stage's folder, an adapter merged."""
    return load(folder).state_dict() if (folder / FILE).is_file() else checkpoint.read_weights(folder)
