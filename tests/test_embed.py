"""Features of a folder of images, and their nearest neighbors."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import PYTHON, ROOT, run, write_image
from PIL import Image

from scripts.tools import embed
from sogclr.builder import resnet
from sogclr.datasets import IMAGENET_MEAN_STD, MEAN_STD
from sogclr.loader import center_view


@pytest.fixture(scope="module")
def encoder():
    """A ResNet-18 without classifier whose features differ among images."""
    torch.manual_seed(0)
    encoder = resnet("resnet18").eval()
    encoder.fc = torch.nn.Identity()
    return encoder


@pytest.fixture
def photos(tmp_path):
    """Six images in nested folders, one of them a copy, and one whose name is neither UTF-8 nor printable."""
    folder = tmp_path / "photos"
    for k, name in enumerate(("b.jpg", "a/x.jpg", "a/y.jpg", "c/d/e.jpg", "z.jpg")):
        write_image(folder / name, k, (90, 70))
    shutil.copy(folder / "z.jpg", folder / "a" / "z.jpg")
    os.rename(folder / "b.jpg", os.fsencode(folder) + b"/b\xff\t.jpg")
    return folder


NAMES = ["b\udcff\t.jpg", "z.jpg", "a/x.jpg", "a/y.jpg", "a/z.jpg", "c/d/e.jpg"]       # in ImageFolder's order


@pytest.fixture
def main(tmp_path, encoder, monkeypatch, no_gpu):
    """A function from settings to record in the checkpoint, and arguments, that calls the script in tmp_path."""
    def main(*args, settings=None):
        torch.save({"state_dict": encoder.state_dict(), "settings": settings or {}}, "checkpoint.pth")
        monkeypatch.setattr("sys.argv", ["embed.py", *map(str, args), "--workers", "0"])
        embed.main()

    monkeypatch.chdir(tmp_path)
    return main


def plain(encoder, folder, names, size, mean, std):
    """The features, one image at a time, by torchvision alone."""
    model = torchvision.models.resnet18()
    model.fc = torch.nn.Identity()
    model.load_state_dict(encoder.state_dict())
    normalize = torchvision.transforms.Normalize(mean, std)
    with torch.no_grad():
        return torch.cat([model.eval()(normalize(center_view(Image.open(os.path.join(folder, name)), size) / 255)[None])
                          for name in names]).numpy()


def cosines(features):
    """The cosine similarities of all pairs, [n, n], in float64."""
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize(("settings", "flags", "size", "statistics"), [
    ({"data_name": "folder", "image_size": 64}, [], 64, IMAGENET_MEAN_STD),
    ({"data_name": "cifar10", "image_size": 48}, [], 48, MEAN_STD["cifar10"]),
    ({"data_name": "cifar10", "image_size": 48}, ["--image-size", 64], 64, MEAN_STD["cifar10"]),
    ({"data_name": "cifar10", "image_size": 48}, ["--data_name", "cifar100"], 32, MEAN_STD["cifar100"]),
    ({}, ["--batch-size", 4], 224, IMAGENET_MEAN_STD)])
def test_features_are_those_of_each_image(settings, flags, size, statistics, main, encoder, photos):
    """Every image's features, from crops of the size and with the normalization that the checkpoint or a flag says,
    next to its path, in order.
    """
    main("checkpoint.pth", f"{photos}/", "out.npz", *flags, settings=settings)
    loaded = np.load("out.npz")
    assert loaded["paths"].tolist() == NAMES
    assert loaded["features"].dtype == np.float32
    expected = plain(encoder, photos, NAMES, size, *statistics)
    assert np.allclose(loaded["features"], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected[0] - expected[1]).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize(("rows", "shown"), [(20, [0, 1, 2, 3, 4, 5]), (3, [0, 2, 4])])
def test_neighbors_are_written_and_drawn(rows, shown, main, photos, monkeypatch):
    """The table must have each image's five others in order of similarity, a copy first; the picture the crops of as
    many rows as it has, from all parts of the table.
    """
    monkeypatch.setattr(embed, "ROWS", rows)
    main("checkpoint.pth", photos, "out.npz", "--neighbors", "near", settings={"data_name": "folder", "image_size": 64})
    similarity = cosines(np.load("out.npz")["features"])
    head, *lines = (line.split("\t") for line in Path("near/neighbors.tsv").read_text("utf-8").splitlines())
    names = ["b\\udcff\\t.jpg", *NAMES[1:]]
    assert head == ["image", *(f"neighbor_{k}" for k in range(1, 6)), *(f"similarity_{k}" for k in range(1, 6))]
    assert [line[0] for line in lines] == names
    for row, (name, *cells) in enumerate(lines):
        assert sorted([name, *cells[:5]]) == sorted(names)
        values = [similarity[row, names.index(other)] for other in cells[:5]]       # a copy's may be equal
        assert np.allclose(np.array(cells[5:], float), values, rtol=0, atol=1e-4)
        assert np.allclose(values, sorted(values, reverse=True), rtol=0, atol=1e-6)
    assert lines[1][:2] == ["z.jpg", "a/z.jpg"]
    assert lines[1][6] == "1.0000"

    with Image.open("near/neighbors.png") as sheet:
        assert sheet.height == 148 * len(shown)
        for place, row in enumerate(shown):
            for column, name in enumerate(lines[row][:6]):
                view = center_view(Image.open(os.path.join(photos, NAMES[names.index(name)])), 64)
                cell = Image.fromarray(view.permute(1, 2, 0).numpy()).resize((128, 128))
                x, y = 132 * column + 20 * (column > 0), 148 * place
                assert np.array_equal(np.asarray(sheet.crop((x, y, x + 128, y + 128))), np.asarray(cell))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_images_have_few_neighbors(n, main, tmp_path):
    """A folder of n images must give n - 1 neighbors of each, none for a single one."""
    for k in range(n):
        write_image(tmp_path / "few" / f"{k}.jpg", k)
    main("checkpoint.pth", "few", "out.npz", "--image-size", 32, "--neighbors", "near")
    lines = [line.split("\t") for line in Path("near/neighbors.tsv").read_text().splitlines()]
    assert [len(line) for line in lines] == [1 + 2 * (n - 1)] * (1 + n)
    with Image.open("near/neighbors.png") as sheet:
        assert sheet.size == (132 * n + 20, 148 * n)


@pytest.mark.parametrize("n", [1, 2, 300])
def test_nearest_in_parts(n, monkeypatch):
    """Whatever part of the similarities is computed at a time, it must find what sorting all of them in float64 finds,
    and never an image itself.
    """
    features = np.random.default_rng(0).standard_normal((n, 16)).astype(np.float32)
    similarity = cosines(features) - 4 * np.eye(n)
    count = min(5, n - 1)
    monkeypatch.setattr(embed, "CHUNK", 7 * n)
    values, rows = embed.nearest(torch.from_numpy(features), count)
    expected = np.argsort(-similarity, axis=1)[:, :count]
    assert np.array_equal(rows, expected)
    assert np.allclose(values, np.take_along_axis(similarity, expected, 1), rtol=0, atol=1e-6)


def test_a_bad_file_stops_or_is_left_out(main, photos, capsys):
    """By default one line that names it, and nothing is written; with --bad-images skip all others."""
    (photos / "a" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="2"):
        main("checkpoint.pth", photos, "out.npz", "--neighbors", "near")
    assert "a/bad.jpg: not a readable image" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["checkpoint.pth", "photos"]
    main("checkpoint.pth", photos, "out.npz", "--neighbors", "near", "--bad-images", "skip")
    assert "=> skipped " in capsys.readouterr().err
    loaded = np.load("out.npz")
    assert loaded["paths"].tolist() == NAMES
    assert len(loaded["features"]) == 6


def test_progress_is_reported(capsys, monkeypatch):
    """A line every ten seconds with the images per second and the time left."""
    monkeypatch.setattr(embed.time, "monotonic", iter(range(0, 1000, 6)).__next__)
    encode = embed.Reporting(lambda images: images, 240)
    for _ in range(4):
        encode(torch.zeros(60))
    assert capsys.readouterr().out.splitlines() == ["=> 120 of 240 images, 10.0 images/s, ETA 0:00:12",
                                                    "=> 240 of 240 images, 10.0 images/s, ETA 0:00:00"]


@pytest.mark.parametrize(("args", "message"), [
    (["missing.pth", "photos", "out.npz"], "CHECKPOINT missing.pth: no such file"),
    (["checkpoint.pth", "missing", "out.npz"], "DIR missing: cannot be listed: missing: No such file or directory"),
    (["checkpoint.pth", "empty", "out.npz"], "DIR empty: contains no images (files named .jpg"),
    (["checkpoint.pth", "photos", "photos"], "OUT.npz photos: already exists, choose a new name or remove it"),
    (["checkpoint.pth", "photos", "nowhere/out.npz"], "OUT.npz nowhere/out.npz: cannot be written: No such file"),
    (["checkpoint.pth", "photos", 300 * "o"], f"OUT.npz {300 * 'o'}: cannot be written: File name too long"),
    (["checkpoint.pth", "photos", "out.npz", "--neighbors", "empty"], "--neighbors empty: already exists"),
    (["checkpoint.pth", "photos", "out.npz", "--neighbors", "out.npz"], "--neighbors out.npz: is OUT.npz, too")])
def test_bad_input_is_one_line(args, message, main, photos, tmp_path, capsys):
    """Exit code 2, one line that names the argument, and no file that was not there before."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main(*args)
    error = capsys.readouterr().err
    assert error.startswith("embed.py: error: " + message)
    assert error.count("\n") == 1
    assert sorted(os.listdir()) == ["checkpoint.pth", "empty", "photos"]


def test_what_is_assumed_is_said(main, photos, capsys):
    """A checkpoint that does not record its images must be named as such, unless a flag says them."""
    for flags, settings, said in (([], {}, True), (["--data_name", "shapes"], {}, False),
                                  ([], {"data_name": "folder", "image_size": 64}, False)):
        main("checkpoint.pth", photos, f"out{len(os.listdir())}.npz", *flags, settings=settings)
        assert ("ImageNet's normalization is assumed" in capsys.readouterr().out) == said


@pytest.mark.slow
def test_the_script_as_the_manual_says(encoder, photos, tmp_path):
    """With workers, as a process of its own; then the manual's lines, which load the file, must work."""
    out = tmp_path / "features.npz"
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    output, _ = run(PYTHON, ROOT / "scripts/tools/embed.py", tmp_path / "encoder.pth", photos, out, "--workers", 2,
                    "--batch-size", 2)
    assert f"=> {out}: 512 features of 6 images, in " in output
    _, start, rest = (ROOT / "scripts" / "README.md").read_text().partition("import numpy as np\n")
    names = {}
    exec(start + rest.partition("```")[0].replace("features.npz", str(out)), names)
    assert names["features"].shape == (6, 512)
    assert list(names["paths"]) == NAMES
