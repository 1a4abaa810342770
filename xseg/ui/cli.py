"""The command line. Heavy imports happen inside the commands, so that ``xseg --help`` answers at once."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

import xseg
from xseg.errors import UserError

app = typer.Typer(
    name="xseg",
    help="Fine-tune multimodal LLMs that answer with masks.",
    epilog="Training: accelerate launch --config_file train_stages/accelerate/zero2.yaml -m xseg.train STAGE.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Write and look at data.", no_args_is_help=True)
app.add_typer(data, name="data")
importing = typer.Typer(help="Other people's checkpoints become folders that xseg opens.", no_args_is_help=True)
app.add_typer(importing, name="import")

Out = Annotated[Path, typer.Option("--out", help="Folder that is written.")]
Model = Annotated[Path, typer.Option("--model", help="The `final` folder of a stage.")]
Root = Annotated[Path, typer.Option("--root", help="Folder that the paths of data recipes are relative to.")]


def main() -> None:
    """Run the command line: status 0 = done, 2 = the user's input was wrong (one message), 1 = anything else."""
    try:
        app()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"xseg: {error}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            sys.exit(2)
        # The launcher ends all processes as soon as one has ended: leave rank 0 the time to speak. And not by way of
        # the destructors, which wait for threads of gloo's that wait for the others.
        time.sleep(0 if os.environ.get("RANK", "0") == "0" else 3)
        os._exit(2)
    except KeyboardInterrupt:
        print("xseg: interrupted", file=sys.stderr)
        sys.exit(130)


def _version(asked: bool) -> None:
    if asked:
        print(xseg.__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Options of all commands."""


@app.command("demo")
def demo_command(
    out: Out = Path("runs/demo"),
    recipe: Annotated[str, typer.Option(help="Stages: a folder under train_stages; tiny is shorter.")] = "all",
    images: Annotated[int, typer.Option(min=1, help="Training images.")] = 8000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the data and, if not 0, of the stages.")] = 0,
) -> None:
    """The whole walk on ShapeWorld: data, three stages, evaluation, report, one chat turn."""
    from rich.console import Console

    from xseg.ui.demo import Demo

    Demo(out, recipe, images, seed, Console(highlight=False)).run()


@app.command("eval")
def eval_command(
    model: Model,
    suite: Annotated[str, typer.Option(help="Suite: a path, or a name under eval/suites.")],
    out: Out,
    root: Root = Path("data"),
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward.")] = 8,
) -> None:
    """Score a model on a suite: results.json, samples.jsonl and a table beside published values."""
    from rich.console import Console

    from xseg.ui.scores import run_suite

    run_suite(model, suite, out, root, batch_size, Console())


@app.command("calibrate")
def calibrate_command(
    recipe: Annotated[str, typer.Argument(help="Data recipe with absent things; no test split.")],
    model: Model,
    root: Root = Path("data"),
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first samples only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward.")] = 8,
) -> None:
    """Choose from which probability on a phrase is there, and keep it with the model."""
    from rich.console import Console

    from xseg.infer.calibrate import Asked
    from xseg.ui.calibrating import calibrate_model

    calibrate_model(model, Asked(recipe, root, limit, batch_size), Console(highlight=False))


@app.command("chat")
def chat_command(
    model: Annotated[
        Path | None, typer.Option(help="The `final` folder of a stage; by default the shipped one.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image to talk about.")] = None,
    say: Annotated[list[str] | None, typer.Option(help="A message (repeatable); without any, you type.")] = None,
    out: Out = Path("runs/chat"),
) -> None:
    """Talk about one image; masks are written as PNG and RLE."""
    from rich.console import Console

    from xseg.paths import default_model
    from xseg.ui.chat import chat

    chat(model or default_model(), image, say or [], out, Console(highlight=False))


@app.command("export")
def export_command(
    source: Annotated[Path, typer.Argument(help="A run (its last stage is taken) or the `final` folder of a stage.")],
    out: Out,
    dtype: Annotated[str, typer.Option(help="How the weights are stored: bf16, fp16 or fp32.")] = "bf16",
    limit_mb: Annotated[float | None, typer.Option(min=0, help="Refuse a larger folder.")] = None,
    language: Annotated[bool, typer.Option("--language", help="The language model alone, for transformers.")] = False,
) -> None:
    """Write a model for users: smaller weights, held against the source's answers, and a model card."""
    from rich.console import Console

    from xseg.ui.exporting import export_language_part, export_model

    if language:
        export_language_part(source, out, dtype, Console(highlight=False))
    else:
        export_model(source, out, dtype, limit_mb, Console(highlight=False))


@importing.command("x-sam")
def import_command(
    source: Annotated[Path, typer.Argument(help="pytorch_model.bin, or the folder of its shards.")],
    out: Out,
    recipe: Annotated[str, typer.Option(help="Model recipe it belongs to.")] = "paper",
    tokenizer: Annotated[str, typer.Option(help="Tokenizer folder, in place of the recipe's.")] = "",
    lora_alpha: Annotated[float, typer.Option(min=0, help="Scale of a LoRA checkpoint, which is merged.")] = 0.0,
) -> None:
    """Convert a released X-SAM checkpoint, tensor by tensor, and report what every part got."""
    from rich.console import Console

    from xseg.infer.importing import Import
    from xseg.ui.importing import import_checkpoint

    import_checkpoint(Import(source, out, recipe, tokenizer, lora_alpha), Console(highlight=False))


@app.command("names")
def names_command(
    model: Annotated[Path, typer.Argument(help="The `final` folder of a stage 3.")],
    siglip: Annotated[Path, typer.Option("--from", help="A whole SigLIP, text tower too, in transformers' layout.")],
    template: Annotated[
        str, typer.Option(help="What SigLIP reads of a name, for which {} stands.")
    ] = "This is a photo of {}.",
) -> None:
    """Let a model name what it never saw a mask of: SigLIP's texts beside it, nothing trained."""
    from rich.console import Console

    from xseg.ui.naming import add_names

    add_names(model, siglip, template, Console(highlight=False))


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run, for example runs/demo.")],
    root: Annotated[Path | None, typer.Option(help="Data root, where it moved since the evaluation.")] = None,
) -> None:
    """Write RUN/report/index.html: tables, curves, worst and best samples."""
    from xseg.ui.report import write_report

    print(write_report(run, root))


@app.command("doctor")
def doctor_command(
    stage: Annotated[str | None, typer.Argument(help="Stage recipe; without one the installation is checked.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe (repeatable).")] = None,
    launch: Annotated[str | None, typer.Option(help="accelerate file it will be launched with.")] = None,
) -> None:
    """Check libraries, kernels, and a stage with its words, paths, memory and launch file, before a run."""
    from rich.console import Console

    from xseg.ui.doctor import diagnose

    if diagnose(stage, settings or [], launch, Console(highlight=False)):
        raise typer.Exit(2)


@app.command("consolidate")
def consolidate_command(
    stage: Annotated[str, typer.Argument(help="The run's stage recipe.")],
    out: Out,
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe (repeatable).")] = None,
) -> None:
    """Write a run's newest whole checkpoint as one model: to look at, or to go on with more or fewer processes."""
    from xseg.train.consolidate import consolidate
    from xseg.train.stage import read_stage

    step = consolidate(read_stage(stage, settings or []), out)
    print(f"{out}: the weights after step {step}; to go on: accelerate launch … --resume {out} --set out=ANOTHER")


@app.command("plan")
def plan_command(
    stage: Annotated[str, typer.Argument(help="Stage recipe.")],
    gpus: Annotated[int, typer.Option(min=0, help="Accelerators; 0 = one process on this CPU.")],
    memory: Annotated[str, typer.Option(help="Of each, for example 80GB.")],
    tflops: Annotated[float, typer.Option(min=1, help="What each sustains, in TFLOP/s.")] = 316.0,
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe (repeatable).")] = None,
) -> None:
    """Predict memory and hours of a stage and choose how to launch it; needs no weights and no accelerator."""
    from rich.console import Console

    from xseg.train.plan import Asked
    from xseg.ui.planning import parse_memory, show_plan

    show_plan(stage, settings or [], Asked(gpus, parse_memory(memory), tflops * 1e12), Console(highlight=False))


@data.command("shapes")
def shapes_command(
    out: Out,
    images: Annotated[int, typer.Option(min=1, help="Training images.")],
    val_images: Annotated[int, typer.Option(min=1, help="Images for evaluation.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other scenes.")] = 0,
    size: Annotated[int, typer.Option(min=32, help="Side of an image in pixels.")] = 128,
    hard: Annotated[bool, typer.Option("--hard", help="Smaller and more objects of more kinds.")] = False,
    tasks: Annotated[int, typer.Option(min=0, help="Training images that get the other tasks' files too.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the result does not depend on it.")] = 1,
) -> None:
    """Write ShapeWorld (train, val, overfit) in the formats of COCO, RefCOCO and LLaVA; with --tasks every task."""
    from rich.console import Console

    from xseg.ui.shapes import write_shapes, write_tasks

    write_shapes(out, images, val_images, seed, workers, size=size, hard=hard, console=Console())
    if tasks:
        write_tasks(out, tasks, workers, Console())


@data.command("show")
def show_command(
    recipe: Annotated[str, typer.Argument(help="Data recipe: a path, or a name under data_recipes.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many samples.")] = 4,
    root: Root = Path("data"),
    out: Out = Path("runs/show"),
    model: Annotated[str, typer.Option(help="Model recipe: its tokenizer and chat template are used.")] = "tiny",
    epoch: Annotated[int, typer.Option(min=0, help="The wording and order of this epoch.")] = 0,
) -> None:
    """Print what the model will read, supervised tokens green and spans underlined; draw the masks as PNG."""
    from rich.console import Console

    from xseg.ui.show import show

    show(recipe, n, root, out, model, epoch, Console(highlight=False))


@data.command("convert")
def convert_command(
    layout: Annotated[str, typer.Argument(help="coco, labelme, png-masks, lisa or sa2va.")],
    source: Annotated[Path, typer.Argument(help="The annotations: a file or a folder.")],
    out: Out,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures, where they lie elsewhere.")] = None,
) -> None:
    """Write what you have as xseg's JSONL, one line a sample, with a recipe for it."""
    from rich.console import Console

    from xseg.ui.datatools import run_convert

    run_convert(layout, source, out, images, Console(highlight=False))


Instances = Annotated[Path, typer.Argument(help="A COCO instances JSON.")]
Built = Annotated[Path, typer.Option("--out", help="File that is written.")]
Seed = Annotated[int, typer.Option(min=0, help="Another seed, other prompts.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes; the result does not depend on them.")]


@data.command("build-vgd")
def build_vgd_command(instances: Instances, out: Built, seed: Seed = 0, workers: Workers = 1) -> None:
    """Draw a point, a scribble, a box and a rough mask for every object: the COCO-VGD annotation."""
    from rich.console import Console

    from xseg.ui.datatools import run_build

    run_build("vgd", instances, out, seed, workers, Console(highlight=False))


@data.command("build-interactive")
def build_interactive_command(instances: Instances, out: Built, seed: Seed = 0, workers: Workers = 1) -> None:
    """Likewise for one object at a time: the COCO-interactive annotation in PSALM's layout."""
    from rich.console import Console

    from xseg.ui.datatools import run_build

    run_build("interactive", instances, out, seed, workers, Console(highlight=False))


@data.command("lint")
def lint_command(
    recipes: Annotated[list[str], typer.Argument(help="Data recipes and mixtures: paths, or names.")],
    root: Root = Path("data"),
    workers: Workers = 1,
) -> None:
    """Name every fault in the data of recipes, with file and record, and pictures both trained and scored on."""
    from rich.console import Console

    from xseg.ui.datatools import run_lint

    if not run_lint(recipes, root, workers, Console(highlight=False)):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
