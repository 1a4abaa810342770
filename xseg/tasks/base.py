"""What every task has unless it says otherwise."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from xseg import postprocess
from xseg.errors import UserError
from xseg.geometry.masks import iou, row_rle, union
from xseg.metrics import oracle
from xseg.types import Sample, Segment, ViewGeometry


class Base:
    """Parent of all tasks."""

    name: ClassVar[str]
    scores_text: ClassVar[bool] = False
    """Whether a model without masks (stage 2) can be scored too."""
    recognises: ClassVar[bool] = False
    """Whether each sample has one query, of the sample's categories, whose names may be new to the model: a SigLIP
    then names objects too, where the model has one (``xseg names``)."""
    max_new_tokens: ClassVar[int] = 128
    """Longest answer of an evaluation that generates."""
    donors = 0
    """How many other samples of the data set ``format`` wants to look through for prompts; seeded by (seed, epoch,
    index). Only images that a prompt names are decoded."""

    def seeks(self, sample: Sample) -> tuple[int, ...]:
        """Categories of a sample that evaluation wants to be shown by other samples that have them; () = by any."""
        return ()

    @property
    def eval_mode(self) -> Literal["forced", "generate"]:
        """Whether evaluation gives the words of the answer ("forced") or the model finds them."""
        return "forced"

    @property
    def note(self) -> str:
        """What every protocol of this task's scores ends with; "" = nothing."""
        return ""

    @property
    def speaks_first(self) -> bool:
        """Whether training answers say before their mask what the mask may read: such a model must find its answers
        itself in evaluation, where ``answer`` of the task leaves that to the model."""
        return False

    def view(self, sample: Sample) -> Sample:
        """Return the sample as this task asks for it and scores it; ``format``, ``decode`` and the metrics see that."""
        return sample


def check_all_fit(sample: Sample, queries: Sequence[int], what: str, fix: str) -> None:
    """Raise UserError when phrases fell to the length limit of the text: a score must not leave them out."""
    if len(queries) != len(sample.phrases):
        raise UserError(
            f"{sample.key}: {len(queries)} of {len(sample.phrases)} {what} fit the text; raise max_tokens of the model "
            f"recipe, or {fix}"
        )


def gap(
    sample: Sample,
    targets: Sequence[oracle.Target],
    chosen: Sequence[Mapping[str, Any] | None],
    mask_logits: Any,
    g: ViewGeometry,
) -> tuple[oracle.Pair, ...]:
    """Compare the masks given out with the best of all N predictions ``mask_logits`` (N, h, w) of one query."""
    return oracle.pairs(sample, targets, chosen, postprocess.nearest(mask_logits, g, [t.mask for t in targets]))


def target(sample: Sample, instances: Sequence[int], group: str = "", phrase: str = "") -> oracle.Target:
    """The union of some instances of a sample as a target of the oracle gap."""
    assert sample.masks is not None
    rles = [row_rle(sample.masks, sample.instances[i].mask) for i in instances]
    return oracle.Target(rles[0] if len(rles) == 1 else union(rles), group, len(phrase.split()))


def gap_of_instances(
    sample: Sample, given: Sequence[Segment], mask_logits: Any, g: ViewGeometry
) -> tuple[oracle.Pair, ...]:
    """Compare, for every instance that is no crowd, the segment of its category nearest to it among ``given`` with the
    nearest of all N predictions."""
    assert sample.categories is not None
    targets, chosen = [], []
    for k, instance in enumerate(sample.instances):
        if instance.is_crowd:
            continue
        truth = target(sample, [k], sample.categories.names[instance.category])
        targets.append(truth)
        chosen.append(nearest_given(truth, [s for s in given if s.category == instance.category]))
    return gap(sample, targets, chosen, mask_logits, g)


def nearest_given(truth: oracle.Target, given: Sequence[Segment]) -> Mapping[str, Any] | None:
    """The mask of the segment that overlaps a target most; None without a segment."""
    return max((s.mask for s in given), key=lambda mask: iou(mask, truth.mask), default=None)
