"""Suites -> results.json and samples.jsonl: every number with its protocol, n, interval and a blind baseline."""

import dataclasses
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import torch

import xseg
from xseg.config import DataRecipe, Suite, SuiteRow, TaskSpec, load_recipe
from xseg.data import checksums
from xseg.data.collate import collate
from xseg.data.dataset import Dataset, Preparation, load_dataset
from xseg.errors import UserError
from xseg.geometry import masks as rle
from xseg.infer import naming
from xseg.infer.baselines import blind_guess, samples
from xseg.infer.predictor import LEAST_SCORE, Predictor, device
from xseg.infer.ranks import ALONE, Ranks
from xseg.infer.summary import summary
from xseg.metrics import Metric
from xseg.paths import make_folder
from xseg.tasks import load_task
from xseg.types import Batch, Encoded, ModelOutput, Prediction, Sample, Score, ViewGeometry

VERSIONS = ("torch", "transformers", "numpy", "hotcoco")

Progress = Callable[[str, int, int, float], None]
"""Told (data set, samples done, samples in all, seconds) after every batch."""
Note = Callable[[str], None]
"""Told what a person should know, such as a row that was skipped."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a suite is run."""

    data_root: str | Path
    out: Path
    """Folder of results.json and samples.jsonl."""
    batch_size: int = 8
    model: str = ""
    """Where the model lies, for the record."""
    progress: Progress = lambda *_: None
    note: Note = lambda _: None
    blind: bool = True
    """Whether the blind baselines are scored too."""
    ranks: Ranks = ALONE
    """The processes that share the work; the results do not depend on them."""


@dataclasses.dataclass
class _Part:
    """What one process makes of its stretch of a row."""

    metrics: list[Metric]
    lines: list[str]
    """Its lines of samples.jsonl, but rank 0's, which writes them at once."""
    seconds: float = 0.0
    samples: int = 0


def evaluate(predictor: Predictor, suite: Suite, run: Evaluation) -> dict[str, Any]:
    """Score a model on every row of a suite and return what is written to ``out/results.json``.

    ``samples.jsonl`` gets one line per sample: key, place, scores, generated text, predicted masks as RLE. Both files
    appear complete or not at all. Of several processes each scores a stretch of every row's batches; rank 0 merges and
    writes, and all return the same. A model without a language part (stage 1) is scored by its own label list on rows
    whose task has one; rows that need what the model lacks are skipped and named. UserError when no row is left.
    """
    partial, fits = run.out / "samples.jsonl.partial", False
    rows: list[dict[str, Any]] = []
    speed: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    # what is wrong with the SigLIP of names is said before any work; suites that never ask it do not wait for it
    named = run.ranks.agreed(lambda: naming.asked_by(suite) and predictor.names is not None)
    with _samples_file(run, partial) as lines:
        for number, row in enumerate(suite.rows):
            dataset = run.ranks.agreed(lambda row=row: open_row(predictor, row, run.data_root))  # type: ignore[misc]
            if dataset is None:
                run.note(f"{row.recipe}: skipped, its task needs text (stage 1 has none) or masks (stage 2)")
                continue
            fits = True
            asked.append(settings(number, row, dataset, run.data_root) if run.ranks.first else {})
            place = {"dataset": row.recipe, "row": number, "task": dataset.task.name}
            part = run.ranks.agreed(
                lambda place=place, dataset=dataset: _score_stretch(predictor, place, dataset, run, lines)  # type: ignore[misc]
            )
            parts = run.ranks.gathered(part)
            if parts is not None:
                rows += _merged(predictor, row, number, dataset, parts, run, lines)
                count, seconds = sum(p.samples for p in parts), max(p.seconds for p in parts)
                speed.append({"dataset": row.recipe, "samples": count, "seconds": round(seconds, 3)})
        if not fits:
            raise UserError(f"suite {suite.name}: no row fits what this model can do; evaluate a later stage")
    if not run.ranks.first:
        return run.ranks.tell({})
    head = {"suite": suite.name, "commit": _commit(), "versions": _versions(), "data_root": str(run.data_root)}
    chosen = predictor.processor.calibration
    head |= {"trained": run.model, "calibration": None if chosen is None else dataclasses.asdict(chosen)}
    head |= naming.record(predictor.processor) if named else {}
    results = {**head, "asked": asked, "rows": rows, "summary": summary(suite, rows, run.note), "speed": speed}
    os.replace(partial, run.out / "samples.jsonl")
    write_json(run.out / "results.json", results)
    return run.ranks.tell(results)


def open_row(predictor: Predictor, row: SuiteRow, data_root: str | Path) -> Dataset | None:
    """The data set of a row, as a model is scored on it; None where its task needs what the model lacks.

    Only the configuration of the model is looked at. Raises UserError for missing files, for files without a sample,
    and for a label list that is not the one of a stage-1 model.
    """
    recipe = load_recipe(DataRecipe, row.recipe)
    spec = task_for(predictor, row.task or recipe.task)
    if spec is None:
        return None
    preparation = Preparation(predictor.processor.encoder, predictor.processor.sizes, train=False)
    dataset = load_dataset(recipe, root=data_root, preparation=preparation, task=spec, limit=row.limit)
    if not len(dataset):
        raise UserError(
            f"{row.recipe}: its files hold no sample, so there is nothing to score; check the recipe's options"
        )
    _check_labels(predictor, dataset, row.recipe)
    return dataset


def settings(number: int, row: SuiteRow, dataset: Dataset, data_root: str | Path) -> dict[str, Any]:
    """All that decides a row's figures beside the model: every option of task and source, and the annotation files."""
    recipe, options = load_recipe(DataRecipe, row.recipe), dataclasses.asdict(dataset.task)
    return {
        "row": number,
        "dataset": row.recipe,
        "task": {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()},
        "source": {"format": recipe.source, "split": recipe.split, **recipe.options},
        "limit": row.limit,
        "sha256": {**recipe.sha256, **checksums.unstated(recipe, data_root)},
    }


def task_for(predictor: Predictor, spec: TaskSpec) -> TaskSpec | None:
    """The task a model can be scored on: as asked, by the fixed label list for a stage-1 model, or None.

    Options that a task leaves to the model (None) get the model's own value.
    """
    task = load_task(spec)
    if not task.scores_text and predictor.model.config.segmentor_config is None:
        return None
    fields = {f.name for f in dataclasses.fields(task)}
    if predictor.processor.encoder is not None:
        own = predictor.processor.own_options(task.name)
        left = {name: own[name] for name in own.keys() & fields if getattr(task, name) is None}
        return TaskSpec(**{"name": spec.name, **spec.options, **left})
    return TaskSpec(**{"name": spec.name, **spec.options, "labels": "fixed"}) if "labels" in fields else None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file under a temporary name and move it into place."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf8")
    os.replace(partial, path)


@torch.inference_mode()
def predict(predictor: Predictor, dataset: Dataset, indices: Sequence[int]) -> list[tuple[Sample, Prediction]]:
    """One batched forward (or generation, where the task says so), decoded by the task."""
    found = [dataset.sample(i) for i in indices]
    encoded = [dataset.get(i) for i in indices]
    batch = collate(encoded).to(device(predictor.model))
    if dataset.task.eval_mode == "generate":
        texts, queries, output = _generate(predictor, batch, dataset.task.max_new_tokens)
    else:
        shared = share_images(batch, [name for sample in encoded for name in sample.names])
        texts, queries, output = [""] * len(encoded), _slices(encoded), predictor.model(shared)
        if dataset.task.recognises:
            output = predictor.recognised(shared, output, [s.categories.names if s.categories else () for s in found])
    places = zip(queries, _geometries(encoded), texts, strict=True)
    return [
        (sample, dataset.task.decode(output, rows, sample, g, text))
        for sample, (rows, g, text) in zip(found, places, strict=True)
    ]


def share_images(batch: Batch, names: Sequence[str]) -> Batch:
    """Keep each picture of a batch once, so that the encoders see it once; ``names`` tells equal ones, (I,).

    The sentences about one image are samples of their own and stand side by side in a data set.
    """
    first = {name: k for k, name in reversed(list(enumerate(names)))}
    kept = sorted(first.values())
    if len(kept) == len(batch.geometry):
        return batch
    place = {k: new for new, k in enumerate(kept)}
    move = torch.tensor([place[first[name]] for name in names], device=batch.query_image.device)
    query_image = move[batch.query_image]
    count: Counter[int] = Counter()
    slots = []
    for image in query_image.tolist():
        slots.append(count[image])
        count[image] += 1
    image_slot = torch.cat([batch.image_slot[:, :2], move[batch.image_slot[:, 2:]]], 1)
    return dataclasses.replace(
        batch,
        llm_pixels=batch.llm_pixels[kept],
        mask_pixels=batch.mask_pixels[kept],
        image_slot=image_slot,
        query_image=query_image,
        query_slot=torch.tensor(slots, dtype=torch.int64, device=move.device),
        prompt_image=move[batch.prompt_image],
        geometry=tuple(batch.geometry[k] for k in kept),
        max_queries=max(count.values(), default=0),
    )


def _generate(
    predictor: Predictor, batch: Batch, max_new_tokens: int
) -> tuple[list[str], list[list[int]], ModelOutput | None]:
    made = predictor.generate(batch, max_new_tokens)
    return [predictor.processor.decode(ids) for ids in made.sequences], made.queries, made.output


def _slices(encoded: Sequence[Encoded]) -> list[list[int]]:
    """Rows of the query axis that belong to each sample."""
    starts = [0]
    for sample in encoded:
        starts.append(starts[-1] + len(sample.queries))
    return [list(range(a, b)) for a, b in pairwise(starts)]


def _geometries(encoded: Sequence[Encoded]) -> list[ViewGeometry]:
    return [s.images[0].geometry if s.images else ViewGeometry((0, 0), (0, 0), 0) for s in encoded]


@contextmanager
def _samples_file(run: Evaluation, partial: Path) -> Iterator[TextIO]:
    """The file of the samples under its temporary name, gone after an error; what other ranks write goes nowhere."""
    if not run.ranks.first:
        with open(os.devnull, "w", encoding="utf8") as nothing:
            yield nothing
        return
    make_folder(run.out)
    try:
        with partial.open("w", encoding="utf8") as lines:
            yield lines
    except BaseException:
        partial.unlink()
        if not any(run.out.iterdir()):
            run.out.rmdir()
        raise


def _score_stretch(
    predictor: Predictor, place: dict[str, Any], dataset: Dataset, run: Evaluation, lines: TextIO
) -> _Part:
    """Score this process's batches of a row, which are those of a process that is alone.

    The lines of rank 0 are the first ones: they go to ``lines`` at once, those of the others to rank 0.
    """
    part, size = _Part(dataset.task.metrics(), []), run.batch_size
    batches = run.ranks.stretch(-(-len(dataset) // size))
    total = min(batches.stop * size, len(dataset)) - batches.start * size
    for batch in batches:
        began = time.perf_counter()
        indices = range(batch * size, min((batch + 1) * size, len(dataset)))
        pairs = predict(predictor, dataset, indices)
        part.seconds += time.perf_counter() - began
        for index, (sample, prediction) in zip(indices, pairs, strict=True):
            scores: dict[str, float] = {}
            for metric in part.metrics:
                scores |= metric.update(prediction, sample)
            line = json.dumps({"key": sample.key, **place, "index": index, **record(prediction, scores)}) + "\n"
            if run.ranks.first:
                lines.write(line)
            else:
                part.lines.append(line)
        part.samples += len(pairs)
        run.progress(place["dataset"], part.samples, total, part.seconds)
    return part


def _merged(
    predictor: Predictor,
    row: SuiteRow,
    number: int,
    dataset: Dataset,
    parts: Sequence[_Part],
    run: Evaluation,
    lines: TextIO,
) -> list[dict[str, Any]]:
    """Rows of the table, with the blind baseline, from what all processes found; their lines go to ``lines``.

    ``number`` is the place of ``row`` in the suite: one data set may stand in it with several options of its task.
    """
    metrics = parts[0].metrics
    for part in parts[1:]:
        lines.writelines(part.lines)
        for mine, other in zip(metrics, part.metrics, strict=True):
            mine += other
    for note in (note for metric in metrics for note in getattr(metric, "notes", list)()):
        run.note(f"{row.recipe}: {note}")
    split = load_recipe(DataRecipe, row.recipe).split
    head = {"task": dataset.task.name, "dataset": row.recipe, "split": split, "row": number}
    labels = " (fixed label list of the stage-1 head)" if predictor.processor.encoder is None else ""
    note = labels + dataset.task.note + _chosen_on(predictor, row, dataset)
    note += naming.note(predictor.processor) if dataset.task.recognises else ""
    table = [_table_row(head, score, score.protocol + note, row) for m in metrics for score in m.compute()]
    return table + (_blind_rows(dataset, head, row) if run.blind else [])


def _chosen_on(predictor: Predictor, row: SuiteRow, dataset: Dataset) -> str:
    """On what the threshold of a row was chosen, where it is the calibrated one."""
    chosen = predictor.processor.calibration
    if chosen is None or getattr(dataset.task, "reject", None) != chosen.reject:
        return ""
    same = ", which is this data set" if chosen.recipe == row.recipe else ""
    return f"; threshold chosen on {chosen.phrases} phrases of {chosen.recipe} ({chosen.split}){same}"


def record(prediction: Prediction, scores: dict[str, float]) -> dict[str, Any]:
    """What a line of samples.jsonl says of a prediction; ``scores`` are the sample's own.

    Where only instances are predicted, the likely ones stand for the prediction; the hundreds of others only score.
    """
    shown = prediction.segments
    if prediction.panoptic is None and not shown:
        shown = tuple(s for s in prediction.extra.get("instances", ()) if s.score >= LEAST_SCORE)
    segments = [
        {"label": s.label, "category": s.category, "score": round(float(s.score), 4), "mask": rle.to_json(s.mask)}
        for s in shown
    ]
    rounded = {name: round(value, 3) for name, value in scores.items()}
    return {"scores": rounded, "text": prediction.text, "segments": segments}


def _blind_rows(dataset: Dataset, head: dict[str, Any], row: SuiteRow) -> list[dict[str, Any]]:
    baseline = blind_guess(dataset)
    if baseline is None:
        return []
    protocol, guess = baseline
    metrics = dataset.task.metrics()
    for sample in samples(dataset):
        prediction = guess(sample)
        for metric in metrics:
            metric.update(prediction, sample)
    unpublished = row.model_copy(update={"published": {}})
    return [_table_row(head, score, protocol, unpublished) for m in metrics for score in m.compute()]


def _table_row(head: dict[str, Any], score: Score, protocol: str, row: SuiteRow) -> dict[str, Any]:
    ci = None if score.ci95 is None else [round(v, 3) for v in score.ci95]
    out = {**head, "metric": score.metric, "value": round(score.value, 3), "n": score.n, "ci95": ci}
    out["protocol"] = protocol
    if score.metric in row.published and row.limit is None:
        out |= {"published": row.published[score.metric], "published_source": row.published_source}
    return out


def _check_labels(predictor: Predictor, dataset: Dataset, name: str) -> None:
    """A linear head only knows the label list it was trained on."""
    if predictor.processor.encoder is not None or not len(dataset):
        return
    categories = dataset.sample(0).categories
    known, asked = predictor.model.config.segmentor_config.num_labels, len(categories.names) if categories else 0
    if known != asked:
        raise UserError(
            f"{name}: {asked} categories, but this stage-1 model has a linear head over {known}: evaluate it on the "
            f"label list it was trained on"
        )


def _commit() -> str | None:
    """The commit of the checkout xseg runs from, "+dirty" when files differ from it, or None outside one."""
    here = Path(xseg.__file__).parent
    if not (here.parent / ".git").exists():
        return None
    ask = ("rev-parse", "HEAD"), ("status", "--porcelain")
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10).stdout.strip()
            for words in ask
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{commit}+dirty" if commit and changes else commit or None


def _versions() -> dict[str, str]:
    return {"xseg": xseg.__version__, **{name: metadata.version(name) for name in VERSIONS}}
