"""The model at SAM-B size against the plain way: eager attention, feature maps repeated, every mask upsampled.

    python bench/parity_speed.py [--image 1024] [--pairs 3] [--threads 1]

The plain way lives here alone: transformers' SAM encoder in eager mode with its neck and all hidden states, one copy of
the maps for each phrase, Mask2FormerLoss, and all object queries brought to original pixels before one is chosen. Both
ways have the same weights and inputs, and their results are compared. Every run has a forked process of its own, which
tells its peak memory; seconds are processor time. Results are kept after every case.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from record import save
from torch import Tensor
from transformers import Mask2FormerConfig, SamVisionConfig, SamVisionModel
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from xseg import postprocess
from xseg.config import LossWeights, ModelRecipe
from xseg.geometry.masks import decode
from xseg.infer.evaluate import share_images
from xseg.infer.processing import XSegProcessor
from xseg.losses.criterion import Criterion
from xseg.losses.points import generator
from xseg.models.build import build_config, build_model
from xseg.models.mask_decoder import Groups
from xseg.tasks import phrasing
from xseg.tokens import IMAGE
from xseg.types import Batch, Encoded, Formatted, ModelOutput, Query, Turn, ViewGeometry

SAM_B = {
    "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_dim": 3072,
    "window_size": 14, "global_attn_indexes": [2, 5, 8, 11],
}  # fmt: skip
SIGLIP_B = {
    "image_size": 224, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12,
}  # fmt: skip
LLM = {
    "model_type": "phi3", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 807,
    "num_attention_heads": 8, "num_key_value_heads": 8, "pad_token_id": 0, "eos_token_id": 2,
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
}  # fmt: skip
LABELS, MASKS, SIZE = 133, 15, (480, 640)
WEIGHTS = LossWeights()
PHRASES = ("the red circle", "the blue square", "a star", "the large ring", "the grass")
KEPT = 200_000
"""Values of a result that are compared."""
THRESHOLD = 0.5
TOGETHER = "referring inference, 5 phrases: five runs of this code, or one batch"
LEAST = 3.0
"""Least ratio of that row."""


@dataclass(frozen=True)
class Case:
    """Two ways to the same result."""

    name: str
    plain: Callable[[], Tensor]
    ours: Callable[[], Tensor]


def measured(run: Callable[[], Tensor]) -> tuple[float, float, np.ndarray]:
    """(processor seconds, peak bytes above those at the start, some values of the result) of a run in a child."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def child() -> None:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        result = run()
        seconds = time.process_time() - start
        peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        values = result.detach().float().flatten()
        send.send((seconds, float(peak), values[:: max(1, len(values) // KEPT)].numpy()))

    process = context.Process(target=child)
    process.start()
    send.close()
    found: tuple[float, float, np.ndarray] = receive.recv()
    process.join()
    return found


def model_of(image: int, parts: Sequence[str], head: str) -> tuple[Any, XSegProcessor]:
    """Random weights at SAM-B size."""
    recipe = ModelRecipe(
        sam={**SAM_B, "image_size": image}, siglip=SIGLIP_B, llm=LLM, tokenizer="examples/tiny_parts/phi",
        segmentor={"connector_layers": [6, 9, 12]},
    )  # fmt: skip
    processor = XSegProcessor.from_recipe(recipe, parts)
    words = len(processor.encoder.tokenizer) if processor.encoder else None
    special = processor.encoder.special if processor.encoder else None
    torch.manual_seed(0)
    return build_model(build_config(recipe, parts, head, LABELS if head == "labels" else 0, words, special)), processor


def eager(model: Any) -> Any:
    """transformers' own encoder with the model's weights."""
    sizes = {k: v for k, v in model.config.sam_config.to_dict().items() if k in (*SAM_B, "image_size")}
    made = SamVisionModel(SamVisionConfig(**sizes, attn_implementation="eager")).vision_encoder
    made.load_state_dict(model.segmentor.sam.state_dict())
    return made


@contextmanager
def plainly(model: Any, encoder: Any) -> Iterator[None]:
    """``model`` with the eager encoder in the place of its own."""

    def forward(pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        states = encoder(pixels, output_hidden_states=True).hidden_states
        return [states[layer] for layer in layers]

    with mock.patch.object(model.segmentor.sam, "forward", forward):
        yield


def upsampled(masks: Tensor, view: ViewGeometry) -> Tensor:
    """All masks (N, h, w) in original pixels."""
    canvas = F.interpolate(masks[None], (view.canvas, view.canvas), mode="bilinear")
    return F.interpolate(canvas[..., : view.scaled[0], : view.scaled[1]], view.original, mode="bilinear")[0]


def best_plain(output: ModelOutput, query: int, view: ViewGeometry) -> Tensor:
    """The surest object query's mask, chosen among upsampled ones."""
    prob = upsampled(output.mask_logits[-1, query], view).sigmoid()
    return prob[output.class_logits[-1, query].softmax(-1)[:, 0].argmax()] > THRESHOLD


def best_ours(output: ModelOutput, query: int, view: ViewGeometry) -> Tensor:
    """The same by the library."""
    found = postprocess.best(output.mask_logits[-1, query], output.class_logits[-1, query], view)
    return torch.from_numpy(np.asarray(decode(found.mask)))


def labelled(image: int) -> Batch:
    """One picture of noise with blobs as targets, for stage 1."""
    g, none, first = generator("cpu", 0), torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    coarse = torch.randn(MASKS, 1, 6, 6, generator=g)
    masks = (F.interpolate(coarse, image, mode="bilinear")[:, 0] > 0.4).to(torch.uint8)
    return Batch(
        keys=("bench/0",), input_ids=none.view(1, 0), attention_mask=none.view(1, 0).bool(), labels=none.view(1, 0),
        llm_pixels=torch.zeros(1, 3, 0, 0), mask_pixels=torch.randn(1, 3, image, image, generator=g),
        image_slot=none.view(0, 3), query_image=first, query_slot=first, seg_position=-torch.ones(1, 2).long(),
        concept_span=none.view(0, 3), query_concepts=none.view(1, 0), target_masks=masks,
        target_query=first.repeat(MASKS), target_class=torch.randint(LABELS, (MASKS,), generator=g),
        prompt_mask=masks[:0], prompt_image=none, region_position=none.view(0, 2), ignore=None, geometry=(),
        max_queries=1,
    )  # fmt: skip


def plain_loss(output: ModelOutput, batch: Batch) -> Tensor:
    """Mask2FormerLoss over all predictions, weighted as ours."""
    config = Mask2FormerConfig(
        num_labels=LABELS, class_weight=WEIGHTS.class_, mask_weight=WEIGHTS.mask, dice_weight=WEIGHTS.dice,
        no_object_weight=WEIGHTS.background, train_num_points=WEIGHTS.num_points,
    )  # fmt: skip
    layers = [
        {"masks_queries_logits": m, "class_queries_logits": c}
        for m, c in zip(output.mask_logits, output.class_logits, strict=True)
    ]
    targets = {"mask_labels": [batch.target_masks.float()], "class_labels": [batch.target_class]}
    terms = Mask2FormerLoss(config, {})(**layers[-1], **targets, auxiliary_predictions=layers[:-1])
    factors = {"loss_cross_entropy": WEIGHTS.class_, "loss_mask": WEIGHTS.mask, "loss_dice": WEIGHTS.dice}
    return torch.stack([next(f for k, f in factors.items() if n.startswith(k)) * v for n, v in terms.items()]).sum()


def training_cases(image: int) -> list[Case]:
    """SAM's encoder, the criterion, and a whole step of stage 1 (forward and backward)."""
    model, _ = model_of(image, ["segmentor"], "labels")
    encoder, batch = eager(model), labelled(image)
    model.train()
    grid = image // 8
    g = generator("cpu", 3)
    logits = 5 * F.interpolate(torch.randn(10, 200, 12, 12, generator=g), grid, mode="bilinear")[:, None]
    classes = torch.randn(10, 1, 200, LABELS + 1, generator=g)

    def sam() -> Tensor:
        return model.segmentor.sam(batch.mask_pixels, [12])[0]

    def sam_plainly() -> Tensor:
        with plainly(model, encoder):
            return sam()

    def criterion(loss: Callable[[ModelOutput, Batch], Tensor]) -> Tensor:
        leaves = logits.clone().requires_grad_(), classes.clone().requires_grad_()
        output = ModelOutput(*leaves, torch.zeros(0, 1), torch.zeros(0, dtype=torch.long))
        loss(output, batch).backward()
        return torch.zeros(0)  # other random points, another loss; bench/criterion.py compares on the same ones

    def our_loss(output: ModelOutput, batch: Batch) -> Tensor:
        return Criterion(WEIGHTS)(output, batch, draw=generator("cpu", 2)).total

    def step(loss: Callable[[ModelOutput, Batch], Tensor]) -> Tensor:
        output = model(batch)
        loss(output, batch).backward()
        return output.mask_logits[-1]

    def step_plainly() -> Tensor:
        with plainly(model, encoder):
            return step(plain_loss)

    with_no_grad = torch.no_grad()
    return [
        Case("SAM encoder, forward", with_no_grad(sam_plainly), with_no_grad(sam)),
        Case("criterion, forward and backward", lambda: criterion(plain_loss), lambda: criterion(our_loss)),
        Case("stage-1 step, forward and backward", step_plainly, lambda: step(our_loss)),
    ]


def asked(processor: XSegProcessor, phrase: str) -> Encoded:
    """One phrase about the picture, in the wording of evaluation."""
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    question = phrasing.PHRASE[0].format(phrase=phrasing.span(phrase))
    turns = (Turn("user", f"{IMAGE}\n{question}"), Turn("assistant", phrasing.ANSWER[0]))
    return processor.encode([processor.sizes.views(Image.fromarray(pixels))], Formatted(turns, (Query(0, (0,)),)))


def referring_cases(image: int) -> list[Case]:
    """The decoder on five phrases, post-processing, one phrase the plain way, and five phrases together."""
    model, processor = model_of(image, ["segmentor", "siglip", "llm"], "concepts")
    encoder, requests = eager(model), [asked(processor, phrase) for phrase in PHRASES]
    model.eval()
    single = [processor.batch([request]) for request in requests]
    together = share_images(processor.batch(requests), ["picture"] * len(requests))
    view, count = single[0].geometry[0], len(PHRASES)
    g, grid, width = generator("cpu", 4), image // 8, 256
    features = torch.randn(1, width, grid, grid, generator=g)
    maps = [torch.randn(1, width, grid // k, grid // k, generator=g) for k in (4, 2, 1)]
    seg = torch.randn(count, width, generator=g)
    masks = F.interpolate(torch.randn(1, 200, 12, 12, generator=g), grid, mode="bilinear")[None]
    made = ModelOutput(5 * masks, torch.randn(1, 1, 200, 2, generator=g), torch.zeros(0, 1), torch.zeros(0))

    def shared() -> Tensor:
        return model.segmentor.mask_decoder(features, maps, seg, Groups(torch.arange(count), 1, count))[1]

    def repeated() -> Tensor:
        copies = [m.repeat(count, 1, 1, 1) for m in (features, *maps)]
        return model.segmentor.mask_decoder(copies[0], copies[1:], seg, Groups(torch.arange(count), count, 1))[1]

    def one(batch: Batch) -> Tensor:
        return best_ours(model(batch), 0, view)

    def one_plainly() -> Tensor:
        with plainly(model, encoder):
            return best_plain(model(single[0]), 0, view)

    def five_together() -> Tensor:
        output = model(together)
        return torch.stack([best_ours(output, k, view) for k in range(count)])

    pairs: list[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]] = [
        ("mask decoder, 5 phrases: maps repeated, or shared", repeated, shared),
        ("post-processing: all upsampled, or the winner", lambda: best_plain(made, 0, view),
         lambda: best_ours(made, 0, view)),
        ("referring inference, 1 phrase", one_plainly, lambda: one(single[0])),
        (TOGETHER, lambda: torch.stack([one(batch) for batch in single]), five_together),
    ]  # fmt: skip
    no_grad = torch.no_grad()
    return [Case(name, no_grad(plain), no_grad(ours)) for name, plain, ours in pairs]


def row_of(runs: Sequence[tuple[Any, Any]]) -> dict[str, float]:
    """Medians over pairs, and the largest difference of results as a part of the largest value, where they compare."""
    off = [float(np.abs(a[2] - b[2]).max() / max(np.abs(a[2]).max(), 1e-12)) for a, b in runs if len(a[2])]
    figures = {
        "plain_s": round(statistics.median(a[0] for a, _ in runs), 3),
        "xseg_s": round(statistics.median(b[0] for _, b in runs), 3),
        "ratio": round(statistics.median(a[0] / b[0] for a, b in runs), 2),
        "plain_peak_gb": round(statistics.median(a[1] for a, _ in runs) / 1e9, 3),
        "xseg_peak_gb": round(statistics.median(b[1] for _, b in runs) / 1e9, 3),
        "memory_ratio": round(statistics.median(a[1] / max(b[1], 1) for a, b in runs), 2),
        "pairs": len(runs),
    }
    return figures | ({"largest_difference": max(off)} if off else {})


def main() -> None:
    """Measure in rounds over all cases; status 1 when five phrases in one batch save less than they must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, default=1024, help="side of SAM's canvas; a multiple of 32")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [*referring_cases(args.image), *training_cases(args.image)]
    about = {
        "claim": "five phrases on one image in one batch at least 3 times faster than five runs",
        "method": "medians of alternating runs in processes of their own; processor seconds, peak memory of the run",
        "sizes": f"SAM-B at {args.image} px, 200 object queries, SigLIP-B at 224 px, a language model of 8 x 512",
        "threads": args.threads,
    }
    runs: dict[str, list[tuple[Any, Any]]] = {case.name: [] for case in cases}
    rows: dict[str, dict[str, float]] = {}
    for _ in range(args.pairs):
        for case in cases:
            runs[case.name].append((measured(case.plain), measured(case.ours)))
            rows[case.name] = row_of(runs[case.name])
            print(case.name, json.dumps(rows[case.name]), flush=True)
            save("parity_speed", {**about, "rows": rows}, ["torch", "transformers"])
    sys.exit(rows[TOGETHER]["ratio"] < LEAST)


if __name__ == "__main__":
    main()
