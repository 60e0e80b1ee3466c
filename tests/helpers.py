"""Real image files, and how the tests run the real scripts and read what they leave."""

import contextlib
import importlib
import io
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sogclr.launch import free_port

ROOT = Path(__file__).resolve().parents[1]
TINY = shlex.split("--arch resnet18 --image-size 32 --stem imagenet --batch-size 8 --workers 1 --print-freq 1")
PYTHON = sys.executable
TIMEOUT_SECONDS = 600       # for any process, also on a slow and busy machine: a test that reaches it hangs

MAY_FORK = "ignore:This process:DeprecationWarning"        # Python 3.12 on warns of loader workers

CLASSES = ("n01440764", "n01443537", "n01484850")


def write_image(path, seed, size=(48, 40)):
    """A JPEG of smooth random colors."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize(size, Image.Resampling.BICUBIC).save(path, "JPEG", quality=90)


class Process(subprocess.Popen):
    """A process on the CPU, with one thread and pipes for its output, whose warnings are errors. As a context manager
    it is killed on exit.
    """

    def __init__(self, *command, cwd=ROOT, **env):
        defaults = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": f"error,{MAY_FORK}"}
        super().__init__(list(map(str, command)), cwd=cwd, env=os.environ | defaults | env, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __exit__(self, *error):
        self.kill()
        super().__exit__(*error)

    def wait_for(self, text):
        """Read the output up to a line that contains the text."""
        limit = threading.Timer(TIMEOUT_SECONDS, self.kill)
        limit.daemon = True
        limit.start()
        lines = []
        for line in self.stdout:
            lines.append(line)
            if text in line:
                limit.cancel()
                return
        raise AssertionError("".join(lines) + self.stderr.read())

    def end(self, *codes):
        """The rest of the output and the error output; it must end with one of the exit codes, by default 0."""
        output, error = self.communicate(timeout=TIMEOUT_SECONDS)
        assert self.returncode in (codes or (0,)), output + error
        return output, error


def run(*command, code=0, **env):
    """The output and the error output of a process that must end with this exit code."""
    with Process(*command, **env) as process:
        return process.end(code)


# Forks processes from one that has only imported these, which takes 4 s.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "lincls"])


class Fork:
    """`train` or `lincls` in a process of its own, like a `Process`, but forked."""

    def __init__(self, module, *args):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / name for name in ("output", "error")]
        self.process = FORKS.Process(target=_launch, args=(module.__name__, list(map(str, args)), self.files))
        self.kill = self.process.kill

    def __enter__(self):
        self.process.start()
        return self

    def __exit__(self, *_):
        self.kill()
        self.process.join()
        self.folder.cleanup()

    def wait_for(self, text):
        """Wait until the output contains the text."""
        limit = time.monotonic() + TIMEOUT_SECONDS
        while not (self.files[0].exists() and text in self.files[0].read_text()):
            assert self.process.is_alive(), self.texts()
            assert time.monotonic() < limit
            time.sleep(0.02)

    def texts(self):
        """The output and the error output so far."""
        return [file.read_text() for file in self.files]

    def end(self, *codes):
        """The output and the error output; it must end with one of the exit codes, by default 0."""
        self.process.join(TIMEOUT_SECONDS)
        assert self.process.exitcode in (codes or (0,)), self.texts()
        return self.texts()


def _launch(name, args, files):
    for stream, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "This process", DeprecationWarning)
    torch.set_num_threads(1)
    sys.argv = [f"{name}.py", *args]
    module = importlib.import_module(name)
    module.launch(module.main_worker, module.PARSER.parse_args())


@contextlib.contextmanager
def two_ranks(module, *args):
    """Start `train` or `lincls` as two processes, as if by hand: rank 0 and rank 1."""
    args = [*args, "--world-size", 2, "--dist-url", f"tcp://localhost:{free_port()}", "--rank"]
    with Fork(module, *args, 0) as first, Fork(module, *args, 1) as second:
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
