"""The processes of a run: accelerate with or without DeepSpeed, on accelerators or on CPU, and how they end."""

import os
import sys
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

from xseg.config import StageRecipe
from xseg.errors import UserError
from xseg.train.stage import check_compiler

Precision = Literal["fp32", "autocast", "bf16"]
"""fp32 everywhere; bf16 products over fp32 weights; bf16 weights with fp32 masters in the optimiser (DeepSpeed)."""


def accelerator(recipe: StageRecipe, precision: Precision) -> Accelerator:
    """Start the process group as the launcher's environment says; what the recipe decides is set here.

    Raises UserError when the launcher gave processes that do not see each other.
    """
    on_cpu, world = not torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if on_cpu else "cuda")
    if uses_deepspeed() and on_cpu:
        check_compiler()
    # Left to itself, accelerate starts no group with DeepSpeed on CPU, and every process takes itself for the only one.
    handlers = [InitProcessGroupKwargs(backend="gloo")] if on_cpu and (world > 1 or uses_deepspeed()) else []
    acc = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        gradient_accumulation_steps=recipe.accumulate,
        deepspeed_plugin=_plugin(recipe, precision) if uses_deepspeed() else None,
        kwargs_handlers=handlers,
        log_with=list(recipe.track) or None,
        project_dir=recipe.out,
    )
    if acc.num_processes != world:
        raise UserError(
            f"{world} processes were launched, but accelerate sees {acc.num_processes}: each would train alone; use "
            "one of the files in train_stages/accelerate (on CPU: cpu2.yaml) with --config_file"
        )
    return acc


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
