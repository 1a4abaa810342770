"""The processes of a run: accelerate with DeepSpeed, FSDP2 or neither, on accelerators or CPU, and how they end."""

import os
import sys
import zlib
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.export import register_dataclass
from transformers.integrations import unset_hf_deepspeed_config

from xseg.config import StageRecipe
from xseg.errors import RunError, UserError
from xseg.train.autocast import attend_in_float32
from xseg.train.stage import FSDP, check_fsdp
from xseg.types import ModelOutput

WAIT = timedelta(hours=2)
"""How long a rank waits at one place for the others, while rank 0 scores held-out images or checks a large checkpoint:
the library's ten minutes are too short for that. Stalls are the watchdog's."""
Precision = Literal["fp32", "autocast", "bf16"]
"""fp32 everywhere; bf16 products over fp32 weights; bf16 weights with fp32 masters in the optimiser (DeepSpeed)."""


def accelerator(recipe: StageRecipe, precision: Precision) -> Accelerator:
    """Start the process group as the launcher's environment says; what the recipe decides is set here.

    Raises UserError when the launcher gave processes that do not see each other.
    """
    on_cpu, world = not torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if on_cpu else "cuda")
    if uses_deepspeed() and on_cpu:
        _compile_nothing()
    if on_cpu and precision == "autocast":
        attend_in_float32()
    sharding = _sharding() if uses_fsdp() else None
    # Left to itself, accelerate starts no group with DeepSpeed or FSDP on CPU, and every process takes itself for the
    # only one.
    grouped = world > 1 or uses_deepspeed() or uses_fsdp()
    handlers = [InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=WAIT)] if grouped else []
    acc = Accelerator(
        # else the processes of a bare torchrun on CPU have one group, but share nothing through it
        cpu=on_cpu and not (uses_deepspeed() or uses_fsdp()),
        mixed_precision="bf16" if precision == "bf16" else "no",
        gradient_accumulation_steps=recipe.accumulate,
        deepspeed_plugin=_plugin(recipe, precision) if uses_deepspeed() else None,
        fsdp_plugin=sharding,
        kwargs_handlers=handlers,
        log_with=list(recipe.track) or None,
        project_dir=recipe.out,
    )
    _build_whole()
    if sharding and on_cpu:
        # accelerate knows FSDP on accelerators alone, and on CPU passes over it in silence; torch has it there, too.
        acc.state.fsdp_plugin = sharding
        acc.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    if acc.num_processes != world:
        raise UserError(
            f"{world} processes were launched, but accelerate sees {acc.num_processes}: each would train alone; use "
            "one of the files in train_stages/accelerate (on CPU: cpu2.yaml) with --config_file"
        )
    return acc


def shard(acc: Accelerator, model: Any, precision: Precision) -> None:
    """Cut ``model`` in place over the ranks under FSDP2, before anything holds its parameters; else do nothing.

    A layer of the language model is whole while it runs. All else is whole from the begin of a forward to the end of
    its backward: which of the other parts run, and how often, depends on a rank's batch, and the ranks must gather in
    one order. The language model runs once in every forward.
    """
    if not acc.is_fsdp2:
        return
    register_dataclass(ModelOutput)  # FSDP finds the backward of a module by the tensors it gave back
    if hasattr(model, "llm"):
        # Its backward, too, must run on every rank, though the words be frozen and no picture stand among them.
        model.llm.enable_input_require_grads()
        policy = MixedPrecisionPolicy()
        if precision == "autocast":
            # Else autocast keeps a copy of every layer from its forward to its backward.
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for layer in layers(model.llm):
            fully_shard(layer, mp_policy=policy)
    fully_shard(model)


def layers(llm: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a language model, by its class's list of what must stay in one piece; none where that is empty."""
    names = set(llm._no_split_modules or ())  # type: ignore[arg-type]
    return [module for module in llm.modules() if type(module).__name__ in names]


def split_by(acc: Accelerator) -> str:
    """What leaves no rank with whole weights between two steps: "ZeRO-3", "FSDP2", or "" where nothing does."""
    plugin = acc.state.deepspeed_plugin
    if acc.is_fsdp2:
        return "FSDP2"
    return "ZeRO-3" if plugin is not None and plugin.zero_stage == 3 else ""


def prepare(acc: Accelerator, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """Wrap model and optimiser as the launcher's environment says."""
    own = list(model.parameters(recurse=False))
    held = [list(group["params"]) for group in optimizer.param_groups]
    model, optimizer = acc.prepare(model, optimizer)
    if acc.is_fsdp2:
        # accelerate looks for the parameters anew, by address, and what a rank has no row of has none.
        for group, parameters in zip(optimizer.param_groups, held, strict=True):
            group["params"] = parameters
    _build_whole()
    if split_by(acc) == "ZeRO-3":
        for parameter in own:
            # ZeRO-3 finds the backward of a module by the tensors it gave back, and knows no dataclass: what the whole
            # model itself owns (a vector) is kept together from its forward to the update.
            parameter.is_external_param = True
    return model, optimizer


def _build_whole() -> None:
    """Under ZeRO-3 accelerate tells transformers to build every model in slices, the language model alone of ours.

    Models are built whole instead, and DeepSpeed cuts all of the prepared one; the copies that are saved stay whole.
    """
    unset_hf_deepspeed_config()


def _compile_nothing() -> None:
    """Keep DeepSpeed on CPU from compiling an operator of its inference: 42 s on two slow cores, and a compiler."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def _plugin(recipe: StageRecipe, precision: Precision) -> DeepSpeedPlugin:
    plugin = DeepSpeedPlugin(gradient_accumulation_steps=recipe.accumulate, gradient_clipping=recipe.clip)
    plugin.deepspeed_config |= {
        "gradient_clipping": recipe.clip,
        "gradient_accumulation_steps": recipe.accumulate,
        "train_micro_batch_size_per_gpu": recipe.batch_size,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": precision == "autocast", "dtype": "bfloat16"},
    }
    return plugin


def _sharding() -> FullyShardedDataParallelPlugin:
    check_fsdp({key: os.environ[key.upper()] for key in FSDP if key.upper() in os.environ})
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="NO_WRAP",
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )


def uses_fsdp() -> bool:
    """True when ``accelerate launch`` was given an FSDP config."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def uses_deepspeed() -> bool:
    """True when ``accelerate launch`` was given a DeepSpeed config."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def choose_precision(recipe: StageRecipe) -> Precision:
    """Return bf16 where the processor has instructions for it and the recipe does not say otherwise."""
    if recipe.precision == "auto":
        on_cpu = torch.cpu.get_capabilities()
        able = on_cpu.get("avx512_bf16") or on_cpu.get("amx_bf16")
        half = torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else bool(able)
    else:
        half = recipe.precision == "bf16"
    if not half:
        return "fp32"
    # On CPU the casts of bf16 weights cost more than they save; on an accelerator they halve the memory.
    return "bf16" if uses_deepspeed() and torch.cuda.is_available() else "autocast"


def together(acc: Accelerator, step: int, batch: Any, stop: int) -> bool:
    """Whether all ranks do step ``step`` (0-based); False when one of them was asked to stop. One gather of 24 bytes.

    ``batch``: what the plan gives all ranks for this step. Raises RunError, on all ranks, when a rank is at another
    step or plans another batch (other annotation files, other recipes): their collectives would not fit together.
    """
    mine = [step, zlib.crc32(repr(batch).encode()), stop]
    rows = acc.gather(torch.tensor([mine], dtype=torch.int64, device=acc.device)).tolist()
    other = [rank for rank, row in enumerate(rows) if row[:2] != rows[0][:2]]
    if other:
        at = ", ".join(f"rank {rank}: step {rows[rank][0] + 1}, batch {rows[rank][1]:08x}" for rank in (0, *other))
        raise RunError(f"the ranks are not at the same work ({at}): do they see the same recipes and annotation files?")
    return not any(row[2] for row in rows)


def finish(acc: Accelerator) -> None:
    """Close the trackers and end the processes together.

    On CPU with several of them the interpreter's own exit aborts now and then.
    """
    acc.end_training()
    if dist.is_initialized():
        dist.destroy_process_group()
    if acc.device.type == "cpu" and acc.num_processes > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
