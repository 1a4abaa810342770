"""What a run tells of its speed, and whom it tells."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from xseg.errors import UserError
from xseg.train import tracking
from xseg.train.log import Console, scalars
from xseg.train.meter import Flops, Meter, part_norms


def test_flops_of_a_linear_layer_and_nothing_changes() -> None:
    layer, given = nn.Linear(6, 10, bias=False), torch.randn(4, 6, requires_grad=True)
    plain = layer(given)
    with Flops() as counted:
        out = layer(given)
        out.sum().backward()
    assert torch.equal(out, plain)
    assert counted.total == 3 * 2 * 4 * 6 * 10, "forward, and backward for the input and for the weight"


def test_attention_counts_with_its_backward() -> None:
    query, key, value = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    with Flops() as counted:
        nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
    assert counted.total == 3 * 2 * (2 * 2 * 3 * 5 * 7 * 8)


def test_the_first_step_of_each_data_set_is_counted() -> None:
    meter = Meter(torch.device("cpu"))
    for source, size in ((0, 4), (0, 8), (1, 8)):
        with meter.counting(source):
            torch.ones(size, 5) @ torch.ones(5, 3)
    assert meter.flops == {0: 2 * 4 * 5 * 3, 1: 2 * 8 * 5 * 3}
    found = meter.figures(1, 0.5, 0.0)
    assert found["tflops"] == pytest.approx(meter.flops[1] / 0.5 / 1e12)
    assert "mfu" not in found and "grad_norms" not in found, "no peak is known of a CPU, no update was seen"
    assert 0.05 < found["memory_gb"] < 1000


def test_norms_of_parts_are_those_before_clipping() -> None:
    model = nn.ModuleDict({"llm": nn.Linear(3, 1, bias=False), "segmentor": nn.ModuleDict({"sam": nn.Linear(2, 1)})})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter = Meter(torch.device("cpu"))
    meter.listen(model, optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 2.0)
    wanted = part_norms({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert wanted == pytest.approx({"llm": 12**0.5, "segmentor.sam": 12**0.5})
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    optimizer.step()
    with meter.counting(0):
        pass
    assert meter.figures(0, 1.0, norm)["grad_norms"] == pytest.approx(wanted, rel=1e-5)


def test_a_line_becomes_numbers_with_flat_names() -> None:
    line = {"step": 3, "loss": 2.5, "source": "coco/train", "task": "any", "grad_norms": {"llm": 0.5}, "last": True}
    assert scalars(line) == {
        "step": 3.0, "loss": 2.5, "grad_norms/llm": 0.5, "loss_of/coco/train": 2.5, "loss_of/any": 2.5
    }  # fmt: skip


def test_every_written_line_reaches_the_trackers(tmp_path: Path) -> None:
    seen: list[tuple[int, dict]] = []
    console = Console(tmp_path, [("a/b", "c")], 0, 3, True, lambda numbers, step: seen.append((step, dict(numbers))))
    for step in (1, 2, 3):
        figures = {"loss": 1.0 / step, "lr": 0.1, "images": 6, "tokens": 40, "data_s": 0.5}
        console.log(step, figures, 0, 2.0, write=step != 2)
    assert [step for step, _ in seen] == [1, 3]
    last = seen[-1][1]
    assert (last["images_per_s"], last["tokens_per_s"], last["data_share"]) == (3.0, 20.0, 0.25)
    assert last["loss_of/a/b"] == last["loss_of/c"] == last["loss"]


def test_a_tracker_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"track: wandb: not installed: pip install xseg\[wandb\]"):
        tracking.check(["wandb"])
    tracking.check([])
