import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_stubs import ListSource, PhraseTask, TalkTask, WordEncoder, phrase_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from xseg.config import DataRecipe, Mixture, MixtureEntry, ModelRecipe, load_recipe
from xseg.data.dataset import Dataset, Preparation, load_dataset
from xseg.data.lengths import PICTURE, TURN, lengths
from xseg.data.mixture import Alike, Item, Plan, alike
from xseg.data.shapeworld.tasks import write_tasks
from xseg.data.shapeworld.write import write
from xseg.data.sources import load_source
from xseg.errors import UserError
from xseg.geometry.views import ViewSizes
from xseg.infer.processing import XSegProcessor
from xseg.types import Sample, Turn

READY = Preparation(WordEncoder(), ViewSizes(32, 0))  # type: ignore[arg-type]
SETS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), min_size=1, max_size=3)


def given_lengths(*sets: Sequence[int], window: int) -> Alike:
    return Alike(window, tuple(np.array(s) for s in sets))


def flat(plan: Plan, step: int) -> list[Item]:
    return [item for rank in plan.batch(step) for micro in rank for item in micro]


def epoch(plan: Plan, number: int = 0) -> range:
    return range(number * plan.steps_per_epoch, (number + 1) * plan.steps_per_epoch)


@settings(max_examples=80, deadline=None)
@given(SETS, st.integers(1, 4), st.sampled_from([1, 1.7, 3]), st.booleans(), st.integers(0, 2))
def test_sorting_draws_what_is_drawn_without_it(
    sets: list[list[int]], window: int, factor: float, mixed: bool, number: int
) -> None:
    given = ([len(s) for s in sets], [factor] * len(sets), 2, 2, 2)
    plain, grouped = (Plan(*given, seed=3, mixed=mixed, alike=a) for a in (None, given_lengths(*sets, window=window)))
    assert plain.steps_per_epoch == grouped.steps_per_epoch
    drawn = [Counter(i for step in epoch(plan, number) for i in flat(plan, step)) for plan in (plain, grouped)]
    assert drawn[0] == drawn[1]
    if not mixed:
        assert all(len({i.dataset for i in flat(grouped, step)}) == 1 for step in epoch(grouped, number))


@settings(max_examples=40, deadline=None)
@given(SETS, st.booleans(), st.integers(0, 8))
def test_a_window_of_one_batch_keeps_the_samples_of_every_step(sets: list[list[int]], mixed: bool, step: int) -> None:
    given = ([len(s) for s in sets], [1.0] * len(sets), 3, 2)
    plain, grouped = (Plan(*given, mixed=mixed, alike=a) for a in (None, given_lengths(*sets, window=1)))
    assert Counter(flat(plain, step)) == Counter(flat(grouped, step))


@settings(max_examples=40, deadline=None)
@given(SETS, st.integers(1, 4), st.integers(0, 30))
def test_resuming_anywhere_and_splitting_anyhow_changes_nothing(sets: list[list[int]], window: int, step: int) -> None:
    counts, factors, order = [len(s) for s in sets], [2.0] * len(sets), given_lengths(*sets, window=window)
    whole, walked = (Plan(counts, factors, 12, seed=5, alike=order) for _ in range(2))
    for earlier in range(step):
        walked.batch(earlier)
    assert walked.batch(step) == whole.batch(step)
    row = flat(whole, step)
    for size, world, accumulate in ((3, 4, 1), (2, 3, 2), (1, 1, 12), (6, 1, 2)):
        ranks = Plan(counts, factors, size, world, accumulate, seed=5, alike=order).batch(step)
        aligned = [item for micro in range(accumulate) for rank in range(world) for item in ranks[rank][micro]]
        assert aligned == row, "micro-batches are stretches of the global batch, those of all ranks side by side"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.randoms())
def test_steps_are_stretches_of_sorted_windows(steps: int, window: int, random: Any) -> None:
    sizes = [random.randrange(20) for _ in range(8 * steps)]
    plan = Plan([len(sizes)], [1.0], 4, 2, alike=given_lengths(sizes, window=window))
    stretches = [[sizes[item.sample] for item in flat(plan, step)] for step in epoch(plan)]
    assert all(stretch == sorted(stretch) for stretch in stretches)
    if window >= steps:
        assert [size for stretch in sorted(stretches) for size in stretch] == sorted(sizes)


def test_epochs_and_seeds_differ_and_steps_are_shuffled() -> None:
    sizes = np.random.default_rng(0).integers(10, 1000, 4000).tolist()
    order = given_lengths(sizes, window=10)
    plan, other = (Plan([4000], [1.0], 8, 2, seed=seed, alike=order) for seed in (0, 1))
    first, second = ([flat(plan, s) for s in epoch(plan, n)] for n in (0, 1))
    assert first != [flat(other, s) for s in epoch(other)]
    assert {frozenset(i.sample for i in row) for row in first} != {frozenset(i.sample for i in row) for row in second}
    means = [np.mean([sizes[i.sample] for i in row]) for row in first]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2, "a long step says nothing of the next one"


def shares(plan: Plan, tokens: np.ndarray) -> tuple[float, float]:
    """Padding of the micro-batches, and what ranks wait for the one with the longest, over an epoch."""
    size = np.array([[[tokens[[i.sample for i in m]] for m in r] for r in plan.batch(s)] for s in epoch(plan)])
    computed = size.max(axis=-1) * plan.batch_size  # (steps, world, accumulate)
    return 1 - size.sum() / computed.sum(), 1 - computed.mean(axis=1).sum() / computed.max(axis=1).sum()


def test_padding_and_waiting_fall() -> None:
    """Answers of a word to those of a page, as a conversation mixture has them."""
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(4.5, 1.0, 20000), 8, 2000).astype(int)
    guessed = (tokens * rng.normal(4, 0.4, len(tokens))).astype(int)
    plain, one, fifty = (
        shares(Plan([len(tokens)], [1.0], 4, 8, 2, alike=Alike(window, (guessed,)) if window else None), tokens)
        for window in (0, 1, 50)
    )
    assert plain[0] > 0.4 and plain[1] > 0.3
    assert one[0] < plain[0] / 2.5
    assert fifty[0] < plain[0] / 4 and fifty[1] < plain[1] / 4


def test_copies_of_a_sample_stand_apart() -> None:
    """A small set that is gone through 24 times an epoch: lengths alone would make a micro-batch of one sample."""
    sizes = np.random.default_rng(0).permutation(239).tolist()
    plain, grouped = (Plan([239], [24.0], 4, 16, alike=a) for a in (None, given_lengths(sizes, window=50)))
    twice = [
        np.mean([len({i.sample for i in m}) < 4 for s in epoch(p) for r in p.batch(s) for m in r])
        for p in (plain, grouped)
    ]
    assert twice[1] < twice[0] / 2


def test_equal_lengths_stay_shuffled() -> None:
    plan = Plan([600], [1.0], 4, 2, alike=given_lengths([7] * 600, window=20))
    plain = Plan([600], [1.0], 4, 2)
    assert [plan.batch(s) for s in epoch(plan)] == [plain.batch(s) for s in epoch(plain)]


def talk(*answers: str) -> Dataset:
    turns = [(Turn("user", "<image> what is it"), Turn("assistant", answer)) for answer in answers]
    return Dataset(ListSource([Sample(f"talk/{i}", (), turns=t) for i, t in enumerate(turns)]), TalkTask(), READY)


def test_samples_of_a_source_without_texts_are_equally_long() -> None:
    long, short = "a thing that is long", "a thing"
    found = lengths(talk(long, short))
    assert found.tolist() == [PICTURE + 2 * TURN + len("<image> what is it") + (len(long) + len(short)) // 2] * 2
    assert lengths(talk()).tolist() == []


def test_a_task_s_wording_counts_once_for_every_phrase() -> None:
    """``PhraseTask`` says "… find <p>left</p>" and "it is <SEG>" of each."""
    samples = [phrase_sample(str(k), (20, 30), ("left",) * (1 + k % 3)) for k in range(12)]
    source = ListSource(samples)
    source.texts = lambda i: ("<image>", *(p.text for p in samples[i].phrases))  # type: ignore[attr-defined]
    data = Dataset(source, PhraseTask(), READY)
    for sample, found in zip(samples, lengths(data), strict=True):
        each = (found - PICTURE - len("<image>")) / len(sample.phrases)
        assert each == pytest.approx(2 * TURN + len(" segment <p>left</p>it is <SEG>"), abs=4)


def test_lengths_foretell_the_tokens_of_shape_world(tmp_path: Path) -> None:
    """They are to sort, so what counts is that they rise with the tokens of a conversation."""
    write(tmp_path / "shapes/train", 24, seed=3, size=48)
    write_tasks(tmp_path / "shapes/train", 24)
    for picture in (tmp_path / "shapes/train/images").iterdir():
        picture.write_bytes(b"not to be opened")
    encoder = XSegProcessor.from_recipe(load_recipe(ModelRecipe, "scratch"), ["segmentor", "siglip", "llm"]).encoder
    assert encoder is not None
    for name in ("refer", "talk", "reason", "gcg", "interactive"):
        recipe = load_recipe(DataRecipe, f"shapes/{name}_train")
        data = load_dataset(recipe, root=tmp_path, preparation=Preparation(encoder, ViewSizes(48, 48)))
        tokens = [len(encoder.encode(data.format(i).turns).input_ids) for i in range(len(data))]
        assert np.corrcoef(lengths(data), tokens)[0, 1] > 0.75, name


def written(root: Path, name: str, file: str, data: Any) -> Path:
    text = "\n".join(map(json.dumps, data)) if name == "jsonl" else json.dumps(data)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text)
    return root


def conversation(*texts: str) -> dict[str, Any]:
    sides = ("human", "gpt")
    return {"id": 1, "conversations": [{"from": sides[k % 2], "value": t} for k, t in enumerate(texts)]}


def test_texts_of_conversations(tmp_path: Path) -> None:
    rows = [{**conversation("<image>\nWhat?", "A cat."), "image": "no.jpg"}, conversation("Hello", "Good day", "", "")]
    source = load_source("llava", written(tmp_path, "llava", "talk.json", rows), "train", {"json": "talk.json"})
    assert [source.texts(i) for i in range(2)] == [("<image>\nWhat?", "A cat."), ("Hello", "Good day", "", "")]
    found = lengths(Dataset(source, TalkTask(), READY))
    assert found.tolist() == [PICTURE + 2 * TURN + len("<image>\nWhat?A cat."), 4 * TURN + len("HelloGood day")]
    assert lengths(Dataset(source, TalkTask(), READY, limit=1)).tolist() == found[:1].tolist()


def test_texts_of_lines(tmp_path: Path) -> None:
    box = [[0, 0, 4, 0, 4, 4, 0, 4]]
    common = {"image": "no.jpg", "size": [9, 9]}
    things = [{"segmentation": box, "category": "dog"}] * 2
    said = {"text": "the dog", "objects": [0], "explanation": "It barks."}
    rows = [
        {**common, "objects": things},
        {**common, "objects": things, "phrases": [said, {"text": "a cat", "objects": []}]},
        {**common, "objects": things, "caption": "<p>two dogs</p>", "spans": [[0, 1]]},
        {"images": ["a.jpg", "b.jpg"], "turns": [{"role": "user", "text": "<image> which?"}]},
        {"turns": [{"role": "user", "text": "hello"}, {"role": "assistant", "text": "you"}]},
    ]
    source = load_source("jsonl", written(tmp_path, "jsonl", "a.jsonl", rows), "train", {"jsonl": "a.jsonl"})
    assert [source.texts(i) for i in range(len(rows))] == [
        ("<image>", "", ""),
        ("<image>", "the dogIt barks.", "a cat"),
        ("<image>", "<p>two dogs</p>"),
        ("<image>", "<image>", " which?"),
        ("hello", "you"),
    ]


def test_texts_of_questions_and_captions(tmp_path: Path) -> None:
    mark = {"text": ["Which?", "what"], "is_sentence": True, "shapes": []}
    written(tmp_path, "reason", "r/train/a.json", mark)
    written(tmp_path, "reason", "why.json", [{"image": "a.jpg", "outputs": "It is large."}])
    source = load_source("reason", tmp_path, "train", {"folder": "r", "explanations": "why.json"})
    assert source.texts(0) == ("<image>", "Which?It is large.", "whatIt is large.")
    caption = {"file_name": "no.jpg", "caption": "A dog and a cat", "groundings": {}}
    written(tmp_path, "gcg", "g.json", [caption])
    captions = load_source("gcg", tmp_path, "train", {"json": "g.json", "images": "none"})
    assert captions.texts(0) == ("<image>", "A dog and a cat")


def test_a_mixture_without_text_has_no_lengths() -> None:
    mixture = Mixture(datasets=[MixtureEntry(recipe="a")], by_length=50)
    samples = ListSource([phrase_sample("a", (20, 30), ("left",))])
    assert alike(mixture.model_copy(update={"by_length": 0}), [Dataset(samples, TalkTask(), READY)]) is None
    found = alike(mixture, [talk("a")])
    assert found is not None and (found.window, [len(part) for part in found.lengths]) == (50, [1])
    with pytest.raises(UserError, match="by_length: 50: a stage without a language model"):
        alike(mixture, [Dataset(samples, TalkTask(), Preparation(None, ViewSizes(32, 0)))])
