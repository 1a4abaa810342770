"""What a run tells: metrics.jsonl, one line per logged step, and a progress bar with the rate and the time left."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

FILE = "metrics.jsonl"
Report = Callable[[Mapping[str, float], int], None]
"""``report(numbers, step)``."""
QUIET_SECONDS = 15.0
"""Without a terminal, a line is printed at most this often."""


class MetricsFile:
    """``metrics.jsonl`` of a run; a resumed run goes on after the line of its checkpoint."""

    def __init__(self, out: Path, step: int) -> None:
        """Drop the lines after ``step`` (a killed run wrote them after its last checkpoint, the last maybe half)."""
        self.path = out / FILE
        kept = [line for line in _lines(self.path) if _step(line) <= step]
        rewrite(self.path, "".join(f"{line}\n" for line in kept))
        self.last: dict[str, Any] = json.loads(kept[-1]) if kept else {"step": 0}
        """The last line."""
        self.elapsed = float(self.last.get("elapsed_s", 0.0))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line at once, so that a killed run keeps it."""
        self.last = {k: _short(v) for k, v in record.items()}
        size = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf8") as file:
                file.write(json.dumps(self.last) + "\n")
        except OSError:
            os.truncate(self.path, size)  # no half of a line on a full disk
            raise

    def add(self, record: Mapping[str, Any]) -> None:
        """Add to the line of the same step, so that a step stays one line with its loss; without one, append."""
        if self.last["step"] != record["step"]:
            self.write(record)
            return
        self.last = {**self.last, **record}
        lines = [*_lines(self.path)[:-1], json.dumps(self.last)]
        rewrite(self.path, "".join(f"{line}\n" for line in lines))


def rewrite(path: Path, text: str) -> None:
    """Give a file another text: whoever reads it sees the old or the new one, and on a full disk the old one stays."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf8").splitlines() if path.exists() else []


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None  # JSON knows no NaN
    return value


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as numbers with flat names; the loss also under its data set and its task."""
    out: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            out |= {f"{key}/{name}": number for name, number in scalars(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out[key] = float(value)
    if "loss" in record:
        out |= {f"loss_of/{record[key]}": float(record["loss"]) for key in ("source", "task") if key in record}
    return out


class Progress:
    """A bar on a terminal, a line now and then elsewhere; silent where ``shown`` is False."""

    def __init__(self, total: int, start: int, shown: bool) -> None:
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, disable=not (shown and terminal), dynamic_ncols=True, unit="step")
        self.lines = shown and not terminal
        self.total, self.start, self.begin, self.last = total, start, time.monotonic(), float("-inf")

    def update(self, step: int, record: Mapping[str, Any]) -> None:
        """Show the record of the finished step ``step`` (1-based)."""
        figures = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['images_per_s']:.1f} images/s"
        self.bar.set_postfix_str(figures, refresh=False)
        self.bar.update(step - self.bar.n)
        now = time.monotonic()
        if self.lines and (now - self.last > QUIET_SECONDS or step == self.total):
            self.last = now
            left = (now - self.begin) / max(step - self.start, 1) * (self.total - step)
            print(f"step {step}/{self.total}  {figures}  {left / 60:.1f} min left", flush=True)

    def say(self, line: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self.lines:
            print(line, flush=True)
        elif not self.bar.disable:
            self.bar.write(line)

    def close(self) -> None:
        """Leave the terminal in order."""
        self.bar.close()


class Console:
    """The log call of the loop: rank 0 writes metrics.jsonl and shows the progress; the other ranks do nothing.

    ``elapsed_s`` of a line is the seconds of training so far: over all resumes, without looks at held-out images.
    """

    def __init__(
        self, out: Path, sources: Sequence[tuple[str, str]], start: int, total: int, shown: bool, report: Report
    ) -> None:
        """``sources``: recipe and task of each data set. ``report`` gets the numbers of every line written."""
        self.shown, self.sources, self.report = shown, sources, report
        self.progress = Progress(total, start, shown)
        self.begin = time.monotonic()
        if shown:
            out.mkdir(parents=True, exist_ok=True)
            self.file = MetricsFile(out, start)
            self.begin -= self.file.elapsed

    def log(self, step: int, figures: Mapping[str, Any], source: int, seconds: float, *, write: bool) -> None:
        """Record the finished step ``step`` (1-based); ``figures`` hold loss, lr, images, tokens, data_s and more."""
        if not self.shown:
            return
        name, task = self.sources[source]
        record = {"step": step, **figures, "source": name, "task": task}
        record |= {f"{key}_per_s": record.pop(key) / seconds for key in ("images", "tokens")}
        record["data_share"] = record["data_s"] / seconds
        record["elapsed_s"] = time.monotonic() - self.begin
        if write:
            self.file.write(record)
            self.report(scalars(record), step)
        self.progress.update(step, record)

    def looked(self, step: int) -> bool:
        """Whether the held-out figures of ``step``, the last one done, are recorded."""
        return self.file.last["step"] == step and "held_out" in self.file.last

    def held_out(self, step: int, figures: Mapping[str, Mapping[str, Any]]) -> None:
        """Record figures on held-out images after ``step``: {row: {"metric", "value", "n"}}."""
        seconds = self.file.last.get("elapsed_s", 0.0)
        self.file.add({"step": step, "elapsed_s": seconds, "held_out": figures})
        shown = ", ".join(f"{name} {f['metric']} {f['value']:.1f}" for name, f in figures.items())
        self.progress.say(f"held out after step {step}: {shown}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of ``elapsed_s`` and of the time left."""
        began = time.monotonic()
        yield
        spent = time.monotonic() - began
        self.begin += spent
        self.progress.begin += spent
