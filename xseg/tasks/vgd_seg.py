"""Visual grounded segmentation: one drawn prompt per category -> all its instances, on the same image or on another
(X-SAM sections 3.1 and 4.2)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from xseg import postprocess
from xseg.errors import UserError
from xseg.geometry import prompts
from xseg.geometry.masks import encode
from xseg.metrics import Metric
from xseg.metrics.ap import AveragePrecision
from xseg.metrics.oracle import OracleGap
from xseg.tasks import base, phrasing
from xseg.tasks.generic_seg import SURE
from xseg.tasks.interactive_seg import fixed, prompt_of
from xseg.tokens import IMAGE, REGION
from xseg.types import (
    Categories,
    Formatted,
    Instance,
    Masks,
    ModelOutput,
    Prediction,
    Query,
    Sample,
    Segment,
    Turn,
    ViewGeometry,
    VisualPrompt,
)

Kind = Literal["point", "scribble", "box", "mask"]
KINDS: tuple[Kind, ...] = ("point", "scribble", "box", "mask")


@dataclass(frozen=True)
class Task(base.Base):
    """Options of visual grounded segmentation."""

    kinds: tuple[Kind, ...] = KINDS
    """Kinds of prompt, drawn for each category anew. Evaluation draws by the sample's key, so that the prompts are
    fixed; a published row has one kind."""
    asked: Literal["present", "all"] = "present"
    """Evaluation: "present" asks for the categories of the image alone (X-SAM's protocol, which knows from the
    annotation what is there), "all" for every category of the data set; absent ones get a prompt of a donor, an empty
    one where no donor has them."""
    prompts_from: Literal["same", "other", "both"] = "both"
    """Whose objects lend the prompts: the image's own, those of the ``donors`` (cross-image), or in training either
    (X-SAM: any of the micro-batch, which in evaluation is one image, so "both" is "same" there). A category that the
    wanted ones lack is taken from the others; evaluation by "other" looks for one image of the data set for each
    category asked for, so that its own is taken only where no other image has it."""
    donors: Annotated[int, Field(ge=0)] = 4
    """Other samples that are looked through, but for evaluation by "other"; only those that lend a prompt are
    decoded."""
    negatives: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Training: probability that absent categories which a donor has are asked for too."""
    max_negatives: Annotated[int, Field(ge=0)] = 5
    """Training: then their number is uniform in 0 .. max_negatives (the paper's 5)."""
    score_threshold: float = 0.0
    top_k: int = 200
    """Number of instance candidates per image."""

    name: ClassVar[str] = "vgd_seg"

    def format(
        self, sample: Sample, rng: np.random.Generator, donors: Sequence[Sample] = (), *, train: bool = True
    ) -> Formatted:
        """Ask for all instances of several categories, each shown by one prompt; crowd regions are no targets."""
        if not self.kinds:
            raise UserError(f"{sample.key}: task vgd_seg: kinds is empty; list at least one of {', '.join(KINDS)}")
        listed = self._drawn(sample, rng, donors) if train else self.listed(sample)
        shown = tuple(self._prompt(category, sample, donors, rng if train else None) for category in listed)
        question = phrasing.pick(phrasing.PROMPTS, rng, train)
        question = question.format(names=", ".join([phrasing.span(REGION)] * len(listed)))
        answer = phrasing.pick(phrasing.ANSWER, rng, train)
        place = {category: k for k, category in enumerate(listed)}
        targets = [i for i in sample.instances if not i.is_crowd]
        rows, classes = tuple(i.mask for i in targets), tuple(place[i.category] for i in targets)
        query = Query(0, tuple(range(len(listed))), rows, classes)
        return Formatted((Turn("user", f"{IMAGE}\n{question}"), Turn("assistant", answer)), (query,), shown)

    def listed(self, sample: Sample) -> list[int]:
        """The categories an evaluation asks for, in the data set's order; the first one where the image has none,
        which a text must have one of: its answer counts for nothing."""
        names = _categories(sample).names
        return list(range(len(names))) if self.asked == "all" else _present(sample) or [0]

    def seeks(self, sample: Sample) -> tuple[int, ...]:
        """The categories asked for, where other images shall lend the prompts of those that are present."""
        return tuple(_present(sample)) if self.prompts_from == "other" and self.asked == "present" else ()

    def _drawn(self, sample: Sample, rng: np.random.Generator, donors: Sequence[Sample]) -> list[int]:
        _categories(sample)
        present = _present(sample)
        absent = sorted({c for donor in donors for c in _present(donor)} - set(present))
        extra = int(rng.integers(self.max_negatives + 1)) if rng.random() < self.negatives else 0
        extra = max(extra, 0 if present else 1)
        chosen = [*present, *rng.permutation(np.array(absent, np.int64))[:extra].tolist()] or [0]
        return [int(c) for c in rng.permutation(chosen)]

    def _prompt(
        self, category: int, sample: Sample, donors: Sequence[Sample], rng: np.random.Generator | None
    ) -> VisualPrompt:
        """One prompt of a random object of the category; without a pixel where nobody has one. ``rng`` None = fixed."""
        own = [(sample, 0, k) for k in _objects(sample, category)]
        first = len(sample.images)
        lent = [(donor, first + n, k) for n, donor in enumerate(donors) for k in _objects(donor, category)]
        pool = {"same": own or lent, "other": lent or own, "both": own + lent if rng else own or lent}[
            self.prompts_from
        ]
        if not pool:
            return VisualPrompt(encode(np.zeros(sample.size, np.uint8)))
        rng = fixed(sample, category) if rng is None else rng
        whose, image, k = pool[int(rng.integers(len(pool)))]
        drawn: Mapping[str, Any] = whose.instances[k].prompts
        # an annotation may lack a kind for an object; training takes what there is
        kinds = [kind for kind in self.kinds if kind in drawn] or list(self.kinds)
        return VisualPrompt(prompt_of(whose, k, kinds[int(rng.integers(len(kinds)))], rng), image)

    def decode(
        self, output: ModelOutput, queries: Sequence[int], sample: Sample, g: ViewGeometry, text: str = ""
    ) -> Prediction:
        """Make the instance candidates, ``extra["instances"]``, of the sample's one query.

        Raises UserError when the query fell to the length limit of the text.
        """
        if not queries:
            raise UserError(f"{sample.key}: the prompts do not fit the text; raise max_tokens of the model recipe")
        if self.asked == "present" and not _present(sample):
            return Prediction(sample.key, extra={"instances": (), "oracle": ()})
        categories, listed = _categories(sample), self.listed(sample)
        masks, logits = output.mask_logits[-1, queries[0]], output.class_logits[-1, queries[0]]
        # in a mixed batch the concept columns are padded before the background column
        logits = logits[:, [*range(len(listed)), logits.shape[1] - 1]]
        found = postprocess.instances(masks, logits, g, top_k=self.top_k, score_threshold=self.score_threshold)
        named = tuple(Segment(s.mask, listed[s.category], s.score, categories.names[listed[s.category]]) for s in found)
        pairs = base.gap_of_instances(sample, [s for s in named if s.score >= SURE], masks, g)
        return Prediction(sample.key, extra={"instances": named, "oracle": pairs})

    def metrics(self) -> list[Metric]:
        """AP and AP50 under the protocol of the options, and the oracle gap."""
        origin = "of the same image"
        if self.prompts_from == "other":
            origin = "of another image, where there is one with the category"
            if self.asked == "all":
                origin = f"of another image, where one of {self.donors} that are looked through has the category"
        asked = {
            "present": "the categories present in the image",
            "all": "all categories of the data set, those that no image looked through has by an empty prompt",
        }[self.asked]
        kinds = " or ".join(self.kinds)
        note = f"asked: {asked}; one {kinds} prompt each, {origin}, fixed by the sample's key"
        return [AveragePrecision(note), OracleGap()]

    @staticmethod
    def example() -> Sample:
        """A 16 x 24 picture of two blocks and a bar, the bar with an annotated box, and a crowd region."""
        from PIL import Image

        id_map = np.zeros((16, 24), np.int32)
        id_map[1:7, 1:7], id_map[8:15, 2:8], id_map[4:8, 10:22], id_map[12:15, 18:23] = 1, 2, 3, 4
        masks = Masks((16, 24), id_map=id_map, ids=(1, 2, 3, 4))
        box = encode(prompts.from_box((16, 24), (10, 4, 22, 8)))
        instances = (
            Instance(0, 2, id=1),
            Instance(1, 2, id=2),
            Instance(2, 0, id=3, prompts={"box": box}),
            Instance(3, 0, True, id=4),
        )
        categories = Categories(("bar", "disc", "block"), (3, 4, 8), (True, True, True))
        image = Image.fromarray((id_map[..., None] * [60, 50, 20]).astype(np.uint8))
        return Sample("example/vgd", (image,), (16, 24), masks, instances, categories, image_id=1)


def _categories(sample: Sample) -> Categories:
    if sample.categories is None or not sample.categories.names:
        raise UserError(f"{sample.key}: task vgd_seg needs a source with categories; use one that has them")
    return sample.categories


def _present(sample: Sample) -> list[int]:
    return sorted({i.category for i in sample.instances if not i.is_crowd})


def _objects(sample: Sample, category: int) -> Iterator[int]:
    return (k for k, i in enumerate(sample.instances) if i.category == category and not i.is_crowd)
