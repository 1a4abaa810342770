"""Train the miniature language model on text alone: ``python examples/tiny_parts/phi.py --out DIR``.

It reads a scene as a board in words (``xseg.data.shapeworld.board``), where X-SAM later puts the rows of SigLIP and of
SAM, and learns to describe it, to answer questions, and to say on which square the thing of an expression stands. So
counting, order and relations are learnt before any pixel. Scenes: seed 3 of the split "parts", which no stage uses;
half of them hold a held-out shape, none a held-out pair.

It learns in three parts. First to look up, nothing else: which thing, which square. Mixed with everything else from
the start, this takes many times as long to appear. Then everything in short lines, then everything as conversations;
late, lines come back for a while, half of them about the grounds.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Plan, arguments, card, processes, save, train
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Phi3Config

from xseg.data.shapeworld import tokenizer as words
from xseg.data.shapeworld.board import BARE, COVERED, MOST, NOWHERE, SQUARES, board, place_of, square
from xseg.data.shapeworld.language import (
    ATTRIBUTES,
    Kind,
    Noun,
    Nouns,
    descriptions,
    draw_expression,
    expressions,
    nouns_of,
)
from xseg.data.shapeworld.questions import questions
from xseg.data.shapeworld.world import (
    COLOURS,
    GROUNDS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    Scene,
    Thing,
    allowed,
    sample_scene,
)
from xseg.encode import Encoder
from xseg.losses.points import generator
from xseg.tasks import phrasing
from xseg.tokens import IGNORE_LABEL, IMAGE, SEG, SENTINELS, add_special_tokens
from xseg.types import Turn

SEED, SIDE, BATCH = 3, 48, 16
PLAN = Plan(steps=10100, lr=4e-3, seed=SEED, muon=1.0, warmup=50)
TOGETHER = 0.99
"""Cosine with the place of unread pieces above which a piece was pushed there (they have 0.999, others at most 0.8)."""
LOOKS, LINES = 1000, 3500
"""Steps after which more is asked than look-ups, and after which lines become conversations."""
GROUNDS_FROM, GROUNDS_TO = 7500, 8100
"""Between these steps lines about the grounds come back: whether one is there stays at chance without them."""
MIXED = 3
"""After ``LINES`` every third step stays one of lines."""
HARD = ("relation", "ground")
"""Questions that come more often: in equal shares they stay at chance when all others are learnt."""
HELD_OUT = SPLITS["parts"][0] + (1 << 23)
"""First scene of the held-out ones; the training stays below."""
QUESTION_WEIGHT, SHORT_WEIGHT, SHORT = 0.05, 3.0, 3
"""Weights in the loss: of what the user says; of squares and of answers of at most ``SHORT`` tokens. The rest counts 1.
Without them the long descriptions drown the answers that take a step of thought."""
HERE = "here "
"""Stands before a square in the answer to a request for a mask, where ``<SEG>`` stands later."""
VALUES = {"size": SIZES, "colour": COLOURS, "texture": TEXTURES, "shape": SHAPES}
TEMPLATE = Path(__file__).parents[2] / "chat_templates/phi3.jinja"
ROW = -2
"""Id of a place where a square of the board stands; the words of the squares come beside the ids."""
Pairs = list[tuple[str, str]]
"""(question, answer)."""


def config(vocabulary: int, end: int) -> Phi3Config:
    """Return the architecture: Phi-3's, in small. Half of each head turns with the place: look-ups need none."""
    return Phi3Config(
        vocab_size=vocabulary, hidden_size=160, intermediate_size=416, num_hidden_layers=6, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=2048, original_max_position_embeddings=2048,
        partial_rotary_factor=0.5, sliding_window=None, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip


def scene(number: int) -> Scene:
    """Return scene ``number`` of this script's own stream."""
    return sample_scene(SEED, number, side=SIDE, policy="open" if number % 2 else "seen")


def look_ups(world: Scene, rng: np.random.Generator) -> Pairs:
    """Draw 16 look-ups: from words to a square, from a square to words, and to every square that some words fit."""
    nouns, out, told = nouns_of(world), Pairs(), board(world)
    while len(out) < 16:
        thing = world.things[int(rng.integers(len(world.things)))]
        way = rng.integers(5)
        if way == 0:
            *words, name = told[int(rng.integers(len(told)))]
            out.append((name, " ".join(words)))
        elif way == 1 and len(nouns[_look(thing)]) == 1:
            out.append((f"the {_look(thing).text()}", square(thing)))
        elif way == 2:
            out += _told(world, nouns, "attribute", rng)
        elif way == 3:
            out.append(ground(world, rng))
        else:
            noun, places = filtered(world, rng)
            out.append((f"every {noun}", places))
    return out


def ground(world: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Return which grounds there are, in the order of the alphabet, or of one of them whether it is bare or nowhere."""
    if rng.random() < 0.5:
        return "picture", " ".join(sorted(world.ground.names))
    name = str(rng.choice(GROUNDS))
    return name, BARE if name in world.ground.names else NOWHERE


def grounds(world: Scene, rng: np.random.Generator) -> Pairs:
    """Draw lines of every kind, about half of them about the grounds."""
    found = [ground(world, rng) for _ in range(4)] + everything(world, rng)[:8]
    found += [(q.text, q.answer) for q in questions(world, rng, 2, ("ground",))]
    return [found[i] for i in rng.permutation(len(found))]


def _look(thing: Thing) -> Noun:
    return Noun(thing.size, thing.colour, thing.texture, thing.shape)


def _told(world: Scene, nouns: Nouns, kind: Kind, rng: np.random.Generator) -> Pairs:
    found = draw_expression(world, nouns, kind, rng)
    return [] if found is None else [(found.text, place_of(world, found.things))]


def filtered(world: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Draw one or two attributes; return their words and the squares of all they fit, of something half of the time."""
    like = world.things[rng.integers(len(world.things))]
    names = [str(n) for n in rng.choice(ATTRIBUTES, rng.integers(1, 3), False)]
    values = {n: getattr(like, n) for n in names}
    if rng.random() < 0.5:
        values[names[0]] = str(rng.choice(VALUES[names[0]]))
    noun = Noun(**values)
    if not allowed(noun.colour or "", noun.shape or SHAPES[0], "open"):
        noun = replace(noun, colour=None)
    places = [square(t) for t in world.things if noun.fits(t)]
    return noun.text(), " ".join(sorted(places, key=SQUARES.index)) or NOWHERE


def everything(world: Scene, rng: np.random.Generator) -> Pairs:
    """Draw lines of every kind: look-ups, expressions and questions."""
    found = look_ups(world, rng)[:4] + [(e.text, place_of(world, e.things)) for e in expressions(world, rng, 6)]
    found += [ground(world, rng), ground(world, rng)]
    found += _asked(world, rng)
    return [found[i] for i in rng.permutation(len(found))]


def _asked(world: Scene, rng: np.random.Generator) -> Pairs:
    asked = [*questions(world, rng, 6), *questions(world, rng, 5, HARD), *questions(world, rng, 2, ("ground",))]
    return [(q.text, q.answer) for q in asked]


def conversation(world: Scene, rng: np.random.Generator) -> Pairs:
    """Draw what a user asks: descriptions, or questions and requests for masks."""
    if rng.random() < 0.25:
        found = descriptions(world, rng)
    else:
        found = _asked(world, rng)
        found += [refer(e.text, place_of(world, e.things), rng) for e in expressions(world, rng, 5)]
    return [found[i] for i in rng.permutation(len(found))]


def refer(text: str, place: str, rng: np.random.Generator) -> tuple[str, str]:
    """Return a request for the mask of a thing, answered by the square it stands on."""
    question = phrasing.pick(phrasing.PHRASE, rng, True).format(phrase=text)
    return question, phrasing.pick(phrasing.ANSWER, rng, True).replace(SEG, f"{HERE}{place}")


Sample = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Ids (n), ``ROW`` where a square stands; words (36 or 72, MOST) of the squares, -1 = none; weights (n) in the loss."""


class Texts:
    """Scenes and what is said about them, as ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.size = len(tokenizer)
        self.tokenizer = tokenizer
        self.end = tokenizer.eos_token_id
        told = (*SQUARES, NOWHERE, COVERED, BARE, *GROUNDS, *SIZES, *COLOURS, *TEXTURES, *SHAPES)
        self.ids = {word: self._ids(word)[0] for word in told}
        self.squares = [self.ids[word] for word in (*SQUARES, NOWHERE)]
        # the encoder wants xseg's own tokens; nothing of these texts uses them
        add_special_tokens(tokenizer)
        self.encoder = Encoder(tokenizer, TEMPLATE.read_text(encoding="utf8"), 4096)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _board(self, world: Scene, twice: bool) -> np.ndarray:
        out = np.full((len(SQUARES), MOST), -1)
        for row, told in zip(out, board(world), strict=True):
            row[: len(told)] = [self.ids[word] for word in told]
        return np.repeat(out, 2, axis=0) if twice else out

    def lines(self, world: Scene, pairs: Pairs, twice: bool = False) -> Sample:
        """Return a board and then lines, each a question, its answer and the end token."""
        told = self._board(world, twice)
        ids, weights = [self.tokenizer.bos_token_id] + [ROW] * len(told), [0.0] * (len(told) + 1)
        for question, answer in pairs:
            asked, said = self._ids(question), [*self._ids(answer), self.end]
            ids += asked + said
            weights += [QUESTION_WEIGHT] * len(asked) + [1.0] * len(said)
        return np.array(ids), told, np.array(weights, np.float32)

    def chat(self, world: Scene, pairs: Pairs, twice: bool = False) -> Sample:
        """Return a conversation whose image is the board."""
        turns = [t for q, a in pairs for t in (Turn("user", q), Turn("assistant", a))]
        turns[0] = Turn("user", f"{IMAGE}\n{turns[0].text}")
        text, told = self.encoder.encode(turns), self._board(world, twice)
        place = int(np.flatnonzero(text.input_ids == SENTINELS[IMAGE])[0])
        rows = np.full(len(told), ROW)
        ids = np.concatenate([text.input_ids[:place], rows, text.input_ids[place + 1 :]])
        said = np.concatenate([text.labels[:place], np.full(len(told), IGNORE_LABEL - 1), text.labels[place + 1 :]])
        weight = np.where(said >= 0, 1.0, np.where(said == IGNORE_LABEL, QUESTION_WEIGHT, 0.0))
        weight[:place] = 0.0
        edges = np.flatnonzero(np.diff(said >= 0, prepend=False, append=False))
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            short = last - first <= SHORT + 1  # with the token that ends an answer
            weight[first:last] = np.where(short | np.isin(ids[first:last], self.squares), SHORT_WEIGHT, 1.0)
        return ids, told, weight.astype(np.float32)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids (B, n), padded on the right, words of squares and weights of a process's share of a step.

        Every second batch tells each square twice, as the two image encoders will.
        """
        rows = []
        for k in range(rank, BATCH, world):
            number = SPLITS["parts"][0] + step * BATCH + k
            world, rng = scene(number), np.random.default_rng([SEED, number, 1])
            ask = grounds if GROUNDS_FROM <= step < GROUNDS_TO else everything if step >= LOOKS else look_ups
            if step < LINES or step % MIXED == 0 or ask is grounds:
                rows.append(self.lines(world, ask(world, rng), step % 2 == 1))
            else:
                rows.append(self.chat(world, conversation(world, rng), step % 2 == 1))
        return together(rows)


def together(rows: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad samples on the right, with weight 0."""
    length = max(len(ids) for ids, _, _ in rows)
    ids, weights = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.float32)
    for k, (row, _, weight) in enumerate(rows):
        ids[k, : len(row)], weights[k, : len(row)] = row, weight
    return torch.from_numpy(ids), torch.from_numpy(np.stack([told for _, told, _ in rows])), torch.from_numpy(weights)


def logits(llm: nn.Module, ids: Tensor, told: Tensor, wanted: Tensor) -> Tensor:
    """Return the logits (m, vocabulary) of the tokens behind the places (B, n) that are ``wanted``."""
    table = llm.get_input_embeddings().weight
    squares = (F.embedding(told.clamp(min=0), table) * (told >= 0)[..., None]).sum(2)
    read = F.embedding(ids.clamp(min=0), table)
    read = read.masked_scatter((ids == ROW)[..., None], squares)
    states = llm.get_decoder()(inputs_embeds=read, use_cache=False).last_hidden_state
    return F.linear(states[wanted], table).float()


def loss_of(llm: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy of the next token, weighted."""
    ids, told, weights = batch
    wanted = weights[:, 1:] > 0
    each = F.cross_entropy(logits(llm, ids[:, :-1], told, wanted), ids[:, 1:][wanted], reduction="none")
    weight = weights[:, 1:][wanted]
    return {"lm": (each * weight).sum() / weight.sum()}


class Check:
    """Held-out accuracy in percent: every question and expression asked alone, with teacher forcing.

    Asked as lines and in conversations. An answer must match as a whole; of the answer to an expression in a
    conversation, whose wording is free, the square alone.
    """

    def __init__(self, texts: Texts, scenes: int) -> None:
        self.rows: dict[str, list[Sample]] = {}
        for number in range(HELD_OUT, HELD_OUT + scenes):
            world, rng = scene(number), np.random.default_rng([SEED, number, 1])
            for q in questions(world, rng, 7):
                self._add(f"QA {q.type}", texts.chat(world, [(q.text, q.answer)]))
                self._add("lines QA", texts.lines(world, [(q.text, q.answer)]))
            for e in expressions(world, rng, 6):
                where = place_of(world, e.things)
                ids, told, weight = texts.chat(world, [refer(e.text, where, rng)])
                weight[~np.isin(ids, texts.squares)] = 0.0
                self._add(f"refer {e.kind}", (ids, told, weight))
                self._add("lines refer", texts.lines(world, [(e.text, where)]))

    def _add(self, name: str, row: Sample) -> None:
        self.rows.setdefault(name, []).append(row)

    @torch.no_grad()
    def __call__(self, llm: nn.Module) -> dict[str, float]:
        """Return percent right by kind, and over all questions and all expressions."""
        right: dict[str, list[bool]] = {}
        for name, rows in sorted(self.rows.items()):
            for start in range(0, len(rows), 64):
                right.setdefault(name, []).extend(_right(llm, rows[start : start + 64]))
        figures = {name: 100 * float(np.mean(values)) for name, values in right.items()}
        for group in ("QA", "refer"):
            values = [v for name, found in right.items() if name.startswith(group) for v in found]
            figures[group] = 100 * float(np.mean(values))
        return figures


def _right(llm: nn.Module, rows: Sequence[Sample]) -> list[bool]:
    ids, told, weights = together(rows)
    asked = weights[:, 1:] >= 1
    with torch.autocast("cpu", torch.bfloat16):
        guess = logits(llm, ids[:, :-1], told, asked).argmax(-1)
    wrong = torch.zeros(asked.shape, dtype=torch.bool)
    wrong[asked] = guess != ids[:, 1:][asked]
    return [not bool(row.any()) for row in wrong]


def told_apart(table: Tensor) -> Tensor:
    """Return embeddings (V, d) in which pieces that no text held have a direction each.

    Training pushes them all to one place, far from every answer. There they read the same, whatever they spell: a later
    stage that asks in new words would have to part them first. What keeps them from being said, the place, stays.
    """
    table = table.float()
    units = F.normalize(table, dim=1)
    place = F.normalize(units.median(0).values, dim=0)
    unread = units @ place > TOGETHER
    own = torch.randn(table.shape, generator=generator("cpu", SEED))
    own = F.normalize(own - (own @ place)[:, None] * place, dim=1) * table[~unread].norm(dim=1).median()
    return table + own * unread[:, None]


def main() -> None:
    """Train and save."""
    given = arguments(__doc__.splitlines()[0])
    given.out.mkdir(parents=True, exist_ok=True)
    rank, world = processes()
    with TemporaryDirectory() as other:
        texts = Texts(words.build(Path(other) if rank else given.out))
    sizes = config(texts.size, texts.encoder.tokenizer.eos_token_id)
    torch.manual_seed(SEED)
    # on CPUs the plain attention's backward pass is 2 to 4 times as fast as the fused one's at these lengths
    model = AutoModelForCausalLM.from_config(sizes, attn_implementation="eager")
    plan = PLAN if given.steps is None else replace(PLAN, steps=given.steps)
    work = Path("runs/parts") / given.out.name
    share = partial(texts.batch, rank=rank, world=world)
    model = train(model, plan, share, loss_of, Check(texts, 300), work)
    if rank:
        return
    state = {n: v for n, v in model.state_dict().items() if n != "lm_head.weight"}
    state["model.embed_tokens.weight"] = told_apart(state["model.embed_tokens.weight"])
    save(given.out, sizes.to_dict() | {"architectures": ["Phi3ForCausalLM"]}, state, card(CARD, plan, work), work)


CARD = f"""# phi: a miniature language model of ShapeWorld

Phi-3's architecture (6 layers of 160) with its own SentencePiece tokenizer. It has never seen a picture: it read
scenes as boards of 6 x 6 squares, each a few words at one place (the sum of their embeddings), and learnt to name the
square of what an expression refers to, to answer questions and to describe.

* Scenes: seed {SEED} of ShapeWorld's split "parts", which no stage and no suite uses; half of them with a held-out
  shape (heart, arrow), none with a held-out pair (purple triangle, yellow ring).
* Loss: next token; squares and short answers count {SHORT_WEIGHT}, other answers 1, questions {QUESTION_WEIGHT},
  boards 0.

Made by `make parts`: @STEPS steps of {BATCH} boards, learning rate {PLAN.lr}, a moving average of the weights is kept.
The first {LOOKS} steps are look-ups alone (which thing, which square), up to {LINES} short lines of every kind follow,
then conversations, with lines every third step; from {GROUNDS_FROM} to {GROUNDS_TO} half of all lines are about the
grounds, and nothing else comes. Pieces of words that none of these texts held, most of the vocabulary, end at one and
the same place, where any two new words read alike; afterwards each is given a direction of its own. The weights are
bf16 safetensors in transformers' layout. Apache-2.0, generated data. Figures hold for ShapeWorld and nothing else.

## What it can do

Held-out scenes, in percent, exact match of the whole answer, every question asked alone: questions by type, and
expressions by kind (the right square, or that it is nowhere), in conversations; "lines" = all asked as short lines. The
last row is the weights in this folder; `metrics.jsonl` has the loss.

"""

if __name__ == "__main__":
    main()
