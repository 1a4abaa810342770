"""Import of a checkpoint in the released layout: random weights of a model recipe, written and read shard by shard.

Writes bfloat16 shards under the official key names of branch main or archive (never the whole model at once), imports
them in a process of its own, and prints its time and peak memory beside the largest shard. The paper's recipe needs
twice 9 GB of disk.

    python bench/released_checkpoint.py --recipe paper --out DIR [--format bin|safetensors] [--branch main|archive]
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xseg.config import ModelRecipe, load_recipe
from xseg.models import key_maps, shards
from xseg.models.build import build_config, build_model
from xseg.tokens import SPECIAL_TOKENS

PARTS = ("segmentor", "siglip", "llm")
CHAT = ("<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>")


def stand_in_tokenizer(words: int, folder: Path) -> None:
    """A tokenizer of as many words as the embedding has rows, for templates like Phi-3's."""
    names = [*CHAT, *(f"w{i}" for i in range(words - len(CHAT) - len(SPECIAL_TOKENS))), *SPECIAL_TOKENS]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [*CHAT[3:], *SPECIAL_TOKENS]
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=special
    ).save_pretrained(folder)


def keys(recipe: str, words: int, branch: str) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of a stage-3 state; a tied output layer is stored once."""
    with torch.device("meta"):
        model = build_model(build_config(load_recipe(ModelRecipe, recipe), PARTS, vocab_size=words))
    out = {name: tuple(value.shape) for name, value in key_maps.to_official(dict(model.named_parameters())).items()}
    if branch == "archive":
        out = {name.replace("vision_encoder.", "visual_encoder."): shape for name, shape in out.items()}
        out["segmentor.logit_scale"] = out.pop("segmentor.class_predictor.logit_scale")
    return out


def groups(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Random tensors, one shard after the other."""
    generator = torch.Generator().manual_seed(0)
    for names in shards.grouped({n: 2 * torch.Size(s).numel() for n, s in shapes.items()}, limit):
        yield {n: torch.empty(shapes[n], dtype=torch.bfloat16).normal_(std=0.02, generator=generator) for n in names}


def write(shapes: dict[str, tuple[int, ...]], folder: Path, kind: str, limit: int) -> int:
    """Write the shards and their index; return the bytes of the largest."""
    folder.mkdir(parents=True)
    table = {}
    for number, state in enumerate(groups(shapes, limit)):
        name = f"pytorch_model-{number:05}.{kind}"
        save_file(state, folder / name) if kind == "safetensors" else torch.save(state, folder / name)
        table |= dict.fromkeys(state, name)
    (folder / f"pytorch_model.{kind}.index.json").write_text(json.dumps({"weight_map": table}))
    return max(path.stat().st_size for path in folder.glob(f"*.{kind}"))


def main() -> None:
    """Write, import, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("--words", type=int, default=32014)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--format", choices=("bin", "safetensors"), default="bin")
    parser.add_argument("--branch", choices=("main", "archive"), default="main")
    parser.add_argument("--shard-gb", type=float, default=5.0)
    given = parser.parse_args()
    stand_in_tokenizer(given.words, given.out / "words")
    shapes = keys(given.recipe, given.words, given.branch)
    largest = write(shapes, given.out / "released", given.format, int(given.shard_gb * 1e9))
    words = ["--recipe", given.recipe, "--tokenizer", str(given.out / "words"), "--out", str(given.out / "imported")]
    begin = time.perf_counter()
    command = [sys.executable, "-m", "xseg.ui.cli", "import", "x-sam", str(given.out / "released"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(done.stdout + done.stderr)
    size = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    print(f"{size / 1e9:.2f} GB, largest shard {largest / 1e9:.2f} GB: peak {peak / 1e9:.2f} GB, {seconds:.0f} s")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
