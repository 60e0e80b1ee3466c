"""The tests' own tools."""

import os
import signal
import subprocess

from helpers import CLEAN_UP, PYTHON, TIMEOUT_SECONDS


def test_nothing_is_left_behind():
    """A process in a session of its own, and what it has started, must be killed; others must not."""
    name, value = "SOGCLR_CLEAN_UP", str(os.getpid())
    command = ["sh", "-c", "sleep 600 & echo started; wait"]
    marked, other = (subprocess.Popen(command, env=os.environ | {name: text}, stdout=subprocess.PIPE,
                                      start_new_session=True) for text in (value, value + "0"))
    with marked, other:
        assert marked.stdout.readline() == other.stdout.readline() == b"started\n"
        subprocess.run([PYTHON, "-I", "-c", CLEAN_UP, f"{name}={value}"], input=b"", check=True,
                       timeout=TIMEOUT_SECONDS)
        assert marked.wait(TIMEOUT_SECONDS) == -signal.SIGKILL
        assert marked.stdout.read() == b""      # sleep, which has it too, is gone
        assert other.poll() is None
        os.killpg(other.pid, signal.SIGKILL)
