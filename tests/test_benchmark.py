"""benchmark.py prints and writes what it measures, and its references compute what ours do. No speed is tested."""

import json
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import write_image

from scripts.tools import benchmark
from sogclr.loss import GlobalContrastiveLoss
from sogclr.optimizer import LARS

TINY = shlex.split("--arch resnet18 --stem imagenet --image-size 16 --batch-size 4 --workers 1 --repeats 1")
FLOOR, PIL = "floor: encoder alone", "PIL recipe, 1 worker"
ROWS = {"step": [FLOOR, "full step", "of which augment", "of which loss", "of which LARS",
                 "loss of iSogCLR", "LARS, one tensor at a time"],
        "train": [FLOOR, "full step", "full step and loader", "plain recipe and loader"],
        "lincls": ["step", "step and loader"],
        "data": [PIL, "uint8 crops, 1 worker", "uint8 crops, 2 workers", "color on the device"]}
RATIOS = {"step": {"% of floor": (FLOOR, 100)}, "data": {"times PIL": (PIL, 1)},
          "train": {"% of floor's speed": (FLOOR, 100), "times the plain recipe": ("plain recipe and loader", 1)}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Just enough images: for `train` and `lincls` 5 batches of 4, and for `data` 7 of 8."""
    folder = tmp_path_factory.mktemp("photos")
    for k in range(56):
        write_image(folder / ("few" if k < 20 else "") / f"{k}.jpg", seed=k)
    few = ["--data", folder / "few"]
    return {"train": few, "lincls": few, "data": ["--data", folder], "step": []}


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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ROWS)
def test_rows(mode, photos, report, capsys):
    """Every variant must be measured, related to its reference, printed, and written to --json."""
    figures = report(mode, *photos[mode])
    assert (figures["device"], figures["versions"]["torch"]) == ("CPU", torch.__version__)
    assert list(figures["tables"]) == [mode]
    rows = {row["what"]: row for row in figures["tables"][mode]}
    assert list(rows) == ROWS[mode]
    for row in rows.values():
        batch = 8 if mode == "data" else 4
        is_part = mode == "step" and row["what"] not in ROWS[mode][:2]
        speed = row["images/s" if mode == "lincls" else "pairs/s"]
        assert speed == (None if is_part else pytest.approx(1000 * batch / row["ms"]))
        for column, (reference, scale) in RATIOS.get(mode, {}).items():     # of one repeat, so they are the medians
            ratio = rows[reference]["ms"] / row["ms"]
            assert row[column] == pytest.approx(scale * (1 / ratio if mode == "step" else ratio))
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ROWS[mode]
    assert "hours" not in printed       # extrapolated from ImageNet's own network and size alone


@pytest.mark.slow
def test_all_modes_at_once(photos, report, monkeypatch, capsys):
    """A table of the steps of all cases, and the other modes for the first one."""
    monkeypatch.setattr(benchmark, "CPU_CASES", [("resnet18", 16, 4), ("resnet34", 24, 2)])
    tables = report("all", *photos["train"])["tables"]
    assert [row["step"] for row in tables["step"]] == ["resnet18, 16 px, batch 4", "resnet34, 24 px, batch 2"]
    for row in tables["step"]:
        assert row["full step, ms"] > row["augment, ms"] > 0
    assert [[row["what"] for row in tables[mode]] for mode in ("train", "lincls")] == [ROWS["train"], ROWS["lincls"]]
    printed = capsys.readouterr().out
    assert printed.count("resnet18 at 16 pixels, batch 4") == 3
    assert printed.count("\n\n| ") == 3


def test_medians():
    """Times and ratios must be medians over the repeats, without the one that warms up."""
    ours, plain = iter([100, 1, 2, 90]), iter([100, 4, 4, 90])
    rows = benchmark.compare({"ours": lambda: next(ours), "plain": lambda: next(plain)}, 3, 8,
                             {"times plain": lambda ms, run: run["plain"] / ms})
    assert rows == [{"what": "ours", "ms": 2, "pairs/s": 4000, "times plain": 2},
                    {"what": "plain", "ms": 4, "pairs/s": 2000, "times plain": 1}]


def test_plain_loss_is_ours():
    """On images that both have visited, `PlainLoss` must give GlobalContrastiveLoss's value, gradient and `u`."""
    torch.manual_seed(0)
    ours, plain, index = GlobalContrastiveLoss(20), benchmark.PlainLoss(20), torch.arange(3, 11)
    ours(*torch.randn(2, 8, 5), index)
    plain.u[:] = ours.u[:, None]
    z = torch.randn(2, 8, 5, requires_grad=True)
    losses = [criterion(*z, index) for criterion in (ours, plain)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z) for loss in losses))
    torch.testing.assert_close(ours.u, plain.u[:, 0])


def test_one_by_one_is_lars():
    """Tensor by tensor the weights must become those of LARS, also where a norm is 0."""
    models = []
    for kind in (LARS, benchmark.OneByOne):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,), (2, 2, 3, 3), (3, 3))]
        params[3].data.zero_()
        optimizer = kind(params, lr=0.5, weight_decay=0.1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        models.append(params)
    torch.testing.assert_close(*models)


def test_hours(capsys):
    """The hours that ImageNet takes must follow from the speed, for its own network and image size alone."""
    for arch in ("resnet18", "resnet50"):
        args = SimpleNamespace(arch=arch, image_size=224, stem="auto", batch_size=256)
        benchmark.describe(args, "bf16", pairs_per_second=benchmark.IMAGENET_IMAGES / 36)
        assert ("1.0 hours for 100 epochs, 8.0 hours for 800" in capsys.readouterr().out) == (arch == "resnet50")


@pytest.mark.parametrize(("flags", "message"), [
    (["train"], "--data data/folder: no such folder"), (["step", "--cuda-graph"], "--cuda-graph: needs step, a GPU")])
def test_what_cannot_be_measured(flags, message, report, tmp_path, monkeypatch, capsys):
    """Where images are missing, or a flag is of no use, one line must say so, with exit code 2."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        report(*flags)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
