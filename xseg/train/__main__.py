"""``accelerate launch --config_file ACCELERATE.yaml -m xseg.train STAGE.yaml [--set a.b=c ...] [--resume auto]``.

Ends with 0 when done, 2 when the input was wrong (one message) or the disk is full, 1 for anything else.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from xseg.errors import UserError
from xseg.train.stage import check_fresh, read_stage


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; argparse itself ends the process with 2 when it does not fit."""
    parser = argparse.ArgumentParser(prog="python -m xseg.train", description="Train one stage.")
    parser.add_argument("stage", help="a stage recipe: a path, or a name under train_stages/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys of the recipe"
    )
    parser.add_argument(
        "--resume", choices=("auto", "none"), default="none", help="auto: go on from the newest complete checkpoint"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; return the exit status."""
    given = parse(arguments)
    try:
        stage = read_stage(given.stage, given.set)
        check_fresh(stage, resume=given.resume == "auto")
        from xseg.train.loop import train

        train(stage, resume=given.resume == "auto")
    except UserError as error:
        return _complain(error)
    return 0


def _complain(error: UserError) -> int:
    """Print the message once; what all ranks meet alike is told by rank 0, and a rank's own trouble by that rank."""
    if os.environ.get("RANK", "0") == "0" or getattr(error, "__notes__", None):
        print(f"xseg.train: {error}", file=sys.stderr, flush=True)
    else:
        # The launcher ends all processes as soon as one has ended: leave rank 0 the time to speak.
        time.sleep(3)
    return 2


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        # The destructors of gloo's threads may abort, which would hide the status.
        os._exit(status)
