"""The tests' own tools."""

import os
import signal
import subprocess

from helpers import CLEAN_UP, PYTHON, TIMEOUT_SECONDS, Process


def test_nothing_is_left_behind():
    """A process in a session of its own, and what it has started, must be killed; others must not."""
    name, value = "SOGCLR_CLEAN_UP", str(os.getpid())
    command = ["sh", "-c", "sleep 600 & echo started; wait"]
    with Process(*command, **{name: value}) as marked, Process(*command, **{name: value + "0"}) as other:
        marked.wait_for("started")
        other.wait_for("started")
        subprocess.run([PYTHON, "-I", "-c", CLEAN_UP, f"{name}={value}"], input=b"", check=True,
                       timeout=TIMEOUT_SECONDS)
        assert marked.wait(TIMEOUT_SECONDS) == -signal.SIGKILL
        assert marked.stdout.read() == ""       # sleep, which has it too, is gone
        assert other.poll() is None
