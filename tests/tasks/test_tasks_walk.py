"""Every task walks the whole way: format, encode, collate, a small random model, decode, metrics."""

import dataclasses
import functools
import pkgutil
from typing import Any

import numpy as np
import pytest
import torch
from data.data_stubs import ListSource
from infer.oracle import encoder as real_encoder
from PIL import Image
from small_models import LLM, SAM, SEGMENTOR, SIGLIP

import xseg.tasks
from xseg.config import DataRecipe, LossWeights, Suite, TaskSpec, load_recipe
from xseg.data.collate import collate
from xseg.data.dataset import Dataset, Preparation
from xseg.encode import Encoder
from xseg.geometry.views import ViewSizes
from xseg.infer.baselines import blind_guess
from xseg.infer.evaluate import predict
from xseg.infer.predictor import Predictor
from xseg.infer.processing import XSegProcessor
from xseg.losses.criterion import Criterion
from xseg.models.build import build_model
from xseg.models.configuration import XSegConfig
from xseg.models.xseg import XSegModel
from xseg.paths import find
from xseg.tasks import SHARED, load_task, phrasing
from xseg.types import Sample

NAMES = sorted({m.name for m in pkgutil.iter_modules(xseg.tasks.__path__)} - SHARED)
SIZES = ViewSizes(64, 32)
SAMPLES = 3


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return real_encoder()


@pytest.fixture(scope="module")
def model(encoder: Encoder) -> XSegModel:
    torch.manual_seed(0)
    config = XSegConfig(
        sam_config=SAM,
        siglip_config=SIGLIP,
        text_config={**LLM, "vocab_size": len(encoder.tokenizer)},
        segmentor_config=SEGMENTOR,
        seg_token_id=encoder.special.seg,
        p_open_token_id=encoder.special.p_open,
        p_close_token_id=encoder.special.p_close,
    )
    return build_model(config)


def samples(task: Any) -> list[Sample]:
    """The task's example on pictures of noise, under names of its own."""
    example = task.example()
    rng = np.random.default_rng(0)
    height, width = example.size if example.size != (0, 0) else (8, 12)
    noise = [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for _ in range(SAMPLES)]
    return [dataclasses.replace(example, key=f"walk/{k}", image_id=k, images=(image,)) for k, image in enumerate(noise)]


def dataset(task: Any, encoder: Encoder, train: bool) -> Dataset:
    return Dataset(ListSource(samples(task)), task, Preparation(encoder, SIZES, train=train))


@pytest.mark.parametrize("name", NAMES)
def test_training_reaches_the_loss(name: str, encoder: Encoder, model: XSegModel) -> None:
    task = load_task(TaskSpec(name=name))
    data = dataset(task, encoder, train=True)
    batch = collate([data.get(i, epoch) for epoch in range(2) for i in range(SAMPLES)])
    output = model.train()(batch)
    losses = Criterion(LossWeights(points="grid"))(output, batch)
    assert torch.isfinite(losses.total)
    model.zero_grad()
    losses.total.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, "touch reaches what a task does not use"
    if name != "conversation":
        assert len(batch.target_masks) > 0 and losses.terms["mask"] > 0
        assert model.llm_projector.first.weight.grad.abs().sum() > 0, "masks teach the <SEG> and the concepts"


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_reaches_the_metrics_and_merges(name: str, encoder: Encoder, model: XSegModel) -> None:
    task = load_task(TaskSpec(name=name))
    data = dataset(task, encoder, train=False)
    predictor = Predictor(model.eval(), XSegProcessor(encoder, SIZES))
    if task.eval_mode == "generate":
        predictor.model = Answering(model, encoder, data)
    pairs = [pair for i in range(SAMPLES) for pair in predict(predictor, data, [i])]
    together = predict(predictor, data, range(SAMPLES))
    assert [p.key for _, p in pairs] == [p.key for _, p in together] == [f"walk/{k}" for k in range(SAMPLES)]
    whole, first, second = task.metrics(), task.metrics(), task.metrics()
    for k, (sample, prediction) in enumerate(pairs):
        for m, metric in enumerate(whole):
            own = metric.update(prediction, sample)
            assert own == (first if k < 1 else second)[m].update(prediction, sample), "earlier samples play no part"
            assert all(0 <= v <= 100 for v in own.values())
    for left, right, metric in zip(first, second, whole, strict=True):
        left += right
        assert left.compute() == metric.compute()
    scores = [s for metric in whole for s in metric.compute()]
    assert scores and all(s.n > 0 and s.protocol and 0 <= s.value <= 1000 for s in scores)
    assert len({s.metric for s in scores}) == len(scores), "one row per name"


def scored() -> set[str]:
    """The tasks of all shipped suites."""
    suites = [load_recipe(Suite, path.stem) for path in find("eval/suites", ".").glob("*.yaml")]
    rows = [row for suite in suites for row in suite.rows]
    return {(row.task or load_recipe(DataRecipe, row.recipe).task).name for row in rows}


@pytest.mark.parametrize("name", NAMES)
def test_a_blind_guess_is_scored_by_the_same_metrics(name: str, encoder: Encoder) -> None:
    task = load_task(TaskSpec(name=name))
    data = dataset(task, encoder, train=False)
    found = blind_guess(data)
    if found is None:
        assert name not in scored(), f"a shipped suite scores {name}: it needs a baseline in xseg/infer/baselines.py"
        pytest.skip("no blind baseline")
    assert found[0].startswith("blind: ")
    metrics = task.metrics()
    for sample in (data.sample(i) for i in range(SAMPLES)):
        for metric in metrics:
            metric.update(found[1](sample), sample)
    scores = [s for metric in metrics for s in metric.compute()]
    assert scores and not any("oracle" in s.metric for s in scores), "who sees nothing has no other masks"


class Answering:
    """A model that generates the annotated answers of a data set, in order, and decodes them by itself."""

    def __init__(self, model: XSegModel, encoder: Encoder, data: Dataset) -> None:
        self.model, self.encoder, self.data = model, encoder, data
        self.config = model.config

    def parameters(self) -> Any:
        return self.model.parameters()

    def generate(self, batch: Any, **options: Any) -> Any:
        keys = [self.data.sample(i).key for i in range(len(self.data))]
        texts = []
        for key in batch.keys:
            sample = self.data.sample(keys.index(key))
            texts.append(self.data.task.format(sample, np.random.default_rng(0), train=True).turns[-1].text)
        ids = [[*self.encoder.tokenizer(t, add_special_tokens=False)["input_ids"]] for t in texts]
        return self.model.generate(batch, processors=[functools.partial(force, ids, options["stop_ids"][0])], **options)


def force(answers: list[list[int]], stop: int, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    step = ids.shape[1]
    wanted = torch.tensor([a[step] if step < len(a) else stop for a in answers])
    return torch.full_like(logits, -1e9).scatter(1, wanted[:, None], 0.0)


def test_a_generated_caption_brings_its_own_spans(encoder: Encoder, model: XSegModel) -> None:
    task = load_task(TaskSpec(name="gcg_seg"))
    data = dataset(task, encoder, train=False)
    predictor = Predictor(Answering(model.eval(), encoder, data), XSegProcessor(encoder, SIZES))
    for _, prediction in predict(predictor, data, range(SAMPLES)):
        assert [s.label for s in prediction.segments] == ["two circles", "the grass"]
        assert [s.category for s in prediction.segments] == [0, 1] and prediction.text.count("<SEG>") == 1


def test_words_that_are_generated_give_the_masks_of_the_same_words_given(
    encoder: Encoder, model: XSegModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xseg.tasks.phrasing.ANSWER", phrasing.ANSWER[:1])
    found = []
    for answer in ("given", "generated"):
        task = load_task(TaskSpec(**{"name": "refer_seg", "answer": answer, "reject": 0.0}))
        one = [dataclasses.replace(s, phrases=s.phrases[k : k + 1]) for k, s in enumerate(samples(task))]
        data = Dataset(ListSource(one), task, Preparation(encoder, SIZES, train=False))
        predictor = Predictor(model.eval(), XSegProcessor(encoder, SIZES))
        if answer == "generated":
            predictor.model = Answering(model, encoder, data)
        found.append([prediction for _, prediction in predict(predictor, data, range(SAMPLES))])
    for given, generated in zip(*found, strict=True):
        assert generated.text == phrasing.ANSWER[0] and given.text == ""
        assert [(s.mask, s.label) for s in generated.segments] == [(s.mask, s.label) for s in given.segments]
        assert generated.segments[0].score == pytest.approx(given.segments[0].score, abs=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_cross_image_prompts_lie_on_the_donors_picture(train: bool, encoder: Encoder, model: XSegModel) -> None:
    task = load_task(TaskSpec(name="vgd_seg", prompts_from="other", donors=2, negatives=0.0))
    data = dataset(task, encoder, train)
    for index in range(SAMPLES):
        encoded = data.get(index)
        assert encoded.names == data.get(index).names, "drawn by (seed, epoch, index)"
        lent = [image for _, image in encoded.prompts]
        assert set(lent) <= {1, 2} and len(encoded.images) == 1 + len(set(lent)) == len(encoded.names)
        assert encoded.names[0] == f"{data.sample(index).key}#0" and len(set(encoded.names)) == len(encoded.names)
        assert encoded.text is not None and len(encoded.text.images) == 1
    batch = collate([data.get(i) for i in range(SAMPLES)])
    assert (batch.prompt_image != batch.query_image[batch.region_position[:, 0]]).all()
    predictor = Predictor(model.eval(), XSegProcessor(encoder, SIZES))
    alone = [predict(predictor, data, [i])[0][1] for i in range(SAMPLES)] if not train else []
    shared = predict(predictor, data, range(SAMPLES)) if not train else []
    for one, (_, other) in zip(alone, shared, strict=True):
        a, b = one.extra["instances"], other.extra["instances"]
        assert [s.category for s in a] == [s.category for s in b]
        assert [s.score for s in a] == pytest.approx([s.score for s in b], abs=1e-4)


def test_evaluation_finds_another_picture_for_each_category_whatever_is_left_out(encoder: Encoder) -> None:
    task = load_task(TaskSpec(name="vgd_seg", prompts_from="other", donors=1))
    example = task.example()
    bare = [dataclasses.replace(example, key=f"bare/{k}", instances=()) for k in range(30)]
    bars, blocks = (
        dataclasses.replace(example, key=f"only/{c}", instances=tuple(i for i in example.instances if i.category == c))
        for c in (0, 2)
    )
    source = ListSource([example, *bare, bars, blocks])
    for limit in (None, 1):
        data = Dataset(source, task, Preparation(encoder, SIZES, train=False), limit)
        assert [s.key for s in data.donors(0)] == ["only/0", "only/2"]
        assert {p.image for p in data.format(0).prompts} == {1, 2}
    alone = Dataset(ListSource([example, *bare]), task, Preparation(encoder, SIZES, train=False))
    assert alone.donors(0) == () and {p.image for p in alone.format(0).prompts} == {0}, "no other picture has them"


def test_donors_of_an_epoch_do_not_depend_on_the_batch(encoder: Encoder) -> None:
    data = dataset(load_task(TaskSpec(name="vgd_seg", donors=1)), encoder, train=True)
    drawn = {epoch: [s.key for s in data.donors(0, epoch)] for epoch in range(12)}
    assert all(len(keys) == 1 and keys != ["walk/0"] for keys in drawn.values())
    assert len({tuple(keys) for keys in drawn.values()}) == 2, "drawn anew each epoch"
    assert data.donors(0, 3) == data.donors(0, 3)
    none = dataset(load_task(TaskSpec(name="refer_seg")), encoder, train=True)
    assert none.donors(0) == ()
