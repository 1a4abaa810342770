"""A data set ready for training or evaluation: source + task + encoder + views, as a pure function of an index."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xseg.config import DataRecipe, TaskSpec
from xseg.data import checksums
from xseg.data.sources import Source, load_source
from xseg.encode import Encoder, surviving
from xseg.errors import UserError
from xseg.geometry.masks import on_canvas
from xseg.geometry.views import ViewSizes, read_image
from xseg.tasks import load_task
from xseg.types import Encoded, EncodedQuery, EncodedText, Formatted, ImageViews, Masks, Query, Sample, ViewGeometry


@dataclass(frozen=True)
class Preparation:
    """How a stage or an evaluation prepares its samples."""

    encoder: Encoder | None
    """None = a stage without text."""
    views: ViewSizes
    train: bool = True
    seed: int = 0
    jitter: tuple[float, float] | None = None
    """Range of the large-scale jitter factor, or None."""


class Dataset:
    """Encoded samples by (index, epoch); the same pair and seed give the same arrays in any process."""

    def __init__(self, source: Source, task: Any, preparation: Preparation, limit: int | None = None) -> None:
        self.source, self.task, self.preparation = source, task, preparation
        self._length = len(source) if limit is None else min(limit, len(source))

    def __len__(self) -> int:
        return self._length

    def sample(self, index: int) -> Sample:
        """Return the annotated sample as the task sees it; no image is decoded."""
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        sample = self.source[index]
        with named(sample.key):
            return self.task.view(sample)  # type: ignore[no-any-return]

    def donors(self, index: int, epoch: int = 0) -> tuple[Sample, ...]:
        """Return the other samples that the task may take prompts from; empty for a task that wants none.

        Drawn by (seed, epoch, index), so that a batch does not depend on how it is split over ranks. An evaluation that
        seeks categories gets a sample of each, whatever ``limit`` is; one that no other sample has is passed over.
        """
        seeks = self.task.donors and not self.preparation.train
        if seeks and (sought := self.task.seeks(self.sample(index))):
            return self._lenders(index, sought)
        count = min(self.task.donors, self._length - 1)
        if count < 1:
            return ()
        rng = np.random.default_rng([self.preparation.seed, epoch, index, 3])
        others = rng.choice(self._length - 1, count, replace=False).tolist()
        return tuple(self.sample(k + (k >= index)) for k in others)

    def _lenders(self, index: int, sought: Sequence[int]) -> tuple[Sample, ...]:
        found: dict[int, None] = {}
        for category in sought:
            others = [k for k in self._having.get(category, ()) if k != index]
            if others and not any(k in others for k in found):
                rng = np.random.default_rng([self.preparation.seed, 0, index, 3, category])
                found[others[int(rng.integers(len(others)))]] = None
        return tuple(self.task.view(self.source[k]) for k in found)

    @cached_property
    def _having(self) -> dict[int, list[int]]:
        """Category -> the samples that have it, in the order of the data set."""
        out: dict[int, list[int]] = {}
        for k in range(len(self.source)):
            for category in self.task.seeks(self.source[k]):
                out.setdefault(category, []).append(k)
        return out

    def format(self, index: int, epoch: int = 0) -> Formatted:
        """Return the conversation and queries of a sample in this epoch's wording."""
        return self._format(self.sample(index), index, epoch, self.donors(index, epoch))

    def get(self, index: int, epoch: int = 0) -> Encoded:
        """Encode a sample; images of its donors that prompts are drawn on follow its own.

        Raises UserError that names the sample's key for anything wrong with its files or annotations.
        """
        sample, p = self.sample(index), self.preparation
        with named(sample.key):
            donors = self.donors(index, epoch)
            formatted = self._format(sample, index, epoch, donors)
            factor = None
            if p.jitter is not None:
                # Its own stream: the wording of a sample does not depend on whether its view is jittered.
                factor = float(np.random.default_rng([p.seed, epoch, index, 1]).uniform(*p.jitter))
            return encode_sample(sample, formatted, p, factor=factor, donors=donors)

    def _format(self, sample: Sample, index: int, epoch: int, donors: Sequence[Sample]) -> Formatted:
        rng = np.random.default_rng([self.preparation.seed, epoch, index])
        return self.task.format(sample, rng, donors, train=self.preparation.train)  # type: ignore[no-any-return]


def load_dataset(
    recipe: DataRecipe,
    *,
    root: str | Path,
    preparation: Preparation,
    task: TaskSpec | None = None,
    limit: int | None = None,
) -> Dataset:
    """Build the data set of a recipe; ``task`` replaces the recipe's own.

    Raises UserError when a checksum or the number of samples differs from what the recipe states.
    """
    checksums.check(recipe, root)
    source = load_source(recipe.source, root, recipe.split, recipe.options)
    if recipe.count is not None and recipe.count != len(source):
        raise UserError(
            f"{recipe.source}/{recipe.split}: {len(source)} samples, the recipe states count: {recipe.count}; use the "
            f"annotation files the recipe names, or correct count ({recipe.options})"
        )
    return Dataset(source, load_task(task or recipe.task), preparation, limit)


@contextmanager
def named(key: str) -> Iterator[None]:
    """Put the sample's key into every error that passes."""
    try:
        yield
    except UserError as error:
        if key in str(error):
            raise
        raise UserError(f"{key}: {error}") from error
    except Exception as error:
        error.add_note(f"while preparing sample {key}")
        raise


def encode_sample(
    sample: Sample,
    formatted: Formatted,
    preparation: Preparation,
    *,
    factor: float | None = None,
    donors: Sequence[Sample] = (),
) -> Encoded:
    """Decode the images, encode the text and put masks and prompts on the canvas.

    A conversation that ends with the user's turn is encoded for generation; its queries wait for their ``<SEG>``.
    Of the donors only those that a prompt is drawn on are decoded, and moved up behind the sample's own images.
    Targets without a pixel on the canvas (cut off by the jitter, or lost in a strong reduction) are left out: the
    view does not show them.
    """
    generation = bool(formatted.turns) and formatted.turns[-1].role == "user"
    text = _text(formatted, preparation, generation)
    if text is not None and not generation:
        formatted = surviving(formatted, text)
    own = len(sample.images)
    used = sorted({p.image for p in formatted.prompts if p.image >= own})
    pictures = [*sample.images, *(donors[k - own].images[0] for k in used)]
    place = {k: k for k in range(own)} | {k: own + n for n, k in enumerate(used)}
    images = tuple(preparation.views.views(read_image(p, sample.key), factor) for p in pictures)
    _check_sizes(sample, images)
    if text is not None and len(text.images) > own:
        raise UserError(f"the text holds {len(text.images)} image tokens for {own} images; it needs one each")
    geometries = [view.geometry for view in images]
    prompts = tuple(
        (on_canvas(Masks(geometries[at].original, (p.mask,)), (0,), geometries[at])[0], at)
        for p, at in ((p, place[p.image]) for p in formatted.prompts)
    )
    # an open picture has no name that outlives it, so it is held equal to no other
    names = tuple(str(p) if isinstance(p, Path) else f"{sample.key}#{n}" for n, p in enumerate(pictures))
    return Encoded(sample.key, text, images, _queries(sample, formatted.queries, geometries), prompts, names)


def _text(formatted: Formatted, preparation: Preparation, generation: bool) -> EncodedText | None:
    if not formatted.turns:
        return None
    if preparation.encoder is None:
        raise UserError("the task writes text, but this stage has no tokenizer; give the model recipe a tokenizer")
    return preparation.encoder.encode(formatted.turns, generation=generation)


def _check_sizes(sample: Sample, images: Sequence[ImageViews]) -> None:
    stated = sample.size if sample.masks is None else sample.masks.size
    if images and stated != (0, 0) and images[0].geometry.original != tuple(stated):
        raise UserError(
            f"image {sample.images[0]} is {list(images[0].geometry.original)} (height, width), its annotation says "
            f"{list(stated)}: masks only fit the image they were drawn on; fetch the original image or repair the size"
        )


def _queries(sample: Sample, queries: Sequence[Query], geometries: Sequence[ViewGeometry]) -> tuple[EncodedQuery, ...]:
    """Queries with their targets; every mask is placed on the canvas once, however many queries want it."""
    rows = sorted({row for query in queries for row in query.instances})
    ignore = None
    if rows:
        assert sample.masks is not None, "a query with targets needs Sample.masks"
        placed = on_canvas(sample.masks, rows, geometries[0])
        visible = placed.reshape(len(rows), -1).max(axis=1, initial=0) > 0
        place = {row: i for i, row in enumerate(rows)}
    else:
        side = geometries[0].canvas if geometries else 0
        placed, visible, place = np.zeros((0, side, side), np.uint8), np.zeros(0, bool), {}
    if sample.ignore is not None and geometries:
        ignore = on_canvas(Masks(geometries[0].original, (sample.ignore,)), (0,), geometries[0])[0]
    out = []
    for query in queries:
        picks = [place[row] for row in query.instances]
        seen = [i for i, pick in enumerate(picks) if visible[pick]]
        chosen = [picks[i] for i in seen]
        out.append(
            EncodedQuery(
                seg=query.seg,
                concepts=query.concepts,
                image=query.image,
                masks=placed if chosen == list(range(len(placed))) else placed[chosen],
                classes=np.array([query.classes[i] for i in seen], np.int64),
                negatives=query.negatives,
                ignore=ignore,
            )
        )
    return tuple(out)
