"""``xseg demo``: the whole walk on ShapeWorld, step by step, each step a command that a person could type."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xseg.config import FOLDERS, DataRecipe, ModelRecipe, StageRecipe, Suite, load_recipe
from xseg.data.sources import load_source
from xseg.errors import UserError
from xseg.infer.evaluate import write_json
from xseg.paths import find, make_folder
from xseg.train.stage import read_stage
from xseg.ui.scores import summary_table, table

GIB = 1 << 30
LEAST_DISK, LEAST_MEMORY = 2 * GIB, 6 * GIB
"""`make demo` keeps what it frees: its last stage grows to 4.6 GB."""
SIDE = 96
"""Pixels of a ShapeWorld image: what the tiny model sees."""
SUITES = {"overfit": "overfit", "all": "shapes_all", "all_long": "shapes_all"}
"""The suite of a recipe; of all others: shapes."""
LABEL_SUITES = {"shapes_all": "shapes"}
"""What the first stage's fixed label list is scored on, where the suite asks for names that are not on it."""
TASK_IMAGES = {"all": 1500, "all_long": 4000}
"""Training images that a recipe wants the files of every task for."""
FINGERPRINTED = {".py", ".yaml", ".safetensors"}
PROGRAMS = {"xseg": ["-m", "xseg.ui.cli"], "accelerate": ["-m", "accelerate.commands.accelerate_cli"]}
"""How this Python runs the programs that a command names, whatever PATH says."""


@dataclass(frozen=True)
class Step:
    """One command of the demo."""

    name: str
    command: tuple[str, ...]
    makes: Path
    """What lies there once the step is done."""


class Demo:
    """The commands of a demo in ``out``; a second run skips what is done and resumes what was cut short."""

    def __init__(self, out: Path, recipe: str, images: int, seed: int, console: Console) -> None:
        """Raises UserError for an unknown recipe."""
        self.out, self.images, self.seed, self.console = out, images, seed, console
        folder = find(recipe, FOLDERS[StageRecipe], suffix="")
        self.stages = sorted(folder.glob("s[0-9]*.yaml"))
        if not self.stages:
            raise UserError(f"--recipe {recipe}: {folder} holds no stages (s1….yaml, s2….yaml, …)")
        self.suite, self.task_images = SUITES.get(folder.name, "shapes"), TASK_IMAGES.get(folder.name, 0)
        recipes = find("mixtures", FOLDERS[DataRecipe], suffix="").parent
        parts = [part for path in self.stages for part in pretrained(path).values()]
        suites = [find(name, FOLDERS[Suite]) for name in (self.suite, LABEL_SUITES.get(self.suite, self.suite))]
        self.made_by = fingerprint((folder.parent, recipes, *suites, *parts))
        self.record = out / "demo.json"
        self.seconds: dict[str, float] = {}
        self.changed = False
        """Whether a step ran this time, so that what follows from it must run too."""

    def run(self) -> None:
        """Do every step. Raises UserError when the machine lacks something, typer.Exit when a step fails."""
        began = time.monotonic()
        precheck(self.out)
        make_folder(self.out)
        for step in [*self.training(), *self.naming(), *self.evaluation()]:
            self.do(step)
        self.do(self.talk())
        results = self.merge()
        self.do(Step("report", ("xseg", "report", str(self.out)), self.out / "report/index.html"))
        self.close(results, time.monotonic() - began)

    def training(self) -> list[Step]:
        """The data, then every stage; a stage starts from the folders of this demo's earlier stages."""
        data = self.out / "data"
        size = ["--images", str(self.images), "--size", str(SIDE), "--seed", str(self.seed), "--workers", "2"]
        made = data / "shapes/val/shapeworld.json"
        if self.task_images:
            size += ["--tasks", str(self.task_images)]
            made = data / "shapes/clips/shapeworld.json"
        write = ("xseg", "data", "shapes", "--out", f"{data}/shapes", *size)
        steps = [Step("data", write, made)]
        accelerate = find("zero2", "train_stages/accelerate")
        for path in self.stages:
            out = self.out / stage_name(path)
            settings = [f"out={out}", f"data_root={data}", *self._start(path)]
            if self.seed:
                settings.append(f"seed={self.seed}")
            launch = ("accelerate", "launch", "--config_file", str(accelerate), "-m", "xseg.train", str(path))
            flags = tuple(word for setting in settings for word in ("--set", setting))
            steps.append(Step(out.name, (*launch, *flags, "--resume", "auto"), out / "final/config.json"))
        return steps

    def naming(self) -> list[Step]:
        """SigLIP's texts beside the final model, where the suite asks for names that no mask was trained for."""
        siglip = pretrained(self.stages[-1]).get("siglip")
        if not self.task_images or siglip is None:
            return []
        model = self.out / stage_name(self.stages[-1]) / "final"
        command = ("xseg", "names", str(model), "--from", str(siglip), "--template", "{}")
        return [Step("names", command, model / "names/names.json")]

    def evaluation(self) -> list[Step]:
        """The first stage's label head, where it is not the only stage, and the final model."""
        first, last = stage_name(self.stages[0]), stage_name(self.stages[-1])
        suites = {first: LABEL_SUITES.get(self.suite, self.suite), last: self.suite}
        steps = []
        for name, suite in suites.items():
            score = ("xseg", "eval", "--suite", suite, "--root", f"{self.out}/data")
            places = ("--model", f"{self.out}/{name}/final", "--batch-size", "32", "--out", f"{self.out}/{name}/eval")
            steps.append(Step(f"eval {name}", (*score, *places), self.out / name / "eval/results.json"))
        return steps

    def talk(self) -> Step:
        """One chat turn on the first held-out picture whose phrase names something."""
        picture, phrase = self._example()
        shutil.copyfile(picture, self.out / "example.png")
        model = self.out / stage_name(self.stages[-1]) / "final"
        talk = ("--image", f"{self.out}/example.png", "--say", phrase, "--say", "/save", "--out", f"{self.out}/chat")
        return Step("chat", ("xseg", "chat", "--model", str(model), *talk), self.out / "chat/conversation.json")

    def do(self, step: Step) -> None:
        """Run a step, unless this very command and all before it have finished earlier; record its time."""
        done = json.loads(self.record.read_text(encoding="utf8")) if self.record.is_file() else {}
        earlier = done.get(step.name, {})
        line = shlex.join(step.command)
        self.console.print(Text.assemble(("\n$ ", "bold green"), (line, "bold")), soft_wrap=True)
        same = earlier.get("command") == line and earlier.get("made_by") == self.made_by
        if not self.changed and same and step.makes.exists():
            self.console.print(f"done before, in {clock(earlier['seconds'])}", style="dim")
            self.seconds[step.name] = earlier["seconds"]
            return
        self.changed = True
        if step.name == "chat":
            shutil.rmtree(self.out / "chat", ignore_errors=True)  # a chat adds to what lies there: an old model's masks
        log = self.out / "logs" / f"{step.name.replace(' ', '-')}.log"
        began = time.monotonic()
        status = run(step.command, log)
        self.seconds[step.name] = time.monotonic() - began
        if status or not step.makes.exists():
            why = f"status {status}" if status else f"it did not write {step.makes}"
            self.console.print(Text(f"demo: {step.name} failed ({why}); its output is in {log}", style="bold red"))
            raise typer.Exit(2 if status == 2 else 1)
        seconds = round(self.seconds[step.name], 1)
        done[step.name] = {"command": line, "made_by": self.made_by, "seconds": seconds}
        write_json(self.record, done)

    def merge(self) -> dict[str, Any]:
        """Write ``out``/results.json: the final model's rows, then those of the first stage, each with its model."""
        places = [step.makes for step in reversed(self.evaluation())]
        found = [json.loads(path.read_text(encoding="utf8")) for path in places]
        rows = [
            {"model": path.parent.parent.name, **row}
            for path, results in zip(places, found, strict=True)
            for row in results["rows"]
        ]
        merged = {**found[0], "rows": rows, "seconds": {k: round(v, 1) for k, v in self.seconds.items()}}
        write_json(self.out / "results.json", merged)
        return merged

    def close(self, results: dict[str, Any], seconds: float) -> None:
        """Print the scores, the time of each step, and where things lie."""
        for name in dict.fromkeys(row["model"] for row in results["rows"]):
            rows = [row for row in results["rows"] if row["model"] == name]
            self.console.print(table({"suite": f"{results['suite']}, model {name}", "rows": rows}))
        self.console.print(summary_table(results))
        times = Table("step", "time", title="times", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name, spent in self.seconds.items():
            times.add_row(name, clock(spent))
        times.add_section()
        times.add_row("this run", clock(seconds))
        self.console.print(times)
        mask = self.out / "chat/example-01.png"
        missing = f"none: the model wrote no <SEG> ({self.out / 'logs/chat.log'})"
        self.tell("report", self.out / "report/index.html")
        self.tell("results", self.out / "results.json")
        self.tell("mask", mask if mask.exists() else missing)
        model = self.out / stage_name(self.stages[-1]) / "final"
        self.tell("talk", f"xseg chat --model {model} --image {self.out}/example.png")

    def tell(self, what: str, where: Path | str) -> None:
        """Print where something lies, unbroken, so that it can be copied."""
        self.console.print(f"{what:8}{where}", markup=False, soft_wrap=True)

    def _start(self, path: Path) -> list[str]:
        """The setting that points ``init_from`` at this demo's own folders."""
        names = [stage_name(Path(given).parent) for given in load_recipe(StageRecipe, str(path)).init_from]
        return [f"init_from=[{', '.join(f'{self.out}/{name}/final' for name in names)}]"] if names else []

    def _example(self) -> tuple[Path, str]:
        for row in load_recipe(Suite, self.suite).rows:
            recipe = load_recipe(DataRecipe, row.recipe)
            source = load_source(recipe.source, self.out / "data", recipe.split, recipe.options)
            for index in range(len(source)):
                sample = source[index]
                named = [phrase.text for phrase in sample.phrases if phrase.instances]
                if named and isinstance(sample.images[0], Path):
                    return sample.images[0], named[0]
        raise UserError(f"suite {self.suite}: no phrase that names something; add a referring data set")


def pretrained(stage: Path) -> dict[str, Path]:
    """The folders of the pretrained parts that a stage starts from, those that exist; training names a lost one."""
    model = read_stage(str(stage), ["init_from=[]"]).model  # the stages before have not run yet
    out: dict[str, Path] = {}
    for part in ("sam", "siglip", "llm"):
        name = getattr(model, part).get("pretrained")
        with suppress(UserError):
            out |= {part: find(str(name), FOLDERS[ModelRecipe], suffix="")} if name else {}
    return out


def fingerprint(recipes: Sequence[Path]) -> str:
    """A digest of xseg's code and of recipes and weights, given as files or folders: a change does a step anew."""
    digest = hashlib.sha256()
    for root in (Path(__file__).parent.parent, *recipes):
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in FINGERPRINTED)
        for file in files:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def precheck(out: Path) -> None:
    """Raise UserError when the machine lacks disk or memory, before anything is written."""
    place = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < LEAST_DISK:
        raise UserError(f"{place}: {free / GIB:.1f} GiB free, the demo needs {LEAST_DISK // GIB}: use another --out")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory < LEAST_MEMORY:
        raise UserError(f"{memory / GIB:.1f} GiB of memory, the demo needs {LEAST_MEMORY // GIB}: use a larger machine")


def run(command: Sequence[str], log: Path) -> int:
    """Run a command with this Python, its output shown and kept in ``log``; return its exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = [sys.executable, *PROGRAMS[command[0]], *command[1:]]
    with (
        log.open("wb") as file,
        subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        ) as process,
    ):
        assert process.stdout is not None
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            file.write(chunk)
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
    return process.returncode


def stage_name(path: Path) -> str:
    """``train_stages/tiny/s1_segmentor.yaml`` -> ``s1``: the folder of a stage within a demo."""
    found = re.match(r"s\d+", path.stem)
    if found is None:
        raise UserError(f"{path}: a demo's stages are named s1…, s2…; rename it")
    return found[0]


def clock(seconds: float) -> str:
    """123.4 -> ``2:03 min``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
