"""Run folders and checkpoint files."""

import os
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

from sogclr import InputError
from sogclr.distributed import barrier, rank

LAST = "checkpoint_last.pth.tar"

# The authors' files hold numpy numbers. They are data, not code, so they may be unpickled; under numpy 1's name too.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_NUMBERS = [(_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"), np.dtype,
                  *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool"))]


def open_run(folder, resume):
    """Make a run's folder, note the command line in it, and say which checkpoint to continue from ("" for none).

    resume: `--resume`, where "auto" means the folder's own last checkpoint if there is one.
    Raises InputError where the folder cannot be written, and where it holds a run that would be overwritten.
    """
    last = folder / LAST
    if last.exists() and not resume:
        raise InputError(f"{folder}: already holds a run with these settings, "
                         "continue it with --resume auto or move the folder away")
    barrier()       # no rank may look after rank 0 has begun to write
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "command.txt", "a") as file:
            if rank() == 0:
                file.write(shlex.join([Path(sys.executable).name, *sys.argv]) + "\n")
    except OSError as error:
        raise InputError(f"--save_dir {folder.parent}: cannot be written: {error.strerror}") from error
    return (str(last) if last.exists() else "") if resume == "auto" else resume


def save(state, path):
    """Write a checkpoint so that `path` holds either the old file or the whole new one, whenever the power fails."""
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load(path, flag):
    """The dict in a checkpoint file, on the CPU. Only data is unpickled, never code.

    flag: which flag named the file, for the message. Raises InputError where it is missing or not a checkpoint.
    """
    if not os.path.isfile(path):
        raise InputError(f"{flag} {path}: " + ("is a folder, give a file in it" if os.path.isdir(path)
                                               else "no such file"))
    try:
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # a foreign file can make the unpickler raise anything
        raise InputError(f"{flag} {path}: not a checkpoint that can be read safely "
                         f"({type(error).__name__}), give a file that train.py or lincls.py wrote") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{flag} {path}: holds no checkpoint but a {type(checkpoint).__name__}")
    return checkpoint


def require(checkpoint, path, flag, keys):
    """Raise InputError where a checkpoint lacks one of the keys."""
    missing = [key for key in keys if key not in checkpoint]
    if missing:
        raise InputError(f"{flag} {path}: lacks {', '.join(missing)}, it is not a checkpoint of this script")


def with_module(state_dict):
    """The names under which DistributedDataParallel saves, as the authors' files have them."""
    return {"module." + key: value for key, value in state_dict.items()}


def without_module(state_dict):
    """The inverse of `with_module`; names without the prefix stay as they are."""
    return {key.removeprefix("module."): value for key, value in state_dict.items()}
