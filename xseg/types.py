"""The currencies of xseg: what each arrow of the data walk carries.

Source -> Sample -> Task.format -> Formatted -> encode -> Encoded -> collate -> Batch -> model -> ModelOutput
-> criterion -> Losses, or -> postprocess -> Prediction -> metric -> Score.

Legend for shapes: B samples, T text tokens (before images are spliced in), I images, Q queries (one per ``<SEG>``),
N object queries of the decoder, C concepts, K concepts competing for one query, M target masks, P visual prompts,
L decoder predictions (initial queries, then every layer; last layer last), S side of the mask canvas in pixels,
(h, w) the mask grid of the decoder, (H, W) original image pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Size = tuple[int, int]
"""(height, width) in pixels."""
Role = Literal["user", "assistant"]


@dataclass(frozen=True)
class Masks:
    """A set of n binary masks of one image, kept compressed: an id map with one id per mask, or one RLE per mask."""

    size: Size
    """Original image size (H, W)."""
    rles: tuple[Mapping[str, Any], ...] = ()
    """COCO RLEs ``{"size": [H, W], "counts": bytes}``; used when ``id_map`` is None."""
    id_map: np.ndarray | None = None
    """(H, W) int32 segment ids (panoptic PNG), or None."""
    ids: tuple[int, ...] = ()
    """The id in ``id_map`` of each mask."""

    def __len__(self) -> int:
        return len(self.rles) if self.id_map is None else len(self.ids)


@dataclass(frozen=True)
class Categories:
    """The closed label list of a data set, in contiguous order."""

    names: tuple[str, ...]
    """Cleaned lower-case names as the language model reads them."""
    ids: tuple[int, ...]
    """The data set's own category ids, same order."""
    is_thing: tuple[bool, ...]
    """True for countable things, False for stuff."""


@dataclass(frozen=True)
class Instance:
    """One annotated segment or object; its mask is row ``mask`` of ``Sample.masks``."""

    mask: int
    """Row in ``Sample.masks``."""
    category: int
    """Contiguous index into ``Sample.categories``; -1 when the data set has no categories."""
    is_crowd: bool = False
    id: int = 0
    """Annotation id of the data set."""
    prompts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    """Annotated visual prompts that point at it: kind ("point", "scribble", "box", "mask", …) -> RLE in original
    pixels. Empty: tasks that need a prompt draw one from the mask."""
    explanation: str = ""
    """Words that a training answer to a prompt may give with its mask, as a phrase's explanation; "" = none."""


@dataclass(frozen=True)
class Phrase:
    """A text that names zero or more instances of the sample (a referring expression, a grounded span)."""

    text: str
    instances: tuple[int, ...] = ()
    """Indices into ``Sample.instances``; empty = the thing is not in the image."""
    id: str = ""
    """Sentence or reference id of the data set, for per-sentence and per-reference protocols."""
    kind: str = ""
    """Free label for break-downs of the score, such as "relation" or "no-target"."""
    explanation: str = ""
    """Words that a training answer may give with its mask, such as why these instances are meant or where they are, on
    the sides that the task was told (``tasks/spoken.py``); "" = none."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. Text may hold ``<image>``, ``<region>``, ``<p>…</p>`` and ``<SEG>``."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """One record of a data set in original pixels, whatever its annotation format was."""

    key: str
    """Unique and readable, for example ``refcoco/val/000123``; appears in every error, log and result."""
    images: "tuple[Path | Image, ...]"
    """Image files (or open images) the sample speaks about; empty for pure text."""
    size: Size = (0, 0)
    """(H, W) of the first image, as the annotation states it; (0, 0) when there is no annotation with a size."""
    masks: Masks | None = None
    instances: tuple[Instance, ...] = ()
    categories: Categories | None = None
    phrases: tuple[Phrase, ...] = ()
    turns: tuple[Turn, ...] = ()
    """Conversation data sets: the turns as annotated. Grounded captions: the caption is the last turn of the assistant,
    its k-th ``<p>…</p>`` is phrase k."""
    image_id: int | str = 0
    """The data set's own image id."""
    kind: str = ""
    """Free label for break-downs of the score, such as the question type."""
    ignore: Mapping[str, Any] | None = None
    """RLE of pixels that neither train nor score (ReasonSeg's 255)."""


@dataclass(frozen=True)
class VisualPrompt:
    """A drawn prompt that stands in the text as ``<region>``."""

    mask: Mapping[str, Any] = field(hash=False)
    """RLE in original pixels of image ``image``; without a pixel = an absent prompt, a zero row."""
    image: int = 0
    """The sample's own images first, then the first image of each donor."""


@dataclass(frozen=True)
class Query:
    """One mask question: which image, which concepts compete, and (in training) which masks are right."""

    seg: int | None = 0
    """Ordinal of the ``<SEG>`` token in the conversation that conditions it; None = no text (stage 1)."""
    concepts: tuple[int, ...] = ()
    """Ordinals of the ``<p>…</p>`` spans that compete; class index = place in this tuple."""
    instances: tuple[int, ...] = ()
    """Rows of ``Sample.masks`` that are targets."""
    classes: tuple[int, ...] = ()
    """Class index of each target: into ``concepts``, or into the fixed label list when ``concepts`` is empty."""
    image: int = 0
    negatives: Literal["own", "batch"] = "own"
    """"batch": the concepts of the other queries of the micro-batch with "batch" compete too (the paper's hidden
    rule for referring); collate resolves it by listing more concepts."""


@dataclass(frozen=True)
class Formatted:
    """What a task makes of a sample: the conversation and the questions behind its ``<SEG>`` tokens."""

    turns: tuple[Turn, ...] = ()
    """Empty = a sample without text (stage 1)."""
    queries: tuple[Query, ...] = ()
    prompts: tuple[VisualPrompt, ...] = ()
    """In the order of the ``<region>`` tokens."""


@dataclass(frozen=True)
class EncodedText:
    """A conversation as ids. Positions index these ids: images and regions are still single sentinels."""

    input_ids: np.ndarray
    """(T,) int64; ``<image>`` = -200, ``<region>`` = -300 are sentinels outside the vocabulary."""
    labels: np.ndarray
    """(T,) int64; the id where it is supervised (assistant text and its suffix), else -100. Not shifted."""
    spans: np.ndarray
    """(n, 2) int64 half-open token spans ``<p>`` … ``</p>``, both markers inside, in order of appearance."""
    segs: np.ndarray
    """(m,) int64 positions of ``<SEG>``."""
    images: np.ndarray
    """(i,) int64 positions of ``<image>``."""
    regions: np.ndarray
    """(r,) int64 positions of ``<region>``."""


@dataclass(frozen=True)
class ViewGeometry:
    """How the views of an image were made; enough to go from the image to its mask view and back.

    original (H, W) -> resized to ``scaled`` -> window of ``canvas`` pixels cut at ``offset`` (zero padded).
    """

    original: Size
    scaled: Size
    """(height, width) after the resize, before padding or cropping."""
    canvas: int
    """Side S of the square canvas the encoder sees."""
    offset: Size = (0, 0)
    """(top, left) of the canvas in the scaled image; not (0, 0) only for the cropped views of augmentation."""
    squashed: bool = True
    """Whether the language model's picture is the image made square; False: it stands in the middle of a square."""


@dataclass(frozen=True)
class ImageViews:
    """The two pictures of one image."""

    llm: np.ndarray
    """(3, s, s) float32, mean = std = 0.5: what SigLIP reads. (3, 0, 0) when the stage has no SigLIP."""
    mask: np.ndarray
    """(3, S, S) float32, ImageNet statistics, zero padded bottom and right: what SAM reads."""
    geometry: ViewGeometry


@dataclass(frozen=True)
class EncodedQuery:
    """A query with its targets on the mask canvas."""

    seg: int | None
    """Ordinal of the ``<SEG>`` (row of ``EncodedText.segs``), or None."""
    concepts: tuple[int, ...]
    image: int
    masks: np.ndarray
    """(m, S, S) uint8 targets on the canvas."""
    classes: np.ndarray
    """(m,) int64."""
    negatives: Literal["own", "batch"] = "own"
    ignore: np.ndarray | None = None
    """(S, S) uint8, 1 = no loss, or None."""


@dataclass(frozen=True)
class Encoded:
    """A sample ready for collate."""

    key: str
    text: EncodedText | None
    """None = no text (stage 1)."""
    images: tuple[ImageViews, ...]
    queries: tuple[EncodedQuery, ...]
    prompts: tuple[tuple[np.ndarray, int], ...] = ()
    """((S, S) uint8 prompt mask, image index) in the order of ``EncodedText.regions``."""
    names: tuple[str, ...] = ()
    """Which picture each of ``images`` is: equal names, equal pictures. Empty where nobody compares them."""


@dataclass(frozen=True)
class Batch:
    """Everything the model and the criterion read, flat: index fields instead of nested lists, complete by
    construction. Empty fields have length 0, never None (but ``ignore``). Positions index ``input_ids``."""

    keys: tuple[str, ...]
    """B sample keys."""
    input_ids: "torch.Tensor"
    """(B, T) int64, right padded with 0; sentinels -200 / -300. T = 0 when the batch has no text."""
    attention_mask: "torch.Tensor"
    """(B, T) bool, False on padding."""
    labels: "torch.Tensor"
    """(B, T) int64, -100 = no loss."""
    llm_pixels: "torch.Tensor"
    """(I, 3, s, s) float32."""
    mask_pixels: "torch.Tensor"
    """(I, 3, S, S) float32."""
    image_slot: "torch.Tensor"
    """(slots, 3) int64: sample, position of the ``<image>`` sentinel, image index; row-major by (sample, position)."""
    query_image: "torch.Tensor"
    """(Q,) int64 image of each query."""
    query_slot: "torch.Tensor"
    """(Q,) int64 running number of the query among those of its image."""
    seg_position: "torch.Tensor"
    """(Q, 2) int64: sample, position of its ``<SEG>``; (-1, -1) = none."""
    concept_span: "torch.Tensor"
    """(C, 3) int64: sample, start, end (half-open, markers inside)."""
    query_concepts: "torch.Tensor"
    """(Q, K) int64 rows of ``concept_span``, -1 = padding. K = 0: the fixed label list of a linear head."""
    target_masks: "torch.Tensor"
    """(M, S, S) uint8."""
    target_query: "torch.Tensor"
    """(M,) int64, ascending."""
    target_class: "torch.Tensor"
    """(M,) int64 column of the query's class logits."""
    prompt_mask: "torch.Tensor"
    """(P, S, S) uint8."""
    prompt_image: "torch.Tensor"
    """(P,) int64 image the prompt is drawn on."""
    region_position: "torch.Tensor"
    """(P, 2) int64: sample, position of its ``<region>`` sentinel."""
    ignore: "torch.Tensor | None"
    """(Q, S, S) uint8, 1 = no loss; None when no query ignores anything."""
    geometry: tuple[ViewGeometry, ...]
    """I view geometries, for postprocessing and for prompts that are read from SigLIP's rows."""
    max_queries: int
    """Largest number of queries on one image (0 without queries); a Python number so that shapes need no sync."""

    def to(self, device: "torch.device | str", dtype: "torch.dtype | None" = None) -> "Batch":
        """Copy to a device; ``dtype`` casts the float pixel fields only."""
        import dataclasses

        import torch

        def move(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            cast = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=cast, non_blocking=True)

        return dataclasses.replace(self, **{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class ModelOutput:
    """What the model says about a batch."""

    mask_logits: "torch.Tensor"
    """(L, Q, N, h, w)."""
    class_logits: "torch.Tensor"
    """(L, Q, N, K + 1); last column = background; padded concept columns hold a large negative number."""
    lm_logits: "torch.Tensor"
    """(supervised tokens, vocabulary): logits at the positions that predict a supervised label only."""
    lm_labels: "torch.Tensor"
    """(supervised tokens,) int64."""
    pixel_logits: "torch.Tensor | None" = None
    """(I, labels + 1, h, w) of the optional dense class loss, else None."""
    touch: "torch.Tensor | None" = None
    """Scalar zero that carries a gradient path through every trainable branch the batch did not use."""


@dataclass(frozen=True)
class Losses:
    """Loss terms of one micro-batch."""

    total: "torch.Tensor"
    terms: Mapping[str, "torch.Tensor"]
    """Detached, weighted: ``lm``, ``class``, ``mask``, ``dice`` of the last layer, ``class_0`` … of earlier ones."""


@dataclass(frozen=True)
class Segment:
    """One predicted mask in original pixels."""

    mask: Mapping[str, Any]
    """RLE, original pixels."""
    category: int = -1
    """Class index of the query (place in its concept list or label list)."""
    score: float = 1.0
    label: str = ""


@dataclass(frozen=True)
class Prediction:
    """What a task made of the model's output for one sample."""

    key: str
    segments: tuple[Segment, ...] = ()
    """All predicted masks; for per-query tasks one entry per query, with an empty mask for "not there"."""
    panoptic: np.ndarray | None = None
    """(H, W) int32: 0 = void, else 1 + index into ``segments``."""
    semantic: np.ndarray | None = None
    """(H, W) int32 class index."""
    text: str = ""
    """Generated text, special tokens kept."""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """One number of a result table; never without its protocol and its n."""

    metric: str
    value: float
    """In percent unless the metric's name says otherwise."""
    n: int
    """How many samples (or sentences, images) it rests on."""
    protocol: str
    ci95: tuple[float, float] | None = None
