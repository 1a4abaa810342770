"""Open-vocabulary segmentation: generic segmentation by any list of names (X-SAM sections 3.1 and 4.2), which may be
written in the grammar ``ins: person, bird; sem: water, sky``."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from xseg.errors import UserError, did_you_mean
from xseg.geometry.masks import Rle, row_rle, union
from xseg.metrics import Metric
from xseg.metrics.panoptic import PanopticQuality
from xseg.tasks import generic_seg
from xseg.types import Categories, Instance, Masks, Sample

KINDS = {"ins": True, "sem": False}
"""Part of the grammar -> whether its names are things: one segment per object, or one per name."""
PART = re.compile(r"\s*(?P<kind>[A-Za-z]+)\s*:(?P<names>[^:]*)")


@dataclass(frozen=True)
class Name:
    """A name to look for."""

    text: str
    """Lower case, single spaces."""
    is_thing: bool


@dataclass(frozen=True)
class Task(generic_seg.Task):
    """Options of generic segmentation, and:"""

    vocabulary: str = ""
    """The names that are asked for, in the grammar of ``read_vocabulary``; "" = those of the data set. Annotated things
    that bear none of the names are void, names that nothing bears are asked for all the same."""

    unseen: tuple[str, ...] = ()
    """Names among them that no training data give a mask: PQ, SQ and RQ of these alone are reported too."""

    name: ClassVar[str] = "open_vocab_seg"
    recognises: ClassVar[bool] = True

    def view(self, sample: Sample) -> Sample:
        """Return the sample with the vocabulary as its categories. Raises UserError when one of ``unseen`` is none."""
        if self.vocabulary:
            sample = with_vocabulary(sample, read_vocabulary(self.vocabulary))
        names = sample.categories.names if sample.categories else ()
        for name in self.unseen:
            if name not in names:
                raise UserError(
                    f"{sample.key}: unseen: {name!r} is no name that is asked for{did_you_mean(name, names)}"
                )
        return sample

    def metrics(self) -> list[Metric]:
        """Those of generic segmentation, and PQ of the unseen names."""
        return [PanopticQuality(self.unseen) if isinstance(m, PanopticQuality) else m for m in super().metrics()]


def read_vocabulary(text: str) -> tuple[Name, ...]:
    """Read ``ins: person, bird; sem: water, sky``: parts of a kind and names, "ins" = one segment per object, "sem" =
    one per name. Raises UserError for unknown kinds, empty parts, and names that stand twice."""
    out: list[Name] = []
    for part in text.split(";"):
        found = PART.fullmatch(part)
        if found is None:
            raise UserError(f"vocabulary: {part.strip()!r} is not 'kind: names'; write 'ins: person, bird; sem: water'")
        kind = found["kind"].lower()
        if kind not in KINDS:
            raise UserError(f"vocabulary: kind {kind!r} of {part.strip()!r}{did_you_mean(kind, KINDS)}")
        names = [" ".join(name.lower().split()) for name in found["names"].split(",")]
        if not all(names):
            raise UserError(f"vocabulary: an empty name in {part.strip()!r}; put one name between two commas")
        out += [Name(name, KINDS[kind]) for name in names]
    twice = [n.text for i, n in enumerate(out) if n.text in {o.text for o in out[:i]}]
    if twice:
        raise UserError(f"vocabulary: {twice[0]!r} stands twice; every name is of one kind, take one out")
    return tuple(out)


def with_vocabulary(sample: Sample, names: Sequence[Name]) -> Sample:
    """Return the sample with ``names`` as its categories; instances of a name that is no thing are one segment."""
    if sample.categories is None:
        raise UserError(f"{sample.key}: task open_vocab_seg needs a source with categories; use one that has them")
    place = {name.text: k for k, name in enumerate(names)}
    known = dict(zip(sample.categories.names, sample.categories.ids, strict=True))
    groups: dict[tuple[int, ...], list[Instance]] = {}
    for row, instance in enumerate(sample.instances):
        # an object of no category answers to no name
        category = place.get(sample.categories.names[instance.category]) if instance.category >= 0 else None
        if category is not None:
            alone = names[category].is_thing or instance.is_crowd
            groups.setdefault((category, row) if alone else (category,), []).append(instance)
    rles: list[Rle] = []
    instances: list[Instance] = []
    for (category, *_), members in groups.items():
        assert sample.masks is not None
        parts = [row_rle(sample.masks, m.mask) for m in members]
        instances.append(dataclasses.replace(members[0], mask=len(rles), category=category))
        rles.append(parts[0] if len(parts) == 1 else union(parts))
    categories = Categories(
        tuple(n.text for n in names),
        tuple(known.get(n.text, -1 - k) for k, n in enumerate(names)),
        tuple(n.is_thing for n in names),
    )
    masks = None if sample.masks is None else Masks(sample.masks.size, tuple(rles))
    return dataclasses.replace(sample, categories=categories, masks=masks, instances=tuple(instances))
