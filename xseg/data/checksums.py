"""Whether annotation files are the ones a recipe speaks of, and the checksums that a recipe lacks."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from xseg.config import DataRecipe
from xseg.errors import UserError
from xseg.paths import data_path


def check(recipe: DataRecipe, root: str | Path) -> None:
    """Raise UserError for the first file that is missing or whose checksum is not the recipe's."""
    for fault in faults(recipe, root):
        raise UserError(fault)


def faults(recipe: DataRecipe, root: str | Path) -> Iterator[str]:
    """What is wrong with each file whose checksum the recipe states."""
    for kind, stated in (("sha256", recipe.sha256), ("md5", recipe.md5)):
        for name, expected in stated.items():
            path = data_path(root, name)
            if not path.is_file():
                yield f"{path}: no such file, but the recipe gives its {kind}; check the data root"
                continue
            found = digest(path, kind)
            if found != expected.lower():
                yield f"{path}: {kind} {found} is not the recipe's {expected}: another version; fetch the right one"


def unstated(recipe: DataRecipe, root: str | Path) -> dict[str, str]:
    """SHA-256 of the files among a recipe's options for which it states no checksum: name -> sum, ready to fill in."""
    names = [str(value) for value in recipe.options.values() if isinstance(value, str)]
    there = [n for n in names if n not in recipe.sha256 and n not in recipe.md5 and data_path(root, n).is_file()]
    return {name: digest(data_path(root, name), "sha256") for name in there}


def digest(path: Path, kind: str) -> str:
    """The hexadecimal checksum of a file; one that has not changed since is not read again by this process."""
    state = path.stat()
    return _digest(path, kind, (state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=256)
def _digest(path: Path, kind: str, _version: tuple[int, int]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()
