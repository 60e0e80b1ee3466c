"""Real image files, and how the tests run the real scripts and read what they leave."""

import contextlib
import importlib
import io
import itertools
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sogclr import run as run_module
from sogclr.launch import free_port

ROOT = Path(__file__).resolve().parents[1]
TINY = shlex.split("--arch resnet18 --image-size 32 --stem imagenet --batch-size 8 --workers 1 --print-freq 1")
PYTHON = sys.executable
TIMEOUT_SECONDS = 900       # for any process, also on a slow and busy machine: one that reaches it hangs

# The authors' command for pretraining.
PRETRAIN = """--lr=.075 --epochs=800 --batch-size=256 --learning-rate-scaling=sqrt --loss_type dcl --gamma 0.9
 --multiprocessing-distributed --world-size 1 --rank 0 --workers 32 --crop-min=.08 --wd=1e-6
 --dist-url 'tcp://localhost:10001' --data_name imagenet1000 --data DIR --save_dir DIR2 --print-freq 1000"""
CLASSES = ("n01440764", "n01443537", "n01484850")


def write_image(path, seed, size=(48, 40)):
    """A JPEG of smooth random colors."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize(size, Image.Resampling.BICUBIC).save(path, "JPEG", quality=90)


# Kills all processes with a variable in their environment once its input is closed.
CLEAN_UP = """
import os, signal, sys
sys.stdin.read()
found = True
while found:        # until there are none, since they may start others meanwhile
    found = False
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if sys.argv[1].encode() in file.read().split(b"\\0") and int(pid) != os.getpid():
                    os.kill(int(pid), signal.SIGKILL)
                    found = True
        except OSError:
            pass
"""


class Process(subprocess.Popen):
    """A process on the CPU, with one thread and pipes for its output, whose warnings are errors. It and what it has
    started are killed after TIMEOUT_SECONDS, and, as a context manager, on exit.
    """

    def __init__(self, *command, cwd=ROOT, **env):
        defaults = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                    # Python 3.12 on warns of the fork of loader workers, and torch 2.6 leaves a folder to be removed.
                    "PYTHONWARNINGS": "error,ignore:This process:DeprecationWarning,"
                                      "ignore:Implicitly cleaning up:ResourceWarning"}
        super().__init__(list(map(str, command)), cwd=cwd, env=os.environ | defaults | env, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        self.limit = threading.Timer(TIMEOUT_SECONDS, self.kill_all)
        self.limit.daemon = True
        self.limit.start()

    def __exit__(self, *error):
        self.limit.cancel()
        self.kill_all()
        super().__exit__(*error)

    def kill_all(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait_for(self, text):
        """Read the output up to a line that contains the text."""
        lines = []
        for line in self.stdout:
            lines.append(line)
            if text in line:
                return
        raise AssertionError("".join(lines) + self.stderr.read())

    def end(self, *codes):
        """The rest of the output and the error output; it must end with one of the exit codes, by default 0."""
        output, error = self.communicate()
        assert self.returncode in (codes or (0,)), output + error
        return output, error


def run(*command, code=0, **env):
    """The output and the error output of a process that must end with this exit code."""
    with Process(*command, **env) as process:
        return process.end(code)


# Forks processes from one that has imported these, since importing torch takes seconds. Before Python 3.13 it finds
# them only in the working directory, which is the project folder.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "lincls"])


class Fork:
    """`train` or `lincls` in a process of its own, like a `Process`, but forked.

    sends: (n, signal) to send itself that signal in the n-th step, counted from 0.
    """

    def __init__(self, module, *args, sends=None):
        self.folder = tempfile.TemporaryDirectory()
        self.output, self.error = files = [Path(self.folder.name) / name for name in ("output", "error")]
        self.process = FORKS.Process(target=_launch, args=(module.__name__, list(map(str, args)), files, sends))

    def __enter__(self):
        self.process.start()
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()
        self.folder.cleanup()

    def end(self, *codes):
        """The output and the error output; it must end with one of the exit codes, by default 0."""
        self.process.join(TIMEOUT_SECONDS)
        texts = self.output.read_text(), self.error.read_text()
        assert self.process.exitcode in (codes or (0,)), texts
        return texts


def _launch(name, args, files, sends):
    for stream, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "This process", DeprecationWarning)       # as in Process
    torch.set_num_threads(1)
    if sends:
        send_in_step(*sends)
    sys.argv = [f"{name}.py", *args]
    module = importlib.import_module(name)
    module.launch(module.main_worker, module.PARSER.parse_args())


def send_in_step(n, number, setattr=setattr):
    """Make this process send itself a signal in the n-th step from now, counted from 0."""
    steps, original = itertools.count(), run_module.stop_requested

    def stop_requested():
        if next(steps) == n:
            os.kill(os.getpid(), number)
        return original()

    setattr(run_module, "stop_requested", stop_requested)


@contextlib.contextmanager
def two_ranks(module, *args, sends=(None, None)):
    """Start `train` or `lincls` as two processes, as if by hand: rank 0 and rank 1. sends: each one's, see `Fork`."""
    args = [*args, "--world-size", 2, "--dist-url", f"tcp://localhost:{free_port()}", "--rank"]
    with Fork(module, *args, 0, sends=sends[0]) as first, Fork(module, *args, 1, sends=sends[1]) as second:
        yield first, second


def call(module, *args):
    """The output of `train` or `lincls` in this process, which saves importing torch, line by line."""
    args = module.PARSER.parse_args(list(map(str, args)))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", [module.__name__])
        patch.setattr(os, "fsync", lambda _: None)      # the disk is not under test
        module.launch(module.main_worker, args)
    return output.getvalue().splitlines()


def refused(module, flags, message, monkeypatch, capsys):
    """Run `train` or `lincls` in this process: it must exit with code 2 and one line that contains the message."""
    script = f"{module.__name__}.py"
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.setattr(module.PARSER, "prog", script)
    with pytest.raises(SystemExit) as caught:
        module.launch(module.main_worker, module.PARSER.parse_args(list(map(str, flags))))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert error.startswith(f"{script}: error: ")
    assert error.count("\n") == 1


def losses(lines):
    """The loss of each step, as text."""
    return re.findall(r"Epoch: \[\d+\]\[ *\d+/\d+\].*  Loss (\S+) ", "\n".join(lines))


def newest(folder, name="checkpoint_last.pth.tar"):
    return max(Path(folder).rglob(name), key=lambda path: path.stat().st_mtime)


def load(folder):
    return torch.load(newest(folder), weights_only=True)
