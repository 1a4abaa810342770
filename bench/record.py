"""The file of a benchmark's results: how they were made, on what, and the figures."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def save(name: str, figures: dict[str, Any], packages: Sequence[str], folder: Path = RESULTS) -> Path:
    """Write ``folder``/``name``.json: this command, the cores, versions of Python and ``packages``, and ``figures``."""
    threads = os.environ.get("OMP_NUM_THREADS")
    words = [f"OMP_NUM_THREADS={threads}"] * bool(threads)
    words += ["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    versions = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    about = {"command": " ".join(words), "cpu_count": os.cpu_count(), "versions": versions}
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**about, **figures}, indent=1) + "\n", encoding="utf8")
    return path
