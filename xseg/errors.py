"""The errors whose message says everything: value, rule, fix and place; nobody has to read a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input from the user; command lines print the message alone and exit with status 2."""


class RunError(RuntimeError):
    """A run that cannot go on though its input is right: a process that is gone, a loss that is no number.

    Command lines print the message alone and exit with status 1.
    """


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known word, or the known words when none is near.

    What YAML or JSON read as no text (``no``, 3) is taken as it is printed.
    """
    names = sorted(map(str, known))
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f" (known: {', '.join(names)})" if names else ""
