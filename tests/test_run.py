"""A run's folder: who may write to it, and which checkpoint it resumes from."""

import types

import pytest
import torch
from helpers import PYTHON, Process

from sogclr import InputError, checkpoint
from sogclr.run import Run


def open_run(folder, resume, keys):
    """The path and the content of the checkpoint that a run with these arguments resumes from."""
    args = types.SimpleNamespace(start_epoch=None, epochs=5, seed=1)
    run = Run(args, folder, keys, resume)
    return run.resume, run.saved


def test_auto_takes_the_newest_intact_checkpoint(tmp_path, capsys):
    """A torn or foreign file must be reported and skipped, and the one before it used; none at all is an error."""
    keys = ("epoch", "arch")
    for epoch in range(1, 5):
        checkpoint.save({"epoch": epoch, "arch": "resnet18"}, tmp_path, [f"checkpoint_{epoch - 1:04d}.pth.tar"])
    last, previous, older = (tmp_path / name for name in (checkpoint.LAST, checkpoint.PREVIOUS,
                                                          "checkpoint_0003.pth.tar"))
    assert open_run(tmp_path, "auto", keys)[0] == str(last)
    previous.write_bytes(previous.read_bytes()[:-100])
    last.unlink()
    torch.save({"model": 1}, last)
    assert open_run(tmp_path, "auto", keys)[1]["epoch"] == 4     # checkpoint_0003 is a file of its own
    said = capsys.readouterr().out
    assert f"=> skipped --resume auto {last}: lacks epoch, arch" in said
    assert f"=> skipped --resume auto {previous}: not a checkpoint" in said
    for path in tmp_path.glob("*.tar"):
        path.write_bytes(b"")
    assert older.exists()
    with pytest.raises(InputError, match=f"no checkpoint in {tmp_path} can be read"):
        open_run(tmp_path, "auto", keys)


HOLD = """
import os, signal, sys, types
from pathlib import Path
from sogclr.run import Run
Run(types.SimpleNamespace(start_epoch=None, seed=1), Path(sys.argv[1]), (), "")
if os.fork() == 0:
    print("locked", flush=True)
signal.pause()
"""


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    """As long as the first is alive, and no longer, although its forked workers may linger."""
    with Process(PYTHON, "-c", HOLD, tmp_path) as holder:
        holder.wait_for("locked")
        with pytest.raises(InputError, match=rf"another run is writing to it \(process {holder.pid} on"):
            open_run(tmp_path, "auto", ())
        holder.kill()
        holder.wait()
        open_run(tmp_path, "auto", ())


def test_run_is_not_overwritten(tmp_path):
    """A folder that contains a run must be refused without --resume, and found by `auto`."""
    folder = tmp_path / "saved" / "run"
    assert open_run(folder, "auto", ("epoch",)) == ("", {})
    checkpoint.save({"epoch": 1}, folder)
    assert open_run(folder, "auto", ("epoch",)) == (str(folder / checkpoint.LAST), {"epoch": 1})
    with pytest.raises(InputError, match="already contains a run"):
        open_run(folder, "", ("epoch",))
    assert len((folder / "command.txt").read_text().splitlines()) == 2
