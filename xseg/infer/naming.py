"""``xseg names``: a model names what it never saw a mask of, by SigLIP's texts."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xseg.config import DataRecipe, Suite, load_recipe
from xseg.data.checksums import digest
from xseg.errors import UserError
from xseg.infer.processing import XSegProcessor
from xseg.models import checkpoint, names, shards
from xseg.models.names import Names
from xseg.tasks import load_task
from xseg.types import Batch, ModelOutput

MARK = ("config.json", f'"model_type": "{names.KIND}"')
"""By this a folder is known as one of names, which may be replaced."""
WEIGHTS = "model.safetensors"
KEPT = ("vision_model.", "text_model.", "logit_")
"""Tensors of a whole SigLIP."""


def add(folder: Path, siglip: Path, template: str) -> Path:
    """Copy the SigLIP in ``siglip`` beside the model in ``folder``, for names; return where it lies.

    Raises UserError, and changes nothing, for a model without SigLIP, words or masks, and for all that ``names.load``
    refuses.
    """
    names.check_template(template)
    config, processor = checkpoint.read_config(folder), XSegProcessor.from_pretrained(folder)
    if not config.sees("siglip") or config.segmentor_config is None:
        raise UserError(f"{folder}: this model lacks SigLIP, words or masks: name the `final` folder of a stage 3")
    made = names.load(siglip, processor.sizes.llm, template)
    with torch.inference_mode():
        made.told(["thing"])  # a tokenizer that does not fit fails here, before anything is written
    place = folder / names.FOLDER
    with checkpoint.replacing(place, MARK, keep=False) as partial:
        partial.mkdir(parents=True)
        state = shards.read(shards.catalog(siglip))  # in the dtypes of the file; that all is finite is known by now
        save_file({n: v.contiguous() for n, v in state.items() if n.startswith(KEPT)}, partial / WEIGHTS)
        shutil.copyfile(siglip / "config.json", partial / "config.json")
        made.tokenizer.save_pretrained(partial)
        fields = {"template": template, "sha256": digest(partial / WEIGHTS, "sha256")}
        (partial / names.FILE).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf8")
    return place


def asked_by(suite: Suite) -> bool:
    """Whether any row of a suite has a task whose names SigLIP recognises. UserError for unknown recipes and tasks."""
    return any(load_task(row.task or load_recipe(DataRecipe, row.recipe).task).recognises for row in suite.rows)


def record(processor: XSegProcessor) -> dict[str, Any]:
    """What results say of the SigLIP that names objects too: its template and the checksum of its weights."""
    assert processor.names is not None
    return {"names": json.loads((processor.names / names.FILE).read_text(encoding="utf8"))}


def note(processor: XSegProcessor) -> str:
    """What the protocol of scores says where names were recognised; "" for a model without such a SigLIP."""
    if processor.names is None:
        return ""
    weights = f"{names.LISTED} for names that the training data list, {names.NEW} for others"
    if processor.categories is None:
        weights = f"{names.LISTED} for all, as the model does not say what its training data list"
    return f"; names also recognised by SigLIP under each mask (FC-CLIP's ensemble, SigLIP's weight {weights})"


@torch.inference_mode()
def recognised(
    made: Names, listed: Sequence[str] | None, batch: Batch, output: ModelOutput, asked: Sequence[Sequence[str]]
) -> ModelOutput:
    """Return ``output`` with the class logits of its last layer heard together with SigLIP (``names.ensemble``).

    ``asked`` (Q): the names of each query's concepts, in their order; of one name, or none, the query stays as it is.
    ``listed``: the categories of the training data, or None where they are not known.
    """
    rows = [row for row, texts in enumerate(asked) if len(texts) > 1]
    if not rows:
        return output
    pictures, image = batch.query_image[rows].unique(return_inverse=True)
    read = made.read(batch.llm_pixels[pictures].to(made.text.dtype))
    views = [batch.geometry[k] for k in pictures[image].tolist()]
    seen = made.seen(read[image], output.mask_logits[-1, rows], views)
    classes = output.class_logits.float().clone()
    for row, vectors in zip(rows, seen, strict=True):
        # in a mixed batch the concept columns are padded before the background column
        columns = [*range(len(asked[row])), classes.shape[-1] - 1]
        cosines = vectors @ made.told(asked[row]).T
        own, weight = classes[-1, row][:, columns], names.weights(asked[row], listed, cosines)
        classes[-1, row, :, columns] = names.ensemble(own, cosines, weight, made.scale)
    return dataclasses.replace(output, class_logits=classes)
