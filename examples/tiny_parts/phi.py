"""Train the miniature language model on text alone: ``python examples/tiny_parts/phi.py --out DIR``.

It reads a scene as a board in words (``xseg.data.shapeworld.board``), where X-SAM later puts the rows of SigLIP and of
SAM, and learns to describe it, to answer questions, and to say on which square the thing of an expression stands. So
counting, order and relations are learnt before any pixel. Scenes: seed 3 of the split "parts", which no stage uses;
half of them hold a held-out shape, none a held-out pair.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Plan, arguments, card, save, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Phi3Config

from xseg.data.shapeworld import tokenizer as words
from xseg.data.shapeworld.board import KINDS, NOWHERE, SQUARES, WORDS, board, square
from xseg.data.shapeworld.language import ATTRIBUTES, Noun, descriptions, draw_expression, expressions, nouns_of
from xseg.data.shapeworld.questions import QUESTION_TYPES, questions
from xseg.data.shapeworld.world import COLOURS, GROUNDS, SHAPES, SIZES, SPLITS, TEXTURES, Scene, allowed, sample_scene
from xseg.encode import Encoder
from xseg.tasks import phrasing
from xseg.tokens import IGNORE_LABEL, IMAGE, SEG, SENTINELS, add_special_tokens
from xseg.types import Turn

SEED, SIDE, BATCH = 3, 48, 16
PLAN = Plan(steps=9000, lr=2e-3, seed=SEED, muon=1.0)
HELD_OUT = SPLITS["parts"][0] + (1 << 23)
"""First scene of the held-out ones; the training stays below."""
QUESTION_WEIGHT, SHORT_WEIGHT, SHORT = 0.1, 3.0, 3
"""Weights in the loss: of what the user says; of squares and of answers of at most ``SHORT`` tokens. The rest counts 1.
Without them the long descriptions drown the answers that take a step of thought."""
EARLY = 300
"""First steps, whose questions take one look each."""
ONE_LOOK = ("presence", "colour", "shape", "ground")
HERE = "here "
"""Stands before a square in the answer to a request for a mask, where ``<SEG>`` stands later."""
VALUES = {"size": SIZES, "colour": COLOURS, "texture": TEXTURES, "shape": SHAPES}
TEMPLATE = Path(__file__).parents[2] / "chat_templates/phi3.jinja"


def config(vocabulary: int, end: int) -> Phi3Config:
    """Return the architecture: Phi-3's, in small."""
    return Phi3Config(
        vocab_size=vocabulary, hidden_size=160, intermediate_size=416, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, original_max_position_embeddings=2048,
        sliding_window=None, tie_word_embeddings=True, initializer_range=0.05, bos_token_id=1, eos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip


def scene(number: int) -> Scene:
    """Return scene ``number`` of this script's own stream."""
    return sample_scene(SEED, number, side=SIDE, policy="open" if number % 2 else "seen")


def asked(world: Scene, rng: np.random.Generator, early: bool = False) -> list[tuple[str, str]]:
    """Draw (question, answer) pairs about a scene: descriptions, or a mixture of everything else.

    ``early``: only what takes one look, found by an attribute or two; what counts and compares builds upon it.
    """
    if rng.random() < 0.1:
        found = descriptions(world, rng)
    else:
        found = [(q.text, q.answer) for q in questions(world, rng, 6, ONE_LOOK if early else QUESTION_TYPES)]
        if early:
            nouns = nouns_of(world)
            told = [e for _ in range(4) if (e := draw_expression(world, nouns, "attribute", rng)) is not None]
        else:
            told = expressions(world, rng, 4)
        found += [refer(e.text, world, e.things, rng) for e in told]
        found += [filtered(world, rng) for _ in range(2)]
    return [found[i] for i in rng.permutation(len(found))]


def filtered(world: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for the squares of everything that has one or two given attributes; half of the time they fit something."""
    like = world.things[rng.integers(len(world.things))]
    names = [str(n) for n in rng.choice(ATTRIBUTES, rng.integers(1, 3), False)]
    values = {n: getattr(like, n) for n in names}
    if rng.random() < 0.5:
        values[names[0]] = str(rng.choice(VALUES[names[0]]))
    noun = Noun(**values)
    if not allowed(noun.colour or "", noun.shape or SHAPES[0], "open"):
        noun = replace(noun, colour=None)
    places = [square(t) for t in world.things if noun.fits(t)]
    return f"Where is every {noun.text()}?", " ".join(sorted(places, key=SQUARES.index)) or NOWHERE


def refer(text: str, world: Scene, things: Sequence[int], rng: np.random.Generator) -> tuple[str, str]:
    """Return a request for the mask of a thing, answered by the square it stands on."""
    place = square(world.things[things[0]]) if things else NOWHERE
    question = phrasing.pick(phrasing.PHRASE, rng, True).format(phrase=text)
    return question, phrasing.pick(phrasing.ANSWER, rng, True).replace(SEG, f"{HERE}{place}")


class Texts:
    """Scenes and what is said about them, as ids."""

    def __init__(self, tokenizer: Any) -> None:
        vocabulary = tokenizer.get_vocab()
        self.size = len(vocabulary)
        self.ids = {
            w: vocabulary[f"▁{w}" if f"▁{w}" in vocabulary else w]
            for w in (*WORDS, *GROUNDS, *SIZES, *COLOURS, *TEXTURES, *SHAPES)
        }
        self.squares = [self.ids[word] for word in (*SQUARES, NOWHERE)]
        # the encoder wants xseg's own tokens; nothing of these texts uses them
        add_special_tokens(tokenizer)
        self.encoder = Encoder(tokenizer, TEMPLATE.read_text(encoding="utf8"), 4096)

    def sample(self, world: Scene, pairs: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and which of them the assistant says, of a conversation that starts with the board."""
        turns = [t for q, a in pairs for t in (Turn("user", q), Turn("assistant", a))]
        turns[0] = Turn("user", f"{IMAGE}\n{turns[0].text}")
        text = self.encoder.encode(turns)
        place = int(np.flatnonzero(text.input_ids == SENTINELS[IMAGE])[0])
        told = np.array([self.ids[word] for word in board(world)])
        ids = np.concatenate([text.input_ids[:place], told, text.input_ids[place + 1 :]])
        said = np.concatenate([text.labels[:place], np.full(len(told), IGNORE_LABEL - 1), text.labels[place + 1 :]])
        weight = np.where(said >= 0, 1.0, np.where(said == IGNORE_LABEL, QUESTION_WEIGHT, 0.0))
        weight[:place] = 0.0
        edges = np.flatnonzero(np.diff(said >= 0, prepend=False, append=False))
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            short = last - first <= SHORT + 1  # with the token that ends an answer
            weight[first:last] = np.where(short | np.isin(ids[first:last], self.squares), SHORT_WEIGHT, 1.0)
        return ids, weight.astype(np.float32)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return ids (B, n), padded on the right, and their weights in the loss, of one training step."""
        rows = []
        for k in range(BATCH):
            number = SPLITS["parts"][0] + step * BATCH + k
            world, rng = scene(number), np.random.default_rng([SEED, number, 1])
            rows.append(self.sample(world, asked(world, rng, step < EARLY)))
        length = max(len(ids) for ids, _ in rows)
        ids, weights = np.zeros((BATCH, length), np.int64), np.zeros((BATCH, length), np.float32)
        for k, (row, weight) in enumerate(rows):
            ids[k, : len(row)], weights[k, : len(row)] = row, weight
        return torch.from_numpy(ids), torch.from_numpy(weights)


class Composed(nn.Module):
    """A language model whose words of boards are sums of the words they are made of, and of something of their own.

    So "stripedredcircle" is near "striped", "red" and "circle" from the first step, and the 300 words of boards are not
    learnt one by one. ``finished`` writes the sums into a plain model.
    """

    def __init__(self, llm: nn.Module, ids: dict[str, int]) -> None:
        super().__init__()
        self.llm = llm
        rows = [(ids[word], ids[part]) for word, parts in composition().items() for part in parts]
        whole, parts = torch.tensor(rows).T
        self.register_buffer("whole", whole)
        self.register_buffer("parts", parts)

    def table(self) -> Tensor:
        """Return the (vocabulary, width) embeddings, of what is read and of what is written."""
        weight = self.llm.get_input_embeddings().weight
        return weight.index_add(0, self.whole, weight[self.parts])

    def forward(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """(B, n) ids -> logits of the tokens behind the places (B, n) that are ``wanted``."""
        table = self.table()
        states = self.llm.get_decoder()(inputs_embeds=F.embedding(ids, table), use_cache=False).last_hidden_state
        return F.linear(states[wanted], table).float()

    @torch.no_grad()
    def finished(self) -> nn.Module:
        """Return the plain language model."""
        twin = copy.deepcopy(self.llm)
        twin.get_input_embeddings().weight.copy_(self.table())
        return twin


def composition() -> dict[str, tuple[str, ...]]:
    """Return the words that a word of boards is made of."""
    out = {name.upper(): (name, "large") for name in SQUARES}
    return out | KINDS


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy of the next token, weighted."""
    ids, weights = batch
    wanted = weights[:, 1:] > 0
    logits = model(ids[:, :-1], wanted)
    each = F.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
    weight = weights[:, 1:][wanted]
    return {"lm": (each * weight).sum() / weight.sum()}


class Check:
    """Held-out accuracy in percent: every question and expression asked alone, with teacher forcing.

    An answer must match as a whole; of the answer to an expression, whose wording is free, the square alone.
    """

    def __init__(self, texts: Texts, scenes: int) -> None:
        self.rows: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for number in range(HELD_OUT, HELD_OUT + scenes):
            world, rng = scene(number), np.random.default_rng([SEED, number, 1])
            for q in questions(world, rng, 7):
                self._add(f"QA {q.type}", texts, world, (q.text, q.answer))
            for e in expressions(world, rng, 6):
                self._add(f"refer {e.kind}", texts, world, refer(e.text, world, e.things, rng))
        for name, rows in self.rows.items():
            if name.startswith("refer"):
                for ids, weight in rows:
                    weight[~np.isin(ids, texts.squares)] = 0.0

    def _add(self, name: str, texts: Texts, world: Scene, pair: tuple[str, str]) -> None:
        self.rows.setdefault(name, []).append(texts.sample(world, [pair]))

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return percent right by kind, and over all questions and all expressions."""
        right: dict[str, list[bool]] = {}
        llm = model.finished()
        for name, rows in sorted(self.rows.items()):
            for start in range(0, len(rows), 64):
                right.setdefault(name, []).extend(self._right(llm, rows[start : start + 64]))
        figures = {name: 100 * float(np.mean(values)) for name, values in right.items()}
        for group in ("QA", "refer"):
            together = [v for name, values in right.items() if name.startswith(group) for v in values]
            figures[group] = 100 * float(np.mean(together))
        return figures

    @staticmethod
    def _right(llm: nn.Module, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[bool]:
        length = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for k, (row, _) in enumerate(rows):
            ids[k, : len(row)] = torch.from_numpy(row)
        with torch.autocast("cpu", torch.bfloat16):
            guess = llm(input_ids=ids, use_cache=False).logits.argmax(-1)
        out = []
        for k, (row, weight) in enumerate(rows):
            said = torch.from_numpy(weight >= 1.0)[1:]
            out.append(bool((guess[k, : len(row) - 1] == ids[k, 1 : len(row)])[said].all()))
        return out


def main() -> None:
    """Train and save."""
    given = arguments(__doc__.splitlines()[0])
    given.out.mkdir(parents=True, exist_ok=True)
    texts = Texts(words.build(given.out))
    sizes = config(texts.size, texts.encoder.tokenizer.eos_token_id)
    torch.manual_seed(SEED)
    model = Composed(AutoModelForCausalLM.from_config(sizes, attn_implementation="sdpa"), texts.ids)
    plan = PLAN if given.steps is None else replace(PLAN, steps=given.steps)
    work = Path("runs/parts") / given.out.name
    model = train(model, plan, texts.batch, loss_of, Check(texts, 300), work)
    state = {n: v for n, v in model.finished().state_dict().items() if n != "lm_head.weight"}
    save(given.out, sizes.to_dict() | {"architectures": ["Phi3ForCausalLM"]}, state, card(CARD, plan, work), work)


CARD = f"""# phi: a miniature language model of ShapeWorld

Phi-3's architecture (6 layers of 160) with its own SentencePiece tokenizer. It has never seen a picture: it read
scenes as boards of 6 x 6 squares in words, 36 for what is on a square and 36 for where things have their centres,
and learnt to describe them, to answer questions and to name the square of what an expression refers to.

* Scenes: seed {SEED} of ShapeWorld's split "parts", which no stage and no suite uses; half of them with a held-out
  shape (heart, arrow), none with a held-out pair (purple triangle, yellow ring).
* Loss: next token; squares and short answers count {SHORT_WEIGHT}, other answers 1, questions {QUESTION_WEIGHT},
  boards 0.

Made by `make parts` (@STEPS steps of {BATCH} conversations, learning rate {PLAN.lr}, a moving average of the
weights is kept). The weights are bf16 safetensors in transformers' layout. Apache-2.0, generated data. Figures hold
for ShapeWorld and nothing else.

## What it can do

Held-out scenes, in percent, exact match of the whole answer, every question asked alone: questions by type, and
expressions by kind (the right square, or that it is nowhere). The last row is the weights in this folder;
`metrics.jsonl` has the loss.

"""

if __name__ == "__main__":
    main()
