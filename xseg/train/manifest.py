"""What a folder holds, to the byte, so that damage is found before anything is loaded from it."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = "manifest.json"
THREADS = 8
"""hashlib lets go of the interpreter, so the shards of a large state are read side by side."""


def write(folder: Path) -> None:
    """Write ``manifest.json``: size in bytes and SHA-256 of every other file under ``folder``."""
    names = _files(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        sums = list(pool.map(_sha256, (folder / name for name in names)))
    files = {n: {"bytes": (folder / n).stat().st_size, "sha256": s} for n, s in zip(names, sums, strict=True)}
    (folder / FILE).write_text(json.dumps({"files": files}, indent=1), encoding="utf8")


def fault(folder: Path) -> str:
    """Say what is not as the manifest states it; empty when ``folder`` is whole. Reads every byte."""
    try:
        stated = json.loads((folder / FILE).read_text(encoding="utf8"))["files"]
        sizes = {name: entry["bytes"] for name, entry in stated.items()}
        sums = {name: entry["sha256"] for name, entry in stated.items()}
    except FileNotFoundError:
        return f"it has no {FILE}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {FILE} cannot be read ({type(error).__name__}: {error})"
    for name, size in sizes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        there = (folder / name).stat().st_size
        if there != size:
            return f"{name} has {there} of {size} bytes"
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            found = dict(zip(sums, pool.map(_sha256, (folder / name for name in sums)), strict=True))
    except OSError as error:
        return f"it cannot be read ({error})"
    changed = [name for name, value in sums.items() if found[name] != value]
    return f"{', '.join(changed)}: not the bytes that were written (SHA-256 differs)" if changed else ""


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != FILE)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
