"""Checkpoint files, written so that a power failure corrupts none and read so that no code in them runs."""

import argparse
import contextlib
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from sogclr import InputError, Stopped, one_line, safetensors
from sogclr.distributed import rank

LAST, PREVIOUS = "checkpoint_last.pth.tar", "checkpoint_previous.pth.tar"

# The authors' files contain numpy numbers, others their flags. These are data, not code, so they may be unpickled; the
# numbers also under numpy 1's name.
_SCALAR = np.float64(0).__reduce__()[0]
_DATA = [argparse.Namespace, (_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"),
         np.dtype, *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool"))]

# In parameter names: DistributedDataParallel, torch.compile, FSDP, activation checkpointing.
_ADDED_TO_NAMES = "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"
_SAVE_ALONE = "where it was made, save the weights alone: torch.save(model.state_dict(), FILE)"
# How files begin that are taken for checkpoints.
_SAFETENSORS = rb".{4}\0{4}\{\s*\""
_OTHER_FILES = {
    rb"version https://git-lfs": "a pointer of Git LFS, not the file itself: fetch it with git lfs pull",
    rb"\s*<(!doctype|html|\?xml)": "a web page, not the file that it offers: download that",
    _SAFETENSORS: "a damaged safetensors file, download or copy it again",
    rb"\x1f\x8b": "compressed with gzip, uncompress it with gunzip",
    rb".{257}ustar": "a tar archive, unpack it with tar and pass a file from it",
    rb"$": "empty, download or copy it again"}


class Writer:
    """Writes a run's checkpoints in the background, one at a time, and only on rank 0.

    folder: the run's, None to write nothing; minutes: between two saves within an epoch, 0 for none.
    A failed save (e.g. on a full disk) is reported and leaves earlier files intact; training continues.
    A context manager, closed on exit.
    """

    def __init__(self, folder, minutes=0.0):
        self.folder, self.seconds, self.active = folder, 60 * minutes, folder is not None and rank() == 0
        self.last_time = time.monotonic()
        self.thread = self.error = None

    def is_due(self):
        """Whether the last save was at least `minutes` ago."""
        return self.active and 0 < self.seconds <= time.monotonic() - self.last_time

    def save(self, state, *names):
        """Save a dict as `checkpoint_last.pth.tar` and under additional names. Returns once it is copied to host memory
        and the previous write is done, so that training may change the tensors.
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
        else:       # whose error takes precedence
            self.wait()

    def _write(self, state, names):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)      # it may have been deleted
            save(state, self.folder, names)
            self.error = None
        except Exception as error:      # torch.save adds errors of its own when a write fails
            cause = error
            while cause.__context__ is not None:
                cause = cause.__context__
            self.error = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            print(f"=> NOT saved: {self.folder}: {self.error}; earlier checkpoints are intact, and training continues",
                  file=sys.stderr, flush=True)


def save(state, folder, names=()):
    """Write `checkpoint_last.pth.tar`, also under additional names; even after a power failure the folder has an intact
    one. The previous one becomes `checkpoint_previous.pth.tar`.
    """
    part, last = folder / (LAST + ".part"), folder / LAST
    part.unlink(missing_ok=True)        # from an interrupted save; may be a hard link to a kept checkpoint
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):      # it may be what fills the disk
            part.unlink(missing_ok=True)
        raise
    for name in names:
        copy = folder / (name + ".part")
        copy.unlink(missing_ok=True)
        try:
            os.link(part, copy)
        except OSError:     # a file system without hard links
            shutil.copyfile(part, copy)
        os.replace(copy, folder / name)
    if last.exists():
        os.replace(last, folder / PREVIOUS)
    os.replace(part, last)
    with contextlib.suppress(OSError):      # some file systems cannot sync a folder
        entries = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entries)
        finally:
            os.close(entries)


@contextlib.contextmanager
def new_path(path, flag):
    """A context manager that gives a path to write a file or a folder to, which becomes `path` at the end, complete
    or not at all.

    flag: what named it, for the message. Raises InputError if it exists or, also up front, cannot be written.
    """
    try:
        if path.exists():
            raise InputError(f"{flag} {path}: already exists, choose a new name or remove it")
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".new-") as folder:
            part = Path(folder) / "complete"
            yield part
            if part.is_file():
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
            part.rename(path)
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written: {error.strerror or one_line(error)}") from error


def _host_copy(state):
    """Copy a state with all its tensors to host memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _host_copy(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(_host_copy, state))
    return state


def size(state):
    """Total bytes of all tensors in a state, about the size of its file."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(size, parts))


def load(path, flag, keys=()):
    """Load the dict in a checkpoint file to the CPU, or the tensors of a safetensors file. Only data is unpickled,
    never code.

    flag: the flag that named the file, for the message; keys: the required keys. Raises InputError if the file is
    missing, damaged, or not such a checkpoint.
    """
    try:
        if not os.path.isfile(path):
            raise InputError(f"{flag} {path}: " + (_what_folder(path) if os.path.isdir(path) else "no such file"))
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    try:
        if re.match(_SAFETENSORS, head, re.DOTALL):
            checkpoint = safetensors.read(path)
        else:
            _check_sums(path)
            with torch.serialization.safe_globals(_DATA), warnings.catch_warnings():
                warnings.simplefilter("ignore")     # about other tools' file formats: the content is checked here
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # an arbitrary file can make the unpickler raise anything
        raise InputError(f"{flag} {path}: not a checkpoint that can be read safely, it is {_what_file(head, error)}"
                         ) from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{flag} {path}: contains a {type(checkpoint).__name__}, not a checkpoint; {_SAVE_ALONE}")
    require(checkpoint, f"{flag} {path}", keys)
    return checkpoint


def _what_folder(path):
    """What a folder in the place of a checkpoint is, and what to do."""
    names = os.listdir(path)
    if ".metadata" in names:
        return ("is a distributed checkpoint, convert it: "
                "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE")
    if any(os.path.exists(os.path.join(path, name, "data.pkl")) for name in (".", *names)):
        return ("is an unzipped checkpoint, pass the file itself, or zip the folder that contains data.pkl again, from "
                "the one above: zip -0rD NEW.pth.tar FOLDER")
    return "is a folder, pass a file in it"


def _what_file(head, error):
    """What a file is that cannot be read as a checkpoint, by its first bytes and the error, and what to do."""
    if re.match(_SAFETENSORS, head, re.DOTALL) and isinstance(error, NotImplementedError):
        return f"a safetensors file in which {error}"
    for pattern, what in _OTHER_FILES.items():
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return what
    if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"more than data, it refers to {refused[1]}; {_SAVE_ALONE}"
    if "TorchScript" in str(error):
        return f"a TorchScript model; {_SAVE_ALONE}"
    return (f"damaged or of another kind ({type(error).__name__}); use a file written by train.py or lincls.py, or a "
            "state_dict saved on its own")


def _check_sums(path):
    """Raise BadZipFile if a bit has changed: torch.save writes checksums, but torch.load ignores them."""
    if not zipfile.is_zipfile(path):        # the legacy format, which has none
        return
    with zipfile.ZipFile(path) as file:
        # torch.load skips entries marked as folders, whatever their name
        if file.testzip() or any(member.external_attr & 0x10 for member in file.infolist()):
            raise zipfile.BadZipFile("checksum")


def require(checkpoint, source, keys):
    """Raise InputError if a checkpoint lacks one of the keys. source: its flag and file."""
    missing = [key for key in keys if key not in checkpoint]
    if missing:
        raise InputError(f"{source}: lacks {', '.join(missing)}, it is not a checkpoint from this script")


def require_same_images(made_with, now, source):
    """Raise InputError if a checkpoint's images are not this run's, since their order determines the run.

    made_with, now: settings with `images`, the `ImageSet.fingerprint`; older files without it are accepted.
    source: the flag and file that `made_with` is from.
    """
    if made_with.get("images", now["images"]) != now["images"]:
        raise InputError(f"{source}: was made with other images ({made_with['images']}) than those in --data "
                         f"({now['images']}), use the same folder, or start a new run")


def restore_parts(saved, source, **parts):
    """Load each part's state by name from a checkpoint, skipping the empty state that older files and lincls.py
    hold for a disabled scaler.

    parts: objects with `load_state_dict`. Raises InputError if a state does not match.
    """
    for name, part in parts.items():
        state = saved.get(name, {})
        try:
            if state or not isinstance(part, torch.amp.GradScaler):
                part.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{source}: was made with another model, optimizer or protocol: {one_line(error)}"
                             ) from error


def add_ddp_prefix(state_dict):
    """Add DistributedDataParallel's prefix to parameter names, as in the authors' files."""
    return {"module." + key: value for key, value in state_dict.items()}


def plain_names(state_dict):
    """Remove what torch's wrappers of modules add to parameter names, wherever it stands."""
    return {".".join(part for part in key.split(".") if part not in _ADDED_TO_NAMES): value
            for key, value in state_dict.items()}
