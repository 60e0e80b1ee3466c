"""Files that survive, and files that are not trusted."""

import os

import numpy as np
import pytest
import torch

from sogclr import InputError, checkpoint


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """When writing breaks off in the middle, the previous checkpoint must still load."""
    path = tmp_path / "a.pth.tar"
    checkpoint.save({"epoch": 1}, path)

    def torn(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"epoch": 2}, path)
    assert checkpoint.load(path, "--resume") == {"epoch": 1}


def test_code_is_not_unpickled(tmp_path, monkeypatch):
    """A pickle that would run code must be refused with one line, and must not run it."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, "evil.pth")
    with pytest.raises(InputError, match=r"--pretrained evil\.pth: not a checkpoint") as caught:
        checkpoint.load("evil.pth", "--pretrained")
    assert "\n" not in str(caught.value)
    assert not os.path.exists("evil")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 torn zip", bytes(1000)])
def test_other_files_are_refused(tmp_path, content):
    """An empty, foreign or torn file, a folder and a missing file: an InputError that names flag and file."""
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    for name in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=f"--resume {name}: "):
            checkpoint.load(str(name), "--resume")


def test_numpy_numbers_load(tmp_path):
    """The authors' files hold numpy scalars, of numpy 1 or 2; they must load."""
    path = tmp_path / "authors.pth.tar"
    values = {"lr": np.float64(1.2), "epoch": np.int64(3), "best": np.float32(0.5)}
    torch.save(values, path)
    assert checkpoint.load(path, "--resume") == values


def test_run_is_not_overwritten(tmp_path):
    """A folder that holds a run must be refused without --resume, and found again by `auto`."""
    folder = tmp_path / "saved" / "run"
    assert checkpoint.open_run(folder, "auto") == ""
    checkpoint.save({}, folder / checkpoint.LAST)
    assert checkpoint.open_run(folder, "auto") == str(folder / checkpoint.LAST)
    assert checkpoint.open_run(folder, "other") == "other"
    with pytest.raises(InputError, match="already holds a run"):
        checkpoint.open_run(folder, "")
    assert len((folder / "command.txt").read_text().splitlines()) == 3
