"""The batch-size study: its plan, and the real scripts at tiny size."""

import signal
import subprocess
import time

import pytest
from helpers import PYTHON, TIMEOUT_SECONDS, Process

import train
from scripts.experiments import batch_size

# Flags of the real runs: two at a time, 2 steps per epoch.
TINY = ["cpu", "--data_name", "folder", "--images", "9", "9", "--batch-sizes", "4", "--seeds", "1", "--jobs", "2",
        "--epochs", "20", "--warmup-epochs", "0", "--mlp-dim", "16", "--dim", "8", "--precision", "fp32",
        "--image-size", "16"]


def planned(monkeypatch, *flags):
    """The settings of all runs of train.py, and the command that makes the images."""
    monkeypatch.setattr("sys.argv", ["batch_size.py", *flags])
    _, args, extra = batch_size.parse()
    data, make_images = batch_size.part_of(args)
    runs = batch_size.plan(args, extra, data)
    assert all(len(steps) == 1 + len(args.protocols) for steps in runs.values())
    return [train.PARSER.parse_args(list(map(str, steps[0][0][1:]))) for steps in runs.values()], make_images


def test_each_method_batch_size_and_seed_is_trained_once(monkeypatch):
    runs, make_images = planned(monkeypatch, "gpu", "--seeds", "1", "2", "1", "--epochs", "7")
    assert sorted((run.loss_type, run.gamma, run.batch_size, run.seed) for run in runs) == [
        (*method, batch, seed) for method in (("cl", 0.9), ("dcl", 0.9), ("dcl", 1.0))
        for batch in (32, 64, 128, 256, 512) for seed in (1, 2)]
    assert {(run.data_name, run.lr, run.epochs, run.arch) for run in runs} == {("cifar10", 1.0, 7, "resnet18")}
    assert make_images is None


def test_gamma_is_tried_at_each_temperature_and_simclr_once(monkeypatch):
    """SimCLR has no gamma and no schedule of it, even if the command sets them: the same run must serve all. DCL has
    gamma 1.
    """
    runs, _ = planned(monkeypatch, "gamma", "--seeds", "1")
    assert sorted((run.loss_type, run.t, run.gamma, run.batch_size) for run in runs) == [
        ("cl", 0.05, 0.9, 16), ("cl", 0.1, 0.9, 16),
        *(("dcl", t, gamma, 16) for t in (0.05, 0.1) for gamma in (0.2, 0.9, 1.0))]
    runs, _ = planned(monkeypatch, "cpu", "--batch-sizes", "16", "--seeds", "1", "--gamma", "0.3", "--gamma-schedule",
                      "cosine", "--gamma-decay-epochs", "6")
    assert [(run.loss_type, run.gamma, run.gamma_schedule, run.gamma_decay_epochs) for run in runs] == [
        ("cl", 0.9, "constant", None), ("dcl", 1.0, "constant", None), ("dcl", 0.3, "cosine", 6)]
    runs, _ = planned(monkeypatch, "cpu", "--batch-sizes", "16", "--seeds", "1", "--gamma", "1", "--gamma-schedule",
                      "cosine")
    assert [(run.loss_type, run.gamma, run.gamma_schedule) for run in runs] == [
        ("cl", 0.9, "constant"), ("dcl", 1.0, "constant")]


def test_search_never_sees_validation_images(monkeypatch):
    """Its images must come from the training split, and each change be tried once for each loss that uses it."""
    runs, make_images = planned(monkeypatch, "search", "--images", "40000", "10000")
    assert "--held-out" in make_images
    assert make_images[make_images.index("--train") + 1] == 40000
    assert {(run.data_name, run.data) for run in runs} == {("folder", str(make_images[1]))}
    assert len({train.run_name(run) for run in runs}) == len(runs) == 11 + 13


def test_each_rho_is_tried_on_held_out_images(monkeypatch):
    """By iSogCLR alone; the other losses, which have no rho, must be trained once even if the command sets one."""
    runs, make_images = planned(monkeypatch, "rho")
    assert "--held-out" in make_images
    assert [(run.loss_type, run.rho) for run in runs] == [("isogclr", rho) for rho in (0.3, 0.2, 0.4, 1.0, 2.0)]
    runs, _ = planned(monkeypatch, "cpu", "--methods", "simclr", "sogclr", "isogclr", "--batch-sizes", "64", "--seeds",
                      "1", "--rho", "1")
    assert [(run.loss_type, run.rho) for run in runs] == [("cl", 0.3), ("dcl", 0.3), ("isogclr", 1.0)]


def test_loss_of_small_batches_in_a_large_one(monkeypatch):
    """The network must see --batch-size images at a time, whatever the loss does; the whole batch is the usual run."""
    runs, _ = planned(monkeypatch, "small", "--seeds", "1", "--batch-sizes", "8", "64", "--methods", "simclr")
    assert [(run.batch_size, run.loss_batch_size) for run in runs] == [(64, 8), (64, 64)]
    usual = train.PARSER.parse_args(train.PARSER.command_line(runs[1]))
    usual.loss_batch_size = None
    assert train.run_name(runs[1]) == train.run_name(usual) != train.run_name(runs[0])
    runs, _ = planned(monkeypatch, "small", "--seeds", "1", "--batch-sizes", "8", "--batch-size", "256")
    assert [(run.batch_size, run.loss_batch_size) for run in runs] == 3 * [(256, 8)]


@pytest.mark.parametrize(("flags", "message"), [
    (["--loss-batch-size", "3"], "--loss-batch-size 3: must divide --batch-size 4"),
    (["--gama", "1"], "unrecognized arguments: --gama 1"), (["--lr", "x"], "argument --lr/--learning-rate: must be"),
    (["-b256"], "--batch-size: set by this script, use --batch-sizes"), (["--jobs", "0"], "argument --jobs: must be"),
    (["--loss_type", "dcl"], "--loss_type: set by this script, use --methods"), (["--dry-run"], "--dry-run: set by")])
def test_wrong_flag_is_refused_before_anything_is_made(flags, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["batch_size.py", *TINY, "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit, match="2"):
        batch_size.main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_failure_starts_no_more_and_shows_its_last_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(signal, "signal", lambda *_: None)      # pytest keeps its own
    runs = {"bad": [(["-c", "print('begun'); raise SystemExit('the reason')"], tmp_path / "never")],
            "next": [(["-c", f"open({str(tmp_path / 'begun')!r}, 'w')"], tmp_path / "begun")]}
    assert batch_size.run_all(runs, tmp_path, jobs=1) == 1
    assert not (tmp_path / "begun").exists()
    assert f"=> code 1, {tmp_path}/bad.log: the reason" in capfd.readouterr().err
    assert batch_size.run_all({"killed": [(["-c", "import os; os.kill(os.getpid(), 9)"], tmp_path / "never")]},
                              tmp_path, jobs=1) == 128 + 9


def test_jobs_run_side_by_side(tmp_path, monkeypatch):
    """Each of two runs waits for the other, so that both end only if both run."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    wait = f"""import pathlib, sys, time
pathlib.Path(sys.argv[1]).touch()
end = time.monotonic() + {TIMEOUT_SECONDS}
while not pathlib.Path(sys.argv[2]).exists():
    if time.monotonic() > end:
        sys.exit(1)
"""
    a, b = tmp_path / "a", tmp_path / "b"
    assert batch_size.run_all({"a": [(["-c", wait, a, b], a)], "b": [(["-c", wait, b, a], b)]}, tmp_path, jobs=2) == 0


@pytest.mark.slow
def test_stopped_study_continues_and_then_has_nothing_to_do(imagenet, tmp_path, monkeypatch, capsys):
    """A signal must reach the runs, which save; the same command must continue them, compare both losses, and do
    nothing twice.
    """
    flags = [*TINY, "--data", str(imagenet), "--out", str(tmp_path)]
    with Process(PYTHON, batch_size.__file__, *flags, PYTHONWARNINGS="ignore") as first:
        while first.poll() is None and not any("Epoch: [0]" in log.read_text() for log in tmp_path.glob("*cl*.log")):
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
        _, errors = first.end(75)
    assert "=> stopped; the same command continues" in errors
    assert "=> stopped after epoch" in errors       # a run's own last line

    monkeypatch.setattr("sys.argv", ["batch_size.py", *flags])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(batch_size.PRESETS, "cpu", batch_size.CPU._replace(
        protocols=[f"{batch_size.RATES} --features cached --epochs 2", "--knn"]))
    batch_size.main()
    output = capsys.readouterr().out
    logs = [log.read_text() for log in tmp_path.glob("*clr*.log")]
    assert [log.count("=> done: ") for log in logs] == [1, 1, 1]
    assert any("=> resumed " in log for log in logs)
    table = (tmp_path / "results.md").read_text()
    assert output.endswith(table)
    for row in ("| SimCLR | 4 |", "| DCL | 4 |", "| SogCLR | 4 |", "| SogCLR - SimCLR | 4 |", "| SogCLR - DCL | 4 |"):
        assert row in table
    assert all(column in table for column in ("kNN-20", "linear evaluation with cached features, best of 8 rates"))

    monkeypatch.setattr(subprocess, "Popen", None)
    batch_size.main()
    assert capsys.readouterr().out == table
