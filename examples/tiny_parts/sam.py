"""Train the miniature SAM: ``python examples/tiny_parts/sam.py --out DIR``.

SAM's own task: a click or a box in, the mask of whatever lies there out, without any class. Encoder, prompt encoder and
mask decoder are those of transformers' SAM in small; the encoder has xseg's residual stem. Scenes: seed 1 of the split
"parts", which no stage uses; no held-out shape and no held-out pair is among them.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Plan, arguments, card, processes, save, train
from torch import Tensor, nn
from transformers import SamConfig as WholeConfig
from transformers import SamModel

from xseg.data.shapeworld.draw import draw
from xseg.data.shapeworld.world import split_scene
from xseg.geometry.views import IMAGENET_MEAN, IMAGENET_STD
from xseg.models.configuration import SamConfig
from xseg.models.sam import SamEncoder

SEED, SIDE, IMAGES, PROMPTS = 1, 96, 16, 8
PLAN = Plan(steps=8000, lr=1e-3, seed=SEED)
HELD_OUT = 1 << 23
"""First held-out number of the split; the training stays below."""
STRIDE = 2
"""Masks are learnt and scored at half the resolution, the decoder's own."""
VISION = {
    "stem": "residual", "image_size": SIDE, "patch_size": 8, "hidden_size": 128, "output_channels": 64,
    "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_dim": 512, "window_size": 0,
    "global_attn_indexes": [0, 1, 2, 3],
}  # fmt: skip


def config() -> WholeConfig:
    """Return the architecture of the whole SAM."""
    shared = {"hidden_size": 64, "image_size": SIDE, "patch_size": 8, "mask_input_channels": 16}
    decoder = {"hidden_size": 64, "mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 64}
    plain = {k: v for k, v in VISION.items() if k != "stem"} | {"num_pos_feats": 32, "initializer_range": 0.02}
    return WholeConfig(vision_config=plain, prompt_encoder_config=shared, mask_decoder_config=decoder)


class Sam(nn.Module):
    """Pixels and one prompt per mask -> masks and their expected quality."""

    def __init__(self) -> None:
        super().__init__()
        whole = SamModel(config())
        self.vision_encoder = SamEncoder(SamConfig(**VISION))
        self.prompt_encoder, self.mask_decoder = whole.prompt_encoder, whole.mask_decoder
        # one table for clicks and for the grid, of the scale that SAM was trained with
        self.shared_image_embedding = self.prompt_encoder.shared_embedding = whole.shared_image_embedding
        nn.init.normal_(self.shared_image_embedding.positional_embedding)

    def forward(self, pixels: Tensor, prompts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(I, 3, 96, 96) and points (I, P, 1, 2) or boxes (I, P, 4) -> logits (I, P, K, 48, 48), quality (I, P, K).

        K is 3 for points, which may mean several things, and 1 for boxes.
        """
        state = self.vision_encoder(pixels, [-1])[0]
        maps = self.vision_encoder.neck(state)
        points, boxes = prompts.get("points"), prompts.get("boxes")
        labels = None if points is None else torch.ones(points.shape[:3], dtype=torch.int)
        sparse, dense = self.prompt_encoder(points, labels, boxes, None)
        size = maps.shape[-1]
        places = (torch.arange(size) + 0.5) / size
        grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), -1)
        where = self.shared_image_embedding(grid).permute(2, 0, 1)[None].repeat(len(maps), 1, 1, 1)
        masks, quality = self.mask_decoder(maps, where, sparse, dense, multimask_output=boxes is None)
        return masks.float(), quality.float()


def share(rank: int, world: int, step: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return the share of process ``rank`` of ``world`` of the batch of one training step."""
    return batch(step, range(step * IMAGES + rank, (step + 1) * IMAGES, world))


def batch(step: int, numbers: range) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return pixels, prompts and masks (I, P, 48, 48) of scenes: clicks on even steps, boxes on odd ones."""
    pixels, prompts, masks = [], [], []
    for number in numbers:
        scene, rng = split_scene(SEED, "parts", number, side=SIDE), np.random.default_rng([SEED, number, 1])
        pixels.append(draw(scene))
        grounds = len(scene.ground.names)
        for _ in range(PROMPTS):
            thing = rng.random() < 0.75
            owner = grounds + 1 + rng.integers(len(scene.things)) if thing else 1 + rng.integers(grounds)
            mask = scene.owner == owner
            rows, columns = np.nonzero(mask)
            at = int(rng.integers(len(rows)))
            low, high = (columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)
            box = np.array([*low, *high]) + rng.normal(0, 1.5, 4)
            prompts.append((np.array([columns[at], rows[at]]) + 0.5) if step % 2 == 0 else box.clip(0, SIDE))
            masks.append(mask)
    shape = len(numbers), PROMPTS
    given = torch.from_numpy(np.stack(prompts)).float().unflatten(0, shape)
    target = F.avg_pool2d(torch.from_numpy(np.stack(masks)).float()[None], STRIDE)[0].unflatten(0, shape)
    return normalised(pixels), {"points": given[:, :, None]} if step % 2 == 0 else {"boxes": given}, target


def normalised(pixels: list[np.ndarray]) -> Tensor:
    """Return (I, 3, s, s) of (s, s, 3) uint8 pictures, normalised as SAM's."""
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


def loss_of(model: nn.Module, given: tuple[Tensor, dict[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """SAM's loss: cross-entropy and dice of the best of the K masks, and the error of the expected quality."""
    pixels, prompts, target = given
    logits, quality = model(pixels, prompts)
    target = target[:, :, None].expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((-2, -1))
    chance = logits.sigmoid()
    dice = 1 - (2 * (chance * target).sum((-2, -1)) + 1) / ((chance + target).sum((-2, -1)) + 1)
    mask = (5 * entropy + dice).amin(-1).mean()
    return {"mask": mask, "quality": F.mse_loss(quality, iou(logits.detach(), target))}


def iou(logits: Tensor, target: Tensor) -> Tensor:
    """Return the intersection over union of the masks, (…)."""
    mask, true = logits > 0, target > 0.5
    return (mask & true).sum((-2, -1)) / (mask | true).sum((-2, -1)).clamp(min=1)


class Check:
    """Held-out mask IoU in percent, of the mask that the model itself takes for the best."""

    def __init__(self, steps: int) -> None:
        self.batches = [batch(step, range(HELD_OUT + 20 * step, HELD_OUT + 20 * (step + 1))) for step in range(steps)]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the mean IoU from one click and from a box."""
        found: dict[str, list[float]] = {}
        for pixels, prompts, target in self.batches:
            logits, quality = model(pixels, prompts)
            best = quality.argmax(-1, keepdim=True)[..., None, None].expand(-1, -1, 1, *logits.shape[-2:])
            kind = "IoU from one click" if "points" in prompts else "IoU from a box"
            found.setdefault(kind, []).extend(iou(logits.gather(2, best)[:, :, 0], target).flatten().tolist())
        return {kind: 100 * float(np.mean(values)) for kind, values in found.items()}


def main() -> None:
    """Train and save."""
    given = arguments(__doc__.splitlines()[0])
    torch.manual_seed(SEED)
    plan = PLAN if given.steps is None else replace(PLAN, steps=given.steps)
    work = Path("runs/parts") / given.out.name
    rank, world = processes()
    trained = train(Sam(), plan, partial(share, rank, world), loss_of, Check(10), work)
    if rank:
        return
    settings: dict[str, Any] = config().to_dict()
    settings["vision_config"] = VISION | {"model_type": "sam_vision_model"}
    save(given.out, settings, dict(trained.state_dict()), card(CARD, plan, work), work)


CARD = f"""# sam: a miniature SAM of ShapeWorld

SAM's architecture (encoder of 4 layers of 128, patches of 8 pixels at 96 x 96) with a residual convolutional stem
in the place of the patch embedding (`stem: residual` in config.json), prompt encoder and mask decoder. It knows no
classes.

* Scenes: seed {SEED} of ShapeWorld's split "parts", which no stage and no suite uses; no held-out shape and no
  held-out pair.
* Prompts: a click inside a thing or a ground, or its box with noise of 1.5 pixels.
* Loss: cross-entropy and dice of the best of three masks (one for a box), and the error of the expected quality.

Made by `make parts` (@STEPS steps of {IMAGES} pictures with {PROMPTS} prompts each, learning rate {PLAN.lr},
a moving average of the weights is kept). The weights are bf16 safetensors in transformers' layout. Apache-2.0,
generated data. Figures hold for ShapeWorld and nothing else.

## What it can do

Held-out scenes, in percent, mean IoU at 48 x 48 of the mask that the model itself takes for the best, things and
grounds. The last row is the weights in this folder; `metrics.jsonl` has the loss.

"""

if __name__ == "__main__":
    main()
