"""Import of a checkpoint in the released layout: noise at the sizes of a model recipe, written and read by shards.

Writes bfloat16 shards under the official key names of branch main or archive (never the whole model at once), imports
them in a process of its own, and keeps its time and peak memory beside the largest shard in
``bench/results/released_checkpoint.json``, one row a form. The paper's recipe needs twice 9 GB under ``--scratch``, for
as long as it runs.

    python bench/released_checkpoint.py --recipe paper --scratch DIR [--format bin|safetensors] [--branch main|archive]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xseg.config import ModelRecipe, load_recipe
from xseg.models import key_maps, shards
from xseg.models.build import build_config, build_model
from xseg.tokens import SPECIAL_TOKENS

PARTS = ("segmentor", "siglip", "llm")
RESULTS = record.RESULTS / "released_checkpoint.json"
BLOCK = 2**24
"""Values of noise that are drawn; tensors repeat them, so that writing costs disk and not draws."""
UNREAD = {"segmentor.shared_image_embedding.positional_embedding": (2, 128)}
"""A tensor of the released files that no model reads."""
PROBE = """\
from xseg.ui.cli import main
try:
    main()
finally:
    high = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    open({!r}, "w").write(high)
"""
"""The command line, then the most memory it held; what ``getrusage`` says of a child begins at its parent's peak."""
LIMIT = 1.3
"""Most peak memory, as a part of the largest shard."""
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
    out |= UNREAD
    if branch == "archive":
        out = {name.replace("vision_encoder.", "visual_encoder."): shape for name, shape in out.items()}
        out["segmentor.logit_scale"] = out.pop("segmentor.class_predictor.logit_scale")
    return out


def groups(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Noise in the shapes that are asked for, one shard after the other."""
    noise = torch.empty(BLOCK, dtype=torch.bfloat16).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    for names in shards.grouped({n: 2 * torch.Size(s).numel() for n, s in shapes.items()}, limit):
        yield {n: _repeated(noise, torch.Size(shapes[n])) for n in names}


def _repeated(noise: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    out = torch.empty(shape.numel(), dtype=noise.dtype)
    for part in out.split(len(noise)):
        part.copy_(noise[: len(part)])
    return out.reshape(shape)


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


def imported(source: Path, recipe: str, words: Path, out: Path) -> dict[str, Any]:
    """Import in a process of its own: what it cost, and what its report could not explain."""
    peak = out.with_name("peak")
    command = [sys.executable, "-c", PROBE.format(str(peak)), "import", "x-sam", str(source), "--recipe", recipe]
    begin = time.perf_counter()
    subprocess.run([*command, "--tokenizer", str(words), "--out", str(out)], check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    (report,) = json.loads((out / "load_report.json").read_text())
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gb": round(int(peak.read_text().split()[1]) * 1024 / 1e9, 3),
        "loaded": len(report["loaded"]),
        "missing": report["fresh"],
        "unexpected": report["unexpected"],
    }


def main() -> None:
    """Write, import, keep the figures; status 1 when memory is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("--words", type=int, default=32014)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--format", choices=("bin", "safetensors"), default="bin")
    parser.add_argument("--branch", choices=("main", "archive"), default="main")
    parser.add_argument("--shard-gb", type=float, default=5.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        place = Path(folder)
        stand_in_tokenizer(given.words, place / "words")
        shapes = keys(given.recipe, given.words, given.branch)
        largest = write(shapes, place / "released", given.format, int(given.shard_gb * 1e9))
        row = imported(place / "released", given.recipe, place / "words", place / "imported")
    size = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    row |= {"tensors": len(shapes), "gb": round(size / 1e9, 3), "largest_shard_gb": round(largest / 1e9, 3)}
    row["peak_of_largest_shard"] = round(row["peak_gb"] / row["largest_shard_gb"], 3)
    print(json.dumps(row, indent=1))
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else {}
    about = {
        "claim": f"nothing missing, nothing unexpected, peak memory at most {LIMIT} of the largest shard",
        "command": "python bench/released_checkpoint.py --scratch DIR --recipe R --branch B --format F, a row each",
        "method": "one run each; seconds are of the wall clock, on a machine that may do other work",
    }
    rows = kept | {f"{Path(given.recipe).stem}, {given.branch}, {given.format}": row}
    record.save(RESULTS.stem, {**about, "rows": rows}, ["torch", "transformers"])
    sys.exit(row["peak_of_largest_shard"] > LIMIT or bool(row["missing"] or row["unexpected"]))


if __name__ == "__main__":
    main()
