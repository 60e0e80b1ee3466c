#!/usr/bin/env python3
"""How far a small batch's gradient points away from the global loss's, in a pretrained network as it stands.

    python scripts/gradient_bias.py CHECKPOINT [--batch-sizes 16 64 256] [--t 0.1] [--gamma 1 0.9 0.2]

CHECKPOINT is of train.py; some of its images stand for the data set, and its network is held fixed. For a view of each
of them the gradient of the global loss, in which every other image is a negative, is known exactly. Beside it stand the
gradients of SimCLR and of SogCLR when the same views are cut into batches, at random, again and again:

    bias   the angle between their mean and the global gradient, in degrees: what no number of steps averages out
    noise  how far a single one is from that mean, in units of the mean's length

All gradients are those with respect to the projections of all images. SogCLR's u come from earlier visits, with other
views and in other batches, as in training; but since the network does not move, they are not out of date. What that
adds shows in the row with the u of the checkpoint, if it is SogCLR's.
"""

import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sogclr import InputError, checkpoint
from sogclr.augment import Augment
from sogclr.builder import SimCLR, memory_format, resnet
from sogclr.flags import Parser, number, resolve_precision
from sogclr.loader import EpochSampler, Loader, TwoViews, fingerprint, open_data_set
from sogclr.loss import ContrastiveLoss, GlobalContrastiveLoss, gamma_at
from sogclr.subset import Subset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def visits(args, saved):
    """What training would see of some of its images next, were its network to stay as it is.

    saved: the checkpoint. Returns which images [N] of the data set were taken, and for each of `args.visits` epochs
    which of those [n] stood in whole batches and their two views' projections [n, 2, D], of length 1.
    """
    settings = saved["settings"]
    if "loss_type" not in settings:
        raise InputError(f"CHECKPOINT {args.checkpoint}: is of lincls.py, give one of train.py")
    name = settings["data_name"]
    data = open_data_set(name, args.data or settings["data"], "train", settings["image_size"], labels=name != "folder")
    checkpoint.require_same_images(settings, {"images": fingerprint(data.images)}, f"CHECKPOINT {args.checkpoint}")
    count, batch = min(args.images, len(data.images)), settings["batch_size"]
    for flag, size in ("--images", batch), ("--batch-sizes", max(args.batch_sizes)):
        if size > count // batch * batch:
            raise InputError(f"{flag}: batches of {size} do not fit {count} images in whole batches of {batch}, as the "
                             "checkpoint's were")
    rng = np.random.default_rng(0)
    images = np.sort(rng.permutation(len(data.images))[:count])
    data.images = Subset(data.images, images)

    _, dtype = resolve_precision(settings["precision"], DEVICE)
    layout = memory_format(DEVICE, dtype)
    model = SimCLR(resnet(settings["arch"], settings["stem"]), settings["dim"], settings["mlp_dim"],
                   settings["num_proj_layers"])
    model.load_state_dict(checkpoint.without_module(saved["state_dict"]))
    model.to(DEVICE, memory_format=layout).train()      # BatchNorm as in training: by the batch
    views = TwoViews(data, settings["seed"], settings["crop_min"], Augment.num_draws, settings["bad_images"])
    order = EpochSampler(count, batch, settings["seed"], shuffle=True, drop_last=True)
    loader = Loader(views, order, args.workers, DEVICE,
                    Augment(data.mean, data.std, data.blur, dtype, layout).to(DEVICE))
    seen = []
    for epoch in range(saved["epoch"], saved["epoch"] + args.visits):
        index, z = [], []
        for view1, view2, batch_index in loader.epoch(epoch):
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                z.append(torch.stack(model(view1, view2), dim=1).float())
            index.append(batch_index)
        seen.append((torch.cat(index), F.normalize(torch.cat(z), dim=2)))
        print(f"=> {len(seen)} of {args.visits} visits", file=sys.stderr)
    return images, seen


def gradient(criterion, z, index):
    """[n, 2, D] of the loss of z [n, 2, D] as one batch, summed over its images, with respect to z."""
    z = z.detach().requires_grad_()
    criterion(*z.unbind(1), index).backward()
    return z.grad * len(z)


def batches(n, batch_size, generator):
    """A random cut of n images into whole batches, as indices [batch_size] each; what is left over is left out."""
    order = torch.randperm(n, generator=generator)
    return order[:n // batch_size * batch_size].split(batch_size)


class Passes:
    """The gradients [n, 2, D] of several passes over the same views, each cut into batches in another way.

    Two sums are kept, of every other pass: their product has no part of the noise, which each of them has of its own.
    """

    def __init__(self):
        self.sums, self.counts, self.squares = [0, 0], [0, 0], 0
        self.passes = 0

    def add(self, gradients, present):
        """gradients [n, 2, D], 0 where an image was left out; present [n]: 1 where it was not, else 0."""
        half = self.passes % 2
        self.sums[half] = self.sums[half] + gradients
        self.counts[half] = self.counts[half] + present
        self.squares += gradients.square().sum().item()
        self.passes += 1

    def against(self, truth):
        """(bias in degrees, noise in units of the mean's length), see above. truth: [n, 2, D]."""
        first, second = (total / count.clamp_min(1)[:, None, None]
                         for total, count in zip(self.sums, self.counts, strict=True))
        scale = ((first + second) / 2 * truth).sum() / truth.square().sum()
        astray = ((first - scale * truth) * (second - scale * truth)).sum().clamp_min(0).sqrt()
        mean_square = self.squares * len(truth) / (self.counts[0] + self.counts[1]).sum().item()
        square_of_mean = (first * second).sum().clamp_min(torch.finfo(first.dtype).tiny).item()
        noise = math.sqrt(max(mean_square / square_of_mean - 1, 0))
        return math.degrees(math.atan2(astray, scale * truth.norm())), noise


def measure(criterion, visit, batch_size, truth, passes, generator):
    """(bias, noise) of a loss on a visit's views in batches of a size; each pass starts with the u that it has."""
    (index, z), gradients = visit, Passes()
    start = copy.deepcopy(criterion.state_dict())
    for _ in range(passes):
        criterion.load_state_dict(start)
        one, present = torch.zeros_like(z), torch.zeros(len(z), device=z.device)
        for rows in batches(len(z), batch_size, generator):
            one[rows], present[rows] = gradient(criterion, z[rows], index[rows]), 1
        gradients.add(one, present)
    return gradients.against(truth)


def follow(criterion, seen, batch_size, generator):
    """Let SogCLR's loss make its u out of visits, in batches of a size. Returns it."""
    for index, z in seen:
        for rows in batches(len(z), batch_size, generator):
            criterion(*z[rows].unbind(1), index[rows])
    return criterion


def table(args, saved, images, seen):
    """The lines of the table, as they are measured. saved: the checkpoint; images, seen: as `visits` returned them."""
    settings, (*earlier, last), n = saved["settings"], seen, len(seen[-1][0])
    generator = torch.Generator().manual_seed(0)

    def sogclr(t, gamma):
        return GlobalContrastiveLoss(len(images), t, gamma).to(DEVICE)

    yield "| loss | `--t` | `--gamma` | " + " | ".join(f"batch {size}" for size in args.batch_sizes) + " |"
    yield "|---" * (3 + len(args.batch_sizes)) + "|"
    for t in args.t or [settings["t"]]:
        truth = gradient(GlobalContrastiveLoss(n, t, gamma=1.0).to(DEVICE), last[1], torch.arange(n))

        def row(name, gamma, criteria, t=t, truth=truth):
            """criteria: the loss at each of the batch sizes, None where there is none."""
            cells = ("{:.1f}°, {:.2f}".format(*measure(criterion, last, size, truth, args.passes, generator))
                     if criterion else "" for criterion, size in zip(criteria, args.batch_sizes, strict=True))
            return f"| {name} | {t:g} | {gamma} | " + " | ".join(cells) + " |"

        yield row("SimCLR", "", [ContrastiveLoss(t) for _ in args.batch_sizes])
        for gamma in args.gamma:
            criteria = [follow(sogclr(t, gamma), earlier, size, generator) for size in args.batch_sizes]
            yield row("SogCLR", gamma, criteria)
        if (settings["loss_type"], settings["t"]) == ("dcl", t) and settings["batch_size"] in args.batch_sizes:
            gamma = settings["gamma"]
            if settings["gamma_schedule"] == "cosine":
                gamma = gamma_at(saved["epoch"], gamma, settings["gamma_decay_epochs"])
            trained = sogclr(t, gamma)
            trained.u = saved["u"].flatten()[images]
            yield row("SogCLR, u of the checkpoint", gamma,
                      [trained if size == settings["batch_size"] else None for size in args.batch_sizes])


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file of train.py")
    parser.add_argument("--data", metavar="DIR", help="where its images lie now (default: where they lay)")
    parser.add_argument("--batch-sizes", nargs="+", default=[16, 64, 256], type=number(int, "[2, inf)"), metavar="N",
                        help="batches to compare")
    parser.add_argument("--t", nargs="+", type=number(float, "(0, inf)"), metavar="T",
                        help="temperatures (default: the checkpoint's)")
    parser.add_argument("--gamma", nargs="+", default=[1.0, 0.9, 0.5, 0.2], type=number(float, "(0, 1]"),
                        help="of the moving averages; 1 is without any")
    parser.add_argument("--images", default=5000, type=number(int, "[2, inf)"), metavar="N",
                        help="how many of the checkpoint's images stand for all, drawn at random; memory grows with "
                             "the square, 5000 take 0.3 GB")
    parser.add_argument("--visits", default=12, type=number(int, "[1, inf)"), metavar="N",
                        help="of each image; all but the last make u")
    parser.add_argument("--passes", default=20, type=number(int, "[2, inf)"), metavar="N",
                        help="ways to cut the last visit's views into batches")
    parser.add_argument("-j", "--workers", default=8, type=number(int, "[0, inf)"), metavar="N",
                        help="data loading processes, at most one a core")
    args = parser.parse_args()
    try:
        saved = checkpoint.load(args.checkpoint, "CHECKPOINT", ("epoch", "state_dict", "settings"))
        images, seen = visits(args, saved)
        for line in table(args, saved, images, seen):
            print(line, flush=True)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
