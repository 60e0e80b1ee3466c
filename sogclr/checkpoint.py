"""Checkpoint files: written so that a power failure spoils none, read so that no code in them runs."""

import argparse
import contextlib
import os
import shutil
import sys
import threading
import time
import warnings
import zipfile

import numpy as np
import torch

from sogclr import InputError, Stopped, one_line
from sogclr.distributed import rank

LAST, PREVIOUS = "checkpoint_last.pth.tar", "checkpoint_previous.pth.tar"

# The authors' files hold numpy numbers, others their flags. They are data, not code, so they may be unpickled; numbers
# under numpy 1's name too.
_SCALAR = np.float64(0).__reduce__()[0]
_DATA = [argparse.Namespace, (_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"),
         np.dtype, *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool"))]


class Writer:
    """Writes the checkpoints of a run in the background, one at a time, and only on rank 0.

    folder: of the run, None to write nothing; minutes: between two saves inside an epoch, 0 for none.
    A save that fails (a full disk, say) is reported and leaves the earlier files as they were; training goes on.
    A context, at whose end it is closed.
    """

    def __init__(self, folder, minutes=0.0):
        self.folder, self.seconds, self.active = folder, 60 * minutes, folder is not None and rank() == 0
        self.last_time = time.monotonic()
        self.thread = self.error = None

    def is_due(self):
        """Whether the last save was `minutes` ago."""
        return self.active and 0 < self.seconds <= time.monotonic() - self.last_time

    def save(self, state, *names):
        """Write a dict as `checkpoint_last.pth.tar`, and under further names. Returns as soon as it is copied to host
        memory and the write before it is done, so that training may change the tensors.
        """
        if self.active:
            self.wait()
            self.last_time = time.monotonic()
            self.thread = threading.Thread(target=self._write, args=(_host_copy(state), names))
            self.thread.start()

    def wait(self):
        """Wait until the last save is written."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def close(self):
        """Wait for the last save, and raise InputError if it failed."""
        self.wait()
        if self.error:
            raise InputError(f"--save_dir {self.folder.parent}: the last save failed: {self.error}")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind in (None, Stopped):
            self.close()
        else:       # which has something else to say
            self.wait()

    def _write(self, state, names):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)      # somebody may have cleaned up
            save(state, self.folder, names)
            self.error = None
        except Exception as error:      # torch.save adds errors of its own when a write fails
            cause = error
            while cause.__context__ is not None:
                cause = cause.__context__
            self.error = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            print(f"=> NOT saved: {self.folder}: {self.error}; the earlier checkpoints are as they were, and training "
                  "goes on", file=sys.stderr, flush=True)


def save(state, folder, names=()):
    """Write `checkpoint_last.pth.tar`, and the same under further names; whenever the power fails, the folder holds an
    intact one. The former one becomes `checkpoint_previous.pth.tar`.
    """
    part, last = folder / (LAST + ".part"), folder / LAST
    part.unlink(missing_ok=True)        # of a save that was cut off, it may be one file with a checkpoint that is kept
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):      # it may fill a full disk
            part.unlink(missing_ok=True)
        raise
    for name in names:
        copy = folder / (name + ".part")
        copy.unlink(missing_ok=True)
        try:
            os.link(part, copy)
        except OSError:     # a file system without links
            shutil.copyfile(part, copy)
        os.replace(copy, folder / name)
    if last.exists():
        os.replace(last, folder / PREVIOUS)
    os.replace(part, last)
    with contextlib.suppress(OSError):      # some file systems cannot flush a folder
        entries = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entries)
        finally:
            os.close(entries)


def _host_copy(state):
    """The same with every tensor copied to host memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _host_copy(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(_host_copy, state))
    return state


def size(state):
    """The bytes of all tensors in a state, which is about the size of its file."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(size, parts))


def load(path, flag, keys=()):
    """The dict in a checkpoint file, on the CPU. Only data is unpickled, never code.

    flag: which flag named the file, for the message; keys: what must be in it. Raises InputError where the file is
    missing, damaged, or not such a checkpoint.
    """
    if not os.path.isfile(path):
        raise InputError(f"{flag} {path}: " + ("is a folder, give a file in it" if os.path.isdir(path)
                                               else "no such file"))
    try:
        _check_sums(path)
        with torch.serialization.safe_globals(_DATA), warnings.catch_warnings():
            warnings.simplefilter("ignore")     # about a foreign file's format: what it holds is checked here
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # a foreign file can make the unpickler raise anything
        raise InputError(f"{flag} {path}: not a checkpoint that can be read safely, it is damaged or holds more than "
                         f"data ({type(error).__name__}); give a file that train.py or lincls.py wrote, or another's "
                         "state_dict saved alone") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{flag} {path}: holds no checkpoint but a {type(checkpoint).__name__}")
    require(checkpoint, f"{flag} {path}", keys)
    return checkpoint


def _check_sums(path):
    """Raise BadZipFile where a bit has changed: torch.save writes check sums, but torch.load does not look at them."""
    if not zipfile.is_zipfile(path):        # the format of long ago, which has none
        return
    with zipfile.ZipFile(path) as file:
        # torch.load leaves what is marked as a folder unread, whatever its name
        if file.testzip() or any(member.external_attr & 0x10 for member in file.infolist()):
            raise zipfile.BadZipFile("check sum")


def require(checkpoint, source, keys):
    """Raise InputError where a checkpoint lacks one of the keys. source: the flag and file that it is from."""
    missing = [key for key in keys if key not in checkpoint]
    if missing:
        raise InputError(f"{source}: lacks {', '.join(missing)}, it is not a checkpoint of this script")


def require_same_images(made_with, now, source):
    """Raise InputError where a checkpoint's settings tell of other images than this run's, whose order decides it.

    made_with, now: settings with `images`, the `ImageSet.fingerprint`; files from before it are taken as they are.
    source: the flag and file that `made_with` is from.
    """
    if made_with.get("images", now["images"]) != now["images"]:
        raise InputError(f"{source}: was made with other images ({made_with['images']}) than those in --data "
                         f"({now['images']}), give the same folder, or start a new run")


def restore_parts(saved, source, **parts):
    """Give each part the state under its name in a checkpoint; an empty one, of a scaler without use, is left out.

    parts: objects with `load_state_dict`. Raises InputError where a state does not fit.
    """
    for name, part in parts.items():
        state = saved.get(name, {})
        try:
            if state or not isinstance(part, torch.amp.GradScaler):
                part.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{source}: was made with another model, optimizer or protocol: {one_line(error)}"
                             ) from error


def add_ddp_prefix(state_dict):
    """The names under which DistributedDataParallel saves, as the authors' files have them."""
    return {"module." + key: value for key, value in state_dict.items()}


def remove_ddp_prefix(state_dict):
    """The inverse of `add_ddp_prefix`; names without the prefix stay as they are."""
    return {key.removeprefix("module."): value for key, value in state_dict.items()}
