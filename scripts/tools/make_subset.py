#!/usr/bin/env python3
"""A small, class-balanced part of a data set, as a folder for `--data_name folder`: to try things, or to tune them.

    python scripts/tools/make_subset.py DST --data_name cifar10 --data DIR --train 5000 --val 5000
    python scripts/tools/make_subset.py DST --data_name cifar10 --data DIR --train 5000 --val 5000 --held-out

DST/val gets images of the validation split; with --held-out it gets other images of the *training* split, on which
settings can be chosen without a look at the validation images. DST/train is the same with and without. Images that are
files are linked, so that the originals must stay, and a change here is a change there; others are written as PNG.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sogclr import InputError
from sogclr.datasets import open_data_set
from sogclr.flags import DATA_SETS, Parser, number
from sogclr.subset import balanced_indices


def draw(images, n, but=()):
    """n indices of a fixed class-balanced draw, ascending; others than `but`, which are the first of the same draw.

    Raises InputError where there are too few images, or n is too small for one of each class.
    """
    if n + len(but) > len(images):
        raise InputError(f"--train, --val: {n + len(but)} images are wanted of a split of {len(images)}, take fewer")
    indices = np.setdiff1d(balanced_indices(images.targets, 100 * (n + len(but)) / len(images), seed=0), but)
    classes = len(np.unique(images.targets))
    if len(indices) != n or len(np.unique(np.asarray(images.targets)[indices])) < classes:
        raise InputError(f"--train, --val: {n} images cannot hold one of each of the {classes} classes, take more")
    return indices


def write(images, indices, folder):
    """folder/<class>/<index>.<ending> for each of the images."""
    for i in indices:
        target = folder / images.classes[images.targets[i]] / f"{i:08d}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if hasattr(images, "path"):
            source = Path(os.fsdecode(images.path(i)))
            target.with_suffix(source.suffix).symlink_to(source.resolve())
        else:
            images[i][0].save(target.with_suffix(".png"))


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DST", help="a new folder")
    parser.add_argument("--data_name", default="cifar10", choices=DATA_SETS, help="the data set to take from")
    parser.add_argument("--data", metavar="DIR", help="where it lies (default: data/<data_name>)")
    parser.add_argument("--train", default=5000, type=number(int, "[1, inf)"), metavar="N", help="training images")
    parser.add_argument("--val", default=5000, type=number(int, "[1, inf)"), metavar="N", help="validation images")
    parser.add_argument("--held-out", action="store_true", help="take the validation images from the training split")
    args = parser.parse_args()
    try:
        if args.folder.exists():
            raise InputError(f"{args.folder}: exists, name a new folder")
        train = open_data_set(args.data_name, args.data, "train").images
        train_indices = draw(train, args.train)
        if args.held_out:
            val, val_indices = train, draw(train, args.val, but=train_indices)
        else:
            val = open_data_set(args.data_name, args.data, "val").images
            val_indices = draw(val, args.val)
        # Under another name until it is whole, and one of its own, in case two of these run at once.
        args.folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.folder.absolute().parent, prefix=args.folder.name) as part:
            whole = Path(part) / "whole"
            write(train, train_indices, whole / "train")
            write(val, val_indices, whole / "val")
            whole.rename(args.folder)
    except InputError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{args.folder}: cannot be written: {error.strerror}")
    print(f"=> {args.folder}: {len(train_indices)} training images, {len(val_indices)} validation images"
          + " held out of the training split" * args.held_out)


if __name__ == "__main__":
    main()
