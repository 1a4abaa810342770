"""Where files lie: those that come with xseg, in a checkout or an installed wheel, and those that users name."""

import os
from pathlib import Path

from xseg.errors import UserError, did_you_mean

SHIPPED = (Path(__file__).parent.parent, Path(__file__).parent / "assets")
"""Where the folders that come with xseg lie: in a checkout, and in an installed wheel."""
EXAMPLES = "examples"
DEFAULT_MODEL = "examples/tiny_model"
"""What is opened where no model is named."""


def shipped(name: str) -> Path | None:
    """``examples/...`` as it comes with xseg, whatever the working directory; None for other names and lost files."""
    if Path(name).parts[:1] != (EXAMPLES,):
        return None
    return next((place / name for place in SHIPPED if (place / name).exists()), None)


def default_model() -> Path:
    """Return the folder of the shipped model. Raises UserError that says where it was looked for."""
    for place in (Path("."), *SHIPPED):
        if (place / DEFAULT_MODEL / "config.json").is_file():
            return place / DEFAULT_MODEL
    looked = ", ".join(str(place.resolve() / DEFAULT_MODEL) for place in SHIPPED)
    raise UserError(
        f"no model was named, and the shipped one, {DEFAULT_MODEL}, is not there (looked for config.json in {looked}): "
        "name the `final` folder of a stage (xseg chat --model DIR, xseg.load(DIR)); `make demo` trains one in a "
        "quarter of an hour, `make train-long` the one that is shipped"
    )


def find(name: str, folder: str, suffix: str = ".yaml", beside: Path | None = None) -> Path:
    """Return the file or folder ``name``: as a path, beside a given file, in ``./folder``, or in the shipped folder.

    Names that begin with ``examples/`` are found in the shipped examples from any working directory.
    """
    given = Path(name).expanduser()
    roots = [Path("."), *([beside] if beside else []), Path(folder), *(place / folder for place in SHIPPED)]
    for root in roots:
        for candidate in (root / given, root / f"{name}{suffix}"):
            if candidate.exists():
                return candidate
    if example := shipped(name):
        return example
    if given.parts[:1] == (EXAMPLES,):
        looked = ", ".join(str(place.resolve() / name) for place in (Path("."), *SHIPPED))
        raise UserError(f"{name!r}: no such file (looked for {looked}); `make parts` trains what examples/ lacks")
    known = {
        p.relative_to(r).with_suffix("").as_posix() for r in roots[-3:] if r.is_dir() for p in r.rglob(f"*{suffix}")
    }
    raise UserError(f"{name!r}: no such file, and no recipe of that name in {folder}/{did_you_mean(name, known)}")


def data_path(root: str | os.PathLike[str], value: str) -> Path:
    """Resolve a recipe's path against the data root."""
    return Path(root).expanduser() / Path(value).expanduser()
