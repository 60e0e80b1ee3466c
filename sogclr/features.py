"""Features of a data set's images, all at once or batch by batch."""

import dataclasses

import numpy as np
import torch
import torch.nn as nn

from sogclr import InputError, one_line
from sogclr.distributed import all_reduce_sum, gather, world_size
from sogclr.loader import EpochSampler
from sogclr.subset import Subset

RANK_IMAGES = 25_600    # for the effective rank, as in the paper


class Encoder(nn.Module):
    """A normalizing encoder: uint8 [b, 3, H, W] -> features, float32 [b, C].

    resnet: a torchvision ResNet whose `fc` is the identity; normalize: uint8 images -> its input;
    dtype: to compute in, float32 or that of autocast.
    """

    def __init__(self, resnet, normalize, dtype):
        super().__init__()
        self.resnet, self.normalize, self.dtype = resnet, normalize, dtype

    def forward(self, images):
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.resnet(self.normalize(images)).float()


def extract(encode, loader, dtype, on_all_ranks=False):
    """Features [n, C] in `dtype` and labels [n] int64 of a loader's images, each once, on its device: this rank's part
    or, with on_all_ranks, all of them in the loader's order.

    encode: uint8 [b, 3, H, W] -> float [b, C], the frozen encoder with its normalization, without gradients;
    loader: a `Loader` of `LabeledBatches`. Images skipped by `--bad-images skip` are missing.
    Holds one copy of the features: 2 n C bytes in half precision, 5.2 GB for ImageNet-1K and C = 2048.
    """
    batch_size, features, n = loader.sampler.batch_size, None, 0
    rows = len(loader) * (batch_size if on_all_ranks else -(-batch_size // world_size()))      # at most
    labels = torch.empty(rows, dtype=torch.int64, device=loader.device)
    for images, target in loader.epoch(0):
        output, target = encode(images).to(dtype), target.to(loader.device, non_blocking=True)
        if on_all_ranks:
            output, target = gather(output), gather(target)
        if features is None:
            features = output.new_empty(rows, output.shape[1])
        features[n:n + len(output)], labels[n:n + len(output)] = output, target
        n += len(output)
    return features[:n], labels[:n]


class Numbered:
    """`numbered[i] -> (PIL image, i)`: a data set with each image's index for its label."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i][0], i


def sample(data):
    """An `ImageSet` of at most RANK_IMAGES evenly spaced images of another one, which may be sorted by class."""
    total = len(data.images)
    n = min(total, RANK_IMAGES)
    return dataclasses.replace(data, images=Subset(data.images, np.arange(n) * total // n))


def effective_rank(encode, loader):
    """RankMe (Garrido et al., ICML 2023, arXiv 2210.02885) of a loader's images, the same on every rank: exp of the
    entropy of the features' singular values, divided by their sum. Needs no labels.

    encode: uint8 [b, 3, H, W] -> float [b, C], without gradients. From 1, if all features are multiples of one
    vector, to C, if all directions are equally strong; nan if a feature is not finite or all are 0.
    """
    gram = 0
    for images, _ in loader.epoch(0):
        features = encode(images).double()
        gram = gram + features.T @ features                                     # [C, C]
    if not all_reduce_sum(gram).isfinite().all():
        return float("nan")
    squares = torch.linalg.eigvalsh(gram)
    squares[squares < len(gram) * torch.finfo(gram.dtype).eps * squares[-1]] = 0        # only rounding
    singular_values = squares.sqrt()
    return torch.special.entr(singular_values / singular_values.sum()).sum().exp().item()


class FreshFeatures:
    """Batches (features float32 [b, C], labels [b]) of a loader's images, encoded on the fly.

    encode: uint8 [b, 3, H, W] -> float32 [b, C], under inference_mode; loader: a `Loader` of `LabeledBatches`.
    """

    def __init__(self, encode, loader):
        self.encode, self.loader, self.num_images = encode, loader, loader.num_images

    def __len__(self):
        return len(self.loader)

    def epoch(self, epoch, first_step=0):
        for images, labels in self.loader.epoch(epoch, first_step):
            yield self.encode(images).clone(), labels       # inference tensors cannot be saved for backward


class CachedFeatures:
    """Batches (features float32 [b, C], labels [b]) of a loader's images, encoded only once.

    encode, loader: as for `extract`; order: `EpochSampler`'s seed, shuffle, drop_last, for the batches.
    Every rank holds all features on its device, in half precision. Raises InputError if one exceeds its range, or if
    they do not fit on a GPU.
    """

    def __init__(self, encode, loader, **order):
        try:
            self.features, self.labels = extract(encode, loader, torch.float16, on_all_ranks=True)
        except torch.OutOfMemoryError as error:
            raise InputError("--features cached: the features of all images do not fit in GPU memory, leave the flag "
                             f"out ({one_line(error)})") from error
        self.num_images = len(self.labels)
        self.sampler = EpochSampler(self.num_images, loader.sampler.batch_size, **order)
        if not torch.stack(self.features.aminmax()).isfinite().all():
            raise InputError("--features cached: a feature is not finite or above 65504, the largest half-precision "
                             "number, leave the flag out")

    def __len__(self):
        return len(self.sampler)

    def epoch(self, epoch, first_step=0):
        self.sampler.epoch, self.sampler.first_step = epoch, first_step
        for _, indices, _ in self.sampler:
            indices = torch.tensor(indices, dtype=torch.int64).to(self.labels.device, non_blocking=True)
            yield self.features[indices].float(), self.labels[indices]
