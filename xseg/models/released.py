"""A released X-SAM checkpoint -> the weights of an xseg folder, tensor by tensor (names: branch main or archive)."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from xseg.errors import UserError
from xseg.models import key_maps, shards
from xseg.models.checkpoint import SHOWN, LoadReport
from xseg.models.shards import Stored
from xseg.models.xseg import XSegModel

SPLIT = {
    "llm": "llm.",
    "visual_encoder": "vision_encoder.",
    "visual_projector": "visual_projector.",
    "segmentor_encoder": "segmentor.encoder.",
    "segmentor_projector": "seg_projector.",
}
"""Folders of the official export for chat, which has no mask decoder, and the prefixes they stand for."""
EMBEDDING, OUTPUT = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
LABELS, QUERIES = "segmentor.class_predictor.predictor.weight", "segmentor.decoder.queries_features.weight"


@dataclass
class Released:
    """What a source holds, under the names of branch main."""

    source: Path
    weights: dict[str, Stored]
    adapters: dict[str, dict[str, Stored]] = field(default_factory=dict)
    """LoRA of a weight: "A" (r, in) and "B" (out, r)."""

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name begins so."""
        return any(name.startswith(prefix) for name in self.weights)

    @property
    def parts(self) -> list[str]:
        """What a model of it builds. Raises UserError when nothing of X-SAM is there."""
        if not self.has("segmentor.encoder."):
            few = ", ".join(list(self.weights)[:SHOWN])
            raise UserError(
                f"{self.source}: another architecture: X-SAM's files hold segmentor.encoder.*, this one has {few}; "
                "name a pytorch_model.bin of X-SAM, or the folder that holds its shards"
            )
        parts = ["segmentor" if self.has("segmentor.decoder.") else "sam"]
        language = bool(self.adapters) or self.has("llm.")
        # An adapter is stored without the encoder that stayed frozen beside it.
        if self.has("vision_encoder.") or self.has("visual_projector."):
            parts.append("siglip")
        return [*parts, "llm"] if language else parts

    def rows(self, name: str) -> int | None:
        """First axis of a tensor, None where it is not there."""
        return self.weights[name].shape[0] if name in self.weights else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most tensors have."""
        return Counter(s.dtype for s in self.weights.values()).most_common(1)[0][0]


def inspect(source: Path) -> Released:
    """Read the table of contents of a checkpoint. Raises UserError for damaged files and for pickles with code."""
    split = {name: prefix for name, prefix in SPLIT.items() if (source / name).is_dir()}
    if split:
        found = {
            _in_folder(name, prefix): stored
            for folder, prefix in split.items()
            for name, stored in shards.catalog(source / folder).items()
        }
    else:
        found = shards.catalog(source)
    out = Released(source, {})
    for name, stored in found.items():
        name = key_maps.unified(name)
        if name.startswith(key_maps.IGNORED):
            continue
        plain, role = key_maps.without_adapter(name)
        if role == "weight":
            out.weights[plain] = stored
        elif role != "replaced":
            out.adapters.setdefault(plain, {})[role] = stored
    return out


def _in_folder(name: str, prefix: str) -> str:
    return prefix + (name.removeprefix("vision_encoder.") if prefix == "segmentor.encoder." else name)


@dataclass(frozen=True)
class Piece:
    """How one tensor of an xseg folder comes about."""

    weight: Stored
    shape: tuple[int, ...]
    third: int | None
    """Which third of the stored tensor it is (query, key, value)."""
    adapter: Mapping[str, Stored] | None = None

    def sources(self) -> Iterator[Stored]:
        """What must be read."""
        yield self.weight
        yield from (self.adapter or {}).values()

    def make(self, get: Callable[[Stored], Tensor], alpha: float) -> Tensor:
        """The tensor; LoRA is merged in float32: W + alpha / r * B A."""
        value = get(self.weight)
        if self.adapter:
            down, up = (get(self.adapter[k]).float() for k in "AB")
            value = (value.float() + alpha / len(down) * (up @ down)).to(value.dtype)
        value = value if self.third is None else value.chunk(3)[self.third]
        return value.reshape(self.shape).clone()


def plan(
    released: Released, skeleton: XSegModel, base: Mapping[str, Stored], alpha: float
) -> tuple[dict[str, Piece], LoadReport]:
    """Match a source with a model on ``meta``: pieces under our names, and the report.

    ``base``: what an adapter was trained on, under official names; only read where there are adapters. Raises
    UserError when a tensor is missing, unexpected, or of another shape.
    """
    report, pieces, used = LoadReport(str(released.source)), {}, set()
    tied = {id(p): n for n, p in reversed(list(skeleton.named_parameters(remove_duplicate=False)))}
    identity = {n: id(p) for n, p in skeleton.named_parameters(remove_duplicate=False)}
    for name, value in skeleton.state_dict().items():
        official, third = key_maps.official_name(name)
        used.add(official)
        stored = released.weights.get(official) or base.get(official)
        first = tied.get(identity.get(name, 0), name)
        if first != name:
            _check_tied(released, official, key_maps.official_name(first)[0])
            continue
        if stored is None:
            report.fresh.append(name)
            continue
        wanted = tuple(value.shape) if third is None else (3 * value.shape[0], *value.shape[1:])
        if stored.shape != wanted and {stored.shape, wanted} != {(), (1,)}:
            report.mismatched.append(f"{name}: {stored.shape} there, {wanted} here")
            continue
        adapter = released.adapters.get(official)
        if adapter is not None and set(adapter) == {"A", "B"}:
            made = (adapter["B"].shape[0], *adapter["A"].shape[1:])
            if made != wanted or adapter["A"].shape[0] != adapter["B"].shape[1]:
                report.mismatched.append(f"LoRA of {name}: {made} there, {wanted} here")
                continue
        pieces[name] = Piece(stored, tuple(value.shape), third, adapter)
        report.loaded.append(name)
    report.unexpected = [n for n in (*released.weights, *released.adapters) if n not in used]
    check(released, report, alpha)
    return pieces, report


def _check_tied(released: Released, name: str, other: str) -> None:
    """Two names of one parameter must hold the same numbers, where a file has both."""
    both = {n: released.weights[n] for n in (name, other) if n in released.weights}
    if len(both) == 2 and not torch.equal(*shards.read(both).values()):
        raise UserError(
            f"{released.source}: {name} and {other} differ, but the model recipe ties them: set "
            "llm.tie_word_embeddings: false in it, and name it with --recipe"
        )


def check(released: Released, report: LoadReport, alpha: float) -> None:
    """Raise UserError for whatever the report cannot explain."""
    if report.mismatched or report.unexpected:
        what = "another architecture or other sizes" if report.mismatched else "tensors that no model here has"
        raise UserError(f"{released.source}: {what}: name the model recipe it belongs to with --recipe\n{report}")
    if report.fresh:
        raise UserError(
            f"{released.source}: incomplete: {len(report.fresh)} tensors are missing; copy every file of the "
            f"checkpoint\n{report}"
        )
    half = [n for n, pair in released.adapters.items() if set(pair) != {"A", "B"}]
    if half:
        raise UserError(
            f"{released.source}: incomplete: LoRA of {', '.join(half[:SHOWN])} has one half only; copy it again"
        )
    if released.adapters and alpha <= 0:
        raise UserError(
            f"{released.source}: a LoRA checkpoint, whose scale alpha stands in no tensor: give it with --lora-alpha "
            "(X-SAM's recipes: 256)"
        )


def write(pieces: Mapping[str, Piece], folder: Path, alpha: float, limit: int) -> None:
    """Write safetensors of at most ``limit`` bytes, reading only what the next one needs.

    Raises UserError for a tensor with values that are not finite.
    """
    sizes = {n: torch.Size(p.shape).numel() * p.weight.dtype.itemsize for n, p in pieces.items()}
    groups = shards.grouped(sizes, limit)
    for number, names in enumerate(groups):
        shards.write(folder, number, len(groups), _made({name: pieces[name] for name in names}, alpha))
    shards.write_index(folder, groups, sum(sizes.values()))


def _made(pieces: Mapping[str, Piece], alpha: float) -> dict[str, Tensor]:
    wanted = {f"{s.file}:{s.key}": s for piece in pieces.values() for s in piece.sources()}
    read = shards.read(wanted)
    made = {name: piece.make(lambda s: read[f"{s.file}:{s.key}"], alpha) for name, piece in pieces.items()}
    for name, value in made.items():
        shards.check_finite(pieces[name].weight.file, pieces[name].weight.key, value)
    return made
