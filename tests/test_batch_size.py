"""The batch-size study: its plan, and the real scripts at tiny size."""

import os
import signal
import subprocess
import sys
import time

import pytest

import train
from scripts.experiments import batch_size

# Of the real runs: two at a time, of one network step each.
TINY = ["cpu", "--data_name", "folder", "--images", "9", "9", "--batch-sizes", "4", "--seeds", "1", "--jobs", "2",
        "--epochs", "1", "--warmup-epochs", "0", "--mlp-dim", "16", "--dim", "8", "--precision", "fp32"]


def planned(monkeypatch, *flags):
    """[the settings of each run of train.py], and the command that makes the images."""
    monkeypatch.setattr("sys.argv", ["batch_size.py", *flags])
    _, args, extra = batch_size.parse()
    data, make_images = batch_size.part_of(args)
    runs = batch_size.plan(args, extra, data)
    assert all(len(steps) == 1 + len(args.protocols) for steps in runs.values())
    return [train.PARSER.parse_args(list(map(str, steps[0][0][1:]))) for steps in runs.values()], make_images


def test_each_loss_batch_size_and_seed_is_trained_once(monkeypatch):
    runs, make_images = planned(monkeypatch, "gpu", "--seeds", "1", "2", "1", "--epochs", "7")
    assert sorted((run.loss_type, run.batch_size, run.seed) for run in runs) == [
        (loss, batch, seed) for loss in ("cl", "dcl") for batch in (32, 64, 128, 256, 512) for seed in (1, 2)]
    assert {(run.data_name, run.lr, run.epochs, run.arch) for run in runs} == {("cifar10", 1.0, 7, "resnet18")}
    assert make_images is None


def test_gamma_is_tried_at_each_temperature_and_simclr_once(monkeypatch):
    """SimCLR has no gamma, also where the command gives one: the same run must serve all."""
    runs, _ = planned(monkeypatch, "gamma", "--seeds", "1")
    assert sorted((run.loss_type, run.t, run.gamma, run.batch_size) for run in runs) == [
        ("cl", 0.05, 0.9, 16), ("cl", 0.1, 0.9, 16),
        *(("dcl", t, gamma, 16) for t in (0.05, 0.1) for gamma in (0.2, 0.9, 1.0))]
    (run,), _ = planned(monkeypatch, "cpu", "--losses", "cl", "--batch-sizes", "16", "--seeds", "1", "--gamma", "0.3")
    assert run.gamma == 0.9


def test_search_never_sees_validation_images(monkeypatch):
    """Its images must come from the training split, and each change be tried once for each loss that knows it."""
    runs, make_images = planned(monkeypatch, "search", "--images", "40000", "10000")
    assert "--held-out" in make_images
    assert make_images[make_images.index("--train") + 1] == 40000
    assert {(run.data_name, run.data) for run in runs} == {("folder", str(make_images[1]))}
    assert len({train.run_name(run) for run in runs}) == len(runs) == 11 + 13


@pytest.mark.parametrize(("flags", "message"), [
    (["--gama", "1"], "unrecognized arguments: --gama 1"), (["--lr", "x"], "argument --lr/--learning-rate: must be"),
    (["-b8"], "--batch-size: set by this script, give --batch-sizes"), (["--jobs", "0"], "argument --jobs: must be")])
def test_wrong_flag_is_refused_before_anything_is_made(flags, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["batch_size.py", *TINY, "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit, match="2"):
        batch_size.main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def study(imagenet, out, *flags):
    # A process group of its own, as in a terminal, where Ctrl-C goes to all of it.
    return subprocess.Popen([sys.executable, batch_size.__file__, *TINY, "--data", imagenet, "--out", out, *flags],
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def test_interrupted_study_continues_and_then_has_nothing_to_do(imagenet, tmp_path, monkeypatch, capsys):
    """After Ctrl-C it must exit with 75, continue the same runs, compare both losses, and do nothing twice."""
    first = study(imagenet, tmp_path, "--epochs", "3", "--save-minutes", "0.001")
    while first.poll() is None and len([1 for log in tmp_path.glob("*.log") if "Epoch: [0]" in log.read_text()]) < 2:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 75, errors
    assert "stopped with code 75, the same command continues" in errors

    second = study(imagenet, tmp_path, "--epochs", "3", "--save-minutes", "0.001")
    output, errors = second.communicate(timeout=300)
    assert second.returncode == 0, output + errors
    logs = [log.read_text() for log in tmp_path.glob("*.log")]
    assert [log.count("=> done: ") for log in logs] == [1, 1]
    assert all("epochs 0 to 2" in log and log.count("=> config: ") == 2 for log in logs)     # of train.py: twice begun
    table = (tmp_path / "results.md").read_text()
    assert table in output
    for row in ("| SimCLR | 4 |", "| SogCLR | 4 |", "| SogCLR - SimCLR | 4 |"):
        assert row in table
    assert all(column in table for column in ("kNN-20", "linear evaluation with cached features, best of 8 rates"))

    monkeypatch.setattr("sys.argv", ["batch_size.py", *TINY, "--data", str(imagenet), "--out", str(tmp_path),
                                     "--epochs", "3", "--save-minutes", "0.001"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)      # pytest keeps its own
    monkeypatch.setattr(subprocess, "Popen", None)
    batch_size.main()
    assert capsys.readouterr().out == table
