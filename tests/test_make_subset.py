"""A small subset of a data set, as a folder."""

import sys

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from scripts.tools import make_imagenet100, make_subset
from sogclr import shapes
from sogclr.shapes import Shapes


def make(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["make_subset.py", *map(str, args)])
    make_subset.main()


def numbers(folder):
    """{class: the numbers of its images in the data set}"""
    return {part.name: {int(file.stem) for file in part.iterdir()} for part in folder.iterdir()}


def test_held_out_images_are_other_training_images(tmp_path, monkeypatch):
    """Both parts must be balanced and disjoint, with the training split's pixels, and train the same without it."""
    monkeypatch.setattr(shapes, "LENGTHS", {"train": 400, "val": 200})
    flags = ["--data_name", "shapes", "--train", 200, "--val", 100]
    make(monkeypatch, tmp_path / "held", *flags, "--held-out")
    make(monkeypatch, tmp_path / "plain", *flags)
    train, held, val = (numbers(tmp_path / name) for name in ("held/train", "held/val", "plain/val"))
    assert numbers(tmp_path / "plain" / "train") == train
    for part, count in ((train, 20), (held, 10), (val, 10)):
        assert {name: len(of_class) for name, of_class in part.items()} == dict.fromkeys(Shapes("val").classes, count)
    assert all(train[name].isdisjoint(held[name]) for name in train)
    for folder, split in (("held/train", "train"), ("held/val", "train"), ("plain/val", "val")):
        for file in list((tmp_path / folder / "plain ring").iterdir())[:3]:
            with Image.open(file) as image:
                assert np.array_equal(np.asarray(image), Shapes(split).data[int(file.stem)])


def test_image_files_are_linked(imagenet, tmp_path, monkeypatch):
    """An image that is a file must be that very file, bytes and all."""
    make(monkeypatch, tmp_path / "part", "--data_name", "imagenet1000", "--data", imagenet, "--train", 6, "--val", 3)
    files = list((tmp_path / "part").rglob("*.JPEG"))
    assert len(files) == 6 + 3
    assert all(file.readlink().is_relative_to(imagenet) and file.parent.name == file.readlink().parent.name
               for file in files)


@pytest.mark.parametrize(("flags", "message"), [
    (["--train", 20, "--val", 10], "--train, --val: 10 images requested from a split of 9, use fewer"),
    (["--train", 20, "--val", 5, "--held-out"], "25 images requested from a split of 24, use fewer"),
    (["--train", 6, "--val", 2, "--held-out"], "2 images cannot include each of the 3 classes, use more"),
    (["--train", 2], "2 images cannot include each of the 3 classes, use more"),
    (["--data", "nowhere"], "--data nowhere: no such folder")])
def test_what_is_missing_gives_one_line(flags, message, imagenet, tmp_path, monkeypatch, capsys):
    """Too many images or too few, or no data set, must exit with code 2 and leave nothing."""
    with pytest.raises(SystemExit, match="2"):
        make(monkeypatch, tmp_path / "new" / "part", "--data_name", "imagenet1000", "--data", imagenet, *flags)
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_nothing_is_replaced(tmp_path, monkeypatch, capsys):
    """An existing folder must be left unchanged; one that cannot be created must give one line."""
    monkeypatch.setattr(shapes, "LENGTHS", {"train": 20, "val": 20})
    for folder, message in ((tmp_path, "already exists, choose a new name"), ("/proc/part", "cannot be written")):
        with pytest.raises(SystemExit, match="2"):
            make(monkeypatch, folder, "--data_name", "shapes", "--train", 20, "--val", 20)
        assert message in capsys.readouterr().err


def test_imagenet100_is_linked(tmp_path, monkeypatch, capsys):
    """The subset must contain the authors' 100 classes in both splits; an incomplete tree must be refused, and so must
    the subset as its own source, whose links would be lost.
    """
    classes = (ROOT / "scripts" / "tools" / "imagenet100_classes.txt").read_text().split()
    assert len(set(classes)) == 100
    full, subset = tmp_path / "full", tmp_path / "subset"

    def link(source):
        monkeypatch.setattr("sys.argv", ["make_imagenet100.py", str(source), str(subset)])
        make_imagenet100.main()

    for split in ("train", "val"):
        for wnid in [*classes, "n99999999"]:
            (full / split / wnid).mkdir(parents=True)
    for _ in range(2):      # also over an earlier one
        link(full)
    with pytest.raises(SystemExit, match="2"):
        link(subset)
    assert "is the folder to link to" in capsys.readouterr().err
    (full / "val" / classes[0]).rmdir()
    with pytest.raises(SystemExit, match="2"):
        link(full)
    assert f"the first is val/{classes[0]}" in capsys.readouterr().err
    assert sorted(path.name for path in (subset / "train").iterdir()) == sorted(classes)
    assert all(path.resolve() == full / "train" / path.name for path in (subset / "train").iterdir())
