"""``xseg names``: a model names what it never saw a mask of, by SigLIP's texts."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from xseg.errors import UserError
from xseg.infer.processing import XSegProcessor
from xseg.models import checkpoint, names
from xseg.models.names import Names
from xseg.types import Batch, ModelOutput

NOTE = (
    f"; names also recognised by SigLIP under each mask (FC-CLIP's ensemble, SigLIP's weight {names.TRAINED} for names "
    f"with masks in training, {names.NEW} for others)"
)
"""What the protocol of scores says where that was so."""
MARK = (names.FILE, '"template"')
"""By this a folder is known as one of names, which may be replaced."""
FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "tokenizer*",
         "special_tokens_map.json", "spiece.model", "vocab*", "merges.txt")  # fmt: skip
"""What is copied of a SigLIP's folder."""


def add(folder: Path, siglip: Path, template: str) -> Path:
    """Copy the SigLIP in ``siglip`` beside the model in ``folder``, for names; return where it lies.

    Raises UserError, and changes nothing, for a model without SigLIP, words or masks, a SigLIP that is not whole or
    reads pictures of another size, and a template without its one {}.
    """
    if template.count("{}") != 1 or "{" in template.replace("{}", "") or "}" in template.replace("{}", ""):
        raise UserError(f"--template {template!r}: must hold one {{}}, where the name goes, and no other brace")
    config, processor = checkpoint.read_config(folder), XSegProcessor.from_pretrained(folder)
    if not config.sees("siglip") or config.segmentor_config is None:
        raise UserError(f"{folder}: this model lacks SigLIP, words or masks: name the `final` folder of a stage 3")
    if not siglip.is_dir():
        raise UserError(f"--from {siglip}: no such folder; name a whole SigLIP in transformers' layout")
    made = names.load(siglip, template)
    size = made.vision.config.image_size
    if size != processor.sizes.llm:
        raise UserError(
            f"{siglip}: reads pictures of {size} pixels, the model in {folder} shows {processor.sizes.llm}: name a "
            "SigLIP of that size"
        )
    with torch.inference_mode():
        if not torch.isfinite(made.told(processor.named or ["thing"])).all():
            raise UserError(f"{siglip}: its texts give vectors that are not finite; copy it again")
    place = folder / names.FOLDER
    with checkpoint.replacing(place, MARK) as partial:
        partial.mkdir(parents=True)
        for file in sorted({file for pattern in FILES for file in siglip.glob(pattern)}):
            shutil.copyfile(file, partial / file.name)
        (partial / names.FILE).write_text(json.dumps({"template": template}) + "\n", encoding="utf8")
    return place


@torch.inference_mode()
def recognised(
    made: Names, trained: Sequence[str] | None, batch: Batch, output: ModelOutput, asked: Sequence[Sequence[str]]
) -> ModelOutput:
    """Return ``output`` with the class logits of its last layer heard together with SigLIP (``names.ensemble``).

    ``asked`` (Q): the names of each query's concepts, in their order; none = the query stays as it is. ``trained``:
    names that training gave masks, or None where that is not known.
    """
    rows = [row for row, texts in enumerate(asked) if texts]
    if not rows:
        return output
    image = batch.query_image[rows]
    views = [batch.geometry[k] for k in image.tolist()]
    seen = made.seen(batch.llm_pixels[image].float(), output.mask_logits[-1, rows], views)
    classes = output.class_logits.float().clone()
    for row, vectors in zip(rows, seen, strict=True):
        # in a mixed batch the concept columns are padded before the background column
        columns = [*range(len(asked[row])), classes.shape[-1] - 1]
        cosines = vectors @ made.told(asked[row]).T
        own, weight = classes[-1, row][:, columns], names.weights(asked[row], trained, cosines)
        classes[-1, row, :, columns] = names.ensemble(own, cosines, weight, made.scale)
    return dataclasses.replace(output, class_logits=classes)
