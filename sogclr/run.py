"""What train.py and lincls.py share of a run: its folder, what it resumes, when it saves and stops, and its record."""

import contextlib
import fcntl
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
    """A run in its folder, which it makes, locks, and notes the command line in. A context, in which it saves.

    args: the script's; folder: the run's, named after its settings; keys: what its checkpoints hold; resume: a file to
    continue from, "auto" for the folder's newest intact one if there is one, or ""; write: whether it writes at all.

    `saved`: the checkpoint, {} for a fresh run; `source`: the flag and file that it is from; `seed`: `--seed`, else
    that of the checkpoint, else a new one, with which torch is seeded; `start_epoch`, `start_step`: see `restore`.
    Raises InputError where the folder cannot be written, another run writes there, it holds a run that would be
    overwritten, a checkpoint cannot be read, or this machine sees other checkpoints than rank 0's.
    """

    def __init__(self, args, folder, keys, resume, write=True):
        if args.start_epoch is not None and args.start_epoch >= args.epochs:
            raise InputError(f"--start-epoch {args.start_epoch}: must be below --epochs {args.epochs}")
        self.args, self.folder, self.write = args, folder, write
        self.start_epoch, self.start_step, self.stop = args.start_epoch or 0, 0, False
        kept = [path for path in (folder / LAST, folder / PREVIOUS) if os.path.exists(path)]
        kept += sorted(folder.glob("checkpoint_[0-9]*.pth.tar"), reverse=True)
        if write:
            if kept and not resume:
                raise InputError(f"{folder}: already holds a run with these settings, "
                                 "continue it with --resume auto or move the folder away")
            barrier()       # no rank may look after rank 0 has begun to write
            self._open()
            barrier()
        path, self.saved = resume, {}
        if resume == "auto":
            path, self.saved = self._newest_intact(kept, keys)
        elif resume:
            self.saved = checkpoint.load(resume, "--resume", keys)
        self.resume, self.source = path, f"--resume {path}"
        for name in ("epoch", "step"):
            here, there = self.saved.get(name, 0), broadcast_int(self.saved.get(name, 0))
            if here != there:
                raise InputError(f"--resume: rank 0 has {name} {there}, but rank {rank()} has {here}; --save_dir must "
                                 "be one folder for all machines")

        # Data order and augmentation do not use torch's generator; they are seeded with the same number.
        self.seed = args.seed if args.seed is not None else self.saved.get("seed", broadcast_int(secrets.randbits(32)))
        torch.manual_seed(self.seed)
        torch.backends.cudnn.deterministic = args.seed is not None
        torch.backends.cudnn.benchmark = args.seed is None

    def _open(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "command.txt", "a") as file:
                if rank() == 0:
                    command = shlex.join([Path(sys.executable).name, *sys.argv])
                    file.write(f"{command}  # {time.strftime('%Y-%m-%d %H:%M')}\n")
        except OSError as error:
            raise InputError(f"--save_dir {self.folder.parent}: cannot be written: {error.strerror}") from error
        if rank() == 0:
            _lock(self.folder / "lock")

    def _newest_intact(self, kept, keys):
        """The first of the files, newest first, that holds a checkpoint, and its content; those before it are named."""
        for path in kept:
            try:
                return str(path), checkpoint.load(path, "--resume auto", keys)
            except InputError as error:
                log(f"=> skipped {error}")
        if kept:
            raise InputError(f"--resume auto: no checkpoint in {self.folder} can be read, "
                             "move the folder away to start again")
        others = sum(path.parent != self.folder for path in self.folder.parent.glob(f"*/{LAST}"))
        log("=> --resume auto: no run with these settings yet" + ", a new one begins" * self.write
            + f" ({self.folder.parent} holds {others} with other settings)" * (others > 0))
        return "", {}

    def restore(self, state, settings, parser, names):
        """Take over what is to be saved; put the checkpoint, if there is one, back into it, and set `start_epoch` and
        `start_step` after it.

        state: an object with `saved()`, a dict for the checkpoint; `restore(saved, source)`, which takes it back;
        and `check_finite(place)`, which raises InputError where it should not be saved. settings: of this run, kept in
        its checkpoints and records; names: those, of the parser's flags, which the checkpoint's must equal.
        """
        self.state, self.settings = state, settings
        if self.saved:
            made_with = {"arch": self.saved["arch"], **self.saved.get("settings", {})}
            parser.require_same(made_with, {name: settings[name] for name in names}, self.source)
            state.restore(self.saved, self.source)
            checkpoint.require_same_images(made_with, settings, self.source)
            epoch, step = self.saved["epoch"], self.saved.get("step", 0)
            log(f"=> resumed {self.resume} after {epoch} epochs" + f" and {step} steps" * (step > 0))
            if self.args.start_epoch is None:
                self.start_epoch, self.start_step = epoch, step

    def first_step(self, epoch):
        """At which step an epoch starts."""
        return self.start_step if epoch == self.start_epoch else 0

    def __enter__(self):
        self.stack, self.logs = contextlib.ExitStack(), []
        self.writer = self.stack.enter_context(
            checkpoint.Writer(self.folder if self.write else None, self.args.save_minutes))
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def events(self, start, name="."):
        """A TensorBoard log in the run's folder, or that called `name` in it, from `start` on."""
        self.logs.append(report.Events(self.folder / name if self.write else None, start or None))
        return self.stack.enter_context(self.logs[-1])

    def after_step(self, epoch, step, steps):
        """Save where it is time, and stop where a signal has asked for it; after an epoch's last step, `after_epoch`
        and `stop_if_asked` do. Raises Stopped. A run that writes nothing is too short for that.
        """
        if not self.write:
            return
        self.stop = stop_requested()        # the same on all ranks
        if step + 1 < steps and (self.stop or self.writer.is_due()):
            self._save(epoch, step + 1, f"epoch {epoch}, step {step}")
            if self.stop:
                raise Stopped(f"after epoch {epoch}, step {step}")

    def after_epoch(self, epoch, name=None):
        """Save, also under a further name."""
        self._save(epoch + 1, 0, f"epoch {epoch}", *([name] if name else []))
        for events in self.logs:
            events.write("flush")

    def stop_if_asked(self, epoch):
        """Raise Stopped where a signal has come in an epoch's last step, and the run is not at its end."""
        if self.stop and epoch + 1 < self.args.epochs:
            raise Stopped(f"after epoch {epoch}")

    def _save(self, epoch, step, place, *names):
        self.state.check_finite(place)
        self.writer.save({"epoch": epoch, "step": step, "arch": self.args.arch, "seed": self.seed,
                          "settings": self.settings, **self.state.saved()}, *names)


def _lock(path):
    """Refuse a folder that another live process writes to: a lock lives as long as its file is open, here until the
    process ends. The system takes it off a process that has died, and does not hand it to forked workers.
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
