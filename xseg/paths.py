"""Where files lie: those that come with xseg, in a checkout or an installed wheel, and those that users name."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xseg.errors import UserError, did_you_mean

SHIPPED = (Path(__file__).parent.parent, Path(__file__).parent / "assets")
"""Where the folders that come with xseg lie: in a checkout, and in an installed wheel."""
EXAMPLES = "examples"
DEFAULT_MODEL = "examples/tiny_model"
"""What is opened where no model is named."""
LONGEST = 200
"""Most bytes that a name given by data keeps: file systems allow 255, number and suffix included."""


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


def make_folder(path: Path) -> Path:
    """Make a folder, with those above it, and return it. Raises UserError as ``check_folder``."""
    check_folder(path)
    with writing_to(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def check_folder(path: Path) -> None:
    """Raise UserError where no folder can be made, or no file in it; nothing is left behind."""
    with writing_to(path):
        if "\0" in str(path):
            raise OSError(errno.EINVAL, "a name holds no zero byte")
        nearest = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.exists(p))
        # permissions do not tell: a disk may be read-only, and /proc takes no file from anybody
        tempfile.TemporaryFile(dir=nearest).close()


def partial_folder(out: Path) -> Path:
    """A new folder beside ``out``, to be filled and renamed. Raises UserError as ``make_folder``."""
    check_folder(out)
    make_folder(out.parent)
    with writing_to(out):
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))


@contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Turn what the system has against a place that a user named into a UserError."""
    try:
        yield
    except OSError as error:
        above = (p for p in (place, *place.parents) if os.path.lexists(p) and not os.path.isdir(p))
        file = next(above, None)
        why = f"{file} is no folder" if file else error.strerror or str(error)
        raise UserError(
            f"{place}: nothing can be written there ({why}); name a folder in which you may write"
        ) from error


def file_name(text: str) -> str:
    """A name out of the data as a file may have it; of one that is too long, the beginning and a digest."""
    name = text.replace("/", "-").replace("\0", "-")
    given = name.encode("utf8", "surrogatepass")
    if len(given) <= LONGEST:
        return name
    return f"{given[: LONGEST - 9].decode('utf8', 'ignore')}-{hashlib.sha256(given).hexdigest()[:8]}"
