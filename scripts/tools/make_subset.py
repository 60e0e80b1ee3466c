#!/usr/bin/env python3
"""Make a small, class-balanced subset of a data set, as a folder for `--data_name folder`, for trials or tuning.

    python scripts/tools/make_subset.py DST --data_name cifar10 --data DIR --train 5000 --val 5000
    python scripts/tools/make_subset.py DST --data_name cifar10 --data DIR --train 5000 --val 5000 --held-out

DST/val gets images of the validation split; with --held-out, other images of the *training* split, so that settings can
be chosen without looking at the validation images. DST/train is the same either way. Image files are linked, so the
originals must stay, and a change here is a change there; other images are written as PNG.
"""

import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sogclr import InputError
from sogclr.checkpoint import new_path
from sogclr.datasets import open_data_set
from sogclr.flags import DATA_SETS, Parser, number
from sogclr.subset import balanced_indices


def draw(images, n, but=()):
    """n indices of a fixed class-balanced sample, ascending, without `but`, the first indices of the same sample.

    Raises InputError if there are too few images, or n is too small for one of each class.
    """
    if n + len(but) > len(images):
        raise InputError(f"--train, --val: {n + len(but)} images requested from a split of {len(images)}, use fewer")
    indices = np.setdiff1d(balanced_indices(images.targets, 100 * (n + len(but)) / len(images), seed=0), but)
    classes = len(np.unique(images.targets))
    if len(indices) != n or len(np.unique(np.asarray(images.targets)[indices])) < classes:
        raise InputError(f"--train, --val: {n} images cannot include each of the {classes} classes, use more")
    return indices


def write(images, indices, folder):
    """Write each image to folder/<class>/<index>.<extension>."""
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
    parser.add_argument("--data_name", default="cifar10", choices=DATA_SETS, help="the source data set")
    parser.add_argument("--data", metavar="DIR", help="its folder (default: data/<data_name>)")
    parser.add_argument("--train", default=5000, type=number(int, "[1, inf)"), metavar="N", help="training images")
    parser.add_argument("--val", default=5000, type=number(int, "[1, inf)"), metavar="N", help="validation images")
    parser.add_argument("--held-out", action="store_true", help="take the validation images from the training split")
    args = parser.parse_args()
    try:
        train = open_data_set(args.data_name, args.data, "train").images
        train_indices = draw(train, args.train)
        if args.held_out:
            val, val_indices = train, draw(train, args.val, but=train_indices)
        else:
            val = open_data_set(args.data_name, args.data, "val").images
            val_indices = draw(val, args.val)
        args.folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with new_path(args.folder, "DST") as part:
            write(train, train_indices, part / "train")
            write(val, val_indices, part / "val")
    except InputError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"DST {args.folder}: cannot be written: {error.strerror}")
    print(f"=> {args.folder}: {len(train_indices)} training images, {len(val_indices)} validation images"
          + " held out of the training split" * args.held_out)


if __name__ == "__main__":
    main()
