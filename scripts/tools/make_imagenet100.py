#!/usr/bin/env python3
"""Build ImageNet-100 (the authors' ImageNet-S) from an ImageNet-1K tree, by links, which take no space.

    python scripts/tools/make_imagenet100.py IMAGENET DST

IMAGENET contains train/<wnid>/ and val/<wnid>/; DST gets the same with the 100 classes of imagenet100_classes.txt.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sogclr.flags import Parser

CLASSES = Path(__file__).with_name("imagenet100_classes.txt").read_text().split()


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("imagenet", type=Path, help="folder that contains train/<wnid>/ and val/<wnid>/")
    parser.add_argument("dst", type=Path, help="folder to create")
    args = parser.parse_args()
    folders = [Path(split, wnid) for split in ("train", "val") for wnid in CLASSES]
    missing = [folder for folder in folders if not (args.imagenet / folder).is_dir()]
    if missing:
        parser.error(f"{args.imagenet}: lacks {len(missing)} of the {len(folders)} folders, the first is {missing[0]}")
    if args.dst.resolve() == args.imagenet.resolve():
        parser.error(f"{args.dst}: is the folder to link to, choose another")
    try:
        for folder in folders:
            link = args.dst / folder
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.is_symlink():
                link.unlink()
            elif link.exists():
                parser.error(f"{link}: exists and is not a link, use an empty folder")
            link.symlink_to((args.imagenet / folder).resolve(), target_is_directory=True)
    except OSError as error:
        parser.error(f"{args.dst}: cannot be written: {error.strerror}")
    print(f"{args.dst}: {len(CLASSES)} classes linked in train and val")


if __name__ == "__main__":
    main()
