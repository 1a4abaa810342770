"""A run that is told to stop saves and ends; told twice, it ends at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from xseg.train import stop as stops
from xseg.train.stop import Stop, Stopped

# The main thread never comes back to Python: it waits at a barrier for a second thread that does not exist.
BLOCKED = """
import ctypes
from xseg.train.stop import Stop
libc = ctypes.CDLL(None)
barrier = ctypes.create_string_buffer(64)
libc.pthread_barrier_init(barrier, None, 2)
with Stop(told=True) as stop:
    print("ready", flush=True)
    libc.pthread_barrier_wait(barrier)
"""


def wait_for(stop: Stop) -> int:
    deadline = time.monotonic() + 5
    while not stop.asked and time.monotonic() < deadline:
        time.sleep(0.01)
    return stop.asked


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_one_asks_and_its_echo_is_no_second(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Stop(told=False) as stop:
        assert stop.asked == 0
        os.kill(os.getpid(), number)
        assert wait_for(stop) == number
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert stop.asked == number
    assert signal.getsignal(number) is before
    assert Stopped(number).status == 128 + number


def test_other_signals_ask_for_nothing() -> None:
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        with Stop(told=False) as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
            assert heard and not stop.asked
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_second_one_ends_a_process_that_hangs() -> None:
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(stops.SAME + 0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 143
    assert process.stderr is not None and b"SIGTERM: saving and ending after this step" in process.stderr.read()
