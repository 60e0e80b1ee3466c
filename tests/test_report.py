"""The record of a run."""

import json
import shutil
import subprocess
import sys
import threading

from sogclr.report import Events, git_state, write_json


def test_results_are_json_that_anything_reads(tmp_path):
    """nan and infinity, which JSON lacks, become null; no partial file is left behind."""
    for value in (float("nan"), 2.5):
        write_json(tmp_path / "results.json", {"rows": [{"acc1": value}, (1, float("inf"))], "name": "x"})
        expected = {"rows": [{"acc1": None if value != value else value}, [1, None]], "name": "x"}
        assert json.loads((tmp_path / "results.json").read_text()) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    """One line must report that they were not written."""
    write_json(tmp_path / "missing" / "results.json", {})
    assert capsys.readouterr().err == f"=> NOT written: {tmp_path}/missing/results.json: No such file or directory\n"


def test_a_log_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    """A deleted folder must cost only the log: reported once, whatever is written then."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)        # TensorBoard's own thread fails
    with Events(tmp_path / "run") as events:
        events.scalars({"loss": 1.0}, 0)
        assert events.writer
        events.write("flush")       # so that its thread does not create the file while the folder is deleted
        shutil.rmtree(tmp_path / "run")
        for step in range(1, 4):
            events.write("flush")
            events.scalars({"loss": 1.0}, step)
        assert not events.writer
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"=> TensorBoard logging disabled: {tmp_path / 'run'}: ")


def test_without_tensorboard_the_run_goes_on(tmp_path, monkeypatch, capsys):
    """If the package is missing, one line must say that there is no log."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Events(tmp_path) as events:
        events.scalars({"loss": 1.0}, 0)
    assert capsys.readouterr().err.startswith(f"=> TensorBoard logging disabled: {tmp_path}: import of torch.utils.ten")


def test_commit_is_only_that_of_the_checkout(tmp_path):
    """The commit and whether files differ from it; nothing for a folder inside another repository or none."""
    def git(*command):
        return subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x", *command], check=True,
                              capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path) == (None, None)
    git("init")
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "x")
    (tmp_path / "untracked").write_text("1")
    assert git_state(tmp_path) == (git("rev-parse", "HEAD"), True)
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == (git("rev-parse", "HEAD"), False)
    assert git_state(tmp_path / "inside") == (None, None)
