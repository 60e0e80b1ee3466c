"""A run of train.py or lincls.py: its folder, what it resumes, when it saves and stops, and its record."""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shlex
import socket
import sys
import time
from pathlib import Path

import torch

from sogclr import InputError, Stopped, checkpoint, report
from sogclr.checkpoint import LAST, PREVIOUS
from sogclr.distributed import barrier, broadcast_int, log, rank
from sogclr.launch import stop_requested


class Run:
    """A run and its folder, which it creates, locks, and records the command line in. A context manager for saving.

    args: the script's; folder: the run's, named after its settings; keys: what its checkpoints must have; resume: a
    file to resume from, "auto" for the folder's newest intact one, if any, or ""; write: whether it writes at all.

    `saved`: the checkpoint, {} for a fresh run; `source`: its flag and file; `made_with`: its settings, {} if it has
    none; `seed`: `--seed`, else the checkpoint's, else a new one, with which torch is seeded; `start_epoch`,
    `start_step`: see `restore`.
    Raises InputError if the folder cannot be written, another run writes there, it has a run that would be overwritten,
    a checkpoint cannot be read, or this machine sees other checkpoints than rank 0.
    """

    def __init__(self, args, folder, keys, resume, write=True):
        if args.start_epoch is not None and args.start_epoch >= args.epochs:
            raise InputError(f"--start-epoch {args.start_epoch}: must be below --epochs {args.epochs}")
        self.args, self.folder, self.write = args, folder, write
        self.start_epoch, self.start_step, self.stop = args.start_epoch or 0, 0, False
        try:
            kept = [path for path in (folder / LAST, folder / PREVIOUS) if os.path.exists(path)]
            kept += sorted(folder.glob("checkpoint_[0-9]*.pth.tar"), reverse=True)
        except OSError as error:
            raise InputError(f"--save_dir {folder.parent}: cannot be written: {error.strerror}") from error
        if write:
            if kept and not resume:
                raise InputError(f"{folder}: already contains a run with these settings, "
                                 "continue it with --resume auto or move the folder away")
            barrier()       # no rank may look once rank 0 has begun to write
            self._open()
            barrier()
        path, self.saved = resume, {}
        if resume == "auto":
            path, self.saved = self._newest_intact(kept, keys)
        elif resume:
            self.saved = checkpoint.load(resume, "--resume", keys)
            if "best_acc1" in self.saved and "best_acc1" not in keys:
                raise InputError(f"--resume {resume}: is from lincls.py, pass a checkpoint from train.py")
        self.resume, self.source, self.made_with = path, f"--resume {path}", self.saved.get("settings") or {}
        for name in ("epoch", "step"):
            here, there = self.saved.get(name, 0), broadcast_int(self.saved.get(name, 0))
            if here != there:
                raise InputError(f"--resume: rank 0 has {name} {there}, but rank {rank()} has {here}; --save_dir must "
                                 "be the same folder on all machines")

        # Data order and augmentation do not use torch's generator; they are seeded with the same number.
        self.seed = args.seed if args.seed is not None else self.saved.get("seed", broadcast_int(secrets.randbits(32)))
        torch.manual_seed(self.seed)
        torch.backends.cudnn.deterministic = args.seed is not None
        torch.backends.cudnn.benchmark = args.seed is None

    def _open(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "command.txt", "a", encoding="utf-8", errors="surrogateescape") as file:
                if rank() == 0:
                    command = shlex.join([Path(sys.executable).name, *sys.argv])
                    file.write(f"{command}  # {time.strftime('%Y-%m-%d %H:%M')}\n")
        except OSError as error:
            raise InputError(f"--save_dir {self.folder.parent}: cannot be written: {error.strerror}") from error
        if rank() == 0:
            _lock(self.folder / "lock")

    def _newest_intact(self, kept, keys):
        """The newest file with an intact checkpoint, and its content; damaged newer ones are logged."""
        for path in kept:
            try:
                return str(path), checkpoint.load(path, "--resume auto", keys)
            except InputError as error:
                log(f"=> skipped {error}")
        if kept:
            raise InputError(f"--resume auto: no checkpoint in {self.folder} can be read, "
                             "move the folder away to start over")
        others = sum(path.parent != self.folder for path in self.folder.parent.glob(f"*/{LAST}"))
        log("=> --resume auto: no run with these settings yet" + ", starting a new one" * self.write
            + f" ({self.folder.parent} has {others} with other settings)" * (others > 0))
        return "", {}

    def restore(self, state, settings, parser, names):
        """Register the state to save; load the checkpoint, if any, into it, and set `start_epoch` and `start_step`
        accordingly.

        state: an object with `saved()`, a dict for the checkpoint; `restore(saved, source)`, which loads it; and
        `check_finite(place)`, which raises InputError if it should not be saved. settings: this run's, stored in its
        checkpoints and records; names: those of the parser's flags that must equal the checkpoint's.
        """
        self.state, self.settings = state, settings
        if self.saved:
            made_with = {"arch": self.saved["arch"], **self.made_with}
            parser.require_same(made_with, {name: settings[name] for name in names}, self.source)
            state.restore(self.saved, self.source)
            checkpoint.require_same_images(made_with, settings, self.source)
            epoch, step = self.saved["epoch"], self.saved.get("step", 0)
            log(f"=> resumed {self.resume} after {epoch} epochs" + f" and {step} steps" * (step > 0))
            if self.args.start_epoch is None:
                self.start_epoch, self.start_step = epoch, step

    def first_step(self, epoch):
        """The step at which an epoch starts."""
        return self.start_step if epoch == self.start_epoch else 0

    def __enter__(self):
        self.stack, self.logs = contextlib.ExitStack(), []
        self.writer = self.stack.enter_context(
            checkpoint.Writer(self.folder if self.write else None, self.args.save_minutes))
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def events(self, start, name="."):
        """A TensorBoard log in the run's folder, or in its subfolder `name`, from `start` on."""
        self.logs.append(report.Events(self.folder / name if self.write else None, start or None))
        return self.stack.enter_context(self.logs[-1])

    def after_step(self, epoch, step, steps):
        """Save if due, and raise Stopped if a signal has asked for it; after an epoch's last step, `after_epoch` and
        `stop_if_asked` do. A run that writes nothing ends at the signal.
        """
        if not self.write:
            return
        self.stop = stop_requested()        # the same on all ranks
        if step + 1 < steps and (self.stop or self.writer.is_due()):
            self._save(epoch, step + 1, f"epoch {epoch}, step {step}")
            if self.stop:
                raise Stopped(f"after epoch {epoch}, step {step}")

    def after_epoch(self, epoch, name=None):
        """Save, also under an additional name."""
        self._save(epoch + 1, 0, f"epoch {epoch}", *([name] if name else []))
        for events in self.logs:
            events.write("flush")

    def stop_if_asked(self, epoch):
        """Raise Stopped if a signal came in an epoch's last step, and the run is not finished."""
        if self.stop and epoch + 1 < self.args.epochs:
            raise Stopped(f"after epoch {epoch}")

    def _save(self, epoch, step, place, *names):
        self.state.check_finite(place)
        self.writer.save({"epoch": epoch, "step": step, "arch": self.args.arch, "seed": self.seed,
                          "settings": self.settings, **self.state.saved()}, *names)


def file_name(text, most=255):
    """A name for a file or folder: the text if it has at most this many bytes, else its beginning and a digest. File
    systems allow 255. Bytes that are not UTF-8, which TensorBoard could not write, are escaped.
    """
    content = os.fsencode(text).decode("utf-8", "backslashreplace").encode()
    if len(content) > most:
        digest = hashlib.sha256(content).hexdigest()[:16]
        content = content[:most - 17].decode("utf-8", "ignore").encode() + f"_{digest}".encode()    # no half characters
    return os.fsdecode(content)


def _lock(path):
    """Lock a folder, refusing it if another live process writes to it: a lock lasts as long as its file is open, here
    until the process ends. The system releases a dead process's lock, and forked workers do not inherit it.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.read(lock, 1000).decode().strip()
        os.close(lock)
        raise InputError(f"{path.parent}: another run is writing to it ({holder}), stop that one first") from error
    except OSError:     # a file system without locks
        pass
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
