"""One file per task: how a sample becomes a conversation with queries, and how the model's output becomes a result.

Each module holds a frozen dataclass ``Task``; its fields are the options that a recipe may set.
"""

import dataclasses
import importlib
import pkgutil
from typing import Any

from pydantic import TypeAdapter, ValidationError

from xseg.config import TaskSpec
from xseg.errors import UserError, did_you_mean

SHARED = {"base", "phrasing", "spoken"}
"""Modules of this folder that are no tasks: what tasks have in common."""


def load_task(spec: TaskSpec) -> Any:
    """Return the ``Task`` that a recipe names, with its options checked.

    Raises UserError for an unknown task, an unknown option, or an option of the wrong type.
    """
    known = {m.name for m in pkgutil.iter_modules(__path__)} - SHARED
    if spec.name not in known:
        raise UserError(f"task {spec.name!r}: no such module in xseg/tasks{did_you_mean(spec.name, known)}")
    kind = importlib.import_module(f"xseg.tasks.{spec.name}").Task
    fields = {f.name for f in dataclasses.fields(kind)}
    for option in spec.options:
        if option not in fields:
            raise UserError(f"task {spec.name}: unknown option '{option}'{did_you_mean(option, fields)}")
    try:
        return TypeAdapter(kind).validate_python(spec.options)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(p) for p in fault["loc"])
        raise UserError(f"task {spec.name}: {place} = {fault['input']!r}: {fault['msg']}") from error
