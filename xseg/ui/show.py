"""``xseg data show``: what a recipe gives the model to read."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from xseg.config import DataRecipe, ModelRecipe, load_recipe
from xseg.data.dataset import Preparation, load_dataset
from xseg.geometry.views import read_image
from xseg.infer.processing import XSegProcessor
from xseg.paths import file_name, make_folder
from xseg.types import Formatted, Query, Segment
from xseg.ui.draw import overlay
from xseg.ui.gallery import truth

PARTS = ("segmentor", "siglip", "llm")


def show(recipe: str, n: int, root: Path, out: Path, model: str, epoch: int, console: Console) -> None:
    """Print ``n`` conversations as training formats them and write their targets as ``out``/*.png."""
    found = load_recipe(DataRecipe, recipe)
    processor = XSegProcessor.from_recipe(load_recipe(ModelRecipe, model), PARTS)
    dataset = load_dataset(found, root=root, preparation=Preparation(processor.encoder, processor.sizes))
    console.print(f"{recipe}: {len(dataset)} samples, split {found.split}, task {found.task.name}", markup=False)
    make_folder(out)
    for index in range(min(n, len(dataset))):
        sample, formatted, encoded = dataset.sample(index), dataset.format(index, epoch), dataset.get(index, epoch)
        console.rule(Text(sample.key), align="left")
        if encoded.text is not None and processor.encoder is not None:
            console.print(Text.from_ansi(processor.encoder.show(encoded.text)))
            supervised = int((encoded.text.labels >= 0).sum())
            console.print(f"{len(encoded.text.input_ids)} ids, {supervised} supervised", style="dim")
        for place, query in enumerate(formatted.queries):
            console.print(Text(_described(place, query), style="dim"))
        if sample.images:
            path = out / f"{file_name(sample.key)}.png"
            drawn = [*truth(sample, _rows(formatted)), *_prompts(formatted)]
            overlay(read_image(sample.images[0], sample.key), drawn).save(path)
            console.print(Text(str(path), style="dim"), soft_wrap=True)


def _described(place: int, query: Query) -> str:
    seg = "no <SEG>" if query.seg is None else f"<SEG> {query.seg}"
    count = len(query.instances)
    rivals = f"{len(query.concepts)} concepts" if query.concepts else "fixed labels"
    return (
        f"query {place}: {seg}, {rivals}, {count} target mask{'' if count == 1 else 's'}, negatives: {query.negatives}"
    )


def _prompts(formatted: Formatted) -> list[Segment]:
    """The prompts on the sample's own image, as segments labelled in the order of their ``<region>``."""
    own = enumerate(formatted.prompts, start=1)
    return [Segment(prompt.mask, label=f"region {number}") for number, prompt in own if prompt.image == 0]


def _rows(formatted: Formatted) -> set[int]:
    return {row for query in formatted.queries for row in query.instances}
