"""Train the miniature SigLIP: ``python examples/tiny_parts/siglip.py --out DIR``.

Image and text towers with SigLIP's sigmoid loss on every (picture, caption) pair of a batch. Captions name one thing by
some of its attributes and, half of the time, the square it stands on, or count things; the truth of every pair is
computed, so that a caption of one picture that happens to fit another is no false negative, and captions with one word
changed are hard ones. SigLIP 2 adds losses that keep features local; here the rows of the squares are held against the
words of a board (``xseg.data.shapeworld.board``) in the same way. Scenes: seed 2 of the split "parts", which no stage
uses; half of them hold a held-out shape, none a held-out pair.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Plan, arguments, card, processes, save, train
from torch import Tensor, nn
from transformers import AutoTokenizer, SiglipTextConfig, SiglipTextModel

from xseg.data.shapeworld.board import BARE, COVERED, SQUARES, board, square
from xseg.data.shapeworld.board import SIDE as SQUARES_A_SIDE
from xseg.data.shapeworld.draw import draw
from xseg.data.shapeworld.language import NUMBERS, Noun
from xseg.data.shapeworld.world import (
    COLOURS,
    GROUNDS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    Scene,
    sample_scene,
)
from xseg.models.configuration import SiglipConfig
from xseg.models.siglip import SiglipEncoder

SEED, SIDE, PICTURES, CAPTIONS = 2, 96, 32, 4
PLAN = Plan(steps=4000, lr=2e-3, seed=SEED, muon=1.0)
HELD_OUT = SPLITS["parts"][0] + (1 << 23)
"""First scene of the held-out ones; the training stays below."""
VOCABULARIES = (SIZES, COLOURS, TEXTURES, SHAPES, SQUARES)
WORDS = (*SIZES, *COLOURS, *TEXTURES, *SHAPES, *GROUNDS, COVERED, BARE, *SQUARES)
"""What a row is held against. Without the names of squares, rows forget where they are, and a projector, which sees one
row at a time, cannot tell a language model."""
READ = -2
"""The hidden state that language models read, whose rows they are."""
FIELDS = ("size", "colour", "texture", "shape")
ANY = -1
COUNTS = (1, 2, 3, 4)
LONGEST = 12
"""Tokens of a caption; shorter ones are padded."""
PHI = Path(__file__).with_name("phi")


@dataclass(frozen=True)
class Claim:
    """A caption: things with these attributes (indices into VOCABULARIES, -1 = any) exist, or are ``count`` many."""

    attributes: tuple[int, int, int, int, int]
    count: int = 0
    """0 = at least one."""

    def text(self) -> str:
        """Return the wording."""
        named = {f: v[a] for f, v, a in zip(FIELDS, VOCABULARIES, self.attributes[:4], strict=False) if a != ANY}
        noun = Noun(**named).text(plural=self.count > 1)
        place = "" if self.attributes[4] == ANY else f" at {SQUARES[self.attributes[4]]}"
        return f"{NUMBERS[self.count]} {noun}" if self.count else f"{noun}{place}"


def facts(scene: Scene) -> np.ndarray:
    """Return (things, 5) indices into VOCABULARIES."""
    rows = [(t.size, t.colour, t.texture, t.shape, square(t)) for t in scene.things]
    return np.array([[v.index(a) for v, a in zip(VOCABULARIES, row, strict=True)] for row in rows])


def claims(things: np.ndarray, rng: np.random.Generator) -> list[Claim]:
    """Draw ``CAPTIONS`` true captions and as many with one thing changed."""
    out = []
    for _ in range(CAPTIONS):
        row = things[rng.integers(len(things))].copy()
        if rng.random() < 0.25:
            keep = (1,) if rng.random() < 0.5 else (3,)
            row[[k for k in range(5) if k not in keep]] = ANY
            number = int((things[:, keep[0]] == row[keep[0]]).sum())
            other = int(rng.choice([c for c in COUNTS if c != number]))
            out += [Claim(tuple(row), min(number, 4)), Claim(tuple(row), other)]
            continue
        hidden = rng.random(5) < (0.6, 0.35, 0.7, 0.35, 0.5)
        if hidden[1:4].all():
            hidden[int(rng.integers(1, 4))] = False
        row[hidden] = ANY
        out += [Claim(tuple(row)), Claim(tuple(_changed(row, things, rng)))]
    return out


def _changed(row: np.ndarray, things: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change one attribute, half of the time to one that another thing of the picture has."""
    while True:
        new, field = row.copy(), int(rng.choice(np.flatnonzero(row != ANY)))
        options = things[:, field] if rng.random() < 0.5 else np.arange(len(VOCABULARIES[field]))
        new[field] = rng.choice(options)
        if new[field] == row[field] and len(set(options.tolist())) == 1:
            new[field] = rng.integers(len(VOCABULARIES[field]))
        pair = (COLOURS[new[1]], SHAPES[new[3]])
        if new[1] == ANY or new[3] == ANY or pair not in HELD_OUT_PAIRS:
            return new


def truth(pictures: list[np.ndarray], told: list[Claim]) -> np.ndarray:
    """Return (pictures, captions) bool: which caption is true of which picture."""
    claim = np.array([c.attributes for c in told])
    count = np.array([c.count for c in told])
    out = np.zeros((len(pictures), len(told)), bool)
    for k, things in enumerate(pictures):
        fits = ((claim[:, None] == ANY) | (claim[:, None] == things[None])).all(-1).sum(1)
        out[k] = np.where(count == 0, fits > 0, fits == count)
    return out


Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Batches:
    """Pictures, captions and their truth."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.rank, self.world = processes()

    def __call__(self, step: int) -> Batch:
        """Return a process's share of the batch of one training step."""
        first = SPLITS["parts"][0] + step * PICTURES
        return self.of(range(first + self.rank, first + PICTURES, self.world))

    def of(self, numbers: range) -> Batch:
        """Return pixels (I, 3, 96, 96) in [-1, 1], ids (T, 12), truth (I, T) and words (I, 36, W) of given scenes."""
        pixels, things, told, rows = [], [], dict[Claim, None](), []
        for number in numbers:
            scene = sample_scene(SEED, number, side=SIDE, policy="open" if number % 2 else "seen")
            pixels.append(draw(scene))
            things.append(facts(scene))
            rows.append([[word in words for word in WORDS] for words in board(scene)])
            told.update(dict.fromkeys(claims(things[-1], np.random.default_rng([SEED, number, 1]))))
        true = torch.from_numpy(truth(things, list(told)))
        return images(pixels), self.ids([c.text() for c in told]), true, torch.tensor(rows)

    def ids(self, texts: list[str]) -> Tensor:
        """Return (T, 12) ids, padded with the end token, which is read at the last place."""
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        out = torch.full((len(rows), LONGEST), self.tokenizer.eos_token_id)
        for k, row in enumerate(rows):
            out[k, : len(row)] = torch.tensor(row[: LONGEST - 1])
        return out


def images(pixels: list[np.ndarray]) -> Tensor:
    """Return (I, 3, s, s) float32 in [-1, 1] of (s, s, 3) uint8 pictures."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Siglip(nn.Module):
    """Both towers and the words of squares, with a temperature and a bias of captions and of words each."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vision = SiglipEncoder(vision_config(), READ)
        self.text = SiglipTextModel(text_config(vocabulary))
        # Cosines, as of captions: each word of a row must take its share of it. Of plain products a small one does, and
        # where a square lies, then 9 % of the rows' variance and not 30, is what stage 2 did not find.
        self.words = nn.Embedding(len(WORDS), 128)
        self.scales, self.biases = nn.Parameter(torch.tensor([2.3, 3.0])), nn.Parameter(torch.tensor([-6.0, -6.0]))

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return (I, T) logits of captions and (I, 36, W) logits of words."""
        hidden = rows = self.vision(pixels)
        for block in self.vision.encoder.layers[self.vision.depth :]:
            hidden = block(hidden, None)
        picture = self.vision.head(self.vision.post_layernorm(hidden))
        pairs = (picture, self.text(ids).pooler_output), (rows, self.words.weight)
        captions, words = (
            F.normalize(seen.float(), dim=-1) @ F.normalize(told.float(), dim=-1).T * scale.exp() + bias
            for (seen, told), scale, bias in zip(pairs, self.scales, self.biases, strict=True)
        )
        return captions, words


def vision_config() -> SiglipConfig:
    """Return the architecture of the vision tower: SigLIP's, in small, behind a stem, with its pooling head."""
    return SiglipConfig(
        stem="residual", image_size=SIDE, patch_size=SIDE // SQUARES_A_SIDE, hidden_size=128, intermediate_size=384,
        num_hidden_layers=4, num_attention_heads=4,
    )  # fmt: skip


def text_config(vocabulary: int) -> SiglipTextConfig:
    """Return the architecture of the text tower: SigLIP's, in small."""
    return SiglipTextConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LONGEST, projection_size=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def loss_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """SigLIP's loss: log-sigmoid over all pairs, summed over captions, or rows and words, averaged over pictures."""
    pixels, ids, true, words = batch
    captions, rows = model(pixels, ids)
    return {
        "contrastive": _sigmoid(captions, true) / len(pixels),
        "words": _sigmoid(rows, words) / len(pixels),
    }


def _sigmoid(logits: Tensor, true: Tensor) -> Tensor:
    return -F.logsigmoid(torch.where(true, logits, -logits)).sum()


class Check:
    """Held-out figures in percent."""

    def __init__(self, batches: Batches, pictures: int) -> None:
        self.batches = batches
        self.sets = [batches.of(range(first, first + 50)) for first in range(HELD_OUT, HELD_OUT + pictures, 50)]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return how often a caption's best picture and a picture's best caption are right; average precision."""
        to_picture, to_caption, precision, named = [], [], [], []
        for pixels, ids, true, words in self.sets:
            logits, rows = model(pixels, ids)
            centre = words[..., : len(SIZES)].any(-1)  # only squares with a centre tell a size
            named += ((rows > 0) == words).all(-1)[centre].tolist()
            asked = true.any(0)
            to_picture += true.T[asked].gather(1, logits.T[asked].argmax(1, keepdim=True)).tolist()
            to_caption += true.gather(1, logits.argmax(1, keepdim=True)).tolist()
            order = logits.flatten().argsort(descending=True)
            hits = true.flatten()[order].float()
            ranks = torch.arange(1, len(hits) + 1)
            precision.append(float((hits.cumsum(0) / ranks * hits).sum() / hits.sum()))
        return {
            "caption to picture": 100 * float(np.mean(to_picture)),
            "picture to caption": 100 * float(np.mean(to_caption)),
            "average precision": 100 * float(np.mean(precision)),
            "square": 100 * float(np.mean(named)),
        }


def main() -> None:
    """Train and save."""
    given = arguments(__doc__.splitlines()[0])
    batches = Batches(AutoTokenizer.from_pretrained(PHI, local_files_only=True))
    torch.manual_seed(SEED)
    model = Siglip(len(batches.tokenizer))
    plan = PLAN if given.steps is None else replace(PLAN, steps=given.steps)
    work = Path("runs/parts") / given.out.name
    trained = train(model, plan, batches, loss_of, Check(batches, 500), work)
    if batches.rank:
        return
    towers = {"vision_model": trained.vision, "text_model": trained.text}
    state = {f"{name}.{key}": value for name, tower in towers.items() for key, value in tower.state_dict().items()}
    # the words of squares have served; those of captions are SigLIP's own
    state |= {"logit_scale": trained.scales[:1], "logit_bias": trained.biases[:1]}
    configs = {"vision_config": vision_config().to_dict(), "text_config": text_config(len(batches.tokenizer)).to_dict()}
    configs["vision_config"]["model_type"] = "siglip_vision_model"
    save(
        given.out,
        {"architectures": ["SiglipModel"], "model_type": "siglip", **configs},
        state,
        card(CARD, plan, work),
        work,
    )
    for file in PHI.glob("tokenizer*.json"):
        shutil.copyfile(file, given.out / file.name)


CARD = f"""# siglip: a miniature SigLIP of ShapeWorld

SigLIP's architecture with a residual convolutional stem in the place of the patch embedding (`stem: residual` in
config.json): a vision tower (4 layers of 128, patches of 16 pixels at 96 x 96), whose rows a language model reads, and
a text tower (2 layers of 128, texts of {LONGEST} tokens, phi's tokenizer), which names what the pooling head sees under
a mask (`xseg names`).

* Scenes: seed {SEED} of ShapeWorld's split "parts", which no stage and no suite uses; half of them with a held-out
  shape (heart, arrow), none with a held-out pair (purple triangle, yellow ring).
* Captions: {CAPTIONS} true ones a picture (a thing by some of size, colour, texture, shape and square, or a count)
  and as many with one word changed.
* Loss: SigLIP's sigmoid loss over all pairs of pictures and captions in a batch, with their computed truth; and the
  same between the rows that a language model reads (one a square) and the {len(WORDS)} words of boards.

Made by `make parts` (@STEPS steps of {PICTURES} pictures, learning rate {PLAN.lr}, a moving average of the
weights is kept). The weights are bf16 safetensors in transformers' layout. Apache-2.0, generated data. Figures hold
for ShapeWorld and nothing else.

## What it can do

Held-out scenes, in percent, of both towers together: how often the best of 50 pictures fits a caption, how often
the best of about 280 captions fits a picture, and the average precision over all pairs; and how often a row names the
size, colour, texture, shape and square of the thing with its centre there, all at once, without any other word. The
last row is the weights in this folder; `metrics.jsonl` has the loss.

"""

if __name__ == "__main__":
    main()
