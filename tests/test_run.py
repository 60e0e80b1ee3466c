"""A run's folder: its name, who may write to it, and which checkpoint it resumes from."""

import os
import types
from pathlib import Path

import pytest
import torch
from helpers import PYTHON, Process

import lincls
import train
from sogclr import InputError, checkpoint
from sogclr.run import Run, file_name


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


def test_long_names_end_in_a_digest():
    """What fits stays as it is. Other names have at most 255 bytes, a pretraining run's 243, since lincls.py adds 12,
    without half a character; different names stay different.
    """
    assert file_name("x" * 255) == "x" * 255
    long, other = "x" * 254 + "é", "x" * 254 + "è"
    for name in (long, other, "数" * 100, os.fsdecode(b"\xe9" * 250)):
        assert len(file_name(name).encode()) <= 255
    assert file_name(long) != file_name(other)
    assert file_name(long)[:238] == long[:238]
    for folder in ("x" * 243, "x" * 250):
        path = lincls.run_folder(lincls.PARSER.parse_args(["--pretrained", f"{folder}/{'y' * 240}.pth.tar"]))
        assert (path.parent.name == f"linear_eval_{folder}") == (len(folder) == 243)
        assert max(map(len, path.parts)) == 255
    name = train.run_name(train.PARSER.parse_args(["--data_name", "folder", "--data", "数" * 60, "--seed", "1"]))
    assert name.startswith("folder-数")
    assert len(name.encode()) <= 243


def test_name_that_no_file_system_takes_is_one_line():
    """A --save_dir of 300 letters, where some Python releases cannot even look for a run."""
    with pytest.raises(InputError, match=r"^--save_dir x{300}: cannot be written: File name too long$"):
        open_run(Path("x" * 300, "run"), "auto", ())
