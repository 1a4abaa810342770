"""One checkpoint, one picture, one phrase: chat, ``model.segment`` and evaluation give the same mask, to the pixel."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_models import save_model

from xseg.data.shapeworld.write import write
from xseg.geometry import masks as rle
from xseg.geometry.views import read_image
from xseg.infer import request
from xseg.infer.predictor import Predictor, load
from xseg.models import checkpoint
from xseg.tasks import phrasing
from xseg.tokens import IMAGE
from xseg.types import Formatted, Query, Turn

CAT = 17
LOUD = 10.0


def teach(predictor: Predictor, image: Path, phrase: str) -> None:
    """Solve the output layer so that greedy generation answers this question in the words of evaluation.

    There are fewer words in the answer than columns in a state, so one linear layer can say them exactly; everything
    that makes the mask keeps its random weights.
    """
    asked, answer = request.phrase(phrase), phrasing.ANSWER[0]
    turns = (Turn("user", f"{IMAGE}\n{asked.text}"), Turn("assistant", answer))
    encoded = predictor.processor.encode([predictor.processor.sizes.views(read_image(image, "image"))],
                                         Formatted(turns, (Query(0, (0,)),)))  # fmt: skip
    output_layer, states = predictor.model.llm.get_output_embeddings(), []
    hook = output_layer.register_forward_hook(lambda module, given, made: states.append(given[0]))
    with torch.inference_mode():
        labels = predictor.model(predictor.processor.batch([encoded])).lm_labels
    hook.remove()
    with torch.no_grad():
        wanted = LOUD * torch.nn.functional.one_hot(labels, len(output_layer.weight)).double()
        output_layer.weight.copy_((torch.linalg.pinv(states[0].double()) @ wanted).T)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a command of xseg in this process."""
    from xseg.ui.cli import main

    def command(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["xseg", *map(str, words)])
        try:
            main()
        except SystemExit as ended:
            assert not ended.code

    return command


def evaluated(run: Callable[..., None], folder: Path, image: Path, phrase: str, outline: list[float]) -> np.ndarray:
    line = {
        "image": str(image), "objects": [{"segmentation": [outline]}], "phrases": [{"text": phrase, "objects": [0]}]
    }  # fmt: skip
    (folder / "lines.jsonl").write_text(json.dumps(line) + "\n")
    recipe = {"source": "jsonl", "options": {"jsonl": "lines.jsonl"}, "task": "refer_seg", "split": "val"}
    (folder / "one.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "suite.yaml").write_text(yaml.safe_dump({"name": "one", "rows": [str(folder / "one.yaml")]}))
    given = ("--suite", folder / "suite.yaml", "--root", folder, "--out", folder / "eval")
    run("eval", "--model", folder / "final", *given)
    (row,) = [json.loads(text) for text in (folder / "eval/samples.jsonl").read_text().splitlines()]
    return rle.decode(rle.from_json(row["segments"][0]["mask"]))


def chatted(run: Callable[..., None], folder: Path, image: Path, phrase: str) -> np.ndarray:
    run("chat", "--model", folder / "final", "--image", image, "--say", f"segment {phrase}", "--out", folder / "chat")
    (path,) = (folder / "chat").glob("*.json")
    said = json.loads(path.read_text())
    assert said["text"] == phrasing.ANSWER[0], "the answer was generated, not given"
    return rle.decode(rle.from_json(said["segments"][0]["mask"]))


def same_three_ways(run: Callable[..., None], folder: Path, image: Path, phrase: str, outline: list[float]) -> None:
    save_model(folder / "final", ("segmentor", "siglip", "llm"), "concepts", hidden_size=32)
    predictor, processor = load(folder / "final", "cpu")
    torch.manual_seed(0)
    with torch.no_grad():  # maps and queries loud enough for a mask with borders
        for parameter in predictor.model.segmentor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    teach(predictor, image, phrase)
    checkpoint.save(predictor.model, folder / "final")
    processor.save_pretrained(folder / "final")
    mask = load(folder / "final", "cpu")[0].segment(image, phrase).mask
    height, width = mask.shape
    assert (width, height) == read_image(image, "image").size
    assert 0.01 < mask.mean() < 0.99, "a mask without borders could agree by chance"
    assert (chatted(run, folder, image, phrase) == mask).all()
    assert (evaluated(run, folder, image, phrase, outline) == mask).all()


def test_a_shapeworld_picture(run: Callable[..., None], tmp_path: Path) -> None:
    write(tmp_path / "shapes", 1, seed=5, size=96)
    image = next((tmp_path / "shapes/images").iterdir())
    same_three_ways(run, tmp_path, image, "the large red circle", [10, 10, 40, 10, 40, 40])


def test_two_cats(run: Callable[..., None], tmp_path: Path) -> None:
    if "XSEG_REAL" not in os.environ:
        pytest.skip("XSEG_REAL is not set: real images and annotations are not at hand")
    folder = Path(os.environ["XSEG_REAL"]) / "coco_39769"
    records = json.loads((folder / "coco_annotations.txt").read_text())
    left = min((r for r in records if r["category_id"] == CAT), key=lambda r: r["bbox"][0])
    same_three_ways(run, tmp_path, folder / "000000039769.png", "the cat on the left", left["segmentation"][0])
