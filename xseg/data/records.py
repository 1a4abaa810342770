"""Annotation files: reading them safely and keeping many records in little memory."""

import codecs
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from xseg.errors import UserError

T = TypeVar("T")


class Packed(Sequence[T], Generic[T]):
    """A read-only list whose items lie serialised in one array.

    Worker processes share the array: reading an item touches no reference count of a parent's object, so memory does
    not grow with the number of workers, and sending the whole to a worker copies two arrays.
    """

    def __init__(self, items: Iterable[T]) -> None:
        blobs = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in items]
        self._ends = np.cumsum([len(b) for b in blobs], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(blobs), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        return pickle.loads(self._bytes[start : int(self._ends[index])].data)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[T]:
        return (self[i] for i in range(len(self)))


def read_records(path: Path) -> Any:
    """Read a JSON file, or by suffix ``.p``/``.pkl``/``.pickle`` a pickle of plain containers, texts and numbers.

    Raises UserError for a missing or damaged file and for a pickle that holds anything else.
    """
    try:
        if path.suffix in (".p", ".pkl", ".pickle"):
            with path.open("rb") as file:
                return PlainUnpickler(file, encoding="latin1").load()
        return _json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such annotation file; check the recipe's options and the data root") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, ValueError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path}: the annotation file cannot be read ({error}); fetch it again") from error


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except UnicodeDecodeError:
        return json.loads(raw.decode("cp1252"))  # some files of ReasonSeg were written on Windows


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of built-in containers, texts, numbers and numpy scalars; never runs code named by the file.

    The REFER annotations are only released as pickles; the stock unpickler would import whatever they name.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return the harmless stand-in for an allowed global; UserError for every other one."""
        module = module.replace("__builtin__", "builtins").replace("numpy._core", "numpy.core")
        allowed = {
            ("builtins", "set"): set,
            ("builtins", "frozenset"): frozenset,
            ("builtins", "bytearray"): bytearray,
            ("collections", "OrderedDict"): dict,
            ("_codecs", "encode"): _latin1_bytes,
            ("numpy", "dtype"): _ScalarType,
            ("numpy.core.multiarray", "scalar"): _scalar,
        }
        if (module, name) not in allowed:
            raise UserError(
                f"the pickle names {module}.{name}: only built-in containers, texts, numbers and numpy scalars are "
                f"read from a pickle, because anything else could run code; convert the file to JSON"
            )
        return allowed[module, name]


class _ScalarType:
    """Stands for ``numpy.dtype`` while a pickle is read; knows no object types."""

    def __init__(self, spec: str, *_: Any) -> None:
        self.spec, self.order = spec, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def _scalar(kind: _ScalarType, data: str | bytes) -> Any:
    dtype = np.dtype(kind.spec)
    if dtype.kind not in "biufSU":
        raise UserError(f"the pickle holds a numpy scalar of type {dtype}: only numbers and texts are read")
    raw = data.encode("latin1") if isinstance(data, str) else data
    swapped = dtype.newbyteorder() if kind.order == ">" else dtype  # every platform we run on is little-endian
    return np.frombuffer(raw, swapped)[0].item()


def _latin1_bytes(text: str, encoding: str = "latin1") -> bytes:
    if codecs.lookup(encoding).name not in ("iso8859-1", "utf-8", "ascii"):
        raise UserError(f"the pickle encodes text as {encoding}: only latin1, ascii and utf-8 are read")
    return text.encode(encoding)


def field(record: Any, key: str, where: str) -> Any:
    """Return ``record[key]``; UserError naming the place and the keys there are."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: expected a record with key '{key}', found {str(record)[:60]!r}")
    if key not in record:
        raise UserError(f"{where}: key '{key}' is missing (keys there: {', '.join(map(str, record))})")
    return record[key]


def whole(record: Any, key: str, where: str, default: int | None = None, least: int | None = None) -> int:
    """Return the whole number under ``key``.

    UserError when it is missing without a ``default``, when it is no number, and when it is below ``least``.
    """
    value = default if default is not None and key not in record else field(record, key, where)
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        rule = "a whole number" if least is None else f"a whole number of {least} or more"
        raise UserError(f"{where}: {key}: {_short(value)} must be {rule}; correct it")
    return value


def identifier(record: Any, key: str, where: str) -> int | float | str:
    """Return the id under ``key``; UserError when it is missing or neither a number nor a text."""
    value = field(record, key, where)
    if not isinstance(value, int | float | str):
        raise UserError(f"{where}: {key}: {_short(value)} is no id: an id is a number or a text; correct it")
    return value


def text(record: Any, key: str, where: str) -> str:
    """Return the text under ``key``; UserError when it is missing, empty or no text."""
    value = field(record, key, where)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key}: {_short(value)} must be a text that is not empty; correct it")
    return value


def flag(record: Any, key: str, where: str, default: bool = False) -> bool:
    """Return the yes or no under ``key``; UserError for anything but 0, 1, true and false: even the text "0" is a yes
    to Python."""
    value = record.get(key, default)
    if isinstance(value, str) or value not in (0, 1):
        raise UserError(f"{where}: {key}: {_short(value)} must be 0 or 1; correct it")
    return bool(value)


def _short(value: Any) -> str:
    return repr(value)[:60]


def records(data: Any, key: str, where: str) -> list[Any]:
    """Return the list under ``key`` of an annotation file; UserError when there is none."""
    rows = field(data, key, where)
    if not isinstance(rows, list):
        raise UserError(f"{where}: '{key}' is a {type(rows).__name__}, it must be a list of records")
    return rows
