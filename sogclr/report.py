"""A run's JSON records and TensorBoard logs: results.json, the table of settings, the embedding."""

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from sogclr import printable
from sogclr.distributed import gather, rank, world_size

THUMBNAIL = 32      # pixels per side; TensorBoard needs 1000 of them in one image of at most 8192


class Events:
    """A run's TensorBoard log, written only on rank 0. A context manager, closed on exit.

    folder: the run's, None for no log; purge_step: step from which an earlier start's events are purged, None for none.
    If it cannot be written (a full disk, a deleted folder or one whose name is not UTF-8, no TensorBoard), this is
    reported once, and the run continues.
    """

    def __init__(self, folder, purge_step=None):
        self.folder, self.writer = folder, None
        if rank() == 0 and folder is not None:
            with self._may_fail():
                # Here, since a package that is missing must not end the run.
                from torch.utils.tensorboard import SummaryWriter
                self.writer = SummaryWriter(folder, purge_step=purge_step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.write("close")

    def write(self, method, *args, **kwargs):
        """Call the SummaryWriter method of that name, such as `add_image` or `flush`."""
        if self.writer:
            with self._may_fail():
                getattr(self.writer, method)(*args, **kwargs)

    def scalars(self, values, step):
        """values: {name: number or 0-d tensor}"""
        if self.writer:     # reading a value waits for the device
            for name, value in values.items():
                self.write("add_scalar", name, float(value), step)

    def hparams(self, settings, score):
        """Add this run as a row to TensorBoard's table of settings.

        settings: {name: value}; score: one classifier's, as in `Classifiers.scores`.
        """
        settings = {name: value for name, value in settings.items() if isinstance(value, (bool, int, float, str))}
        self.write("add_hparams", settings | {name: score[name] for name in ("lr", "weight_decay")},
                   {f"hparam/{name}": score[name] for name in ("acc1", "acc5", "best_acc1")}, run_name=".")

    @contextlib.contextmanager
    def _may_fail(self):
        try:
            yield
        except (OSError, UnicodeError, ImportError) as error:   # perhaps of an earlier call: a thread writes the events
            why = getattr(error, "strerror", None) or error
            why = "its name is not UTF-8" if isinstance(error, UnicodeError) else why
            print(f"=> TensorBoard logging disabled: {self.folder}: {why}", file=sys.stderr, flush=True)
            self.writer = None


def device_name(device):
    """`CPU`, or the GPU's name."""
    return "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def device_names(device):
    """The run's devices, for people: `4 x NVIDIA H200`."""
    return f"{world_size()} x {device_name(device)}"


def environment_info(device):
    """What affects results besides the settings: versions, the code's commit, the device, on a CPU the threads."""
    commit, clean = git_state(Path(__file__).resolve().parents[1])
    return {"versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__, "numpy": np.__version__},
            "commit": commit, "clean": clean, "device": device_name(device), "threads": torch.get_num_threads(),
            "ranks": world_size()}


def git_state(folder):
    """The commit checked out in a folder, and whether its files are unmodified; (None, None) if the folder is not a git
    checkout of its own.
    """
    def git(*command):
        return subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True).stdout

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != folder:       # a copy inside another repository
            return None, None
        return commit, not git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None, None


def write_json(path, content):
    """Write a dict as JSON atomically, on rank 0; nan and infinity become null. A failure is only reported and does not
    end the run.
    """
    if rank() == 0:
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")
            os.replace(part, path)
        except OSError as error:
            print(f"=> NOT written: {path}: {error.strerror}", file=sys.stderr, flush=True)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@torch.no_grad()
def add_embedding(folder, encode, loader, classes, step):
    """Log features for TensorBoard's projector, with their classes and thumbnails. Call on all ranks.

    folder: the run's; encode: uint8 [b, 3, H, W] -> [b, C]; loader: a `Loader` of the labeled images to show;
    classes: their names; step: the run's; nothing is done if its folder already has an embedding of this step.
    """
    parts = [(encode(images), labels.to(loader.device), _thumbnails(images)) for images, labels in loader.epoch(0)]
    features, labels, thumbnails = (gather(torch.cat(part)).cpu() for part in zip(*parts, strict=True))
    if rank() == 0 and not (folder / f"{step:05d}").exists():
        names = [printable(classes[label]) for label in labels]
        with Events(folder) as events:
            events.write("add_embedding", features, metadata=names, label_img=thumbnails, global_step=step)


def _thumbnails(images):
    """uint8 [b, 3, H, W] -> [b, 3, THUMBNAIL, THUMBNAIL] in [0, 1]"""
    return F.interpolate(images.float() / 255, size=(THUMBNAIL, THUMBNAIL), mode="area")
