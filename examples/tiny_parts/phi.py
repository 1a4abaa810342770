"""Train the miniature language model on text alone: ``python examples/tiny_parts/phi.py --out DIR``.

It reads a scene as a board in words (``xseg.data.shapeworld.board``), where X-SAM later puts the rows of SigLIP and of
SAM, and learns to describe it, to answer questions, and to say on which square the thing of an expression stands. So
counting, order and relations are learnt before any pixel. Scenes: seed 3 of the split "parts", which no stage uses;
half of them hold a held-out shape, none a held-out pair.

It learns in three parts. First to look up, nothing else: which thing, which square. Mixed with everything else from
the start, this takes many times as long to appear. Then everything in short lines, then everything as conversations;
late, lines come back for a while, half of them about the grounds, then nothing but squares of busy scenes is read, and
last half of everything is riddles.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from common import Plan, arguments, card, processes, save, train
from phi_texts import (
    BATCH,
    GROUNDS_FROM,
    GROUNDS_TO,
    LINES,
    LOOKS,
    QUESTION_WEIGHT,
    READS,
    RIDDLES,
    ROW,
    SEED,
    SHORT_WEIGHT,
    WIDTH,
    Sample,
    Texts,
    refer,
    riddle,
    scene,
    together,
)  # fmt: skip
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Phi3Config

from xseg.data.shapeworld import tokenizer as words
from xseg.data.shapeworld.board import place_of, square
from xseg.data.shapeworld.language import expressions
from xseg.data.shapeworld.questions import questions
from xseg.data.shapeworld.reasoning import TYPES, riddles
from xseg.data.shapeworld.world import SPLITS
from xseg.losses.points import generator

PLAN = Plan(steps=15000, lr=4e-3, seed=SEED, muon=1.0, warmup=50)
TOGETHER = 0.9
"""Cosine with the place of unread pieces above which a piece was pushed there (they have 0.95 and more, others at most
0.8)."""
HELD_OUT = SPLITS["parts"][0] + (1 << 23)
"""First scene of the held-out ones; the training stays below."""


def config(vocabulary: int, end: int) -> Phi3Config:
    """Return the architecture: Phi-3's, in small. Half of each head turns with the place: look-ups need none."""
    return Phi3Config(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=416, num_hidden_layers=6, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=2048, original_max_position_embeddings=2048,
        partial_rotary_factor=0.5, sliding_window=None, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip


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
    conversation, whose wording is free, the square alone, and of that to a riddle the reason, which leads to the thing.
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
            for r in riddles(world, rng, len(TYPES)):
                ids, told, weight = texts.chat(world, [riddle(r, world, rng)])
                said = np.flatnonzero(weight >= 1)
                weight[said[0] + len(texts.tokenizer(r.explanation, add_special_tokens=False).input_ids) :] = 0.0
                self._add(f"reason {r.type}", (ids, told, weight))
                self._add("lines riddle", texts.lines(world, [(r.text, square(world.things[r.thing]))]))

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
        for group in ("QA", "refer", "reason"):
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
grounds, and nothing else comes; from {READS} to {RIDDLES} lists of what stands on which square, of scenes with up to
ten things; from then on, half of everything is riddles with their reasons. Pieces of words that none of these texts
held, most of the vocabulary, end at one and the same place, where two new words read alike; afterwards each is given a
direction of its own. The weights are bf16 safetensors in transformers' layout. Apache-2.0, generated data. Figures hold
for ShapeWorld and nothing else.

## What it can do

Held-out scenes, in percent, exact match of the whole answer, every question asked alone: questions by type, and
expressions by kind (the right square, or that it is nowhere), in conversations; "lines" = all asked as short lines;
"reason" = the whole reason of a riddle, by kind ("A ring has a hole. It is the small red plain ring."; but for shapes,
all things that are compared, square by square, stand before it). The last row is the weights in this folder;
`metrics.jsonl` has the loss.

"""

if __name__ == "__main__":
    main()
