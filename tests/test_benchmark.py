"""The benchmark's modes of training must run and write what they measured; what they measure is for no test to say."""

import json
import shlex
import sys

import pytest
import torch

from scripts.tools import benchmark

TINY = shlex.split("--arch resnet18 --stem imagenet --image-size 16 --batch-size 4 --workers 1 --repeats 1")


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A function from the command line to the JSON file that it writes, on the CPU."""
    monkeypatch.setattr(benchmark, "DEVICE", torch.device("cpu"))

    def run(*flags):
        file = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, flags), *TINY, "--json", str(file)])
        benchmark.main()
        return json.loads(file.read_text())
    return run


@pytest.mark.parametrize(("mode", "rows"), [("step", 5), ("train", 4)])
def test_training_beside_its_floor(mode, rows, imagenet, report, capsys):
    """A row for the floor, for our step and for what is beside it, all of them measured."""
    figures = report(mode, *(["--data", imagenet] if mode == "train" else []))
    assert figures["mode"] == mode
    assert figures["rows"][0]["what"] == "floor: encoder alone"
    assert len(figures["rows"]) == rows
    assert all(row["ms"] > 0 for row in figures["rows"])
    printed = capsys.readouterr().out
    assert all(row["what"] in printed for row in figures["rows"])
    assert "hours" not in printed       # extrapolated from ImageNet's own network and size alone


def test_frozen_features(report):
    figures = report("lincls", "--precision", "bf16")
    assert figures["ours ms"] > 0
    assert figures["plain ms"] > 0


def test_save(report):
    figures = report("save")
    assert 0 < figures["ours s"] < figures["ours, on disk s"]


def test_images_are_asked_for(report, capsys):
    """Without images, or with too few of them, one line must say what is missing."""
    with pytest.raises(SystemExit):
        report("train")
    assert "train: give a folder of images with --data DIR" in capsys.readouterr().err


def test_what_a_mode_or_machine_cannot_do_is_refused(report, capsys):
    with pytest.raises(SystemExit):
        report("step", "--cuda-graph")
    assert "--cuda-graph: needs a GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report("lincls", "--compile")
    assert "--compile: belong to step" in capsys.readouterr().err
