"""Tables and plots of many runs."""

import json
import shutil
import sys

import pytest
from helpers import TINY, call
from PIL import Image

import train
from scripts.experiments import collect_results


@pytest.fixture
def runs(tmp_path):
    """Two losses, two batch sizes, two seeds; plus a random encoder and a training run."""
    def write(name, **results):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))

    made_by = {"commit": "abc", "clean": True, "device": "CPU", "versions": {"torch": "2.x"}}
    for loss, batch, seed, acc1 in (("cl", 64, 1, 70.0), ("cl", 64, 2, 72.0), ("dcl", 64, 1, 75.0),
                                    ("dcl", 256, 1, 76.0), ("dcl", 256, 2, 77.0)):
        encoder, name = {"loss_type": loss, "batch_size": batch, "seed": seed, "t": 0.1,
                         "gamma": 0.9 if loss == "dcl" else 0.5, "gamma_schedule": "constant"}, f"{loss}_{batch}_{seed}"
        common = {"encoder": encoder, "pretraining_seconds": 60 * batch, **made_by}
        write(name, protocol="linear evaluation", classifiers=[{"acc1": 1}, {"acc1": acc1}, {"acc1": None}], **common)
        write(name + "_knn", protocol="kNN evaluation", knn_acc1={"20": acc1 - 10, "200": acc1 - 20}, **common)
    write("random", encoder=None, protocol="linear evaluation", classifiers=[{"acc1": 30}])
    write("training", loss=0.5)
    return tmp_path


def add(runs, name, like, acc1=None, **encoder):
    """Add an evaluation like another, with other settings of its encoder, and another accuracy if given."""
    results = json.loads((runs / like / "results.json").read_text())
    results["encoder"] |= encoder
    if acc1 is not None:
        results["classifiers"][1] = {"acc1": acc1}
    (runs / name).mkdir()
    (runs / name / "results.json").write_text(json.dumps(results))


def collect(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["collect_results.py", *map(str, args)])
    collect_results.main()
    return capsys.readouterr().out.splitlines()


def test_mean_and_deviation_over_seeds(runs, monkeypatch, capsys):
    """Each seed counts once, and the best classifier represents its run; nothing else is mixed in, and settings that
    SimCLR does not use do not separate runs.
    """
    assert collect(monkeypatch, capsys, runs) == [
        "| method | `--batch-size` | kNN-20 | kNN-200 | linear evaluation, best of 3 rates | minutes | seeds |",
        "|---|---|---|---|---|---|---|",
        "| SimCLR | 64 | 61.00 ± 1.41 | 51.00 ± 1.41 | 71.00 ± 1.41 | 64.00 ± 0.00 | 1, 2 |",
        "| SogCLR | 64 | 65.00 | 55.00 | 75.00 | 64.00 | 1 |",
        "| SogCLR | 256 | 66.50 ± 0.71 | 56.50 ± 0.71 | 76.50 ± 0.71 | 256.00 ± 0.00 | 1, 2 |",
        "",
        "| method | `--batch-size` | kNN-20 | kNN-200 | linear evaluation, best of 3 rates | seeds |",
        "|---|---|---|---|---|---|",
        "| SogCLR - SimCLR | 64 | 5.00 | 5.00 | 5.00 | 1 |",
        "", "Evaluated at commit abc, on CPU, torch 2.x."]


def test_differences_are_of_equal_settings_and_seeds(runs, monkeypatch, capsys):
    """Each SogCLR run must be paired with SimCLR of the same temperature and seed, whatever its gamma, or omitted."""
    def another(name, **encoder):
        add(runs, name, "dcl_64_1", 80.0 + encoder["seed"], **encoder)

    another("second seed", seed=2)
    another("other gamma", gamma=0.2, seed=1)
    another("other gamma, second seed", gamma=0.2, seed=2)
    another("other temperature", t=0.5, seed=1)
    lines = collect(monkeypatch, capsys, runs)
    assert [line for line in lines if " - " in line] == [
        "| SogCLR - SimCLR | 64 | 0.1 | 0.2 |  |  | 10.50 ± 0.71 | 1, 2 |",       # 81 - 70, 82 - 72
        "| SogCLR - SimCLR | 64 | 0.1 | 0.9 | 5.00 | 5.00 | 7.50 ± 3.54 | 1, 2 |"]


def test_dcl_is_a_method_of_its_own(runs, monkeypatch, capsys):
    """SogCLR with gamma 1, whatever its schedule, must have its row between SimCLR and SogCLR, no gamma, and the
    differences to both.
    """
    add(runs, "gamma 1", "dcl_64_1", 73.5, gamma=1.0, gamma_schedule="cosine", gamma_decay_epochs=6)
    rows = [line for line in collect(monkeypatch, capsys, runs) if " 64 |" in line]
    assert [(row.split(" | ")[0], row.split(" | ")[4][:5]) for row in rows] == [
        ("| SimCLR", "71.00"), ("| DCL", "73.50"), ("| SogCLR", "75.00"), ("| DCL - SimCLR", "3.50"),
        ("| SogCLR - SimCLR", "5.00"), ("| SogCLR - DCL", "1.50")]


def test_batch_is_that_of_the_loss(runs, monkeypatch, capsys):
    """A run whose loss saw fewer images at a time must be another row, with the whole batch's size where it varies.
    Earlier runs, which do not record it, saw the whole batch.
    """
    add(runs, "groups", "dcl_64_1", loss_batch_size=4)
    lines = collect(monkeypatch, capsys, runs)
    assert lines[0].startswith("| method | `--loss-batch-size` | `--batch-size` | kNN-20 ")
    assert [line.split(" | ")[:3] for line in lines[2:6]] == [
        ["| SimCLR", "64", "64"], ["| SogCLR", "4", "64"], ["| SogCLR", "64", "64"], ["| SogCLR", "256", "256"]]
    for file in runs.glob("*_256_*/results.json"):
        file.unlink()
    assert collect(monkeypatch, capsys, runs)[0].startswith("| method | `--loss-batch-size` | kNN-20 ")


def test_isogclr_is_compared_with_sogclr(runs, monkeypatch, capsys):
    """Of the same gamma, temperature and seed, whatever its own settings."""
    for name, acc1, settings in (("a", 76.0, {"rho": 0.3}), ("b", 77.0, {"rho": 0.4}), ("c", 90.0, {"gamma": 0.2})):
        add(runs, name, "dcl_64_1", acc1, **{"loss_type": "isogclr", "rho": 0.3, "t_min": 0.05, **settings})
    lines = collect(monkeypatch, capsys, runs)
    assert "| iSogCLR | 64 | 0.9 | 0.4 |  |  | 77.00 | 64.00 | 1 |" in lines
    assert [line for line in lines if line.startswith("| iSogCLR - SogCLR ")] == [
        "| iSogCLR - SogCLR | 64 | 0.9 | 0.3 |  |  | 1.00 | 1 |",
        "| iSogCLR - SogCLR | 64 | 0.9 | 0.4 |  |  | 2.00 | 1 |"]


def test_logistic_regression_has_columns(runs, monkeypatch, capsys):
    """One for all images, which a plot then shows, and one for each number of images per class."""
    plotted = []
    monkeypatch.setattr(collect_results, "plot", lambda lines, *args: plotted.append((args[0], lines["SogCLR"])))
    collect(monkeypatch, capsys, runs, "--png", runs / "plot.png")
    common = {key: value for key, value in json.loads((runs / "dcl_64_1" / "results.json").read_text()).items()
              if key not in ("classifiers", "protocol")}
    for name, results in (("all", {"protocol": "logistic regression", "logistic": {"acc1": 74.0}}),
                          ("few", {"protocol": "of no use", "shots": {"1": {"acc1": 20.0}, "5": {"acc1": 40.0}}})):
        (runs / name).mkdir()
        (runs / name / "results.json").write_text(json.dumps(common | results))
    head, _, *rows = collect(monkeypatch, capsys, runs)
    assert head.split(" | ")[5:8] == ["logistic regression", "logistic regression, 1 images per class",
                                      "logistic regression, 5 images per class"]
    ours = next(row for row in rows if row.startswith("| SogCLR | 64 "))
    assert ours.split(" | ")[5:8] == ["74.00", "20.00", "40.00"]
    collect(monkeypatch, capsys, runs, "--png", runs / "plot.png")
    assert plotted == [("linear evaluation, best of 3 rates", {64: [75.0], 256: [76.0, 77.0]}),
                       ("logistic regression", {64: [74.0]})]


def test_settings_that_differ_have_columns(runs, monkeypatch, capsys):
    """A run with another temperature must be a row of its own, with the temperature in a column; no plot can show it.
    """
    add(runs, "other", "cl_64_1", t=0.5)
    lines = collect(monkeypatch, capsys, runs)
    assert lines[0].startswith("| method | `--batch-size` | `--t` | kNN-20 ")
    assert [line.split(" | ")[:3] for line in lines[2:4]] == [["| SimCLR", "64", "0.1"], ["| SimCLR", "64", "0.5"]]
    with pytest.raises(SystemExit, match="2"):
        collect(monkeypatch, capsys, runs, "--png", runs / "plot.png")
    output = capsys.readouterr()
    assert "method, batch size and seed, not in t" in output.err
    assert output.out.splitlines() == lines


def test_plot(runs, monkeypatch, capsys):
    """A point for each row, higher for a higher accuracy."""
    collect(monkeypatch, capsys, runs, "--png", runs / "plot.png")
    with Image.open(runs / "plot.png") as picture:
        pixels, (width, height) = picture.load(), picture.size
        heights = {}
        for name, color in collect_results.COLORS.items():
            spots = [(x, y) for x in range(width) for y in range(60, height)        # below the names
                     if pixels[x, y] == color and pixels[x - 3, y] == pixels[x + 3, y] == color]
            heights[name] = [sum(ys) / len(ys) for x in (70, width - 30) if (ys := [y for a, y in spots if a == x])]
    assert not heights["DCL"] + heights["iSogCLR"]
    (simclr,), (small, large) = heights["SimCLR"], heights["SogCLR"]
    assert large < small < simclr


@pytest.mark.slow
def test_curves_of_knn_over_epochs(imagenet, tmp_path, monkeypatch, capsys):
    """They must have each seed's value after each report; unfinished runs and those without kNN are left out."""
    for flags in ("--seed 1 --knn-freq 2", "--seed 2 --knn-freq 2", "--seed 1 --knn-freq 2 --loss_type cl", "--seed 3"):
        lines = call(train, "--data", imagenet, *TINY, "--epochs", 3, "--save_dir", tmp_path, *flags.split())
        if "cl" in flags:
            log = [line for line in lines if line.startswith(" * Epoch 1 ")]
    written = {}
    for file in tmp_path.rglob("results.json"):
        results = json.loads(file.read_text())
        written[results["settings"]["loss_type"], results["settings"]["seed"]] = results.get("kNN-20")
    curves = collect_results.knn_curves(tmp_path)
    assert {method: sorted(line) for method, line in curves.items()} == {"SogCLR": [2, 3], "SimCLR": [2, 3]}
    assert sorted(curves["SogCLR"][3]) == pytest.approx(sorted([written["dcl", 1], written["dcl", 2]]))
    assert curves["SimCLR"][3] == pytest.approx([written["cl", 1]])
    assert curves["SimCLR"][2] == pytest.approx([float(log[-1].split("kNN-20 ")[1].split()[0])], abs=0.05)
    assert collect(monkeypatch, capsys, tmp_path, "--curves", tmp_path / "curves.png") == []
    with Image.open(tmp_path / "curves.png") as picture:
        colors = {color for _, color in picture.getcolors(2**24)}
    assert {collect_results.COLORS[name] for name in ("SimCLR", "SogCLR")} <= colors
    assert collect_results.COLORS["DCL"] not in colors

    for file in tmp_path.rglob("*simclr*/results.json"):
        file.unlink()
    assert list(collect_results.knn_curves(tmp_path)) == ["SogCLR"]
    shutil.copytree(next(tmp_path.glob("*seed_2")), tmp_path / "zz")
    for folder, message in ((tmp_path, "zz: has the same method and seed as"),
                            (tmp_path / "none", "no such folder"),
                            (next(tmp_path.glob("*seed_3")), "no finished run of train.py with --knn-freq")):
        with pytest.raises(SystemExit, match="2"):
            collect(monkeypatch, capsys, folder, "--curves", tmp_path / "curves.png")
        assert message in capsys.readouterr().err
    shutil.rmtree(tmp_path / "zz")
    call(train, "--data", imagenet, *TINY, "--epochs", 3, "--save_dir", tmp_path, "--seed", 4, "--knn-freq", 3,
         "--t", 0.2)
    with pytest.raises(SystemExit, match="2"):
        collect(monkeypatch, capsys, tmp_path, "--curves", tmp_path / "curves.png")
    assert "--curves: plots runs that differ in method and seed, not in batch_size, t" in capsys.readouterr().err


def test_what_cannot_be_collected(tmp_path, runs, monkeypatch, capsys):
    """No folder, one without results, the same run twice, a damaged file, and a plot that cannot be written must each
    give one line.
    """
    def refusal(*args):
        with pytest.raises(SystemExit, match="2"):
            collect(monkeypatch, capsys, *args)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'none'}: no such folder" in refusal(tmp_path / "none")
    assert "contains no results.json of a pretrained encoder" in refusal(tmp_path / "empty")
    for plot in (tmp_path / "none" / "plot.png", tmp_path, tmp_path / ("long" * 99)):
        assert "argument --png: must be a writable file in an existing folder" in refusal(runs, "--png", plot)
    again, first = runs / "zz again" / "results.json", runs / "cl_64_1" / "results.json"
    again.parent.mkdir()
    again.write_text(first.read_text())
    assert f"{again}: has the same pretraining settings, protocol and seed as {first}" in refusal(runs)
    for text in (first.read_text()[:100], "null", '{"encoder": {"loss_type": "cl"}}'):
        again.write_text(text)
        assert f"{again}: cannot be read as a result, remove it or run it again" in refusal(runs)
