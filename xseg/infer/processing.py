"""From images and turns to a Batch, with everything a checkpoint folder needs to do it again."""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from xseg.config import ModelRecipe
from xseg.data.collate import collate
from xseg.encode import Encoder
from xseg.errors import UserError
from xseg.geometry.masks import on_canvas
from xseg.geometry.views import ViewSizes
from xseg.models.build import sides
from xseg.models.names import FOLDER as NAMES
from xseg.paths import find
from xseg.tasks.refer_seg import LEAST
from xseg.tokens import SPECIAL_TOKENS, add_special_tokens
from xseg.types import Batch, Encoded, EncodedQuery, Formatted, ImageViews, Masks

FILE, TEMPLATE = "xseg_processor.json", "chat_template.jinja"
STATED = ("learnt", "categories")
"""Keys of what a model was trained on, its earlier stages too."""
AFTER_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ") ")


@dataclass(frozen=True)
class Calibration:
    """From which probability on a phrase of this model is there, and on what that was chosen (``xseg calibrate``)."""

    reject: float
    """In 0..1."""
    recipe: str
    split: str
    phrases: int
    n_acc: float
    """Percent of the phrases without a target that fall below."""
    t_acc: float
    """Percent of the phrases with a target that do not."""


class XSegProcessor:
    """The tokenizer, the chat template and the view sizes of one model; lives beside its weights.

    ``encoder`` is None for a model that reads no text (stage 1), ``calibration`` for one that was not calibrated.
    ``speaks_first``: tasks in which the model learnt to say before a mask what the mask may read: there it finds its
    answers itself. ``learnt``: every task that it was trained on, in the stages before too; None = not known.
    ``categories``: every name that its training data list, likewise. ``names``: the folder of a SigLIP that names
    objects too, where the model has one (``xseg names``).
    """

    def __init__(
        self,
        encoder: Encoder | None,
        sizes: ViewSizes,
        calibration: Calibration | None = None,
        speaks_first: Sequence[str] = (),
        learnt: Sequence[str] | None = None,
        categories: Sequence[str] | None = None,
        names: Path | None = None,
    ) -> None:
        self.encoder, self.sizes, self.calibration = encoder, sizes, calibration
        self.speaks_first = list(speaks_first)
        self.learnt = None if learnt is None else list(learnt)
        self.categories, self.names = None if categories is None else list(categories), names

    @property
    def reject(self) -> float:
        """The probability against the background below which a phrase is not there."""
        return LEAST if self.calibration is None else self.calibration.reject

    def own_options(self, task: str) -> dict[str, Any]:
        """What a task leaves to the model: its options' names and this model's values."""
        return {"reject": self.reject, "answer": "generated" if task in self.speaks_first else "given"}

    @classmethod
    def from_recipe(cls, recipe: ModelRecipe, parts: Sequence[str]) -> "XSegProcessor":
        """Build what a stage with these parts needs. Raises UserError for a missing tokenizer or template."""
        canvas, llm = sides(recipe, parts)
        encoder = _encoder_from_recipe(recipe) if "llm" in parts else None
        return cls(encoder, ViewSizes(canvas, llm, recipe.llm_view))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "XSegProcessor":
        """Read what ``save_pretrained`` wrote. Raises UserError when the folder is not one of xseg's."""
        path = Path(folder) / FILE
        try:
            fields = json.loads(path.read_text(encoding="utf8"))
            sizes = ViewSizes(fields["mask_size"], fields["llm_size"], fields["llm_mode"])
            max_tokens, chosen = fields["max_tokens"], fields.get("calibration")
            speaks_first = fields.get("speaks_first", ())
            trained = {key: fields.get(key) for key in STATED}
            calibration = None if chosen is None else Calibration(**chosen)
        except FileNotFoundError as error:
            raise UserError(f"{folder}: no {FILE} here; give the `final` folder of a stage") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error!r}); save the model again") from error
        if max_tokens is None:
            return cls(None, sizes, calibration, **trained)
        template = (Path(folder) / TEMPLATE).read_text(encoding="utf8")
        encoder = Encoder(_tokenizer(Path(folder), _llm_config(Path(folder))), template, max_tokens)
        names = Path(folder) / NAMES
        return cls(encoder, sizes, calibration, speaks_first, **trained, names=names if names.is_dir() else None)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files, chat_template.jinja, xseg_processor.json and ``names`` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.encoder is not None:
            self.encoder.tokenizer.save_pretrained(folder)
            (folder / TEMPLATE).write_text(self.encoder.template, encoding="utf8")
        if self.names is not None and self.names.resolve() != (folder / NAMES).resolve():
            shutil.copytree(self.names, folder / NAMES, dirs_exist_ok=True)
        (folder / FILE).write_text(self.fields(), encoding="utf8")

    def fields(self) -> str:
        """The text of xseg_processor.json: what is not the tokenizer's and not the template's."""
        fields = {
            "mask_size": self.sizes.canvas,
            "llm_size": self.sizes.llm,
            "llm_mode": self.sizes.llm_mode,
            "max_tokens": None if self.encoder is None else self.encoder.max_tokens,
            "calibration": None if self.calibration is None else dataclasses.asdict(self.calibration),
            "speaks_first": self.speaks_first,
            "learnt": self.learnt,
            "categories": self.categories,
        }
        return json.dumps(fields, indent=1) + "\n"

    def encode(
        self, views: Sequence[ImageViews], formatted: Formatted, *, generation: bool = False, key: str = "request"
    ) -> Encoded:
        """Make a request ready for ``batch``: views of its images, turns, queries without targets, drawn prompts.

        Raises UserError for text on a model without a language part.
        """
        text = self._with_text().encode(formatted.turns, generation=generation) if formatted.turns else None
        nothing, no_class = np.zeros((0, self.sizes.canvas, self.sizes.canvas), np.uint8), np.zeros(0, np.int64)
        queries = [EncodedQuery(q.seg, q.concepts, q.image, masks=nothing, classes=no_class) for q in formatted.queries]
        prompts = [(self._on_canvas(p.mask, views[p.image]), p.image) for p in formatted.prompts]
        return Encoded(key, text, tuple(views), tuple(queries), tuple(prompts))

    def batch(self, requests: Sequence[Encoded]) -> Batch:
        """Collate requests; (B, T) ids and all images, on CPU."""
        return collate(list(requests))

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids as text up to the stop token, special tokens kept.

        SentencePiece tokenizers write a space after each special token that was not there; it is left out where the
        text then gives the very same ids, as it must when the answer is read again in a later turn.
        """
        encoder = self._with_text()
        own = list(takewhile(lambda i: i not in encoder.stop_ids, ids))
        text = encoder.decode(own).strip()
        tight = AFTER_SPECIAL.sub(r"\1", text)
        return tight if encoder.tokenizer(tight, add_special_tokens=False)["input_ids"] == own else text

    def _with_text(self) -> Encoder:
        if self.encoder is None:
            raise UserError(
                "this model has no language part (it is a stage-1 checkpoint), so it cannot read text: load the "
                "`final` folder of a later stage"
            )
        return self.encoder

    @staticmethod
    def _on_canvas(mask: Mapping[str, Any], views: ImageViews) -> np.ndarray:
        masks = Masks(views.geometry.original, (mask,))
        return np.asarray(on_canvas(masks, [0], views.geometry)[0])


def stated(folder: Path, key: str) -> list[str] | None:
    """What the model of a folder was trained on, by a key of ``STATED``; None where it does not say."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text(encoding="utf8")).get(key)
    except FileNotFoundError:
        return None  # weights alone
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); save the model again") from error
    return None if found is None else [str(value) for value in found]


def _encoder_from_recipe(recipe: ModelRecipe) -> Encoder:
    name = recipe.tokenizer or recipe.llm.get("pretrained", "")
    if not name:
        raise UserError("model recipe: key 'tokenizer' is missing; name the folder of a Hugging Face tokenizer")
    tokenizer = _tokenizer(find(str(name), "train_stages/models", suffix=""))
    add_special_tokens(tokenizer)
    template = find(recipe.chat_template, "chat_templates", ".jinja").read_text(encoding="utf8")
    return Encoder(tokenizer, template, recipe.max_tokens)


def _tokenizer(folder: Path, config: Any = None) -> Any:
    """The tokenizer of a folder, or the one inside a .gguf file."""
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"config": config} if config else {}
    if folder.suffix == ".gguf":
        options["gguf_file"] = folder.name
    place = folder.parent if "gguf_file" in options else folder
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{folder}: not the folder of a Hugging Face tokenizer: {error}") from error


def _llm_config(folder: Path) -> Any:
    """The language model's own config, by which transformers knows the tokenizer; beside it lies that of xseg."""
    from xseg.models.configuration import XSegConfig

    return XSegConfig.from_pretrained(folder).text_config if (folder / "config.json").is_file() else None
