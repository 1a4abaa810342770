"""The language part alone, as a plain transformers folder: any program that reads such folders can serve it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from xseg.errors import UserError
from xseg.infer.export import DTYPES, HALF, WHOLE, Export, check_dtype, distance, final_folder
from xseg.infer.predictor import load
from xseg.models import checkpoint


def export_language(asked: Export) -> float:
    """Write ``asked.out``: weights, tokenizer and chat template of the language part; return how far logits differ.

    The folder is opened again with AutoModelForCausalLM and held against its source on fixed ids, both in float32.
    Raises UserError, and leaves ``out`` as it was, for an ``out`` that holds anything, for a model without a language
    part, and for logits that differ.
    """
    check_dtype(asked.dtype)
    source = final_folder(asked.source)
    checkpoint.check_place(asked.out)
    predictor, processor = load(source, "cpu")
    if processor.encoder is None:
        raise UserError(f"{source}: has no language part (a stage-1 model): name the `final` folder of a later stage")
    tokenizer, llm = processor.encoder.tokenizer, predictor.model.llm
    ids = torch.randint(len(tokenizer), (2, 16), generator=torch.Generator().manual_seed(0))
    with checkpoint.replacing(asked.out) as partial, torch.no_grad():
        wanted = llm(ids).logits
        _save(llm, tokenizer, processor.encoder.template, DTYPES[asked.dtype], partial)
        copy: Any = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32).eval()
        off = distance(wanted, copy(ids).logits, asked.dtype)
        most = WHOLE if asked.dtype == "fp32" else HALF
        if off > most:
            raise UserError(
                f"{source}: the {asked.dtype} copy of its language part is off by {off:.1e} of the largest logit (at "
                f"most {most:.0e}); {asked.out} was not written. Export with --dtype fp32"
            )
    return off


def _save(llm: Any, tokenizer: Any, template: str, dtype: torch.dtype, folder: Path) -> None:
    llm.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf8")
