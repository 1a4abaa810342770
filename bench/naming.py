"""Does the language model know where the thing of an expression is, and does its mask follow: ``python bench/naming.py
--model DIR``.

Asked for a mask it says the square of ShapeWorld's board in words: in the place of ``<SEG>`` after stage 2, on both
sides of it after stage 3. Held-out pictures of the split "val", expressions of their own, each in two wordings. Prints
a JSON line: percent of the answers that name the right square, or that there is none, and no other, by kind of
expression; and after stage 3 how many masks have an IoU above 0.5 with the thing that is meant, where its square is
named and where not, and how loud ``<SEG>`` is: lengths of its states and of the vectors made of them, and of what
differs between expressions.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xseg.data.shapeworld.board import NOWHERE, SQUARES, place_of
from xseg.data.shapeworld.draw import draw
from xseg.data.shapeworld.language import Expression, expressions
from xseg.data.shapeworld.world import Scene, split_scene
from xseg.geometry.masks import encode, iou
from xseg.infer.predictor import load
from xseg.infer.session import Answer, Session
from xseg.models.xseg import XSegModel

SIDE, SEED, EACH = 96, 0, 4
WORDINGS = ("Please segment {} in the image.", "Where is {}? Answer with a mask.")
NEW_TOKENS = 24
PLACES = re.compile("|".join((*SQUARES, NOWHERE)))


def hits(answer: Answer, scene: Scene, found: Expression) -> bool:
    """Whether the first mask has an IoU above 0.5 with the thing."""
    thing = scene.owner == len(scene.ground.names) + 1 + found.things[0]
    return iou(answer.segments[0].mask, encode(thing)) > 0.5


def lengths(rows: list[Tensor]) -> dict[str, float]:
    """Mean length of vectors, and of what is left without their mean."""
    x = torch.stack(rows).float()
    return {
        "length": round(x.norm(dim=1).mean().item(), 2),
        "spread": round((x - x.mean(0)).norm(dim=1).mean().item(), 2),
    }


def listen(model: XSegModel) -> dict[str, list[Tensor]]:
    """Collect each state at ``<SEG>`` and the vector made of it: the first row that llm_projector reads and makes."""
    heard: dict[str, list[Tensor]] = {"state": [], "vector": []}
    if hasattr(model, "llm_projector"):

        def hook(_: Any, given: tuple[Tensor], made: Tensor) -> None:
            heard["state"].append(given[0][0].detach())
            heard["vector"].append(made[0].detach() * model.config.segmentor_config.seg_gain)

        model.llm_projector.register_forward_hook(hook)
    return heard


def main() -> None:
    """Ask and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="final/ of stage 2 or 3 on ShapeWorld")
    parser.add_argument("--images", type=int, default=100)
    given = parser.parse_args()
    predictor = load(given.model)[0]
    session, heard = Session(predictor), listen(predictor.model)
    right: dict[str, list[bool]] = defaultdict(list)
    for number in range(1, given.images + 1):
        scene = split_scene(SEED, "val", number, side=SIDE)
        session.set_image(Image.fromarray(draw(scene)))
        for found in expressions(scene, np.random.default_rng([SEED, number, 2]), EACH):
            for wording in WORDINGS:
                answer = session.ask(wording.format(found.text), max_new_tokens=NEW_TOKENS)
                session.undo()
                named = set(PLACES.findall(answer.text)) == {place_of(scene, found.things)}
                right["named"].append(named)
                right[f"named, {found.kind}"].append(named)
                if found.things and answer.segments:
                    right[f"mask right where {'named' if named else 'not named'}"].append(hits(answer, scene, found))
    shares = {what: round(100 * float(np.mean(values)), 1) for what, values in sorted(right.items())}
    out = {"model": str(given.model), "images": given.images, "n": len(right["named"]), **shares}
    if heard["state"]:
        out |= {f"<SEG> {what}": lengths(rows) for what, rows in heard.items()}
        queries = predictor.model.segmentor.mask_decoder.queries_features.weight
        out["object query length"] = round(queries.float().norm(dim=1).mean().item(), 2)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
