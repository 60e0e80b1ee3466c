"""What many runs come to."""

import json
import sys

import pytest
from PIL import Image

from scripts import collect_results


@pytest.fixture
def runs(tmp_path):
    """Two losses, two batch sizes, two seeds; a random encoder and a training run beside them."""
    def write(name, **results):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))

    for loss, batch, seed, acc1 in (("cl", 64, 1, 70.0), ("cl", 64, 2, 72.0), ("dcl", 64, 1, 75.0),
                                    ("dcl", 256, 1, 76.0), ("dcl", 256, 2, 77.0)):
        encoder, name = {"loss_type": loss, "batch_size": batch, "seed": seed}, f"{loss}_{batch}_{seed}"
        write(name, encoder=encoder, protocol="linear evaluation", chosen=1, classifiers=[{"acc1": 1}, {"acc1": acc1}])
        write(name + "_knn", encoder=encoder, protocol="kNN evaluation", knn_acc1={"20": acc1 - 10, "200": acc1 - 20})
    write("random", encoder=None, protocol="linear evaluation", chosen=0, classifiers=[{"acc1": 30}])
    write("training", loss=0.5)
    return tmp_path


def collect(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["collect_results.py", *map(str, args)])
    collect_results.main()
    return capsys.readouterr().out.splitlines()


def test_mean_and_deviation_over_seeds(runs, monkeypatch, capsys):
    """Each seed counts once, the chosen classifier stands for its run, and nothing else is mixed in."""
    assert collect(monkeypatch, capsys, runs) == [
        "| loss | batch | kNN-20 | kNN-200 | linear evaluation | seeds |",
        "|---|---|---|---|---|---|",
        "| SimCLR | 64 | 61.00 ± 1.41 | 51.00 ± 1.41 | 71.00 ± 1.41 | 1, 2 |",
        "| SogCLR | 64 | 65.00 | 55.00 | 75.00 | 1 |",
        "| SogCLR | 256 | 66.50 ± 0.71 | 56.50 ± 0.71 | 76.50 ± 0.71 | 1, 2 |"]


def test_plot(runs, monkeypatch, capsys):
    """A point for each row, higher for a higher accuracy."""
    collect(monkeypatch, capsys, runs, "--png", runs / "plot.png")
    with Image.open(runs / "plot.png") as picture:
        pixels, (width, height) = picture.load(), picture.size
        heights = {}
        for name, colour in collect_results.LOSSES.values():
            spots = [(x, y) for x in range(width) for y in range(60, height)        # below the names
                     if pixels[x, y] == colour and pixels[x - 3, y] == pixels[x + 3, y] == colour]
            heights[name] = [sum(ys) / len(ys) for x in (70, width - 30) if (ys := [y for a, y in spots if a == x])]
    (simclr,), (small, large) = heights["SimCLR"], heights["SogCLR"]
    assert large < small < simclr


def test_nothing_to_collect(tmp_path, runs, monkeypatch, capsys):
    """A folder without results, or with the same run twice, must be one line."""
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "holds no results.json of a pretrained encoder"),
                            (runs, "another run there has its loss, batch size, protocol and seed")):
        again = json.loads((runs / "cl_64_1" / "results.json").read_text())
        (runs / "again").mkdir(exist_ok=True)
        (runs / "again" / "results.json").write_text(json.dumps(again))
        with pytest.raises(SystemExit, match="2"):
            collect(monkeypatch, capsys, folder)
        assert message in capsys.readouterr().err
