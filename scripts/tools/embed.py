#!/usr/bin/env python3
"""Compute the features of all images in a folder, and find each one's nearest neighbors.

    python scripts/tools/embed.py CHECKPOINT DIR OUT.npz [--neighbors NEW]

CHECKPOINT is from train.py or lincls.py, or any other that lincls.py accepts as --pretrained. OUT.npz gets two arrays:
`features`, float32 [n, C], of center crops, and `paths` [n], the files relative to DIR, in the order of their names.
With --neighbors the new folder NEW gets neighbors.tsv, a row per image with its five nearest by cosine similarity, and
neighbors.png, which shows up to 20 of these rows.

Runs on the first visible GPU, else on the CPU, in float32 (TF32 on a GPU). The features stay there until all are
computed: 4 n C bytes, 10 GB for ImageNet-1K and C = 2048, and twice as much with --neighbors.
"""

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sogclr import InputError, checkpoint, printable
from sogclr.augment import Normalize
from sogclr.builder import architecture, encoder_state, load_encoder, memory_format, resnet
from sogclr.checkpoint import new_path
from sogclr.datasets import MEAN_STD, ImageSet, default_image_size, mean_and_std, trained_on
from sogclr.distributed import log
from sogclr.features import Encoder, Numbered, extract
from sogclr.files import ImageFiles
from sogclr.flags import DATA_SETS, Parser, add_loading_flags, number
from sogclr.loader import LabeledBatches, Loader, center_view
from sogclr.meters import clock
from sogclr.report import device_name

NEIGHBORS, CHUNK = 5, 2**26                 # similarities that are computed at a time, 256 MB
ROWS, CELL, GAP = 20, 128, 20               # of the picture: rows, pixels of an image and between rows


class Reporting:
    """An encoder that reports its progress, on a terminal in a live line, otherwise every ten seconds.

    encoder: uint8 [b, 3, H, W] -> float [b, C]; total: the number of images.
    """

    def __init__(self, encoder, total):
        self.encoder, self.total, self.done = encoder, total, 0
        self.start = self.last = time.monotonic()
        self.live = sys.stdout.isatty()

    def __call__(self, images):
        features = self.encoder(images)
        self.done += len(images)
        now = time.monotonic()
        if now - self.last > (0.2 if self.live else 10):
            self.last, speed = now, self.done / (now - self.start)
            log(f"=> {self.done} of {self.total} images, {speed:.1f} images/s, ETA "
                f"{clock((self.total - self.done) / speed)}", live=self.live)
        return features


def nearest(features, count):
    """Each image's `count` nearest others by cosine similarity, the nearest first: similarities and rows, NumPy
    [n, count] each. features: [n, C].
    """
    unit, parts = F.normalize(features), []
    for first, some in enumerate(unit.split(chunk := max(1, CHUNK // len(unit)))):
        similarity = some @ unit.T
        itself = torch.arange(len(some), device=unit.device)
        similarity[itself, first * chunk + itself] = -2.0
        parts.append(similarity.topk(count))
    return tuple(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))


def write_table(file, paths, similarity, rows):
    """Write a line per image: its path, those of its neighbors, and their similarities. What is not printable in a
    name is escaped.
    """
    names, numbers = [printable(path) for path in paths], range(1, rows.shape[1] + 1)
    with open(file, "w", encoding="utf-8") as table:
        print("image", *(f"neighbor_{k}" for k in numbers), *(f"similarity_{k}" for k in numbers), sep="\t", file=table)
        for name, others, values in zip(names, rows.tolist(), similarity.tolist(), strict=True):
            print(name, *(names[row] for row in others), *(f"{value:.4f}" for value in values), sep="\t", file=table)


def contact_sheet(view, paths, similarity, rows):
    """A picture of up to ROWS images, spaced evenly, each followed by its neighbors.

    view: row -> uint8 [3, size, size], as the encoder sees it.
    """
    queries = np.arange(shown := min(ROWS, len(rows))) * len(rows) // shown
    width = CELL + 4
    sheet = Image.new("RGB", (width * (1 + rows.shape[1]) + GAP, shown * (CELL + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for y, query in zip(range(0, sheet.height, CELL + GAP), queries, strict=True):
        captions = [printable(os.path.basename(paths[query]))[-18:], *(f"{value:.3f}" for value in similarity[query])]
        for column, (row, caption) in enumerate(zip([query, *rows[query]], captions, strict=True)):
            x = width * column + GAP * (column > 0)
            image = Image.fromarray(view(row).permute(1, 2, 0).numpy())
            sheet.paste(image.resize((CELL, CELL)), (x, y))
            draw.text((x + 2, y + CELL + 2), caption, "black", font)
    return sheet


@torch.inference_mode()
def embed(args, device, npz, folder):
    """Write the features to the file `npz` and, unless it is None, their neighbors to the new folder `folder`. Returns
    what was done, as text.
    """
    begin = time.monotonic()
    source, loaded = f"CHECKPOINT {args.checkpoint}", checkpoint.load(args.checkpoint, "CHECKPOINT")
    state = encoder_state(loaded, source)
    arch, stem = architecture(state, source)
    name, size = trained_on(loaded)
    if args.data_name:
        name, size = args.data_name, default_image_size(args.data_name)
    images = ImageFiles(args.dir, labels=False, flag="DIR")
    data = ImageSet(Numbered(images), args.image_size or size, *mean_and_std(name))

    network = resnet(arch, stem)
    load_encoder(network, state, source)
    network.fc = nn.Identity()
    network.to(memory_format=memory_format(device, torch.float32))
    encoder = Encoder(network, Normalize(data.mean, data.std), torch.float32).to(device).eval()
    log(f"=> {arch} with {stem} stem, on {device_name(device)}: {len(images)} images of {data.image_size} pixels, "
        f"normalized as {name if name in MEAN_STD else 'ImageNet'}")
    if name is None:
        log("=> note: ImageNet's normalization is assumed, the checkpoint records none; for others pass --data_name")

    loader = Loader(LabeledBatches(data, bad_images=args.bad_images), args.batch_size, args.workers, device)
    features, index = extract(Reporting(encoder, len(images)), loader, torch.float32)
    index = index.tolist()
    paths = [os.path.relpath(os.fsdecode(images.path(i)), args.dir) for i in index]
    with open(npz, "wb") as file:       # np.savez would append .npz to another name
        np.savez(file, features=features.cpu().numpy(), paths=np.array(paths))
    if folder:
        neighbors = nearest(features, min(NEIGHBORS, len(features) - 1))
        folder.mkdir()
        write_table(folder / "neighbors.tsv", paths, *neighbors)
        contact_sheet(lambda row: center_view(images[index[row]][0], data.image_size), paths, *neighbors).save(
            folder / "neighbors.png")
    return f"{features.shape[1]} features of {len(paths)} images, in {time.monotonic() - begin:.1f} s"


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file from train.py, or any that lincls.py accepts")
    parser.add_argument("dir", metavar="DIR", help="folder of images at any depth")
    parser.add_argument("out", metavar="OUT.npz", type=Path, help="file to create")
    parser.add_argument("--neighbors", metavar="NEW", type=Path,
                        help="also write a table and a picture of nearest neighbors to this new folder")
    parser.add_argument("--data_name", choices=DATA_SETS,
                        help="the data set whose normalization and image size to use (default: that which the "
                             "checkpoint records, imagenet1000 if it records none)")
    parser.add_argument("--image-size", type=number(int, "[8, inf)"), metavar="PIXELS",
                        help="size of the square center crops (default: that of --data_name, or which the checkpoint "
                             "records, 224 if it records none)")
    parser.add_argument("-b", "--batch-size", default=256, type=number(int, "[1, inf)"), metavar="N",
                        help="images encoded at a time")
    add_loading_flags(parser)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.neighbors and args.neighbors.absolute() == args.out.absolute():
        parser.error(f"--neighbors {args.neighbors}: is OUT.npz, too, choose another name")
    try:
        with (new_path(args.out, "OUT.npz") as npz,
              new_path(args.neighbors, "--neighbors") if args.neighbors else nullcontext() as folder):
            done = embed(args, device, npz, folder)
        log(f"=> {args.out}: {done}" + f", neighbors in {args.neighbors}" * bool(args.neighbors))
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
