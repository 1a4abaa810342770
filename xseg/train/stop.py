"""SIGTERM and SIGINT: the first one asks the run to save and end, a second one ends the process at once."""

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME = 2.0
"""Seconds within which signals count as one: a scheduler tells every process, and the launcher passes its own on."""

TOLD = "told by another rank"
"""Note on an error that this rank keeps to itself."""


class Stopped(Exception):
    """A run that a signal ended, its state saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number
        """Exit status of the process, as shells give it."""


class Stop:
    """Listens while it is entered; only the main thread may enter it.

    The signals are read from a pipe by a thread of its own, so that a second one ends a process whose main thread waits
    for other ranks and never comes back to Python.
    """

    def __init__(self, told: bool) -> None:
        """``told``: say on stderr that the signal came (rank 0)."""
        self.told = told
        self.asked = 0
        """Number of the signal that came, or 0."""
        self._first = 0.0

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {number: signal.signal(number, _noted) for number in SIGNALS}
        self._fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _listen(self) -> None:
        while number := os.read(self._read, 1)[0]:
            if number not in SIGNALS:
                continue
            now = time.monotonic()
            if self.asked and now - self._first > SAME:
                os._exit(128 + number)
            if not self.asked:
                self._first, self.asked = now, number
                if self.told:
                    name = signal.Signals(number).name
                    print(f"{name}: saving and ending after this step; once more ends at once", file=sys.stderr)


def _noted(number: int, frame: FrameType | None) -> None:
    """The thread hears of it; without a handler the process would end here."""
