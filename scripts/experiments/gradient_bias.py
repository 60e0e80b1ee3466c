#!/usr/bin/env python3
"""Measure how far a small batch's gradient points away from the global loss's, for a fixed pretrained network.

    python scripts/experiments/gradient_bias.py CHECKPOINT [--batch-sizes 16 64 256] [--t 0.1] [--gamma 1 0.9 0.2]

CHECKPOINT is from train.py; two views of some of its images represent the data set. The network is held fixed, with
BatchNorm's running statistics, so that a projection depends only on its own image. The gradient of the global loss, in
which the views of all other images are the negatives, is then known exactly. It is compared with the gradients of
SimCLR, DCL (SogCLR with gamma 1, without moving averages) and SogCLR when the same views are repeatedly split into
batches at random:

    bias   the angle between their mean and the global gradient, in degrees: what more batches do not average out
    noise  how far a single one is from that mean, in units of the mean's length

All gradients are with respect to the projections of all images. SogCLR's u come from earlier visits, with other views
and in other batches, as in training; but since the network does not change, they are not stale. At a low temperature
few views dominate a score, so the angles then depend on the number of images.

The last row is about the network instead: the mean of the negatives' score g among the images of a batch that BatchNorm
normalizes by the batch's own statistics, as in training, as a fraction of its mean among all of them. Below the table
are the global loss itself, GCL, and, for a checkpoint of SogCLR, how well its u agree with the scores among all images.
"""

import copy
import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sogclr import InputError, checkpoint
from sogclr.augment import Augment, pil_recipe
from sogclr.builder import SimCLR, memory_format, resnet
from sogclr.datasets import open_data_set
from sogclr.flags import Parser, number, resolve_precision
from sogclr.loader import Loader, TwoViewBatches
from sogclr.loss import ContrastiveLoss, GlobalContrastiveLoss
from sogclr.subset import Subset

SETTINGS = ("data_name", "data", "image_size", "crop_min", "bad_images", "augment", "seed", "precision", "arch", "stem",
            "dim", "mlp_dim", "num_proj_layers", "loss_type", "t")


class Network:
    """A checkpoint's network, and some of its images as training would see them next.

    saved: the checkpoint. Raises InputError if it is not from train.py, or if the images are not those that it was
    trained on.
    """

    def __init__(self, args, saved, device):
        settings, source = saved["settings"], f"CHECKPOINT {args.checkpoint}"
        if not isinstance(settings, dict) or any(name not in settings for name in SETTINGS):
            raise InputError(f"{source}: does not record how it was trained, use one from this repository's train.py")
        self.settings, self.device, self.workers, self.epoch = settings, device, args.workers, saved["epoch"]
        name, folder = settings["data_name"], args.data or settings["data"]
        data = open_data_set(name, folder, "train", settings["image_size"], labels=name != "folder")
        checkpoint.require_same_images(settings, {"images": data.fingerprint}, source)
        count = min(args.images, len(data.images))
        for size in args.batch_sizes:
            if size > count:
                raise InputError(f"--batch-sizes {size}: only {count} images are used, pass smaller ones")
        chosen = np.random.default_rng(0).permutation(len(data.images))[:count]
        chosen.sort()
        data.images = Subset(data.images, chosen)
        self.log_u = saved["log_u"][chosen] if settings["loss_type"] == "dcl" and "log_u" in saved else None

        recipe = pil_recipe(data, settings["crop_min"]) if settings["augment"] == "pil" else None
        self.views = TwoViewBatches(data, settings["seed"], settings["crop_min"], Augment.num_uniforms,
                                    settings["bad_images"], recipe)
        _, self.dtype = resolve_precision(settings["precision"], device)
        layout = memory_format(device, self.dtype)
        self.augment = Augment(data.mean, data.std, data.blur, self.dtype, layout).to(device)
        self.model = SimCLR(resnet(settings["arch"], settings["stem"]), settings["dim"], settings["mlp_dim"],
                            settings["num_proj_layers"])
        try:
            self.model.load_state_dict(checkpoint.plain_names(saved["state_dict"]))
        except RuntimeError as error:
            raise InputError(f"{source}: its weights do not match its --arch {settings['arch']}") from error
        self.model.to(device, memory_format=layout).eval()

    @torch.no_grad()
    def project(self, visit, batch_size, batch_statistics=False):
        """[N, 2, D] the unit projections of the two views that each image has at a visit.

        visit: its number, from 0. batch_statistics: BatchNorm normalizes each batch by its own, and batches are random,
        without an incomplete last one.
        """
        loader = Loader(self.views, batch_size, self.workers, self.device, seed=self.settings["seed"],
                        shuffle=batch_statistics, drop_last=batch_statistics)
        model = copy.deepcopy(self.model).train(batch_statistics)       # whose running statistics would change
        z, index = [], []
        for crops, uniforms, batch in loader.epoch(self.epoch + visit):
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                z.append(torch.stack(model(*self.augment(crops, uniforms)), dim=1).float())
            index.append(batch)
        print(f"=> visit {visit} of {len(self.views)} images", file=sys.stderr)
        index = torch.cat(index)
        if len(index.unique()) < len(index):
            raise InputError("--data: an unreadable image was replaced by another, remove it")
        return F.normalize(torch.cat(z), dim=2)


def gradient(criterion, z, index):
    """[n, 2, D] gradient of the loss of z [n, 2, D] as one batch, summed over its images, with respect to z."""
    z = z.detach().requires_grad_()
    criterion(*z.unbind(1), index).backward()
    return z.grad * len(z)


def batches(n, batch_size, generator):
    """A random split of n images into batches: for each, its indices [batch_size], and how many of them, the first, are
    new. An incomplete last batch is filled with images of earlier ones.
    """
    order = torch.randperm(n, generator=generator)
    for start in range(0, n, batch_size):
        rows = order[start:start + batch_size]
        yield torch.cat([rows, order[:batch_size - len(rows)]]), len(rows)


def measure(make_criterion, earlier, z, batch_size, truth, passes, generator):
    """`bias_and_noise` of a loss on z [N, 2, D] in batches of batch_size.

    make_criterion: creates a new loss for each pass, which first sees the `earlier` visits, a list of [N, 2, D];
    truth: [N, 2, D].
    """
    gradients = torch.empty(passes, *z.shape, device=z.device)
    for one in gradients:
        criterion = make_criterion()
        for visit in earlier:
            for rows, _ in batches(len(z), batch_size, generator):
                criterion(*visit[rows].unbind(1), rows)
        for rows, new in batches(len(z), batch_size, generator):
            one[rows[:new]] = gradient(criterion, z[rows], rows)[:new]
    return bias_and_noise(gradients.flatten(1), truth.flatten())


def bias_and_noise(gradients, truth):
    """(bias in degrees, its standard error, noise in units of the mean's length), see above.

    gradients: [passes, n]; truth: [n]. For the bias only products of different passes count, since they share no noise.
    Its standard error is a jackknife over the passes.
    """
    passes, pairs = len(gradients), len(gradients) * (len(gradients) - 1)
    scale = (gradients.mean(0) @ truth / (truth @ truth)).double()
    astray = gradients - scale.to(truth) * truth
    products = (astray @ astray.T).double().fill_diagonal_(0)                   # [passes, passes]
    length = scale * truth.norm()                                               # of the mean, along the truth

    def degrees(square):
        """Negative if residual noise makes the square negative."""
        return torch.rad2deg(torch.atan2(square.abs().sqrt(), length)) * square.sign()

    square = products.sum() / pairs                                             # of the mean, across the truth
    without = degrees((products.sum() - 2 * products.sum(1)) / (pairs - 2 * (passes - 1)))      # leaving out each pass
    error = (without.var(correction=0) * (passes - 1)).sqrt()
    noise = (gradients.square().sum(1).mean() / (square + length**2) - 1).clamp_min(0).sqrt()
    return degrees(square).clamp_min(0).item(), error.item(), noise.item()


def log_scores(z, t):
    """[n] the log of g of each image, a mean over its two views, of z [n, 2, D] as one batch."""
    criterion = GlobalContrastiveLoss(len(z), t, gamma=1.0).to(z.device)
    criterion(*z.unbind(1), torch.arange(len(z)))
    return criterion.log_u      # after the first visit


def log_mean_score(z, t):
    """The log of the mean of g over the images of z [n, 2, D] as one batch."""
    return log_scores(z, t).logsumexp(0) - math.log(len(z))


def agreement(log_u, z, t):
    """A line on how well u agrees with g among all images.

    log_u: [N], of images never visited -inf; z: [N, 2, D] projections; t: the temperature of u.
    """
    logs = torch.stack([log_u.to(z), log_scores(z, t)])[:, log_u.isfinite()]
    correlation, (of_u, of_g), ratio = torch.corrcoef(logs)[0, 1], logs.std(1), (logs[0] - logs[1]).mean().exp()
    return (f"u of the checkpoint, and g, at --t {t:g}: correlation of the logarithms {correlation:.2f}, their "
            f"standard deviations {of_u:.2f} and {of_g:.2f}, geometric mean of u / g {ratio:.2f}")


def table(args, network):
    """Yield the table's lines as they are measured."""
    *earlier, z = (network.project(visit, max(args.batch_sizes)) for visit in range(args.visits))
    by_batch = [network.project(0, size, batch_statistics=True) for size in args.batch_sizes]
    N, generator, errors, gcl = len(z), torch.Generator().manual_seed(0), [], []

    def row(name, t, gamma, cells):
        return f"| {name} | {t:g} | {gamma} | " + " | ".join(cells) + " |"

    def cell(make_criterion, visits, size, truth):
        bias, error, noise = measure(make_criterion, visits, z, size, truth, args.passes, generator)
        errors.append(error)
        return f"{bias:.1f}°, {noise:.2f}"

    yield "| loss | `--t` | `--gamma` | " + " | ".join(f"batch {size}" for size in args.batch_sizes) + " |"
    yield "|---" * (3 + len(args.batch_sizes)) + "|"
    for t in args.t or [network.settings["t"]]:
        def sogclr(gamma, t=t):
            return GlobalContrastiveLoss(N, t, gamma).to(z.device)

        whole = sogclr(1.0)
        truth = gradient(whole, z, torch.arange(N))
        gcl.append(f"{whole.gcl():.4f} at --t {t:g}")
        yield row("SimCLR", t, "", [cell(lambda t=t: ContrastiveLoss(t), [], size, truth) for size in args.batch_sizes])
        for gamma in args.gamma:
            visits = earlier if gamma < 1 else []       # with gamma 1, u keeps nothing of them
            yield row("SogCLR" if gamma < 1 else "DCL", t, f"{gamma:g}", [
                cell(functools.partial(sogclr, gamma), visits, size, truth) for size in args.batch_sizes])
        scores = (torch.stack([log_mean_score(batch, t) for batch in ours.split(size)]).sub_(log_mean_score(ours, t))
                  .exp_().mean() for ours, size in zip(by_batch, args.batch_sizes, strict=True))
        yield row("g within a batch / among all", t, "", [f"{score:.2f}" for score in scores])
    yield ""
    yield f"GCL, with all {N} images: {', '.join(gcl)}"
    if network.log_u is not None:
        yield agreement(network.log_u, z, network.settings["t"])
    yield (f"{N} images, {args.visits} visits, {args.passes} passes; standard errors of the angles: at most "
           f"{max(errors):.2f}°")


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file from train.py")
    parser.add_argument("--data", metavar="DIR", help="where its images are now (default: where they were)")
    parser.add_argument("--batch-sizes", nargs="+", default=[16, 64, 256], type=number(int, "[2, inf)"), metavar="N",
                        help="batch sizes to compare")
    parser.add_argument("--t", nargs="+", type=number(float, "(0, inf)"), metavar="T",
                        help="temperatures (default: the checkpoint's)")
    parser.add_argument("--gamma", nargs="+", default=[1.0, 0.9, 0.5, 0.2], type=number(float, "(0, 1]"),
                        metavar="G", help="gammas of the moving averages; 1 is without any")
    parser.add_argument("--images", default=5000, type=number(int, "[2, inf)"), metavar="N",
                        help="number of the checkpoint's images, chosen at random, that represent all; memory grows "
                             "quadratically")
    parser.add_argument("--visits", default=12, type=number(int, "[2, inf)"), metavar="N",
                        help="visits per image; all but the last build u")
    parser.add_argument("--passes", default=20, type=number(int, "[3, inf)"), metavar="N",
                        help="random splits of the last visit's views into batches")
    parser.add_argument("-j", "--workers", default=8, type=number(int, "[0, inf)"), metavar="N",
                        help="data loading processes, at most one per core")
    args = parser.parse_args()
    try:
        saved = checkpoint.load(args.checkpoint, "CHECKPOINT", ("epoch", "state_dict", "settings"))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for line in table(args, Network(args, saved, device)):
            print(line, flush=True)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
