"""What to watch during pretraining: scalars, histograms and pictures for TensorBoard, and the encoder's evaluation.

All of it leaves the run as it is.
"""

import copy
import math

import torch
from torchvision.utils import make_grid

from sogclr.augment import Normalize
from sogclr.features import Encoder, effective_rank, sample
from sogclr.isogclr import RobustGlobalContrastiveLoss
from sogclr.knn import evaluate_knn
from sogclr.loader import LabeledBatches, Loader
from sogclr.loss import GlobalContrastiveLoss


class FeatureMonitor:
    """The effective rank of an encoder's features, for --rank-freq, and their kNN accuracy, for --knn-freq.

    train: the `ImageSet` in training, whose labels are not used; labeled: those of training and validation images, bank
    and queries of kNN, or None; args: the script's. All views are center crops.
    Evaluates a copy of the encoder and leaves torch's generator unchanged, so that the run stays the same.
    """

    def __init__(self, train, labeled, args, device, dtype):
        self.sample, *self.bank_and_queries = (
            Loader(LabeledBatches(data, bad_images=args.bad_images), args.batch_size, args.workers, device)
            for data in (sample(train), *(labeled or ())))
        self.num_classes = len(labeled[0].images.classes) if labeled else None
        self.normalize, self.dtype = Normalize(train.mean, train.std).to(device), dtype
        self.rank_freq, self.knn_freq, self.epochs = args.rank_freq, args.knn_freq, args.epochs

    @torch.inference_mode()
    def __call__(self, encoder, epoch):
        """What is due after an epoch, {"effective_rank": number, "kNN-20": percent, ...}, the same on every rank.

        The effective rank is part of every kNN report, and of the last epoch's.
        """
        done = epoch + 1
        knn_is_due = self.knn_freq and (done % self.knn_freq == 0 or done == self.epochs)
        if not (knn_is_due or done == self.epochs or (self.rank_freq and done % self.rank_freq == 0)):
            return {}
        frozen = copy.deepcopy(encoder).eval()
        frozen.fc = torch.nn.Identity()
        with torch.random.fork_rng(devices=[]):     # a loader draws its workers' seeds from it
            encode = Encoder(frozen, self.normalize, self.dtype)
            measured = {"effective_rank": effective_rank(encode, self.sample)}
            if knn_is_due:
                accuracies = evaluate_knn(encode, *self.bank_and_queries, self.num_classes)
                measured |= {f"kNN-{k}": acc1 for k, acc1 in accuracies.items()}
        return measured


def watched(criterion, losses, gcl, lr, progress):
    """The scalars logged to TensorBoard for a step, {name: value}."""
    alignment, uniformity = alignment_and_uniformity(criterion.keys)
    values = {"loss/loss": losses.value, "loss/gcl": gcl.value, "features/alignment": alignment,
              "features/uniformity": uniformity, "run/learning rate": lr,
              "run/images per second": progress.images_per_second}
    if isinstance(criterion, GlobalContrastiveLoss):
        values["run/gamma"] = criterion.gamma
    if isinstance(criterion, RobustGlobalContrastiveLoss):
        values["tau/mean"] = criterion.batch_tau.mean()
    if criterion.keys.is_cuda:
        values["run/GPU memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return values


@torch.no_grad()
def alignment_and_uniformity(keys):
    """How close the two views of an image are, and how evenly the images are spread (Wang and Isola, arXiv 2005.10242).

    keys: [2B, D] unit rows, views a before views b (`criterion.keys`). Returns two 0-d tensors:
    mean |z_i^a - z_i^b|^2, and log mean exp(-2 |z_i - z_j|^2) over pairs of different images, averaged over the views.
    """
    Z1, Z2 = keys.chunk(2)
    B, uniformity = len(Z1), 0
    for Z in (Z1, Z2):
        potential = (4 * (Z @ Z.T) - 4).fill_diagonal_(-math.inf)       # -2 |x - y|^2 of unit vectors
        uniformity = uniformity + (potential.flatten().logsumexp(0) - math.log(B * (B - 1))) / 2
    return (2 - 2 * (Z1 * Z2).sum(1)).mean(), uniformity


def side_by_side(augment, images1, images2):
    """The two views of the first images side by side, as one picture [3, H, W] in [0, 1]."""
    pairs = torch.stack([images1[:32], images2[:32]], 1).flatten(0, 1)
    return make_grid(augment.normalize.undo(pairs))


def show_histograms(events, criterion, steps, at):
    """Log histograms of the moving averages u, of their ages, and of the temperatures if each image has its own.

    Only of images visited so far. steps: per epoch; at: the total so far.
    """
    if events.writer and isinstance(criterion, GlobalContrastiveLoss):
        visited = criterion.log_u.isfinite()
        events.write("add_histogram", "u/log u", criterion.log_u[visited], at)
        events.write("add_histogram", "u/age in epochs", criterion.age / steps, at)
        if isinstance(criterion, RobustGlobalContrastiveLoss):
            events.write("add_histogram", "tau/tau", criterion.tau[visited], at)


def show_extremes(events, criterion, data, at):
    """Log two rows of pictures if each image has its own temperature: those with the largest and with the smallest.

    data: the `ImageSet` in training; at: total steps.
    """
    if events.writer and isinstance(criterion, RobustGlobalContrastiveLoss):
        visited = criterion.log_u.isfinite().nonzero().flatten()
        order = visited[criterion.tau[visited].argsort(stable=True)].tolist()
        per_row = min(len(order) // 2, 16)
        batches = LabeledBatches(data, bad_images="skip")       # without those that can no longer be read
        for name, row in (("largest", order[::-1][:per_row]), ("smallest", order[:per_row])):
            if len(pictures := batches.make(0, row, ()).content[0]):
                events.write("add_image", f"tau/{name}", make_grid(pictures, nrow=per_row), at)
