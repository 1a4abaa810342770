"""``accelerate launch --config_file ACCELERATE.yaml -m xseg.train STAGE.yaml [--set a.b=c ...] [--resume auto]``.

Ends with 0 when done, 2 when the input was wrong (one message), the disk is full or memory too small, 128 + N when
signal N stopped it with its state saved (143: SIGTERM, 130: SIGINT), 1 for anything else.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from xseg.errors import RunError, UserError
from xseg.train.stage import check_fresh, read_stage
from xseg.train.stop import TOLD, Stopped


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; argparse itself ends the process with 2 when it does not fit."""
    parser = argparse.ArgumentParser(prog="python -m xseg.train", description="Train one stage.")
    parser.add_argument("stage", help="a stage recipe: a path, or a name under train_stages/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys of the recipe"
    )
    parser.add_argument(
        "--resume",
        default="none",
        metavar="auto|DIR",
        help="auto: go on from the newest whole checkpoint; DIR: start from what `xseg consolidate` wrote, with any "
        "number of processes (once the run has checkpoints of its own, from these)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; return the exit status."""
    given = parse(arguments)
    try:
        stage = read_stage(given.stage, given.set)
        check_fresh(stage, resume=given.resume != "none")
        from xseg.train.loop import train

        train(stage, given.resume)
    except Stopped as error:
        _say(error)
        return error.status
    except UserError as error:
        _say(error)
        return 2
    except RunError as error:
        _say(error)
        return 1
    return 0


def _say(error: Exception) -> None:
    """Print the message once: by the rank that met the trouble first, and before there were ranks by rank 0."""
    notes = getattr(error, "__notes__", [])
    first = os.environ.get("RANK", "0") == "0"
    if TOLD not in notes and (first or notes):
        print(f"xseg.train: {error}", file=sys.stderr, flush=True)
    elif not first:
        # The launcher ends all processes as soon as one has ended: leave the other one the time to speak.
        time.sleep(3)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        # The destructors of gloo's threads may abort, which would hide the status.
        os._exit(status)
