"""A model card: what a model was trained on and what was measured, from the files that training and evaluation left."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from xseg.config import DataRecipe, ModelRecipe, load_recipe
from xseg.errors import UserError
from xseg.geometry.views import ViewSizes
from xseg.infer.summary import is_blind
from xseg.paths import DEFAULT_MODEL, find

FILE, STAGE, EXAMPLE = "README.md", "stage.yaml", "example.png"
PHRASE = "the large blue square"
"""What the example picture shows."""
GENERATED = "Apache-2.0 (generated)"
"""The licence of data that xseg makes itself."""


@dataclass(frozen=True)
class Agreement:
    """How far a copy answers as its source does."""

    pictures: int
    masks: int
    iou: float
    """Mean over ``masks`` of the IoU of the two masks, 0..1."""
    texts: int
    same: int
    """How many of ``texts`` generated answers are equal word by word."""


@dataclass(frozen=True)
class Copy:
    """The folder that the card describes."""

    name: str
    dtype: str
    parameters: int
    sizes: ViewSizes
    agreement: Agreement
    example: bool = False
    """Whether a picture to try it on lies in the folder."""
    names: bool = False
    """Whether a whole SigLIP does, which names objects too."""


def write(source: Path, copy: Copy) -> str:
    """The card of the copy of a ``final`` folder, as Markdown."""
    stages = list(lineage(source))
    licences = dataset_licences(stages)
    free = bool(licences) and set(licences.values()) == {GENERATED}
    sections = [
        f"---\nlicense: {'apache-2.0' if free else 'other'}\nlibrary_name: xseg\npipeline_tag: image-segmentation\n---",
        f"# {copy.name}",
        _what(copy),
        _use(copy),
        "## What it was trained on",
        *_training(stages),
        *_datasets(licences),
        *_parts(stages),
        *_figures(source),
        "## The copy against its float32 source",
        _agreement(copy),
        "## What it cannot do",
        _limits(free),
        "## Licence",
        _licence(free),
    ]
    return "\n\n".join(sections) + "\n"


def lineage(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, recipe) of the stages a model went through, the first first; a folder without a recipe ends the line.

    Earlier stages are looked for where their recipe says, and beside this one, for runs that were moved.
    """
    path = folder / STAGE
    if not path.is_file():
        return
    recipe = yaml.safe_load(path.read_text(encoding="utf8"))
    seen = set()
    for earlier in map(Path, recipe.get("init_from", ())):
        beside = folder.parent.parent / earlier.parent.name / earlier.name
        # A run that starts from another folder's run of its own name must not take itself for it.
        moved = (beside / STAGE).is_file() and beside.resolve() != folder.resolve()
        for place, stage in lineage(beside if moved else earlier):
            if place not in seen:
                seen.add(place)
                yield place, stage
    yield folder, recipe


def dataset_licences(stages: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, str]:
    """Every training data set with the licence that its recipe names."""
    out = {}
    for _, recipe in stages:
        for entry in recipe["mixture"]["datasets"]:
            try:
                out[entry["recipe"]] = load_recipe(DataRecipe, entry["recipe"]).licence or "not stated"
            except UserError:
                out[entry["recipe"]] = "not known: its recipe is not here"
    return out


def _what(copy: Copy) -> str:
    sees = [f"{copy.sizes.canvas} px for masks"] if copy.sizes.canvas else []
    sees += [f"{copy.sizes.llm} px for the language model"] if copy.sizes.llm else []
    return (
        f"An xseg model of {copy.parameters / 1e6:.1f} million parameters, stored in {copy.dtype}. It sees a picture "
        f"at {' and '.join(sees)}. Written by `xseg export`; every figure below is read from the files of its run."
        + " Lists of names are recognised by the SigLIP in `names/` too."
        * copy.names
    )


def _use(copy: Copy) -> str:
    shipped = Path(DEFAULT_MODEL).name == copy.name
    picture = f"{DEFAULT_MODEL if shipped else copy.name}/{EXAMPLE}" if copy.example else "picture.png"
    model, folder = ("", "") if shipped else (f" --model {copy.name}", f'"{copy.name}"')
    return (
        f"```bash\nxseg chat{model} --image {picture}\n```\n\n"
        f"```python\nfrom xseg import load\n\nmodel, processor = load({folder})\n"
        f'model.segment("{picture}", "{PHRASE}").mask  # (H, W) bool\n```'
    )


def _training(stages: Sequence[tuple[Path, dict[str, Any]]]) -> list[str]:
    if not stages:
        return [f"Not recorded: the source holds no {STAGE}."]
    rows = ["| stage | steps | batch per process | seed | minutes | data sets |", "|---|---|---|---|---|---|"]
    for folder, recipe in stages:
        last = _last_line(folder.parent / "metrics.jsonl")
        steps = last.get("step", recipe.get("steps") or "")
        minutes = f"{last['elapsed_s'] / 60:.0f}" if "elapsed_s" in last else "not recorded"
        names = ", ".join(entry["recipe"] for entry in recipe["mixture"]["datasets"])
        batch = recipe["batch_size"] * recipe["accumulate"]
        rows.append(f"| {recipe['stage']} | {steps} | {batch} | {recipe['seed']} | {minutes} | {names} |")
    worlds = [w for w in (_world(stages[-1][1], split) for split in ("train", "val")) if w]
    return ["\n".join(rows), *(["ShapeWorld: " + "; ".join(worlds) + "."] if worlds else [])]


def _last_line(path: Path) -> dict[str, Any]:
    lines = path.read_text(encoding="utf8").splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else {}


def _world(recipe: dict[str, Any], split: str) -> str:
    path = Path(recipe["data_root"]) / "shapes" / split / "shapeworld.json"
    if not path.is_file():
        return ""
    made = json.loads(path.read_text(encoding="utf8"))
    return f"{split}: {made['images']} pictures of {made['size']} px, seed {made['seed']}, {made['variant']}"


def _datasets(licences: dict[str, str]) -> list[str]:
    if not licences:
        return []
    return ["\n".join(f"- `{name}`: {licence}" for name, licence in sorted(licences.items()))]


def _parts(stages: Sequence[tuple[Path, dict[str, Any]]]) -> list[str]:
    """The pretrained parts of the stages' model recipes, each with the first words of its own card."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(recipe["model"] for _, recipe in stages):
        try:
            model = load_recipe(ModelRecipe, name)
        except UserError:
            continue
        for part in ("sam", "siglip", "llm"):
            given = getattr(model, part).get("pretrained")
            if given:
                found[part] = f"- {part}: `{given}`. {_summary(given)}".rstrip()
    if not found:
        return ["Nothing was pretrained: every weight started random."] if stages else []
    return ["Pretrained parts it started from:", "\n".join(found.values())]


def _summary(part: str) -> str:
    """The first paragraph of a part's card that is neither a heading nor front matter."""
    try:
        text = (find(part, "train_stages/models", suffix="") / FILE).read_text(encoding="utf8")
    except (UserError, OSError):
        return ""
    if text.startswith("---\n"):
        text = text[4:].partition("\n---\n")[2]
    plain = (p for p in text.split("\n\n") if p.strip() and not p.lstrip().startswith(("#", "```", "|")))
    return " ".join(next(plain, "").split())


def results_of(source: Path) -> dict[str, Any] | None:
    """What the evaluation of a ``final`` folder left: of the stage itself, or of the whole run."""
    stage = source.parent
    for path in (stage / "eval/results.json", stage.parent / "results.json"):
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
            rows = [row for row in found["rows"] if row.get("model", stage.name) == stage.name]
            return {**found, "rows": rows}
    return None


def _figures(source: Path) -> list[str]:
    results = results_of(source)
    if results is None:
        return ["## Figures", "None: the source has no results.json beside it (`xseg eval` writes one)."]
    blind = {_key(row): row for row in results["rows"] if is_blind(row)}
    shown = [row for row in results["rows"] if not is_blind(row)]
    rows = ["| data set | metric | value | 95 % | blind | n | protocol |", "|---|---|---|---|---|---|---|"]
    for row in shown:
        interval = "-".join(f"{v:.1f}" for v in row["ci95"]) if row["ci95"] else ""
        guess = f"{blind[_key(row)]['value']:.1f}" if _key(row) in blind else ""
        cells = (row["dataset"], row["metric"], f"{row['value']:.1f}", interval, guess, row["n"], row["protocol"])
        rows.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    held_out = all(row["split"].startswith("val") for row in shown)
    commit = f", commit `{results['commit'][:12]}`" if results.get("commit") else ""
    head = f"Suite `{results['suite']}`{commit}, weights in float32; 95 % intervals by picture."
    guesses = sorted({f"- {row['dataset']}: {row['protocol']}" for row in blind.values()})
    return [
        "## Held-out figures" if held_out else "## Figures (not of held-out pictures alone)",
        head,
        "\n".join(rows),
        *(["Blind baselines:", "\n".join(guesses)] if guesses else []),
    ]


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["task"], row["dataset"], row["metric"]


def _agreement(copy: Copy) -> str:
    a = copy.agreement
    said = [f"mean IoU {a.iou:.4f} over {a.masks} masks"] if a.masks else []
    said += [f"{a.same} of {a.texts} answers equal word by word"] if a.texts else []
    return (
        f"On {a.pictures} held-out ShapeWorld pictures, both in float32 arithmetic on a CPU: {'; '.join(said)}. The "
        "figures above are the source's."
    )


def _limits(shapes_only: bool) -> str:
    if not shapes_only:
        return "Its figures speak of the data sets above and of no other."
    return (
        "It has seen ShapeWorld and nothing else: drawn shapes on drawn ground, and the few hundred words that speak "
        "of them. On photographs its masks and answers mean nothing. No figure here is a number of COCO, RefCOCO or "
        "any other benchmark, nor comparable with one. Where a figure is not above its blind baseline, it has not "
        "learnt that task."
    )


def _licence(free: bool) -> str:
    if free:
        return (
            "Weights: Apache-2.0. They were trained on generated data alone (ShapeWorld); no picture, text or weight "
            "of anybody else went into them."
        )
    return "Weights: not stated here; it depends on the licences of the data and of the parts above."
