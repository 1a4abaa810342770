"""The paper's Tables 6 to 9 in miniature on ShapeWorld: what each choice is worth, over several seeds.

    python bench/ablations.py --row connector-linear       one row; without --row all of them
    python bench/ablations.py --jobs 2                     two trainings side by side, one core each
    python bench/ablations.py --settings bench/ablations/dry.yaml --out runs/ablations_dry --results runs/ablations_dry

Rows, and the paper's numbers: bench/ablations/rows.yaml. Sizes, steps and seeds: bench/ablations/settings.yaml.
Rows share trainings. A training that has its result is not done again, unless its recipe, or that of a training before
it, has changed; one that was cut short goes on. Several of these commands may run at a time: a training belongs to the
first that takes it, and the others wait for its result. The table is written anew at the end of every command.
"""

import argparse
import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablations_plan import HERE, Plan, Settings, fingerprint, read_plan, read_settings
from ablations_table import markdown, summarise

from xseg.errors import UserError
from xseg.infer.evaluate import write_json

ROOT = HERE.parent.parent
PROGRAMS = {"xseg": ["-m", "xseg.ui.cli"], "accelerate": ["-m", "accelerate.commands.accelerate_cli"]}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Job:
    """One training with one seed."""

    name: str
    seed: int


class Bench:
    """Runs jobs in ``out`` and knows which are done."""

    def __init__(self, plan: Plan, settings: Settings, out: Path) -> None:
        self.plan, self.settings, self.out = plan, settings, out
        s = settings
        self.data = out / f"data_{s.images}_{s.val_images}_{s.side}_{s.data_seed}"
        self.scored = {row.training for group in plan.groups.values() for row in group.rows.values()}

    def folder(self, job: Job) -> Path:
        """Where a job's weights, logs and result lie."""
        return self.out / f"seed_{job.seed}" / job.name

    def before(self, job: Job) -> list[Job]:
        """The jobs whose weights it starts from."""
        return [Job(name, job.seed) for name in self.plan.trainings[job.name].after]

    def needed(self, rows: Sequence[str]) -> list[Job]:
        """All jobs behind these rows, each once, what comes first before what needs it."""
        names = dict.fromkeys(n for row in rows for n in self.plan.lineage(self.plan.row(row).training))
        return [Job(name, seed) for seed in self.settings.seeds for name in names]

    def made_by(self, job: Job) -> str:
        """What a result depends on, in short; another value makes a stored result worthless."""
        return fingerprint(self.plan, self.settings, job.name, job.seed)

    def result(self, job: Job) -> dict[str, Any] | None:
        """The stored result, or None when there is none of today's recipes."""
        path = self.folder(job) / "result.json"
        if not path.is_file():
            return None
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
        return stored if stored["made_by"] == self.made_by(job) else None

    def write_data(self) -> None:
        """Make the pictures that all jobs share, once."""
        done = self.data / "done"
        with locked(self.out / "data.lock"):
            if done.is_file():
                return
            shutil.rmtree(self.data, ignore_errors=True)
            s = self.settings
            sizes = {"images": s.images, "val-images": s.val_images, "size": s.side, "seed": s.data_seed}
            words = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
            call(["xseg", "data", "shapes", "--out", f"{self.data}/shapes", *words], self.out / "data.log")
            done.touch()

    def do(self, job: Job) -> None:
        """Train and score one job, unless it is done; wait while another process is at it."""
        folder = self.folder(job)
        with locked(folder.with_name(f"{job.name}.lock")):
            if self.result(job) is not None:
                return
            # Taken before the first step: recipes that change while it runs are not what it was made by.
            made_by = self._start(job)
            log, final = folder / "train.log", folder / "final"
            began = time.monotonic()
            command = self.training(job)
            call(command, log)
            # A run that goes on after a cut counts the time before it too.
            seconds = {"train": round(last_elapsed(folder, time.monotonic() - began), 1)}
            rows: list[dict[str, Any]] = []
            if job.name in self.scored:
                began = time.monotonic()
                score = ["xseg", "eval", "--model", str(final), "--suite", suite(), "--root", str(self.data)]
                call([*score, "--out", f"{folder}/eval", "--batch-size", str(self.settings.eval_batch)], log)
                seconds["eval"] = round(time.monotonic() - began, 1)
                found = json.loads((folder / "eval/results.json").read_text(encoding="utf8"))
                rows = [row for row in found["rows"] if not row["protocol"].startswith("blind")]
            stored = {"training": job.name, "seed": job.seed, "steps": self.settings.steps_of(job.name)}
            stored |= {"seconds": seconds, "made_by": made_by, "commit": commit()}
            write_json(folder / "result.json", {**stored, "command": shlex.join(command), "rows": rows})
            # The optimiser's state is four times the weights, and nothing reads it again.
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def _start(self, job: Job) -> str:
        """Clear a folder that another recipe left, keep one that the same recipe was cut short in; return ``made_by``.

        Raises UserError when what the job starts from is no longer what the recipes say.
        """
        for parent in self.before(job):
            if self.result(parent) is None:
                raise UserError(
                    f"{job.name} seed {job.seed}: {parent.name} is not what its recipes now say (they changed while "
                    "this ran): run the same command again"
                )
        folder, made_by = self.folder(job), self.made_by(job)
        mark = folder / "made_by"
        if not (mark.is_file() and mark.read_text(encoding="utf8") == made_by):
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(made_by, encoding="utf8")
        return made_by

    def training(self, job: Job) -> list[str]:
        """The command that trains a job."""
        first = ", ".join(f"{self.folder(parent)}/final" for parent in self.before(job))
        steps = self.settings.steps_of(job.name)
        keys = [f"out={self.folder(job)}", f"data_root={self.data}", f"init_from=[{first}]"]
        keys += [f"seed={job.seed}", f"steps={steps}", *self.settings.sets]
        launch = ["accelerate", "launch", "--config_file", "train_stages/accelerate/single.yaml"]
        launch += ["--num_cpu_threads_per_process", "1", "-m", "xseg.train", relative(self.recipe(job))]
        return [*launch, *(word for key in keys for word in ("--set", key)), "--resume", "auto"]

    def recipe(self, job: Job) -> Path:
        """The stage recipe of a job."""
        return self.plan.recipe(job.name)

    def do_all(self, jobs: Sequence[Job], workers: int) -> None:
        """Do jobs, ``workers`` at a time, each after those it starts from; the first failure ends it."""
        left = [job for job in jobs if self.result(job) is None]
        print(f"{len(jobs)} trainings, {len(jobs) - len(left)} done before", flush=True)
        total, open_jobs = len(left), set(left)
        running: dict[Future[None], Job] = {}
        with ThreadPoolExecutor(workers) as pool:
            while left or running:
                ready = [job for job in left if not open_jobs & set(self.before(job))]
                for job in ready[: workers - len(running)]:
                    left.remove(job)
                    running[pool.submit(self.do, job)] = job
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    job = running.pop(future)
                    future.result()
                    open_jobs.discard(job)
                    print(f"{total - len(open_jobs)}/{total} {job.name} seed {job.seed}: {self.told(job)}", flush=True)

    def told(self, job: Job) -> str:
        """A finished job in a few words."""
        stored = self.result(job) or {"seconds": {}, "rows": []}
        seconds = sum(stored["seconds"].values())
        late = f", over {self.settings.max_seconds} s" * (stored["seconds"].get("train", 0) > self.settings.max_seconds)
        first = {row["dataset"]: row for row in reversed(stored["rows"])}
        return ", ".join([f"{seconds:.0f} s{late}", *(f"{r['metric']} {r['value']:.1f}" for r in first.values())])


def suite() -> str:
    """The suite of all rows, as a command names it."""
    return relative(HERE / "suite.yaml")


def relative(path: Path) -> str:
    """A path as the commands name it, which run in the repository's root."""
    absolute = path.resolve()
    return str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else str(absolute)


def last_elapsed(folder: Path, otherwise: float) -> float:
    """Seconds that the training's own log counts, start-up not included; or ``otherwise``."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf8").splitlines()
    return max(float(json.loads(lines[-1]).get("elapsed_s", 0.0)), otherwise)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; another thread or process that wants it waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def call(command: Sequence[str], log: Path) -> None:
    """Run a public command with this Python. Raises UserError with the end of its output when it fails."""
    line = [sys.executable, *PROGRAMS[command[0]], *command[1:]]
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        done = subprocess.run(line, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **ENVIRONMENT})
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf8", errors="replace").splitlines()[-12:])
        raise UserError(f"status {done.returncode}: {shlex.join(command)}\n{tail}\nall of it: {log}")


def commit() -> str:
    """The commit that is checked out, with a mark when files differ from it; empty outside of git."""
    run = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT).stdout.strip()  # noqa: E731
    return run("rev-parse", "HEAD") + "+changes" * bool(run("status", "--porcelain", "--untracked-files=no"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", action="append", default=[], help="a row (repeatable), or a group; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.yaml")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of the settings")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/ablations")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results", help="folder of the table")
    parser.add_argument("--list", action="store_true", help="print rows and trainings, run nothing")
    return parser.parse_args()


def main() -> None:
    args = parse()
    # Recipes name pretrained parts relative to the repository.
    args.out, args.results, args.settings = (p.resolve() for p in (args.out, args.results, args.settings))
    os.chdir(ROOT)
    plan, settings = read_plan(), read_settings(args.settings, args.set)
    rows = plan.chosen(args.row)
    bench = Bench(plan, settings, Path(relative(args.out)))
    jobs = bench.needed(rows)
    if args.list:
        for row in rows:
            print(f"{row:22} {' -> '.join(plan.lineage(plan.row(row).training))}")
        print(f"{len(jobs)} trainings with seeds {settings.seeds}")
        return
    bench.write_data()
    try:
        bench.do_all(jobs, max(1, args.jobs))
    finally:
        results = {(j.name, j.seed): r for j in bench.needed(plan.chosen([])) if (r := bench.result(j)) is not None}
        summary = summarise(plan, settings, results)
        args.results.mkdir(parents=True, exist_ok=True)
        write_json(args.results / "ablations.json", summary)
        (args.results / "ablations.md").write_text(markdown(summary), encoding="utf8")
    print(args.results / "ablations.md")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"ablations: {error}", file=sys.stderr)
        sys.exit(2)
