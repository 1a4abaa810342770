"""Readers of annotation formats: one module, one format, one class ``Source`` that turns records into Samples."""

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any, Protocol

from xseg.errors import UserError, did_you_mean
from xseg.types import Categories, Sample


class Source(Protocol):
    """What every source offers: samples by number, without decoding an image."""

    categories: Categories | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def load_source(name: str, root: str | Path, split: str, options: dict[str, Any]) -> Source:
    """Build ``Source`` of the module ``name``; paths among ``options`` are relative to ``root``.

    Raises UserError for an unknown name, and for unknown or missing options.
    """
    known = [m.name for m in pkgutil.iter_modules(__path__)]
    if name not in known:
        raise UserError(f"source: {name!r}: no such annotation format{did_you_mean(name, known)}")
    source = importlib.import_module(f"{__name__}.{name}").Source
    parameters = {n: p for n, p in inspect.signature(source).parameters.items() if p.kind == p.KEYWORD_ONLY}
    for option in options:
        if option not in parameters:
            raise UserError(f"source {name}: unknown option '{option}'{did_you_mean(str(option), parameters)}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in options]
    if missing:
        raise UserError(f"source {name}: option '{missing[0]}' is missing; add it under options: in the recipe")
    return source(Path(root), split, **options)  # type: ignore[no-any-return]
