"""Real image files, and how the tests run the real scripts and read what they leave."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sogclr.launch import free_port

ROOT = Path(__file__).resolve().parents[1]
TINY = shlex.split("--arch resnet18 --image-size 32 --stem imagenet --batch-size 8 --workers 1 --print-freq 1")
PYTHON = (sys.executable,)
TORCHRUN = (*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TIMEOUT_SECONDS = 600       # for any process, also on a slow and busy machine: a test that reaches it hangs

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
        defaults = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "error"}
        super().__init__(list(map(str, command)), cwd=cwd, env=os.environ | defaults | env, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __exit__(self, *error):
        self.kill()
        super().__exit__(*error)

    def wait_for(self, text):
        """Read the output up to a line that contains the text."""
        lines = []
        for line in self.stdout:
            lines.append(line)
            if text in line:
                return
        raise AssertionError("".join(lines) + self.stderr.read())

    def end(self, code=0):
        """The rest of the output and the error output; it must end with this exit code."""
        output, error = self.communicate(timeout=TIMEOUT_SECONDS)
        assert self.returncode == code, output + error
        return output, error


def run(*command, code=0, **env):
    """The output and the error output of a process that must end with this exit code."""
    with Process(*command, **env) as process:
        return process.end(code)


@contextlib.contextmanager
def two_ranks(script, *args, launcher=()):
    """Start a script as two processes by hand: rank 0 and rank 1."""
    command = [*launcher, *PYTHON, ROOT / script, *args, "--world-size", 2, "--dist-url",
               f"tcp://localhost:{free_port()}", "--rank"]
    with Process(*command, 0) as first, Process(*command, 1) as second:
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
