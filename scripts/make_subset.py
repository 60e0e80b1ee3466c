#!/usr/bin/env python3
"""A small, class-balanced part of a data set, as a folder for `--data_name folder`: to try things, or to tune them.

    python scripts/make_subset.py DST --data_name cifar10 --data DIR --train 5000 --val 5000
    python scripts/make_subset.py DST --data_name cifar10 --data DIR --train 5000 --val 5000 --held-out

DST/val gets images of the validation split; with --held-out it gets other images of the *training* split, on which
settings can be chosen without a look at the validation images. DST/train is the same with and without. Images that are
files are linked, others are written as PNG.
"""

import os
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sogclr import InputError
from sogclr.flags import DATA_SETS, Parser, number
from sogclr.loader import open_data_set
from sogclr.subset import balanced_indices


def first(images, n):
    """The first n images of a fixed class-balanced draw, [n] ascending. Those of a larger n hold those of a smaller."""
    if n > len(images):
        raise InputError(f"--train, --val: {n} images are wanted of a split of {len(images)}, take fewer")
    return balanced_indices(images.targets, 100 * n / len(images), seed=0)


def write(images, indices, folder):
    """folder/<class>/<index>.<ending> for each of the images."""
    for i in indices:
        target = folder / images.classes[images.targets[i]] / f"{i:08d}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if hasattr(images, "path"):
            source = Path(os.fsdecode(images.path(i))).resolve()
            target.with_suffix(source.suffix).symlink_to(source)
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
    part = args.folder.with_name(args.folder.name + ".part")
    try:
        if args.folder.exists():
            raise InputError(f"{args.folder}: exists, name a new folder")
        train = open_data_set(args.data_name, args.data, "train").images
        train_indices = first(train, args.train)
        if args.held_out:
            val, val_indices = train, np.setdiff1d(first(train, args.train + args.val), train_indices)
        else:
            val = open_data_set(args.data_name, args.data, "val").images
            val_indices = first(val, args.val)
    except InputError as error:
        parser.error(str(error))
    shutil.rmtree(part, ignore_errors=True)     # of an earlier call that was cut off
    write(train, train_indices, part / "train")
    write(val, val_indices, part / "val")
    part.rename(args.folder)
    print(f"=> {args.folder}: {len(train_indices)} training images, {len(val_indices)} validation images"
          + " held out of the training split" * args.held_out)


if __name__ == "__main__":
    main()
