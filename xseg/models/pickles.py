"""Files of torch.save: checked and read without running what a pickle may hold."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from xseg.errors import UserError

ZIP = b"PK\x03\x04"
INERT = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
)
"""Classes that stand in every checkpoint of DeepSpeed; ``Inert`` takes their place, so that none of their code runs."""


class Inert:
    """An object of another program that nobody reads."""

    def __init__(self, *given: Any) -> None:
        self.given = given


def check_sums(file: Path) -> None:
    """Compare a torch file's records with the sums it was written with. Raises UserError for a difference."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{file}: damaged or cut short ({error}); copy it again") from error
    if bad:
        raise UserError(f"{file}: damaged: the bytes of {bad} do not fit the check sum beside them; copy it again")


def load(file: Path) -> Any:
    """What a file holds, its tensors mapped from the disk. Raises UserError for damage, and for code in it."""
    try:
        with file.open("rb") as stream:
            is_zip = stream.read(len(ZIP)) == ZIP
        if is_zip and not zipfile.is_zipfile(file):
            raise EOFError("its end is not there")
        with torch.serialization.safe_globals([(Inert, name) for name in INERT]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise UserError(_refused(file, error)) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{file}: damaged or cut short ({error}); copy it again") from error


def _refused(file: Path, error: Exception) -> str:
    said = str(error)
    if "global" not in said.lower():
        return f"{file}: damaged, or no file of weights ({said.splitlines()[0]}); copy it again"
    word = next((w for line in said.splitlines() if "GLOBAL" in line for w in _behind(line)), "an object")
    return (
        f"{file}: holds code ({word}) beside its tensors, which is never run here: write its tensors alone with "
        "torch.save or safetensors where you trust it, and name that file"
    )


def _behind(line: str) -> list[str]:
    return line.split("GLOBAL", 1)[1].split()[:1]
