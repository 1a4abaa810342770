"""``xseg doctor`` on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from xseg.train.doctor import examine


def diagnose(stage: str | None, overrides: Sequence[str], launch: str | None, console: Console) -> int:
    """Print every check as it ends; return how many found a fault."""
    faults = 0
    for finding in examine(stage, overrides, launch):
        mark = "[red]fault[/red]" if finding.fault else "[green]ok[/green]   "
        console.print(f"{mark}  {finding.check}", soft_wrap=True)
        if finding.fault:
            faults += 1
            console.print(f"       {escape(finding.fault)}", soft_wrap=True)
    console.print(f"faults: {faults}" if faults else "nothing found")
    return faults
