"""Data sets by name, the two views of an image, and the order in which images are seen.

The worker processes read and decode an image once and cut its crops as uint8; colour is done in whole batches on the
device (`sogclr.augment`). What is drawn for image i in epoch e depends on (seed, e, i) alone: neither on the number of
workers nor on the number of ranks.
"""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from sogclr import InputError
from sogclr.distributed import barrier, local_rank, rank, ranks_here, world_size
from sogclr.shapes import Shapes

IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
SHAPES_MEAN_STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

# What the random numbers are for. Each generator is seeded by (seed, purpose, epoch, image).
_ORDER, _VIEWS = 0, 1


@dataclasses.dataclass
class ImageSet:
    """A data set and what is known about it. `images[i]` is `(PIL image, label)`, as in torchvision."""

    images: object
    image_size: int
    mean: tuple
    std: tuple

    @property
    def blur(self):
        """The authors blur, but not at CIFAR's 32 pixels."""
        return self.image_size > 32


def open_data_set(name, folder, split, image_size=None, labels=True):
    """The data set called `name` (see `--data_name`).

    folder: where it lies, `data/<name>` if None; split: "train" or "val"; image_size: of the crops, None for the
    data set's own; labels: whether classes are needed. Raises InputError where images are missing.
    """
    folder = Path(folder or Path("data") / name)
    native = 32 if name in ("cifar10", "cifar100", "shapes") else 224
    mean_std = {"cifar10": CIFAR10_MEAN_STD, "cifar100": CIFAR100_MEAN_STD, "shapes": SHAPES_MEAN_STD}
    if name == "shapes":
        images = Shapes(split)
    elif name in ("cifar10", "cifar100"):
        images = _cifar(name, folder, split)
    else:
        images = _image_folder(name, folder, split, labels)
    return ImageSet(images, image_size or native, *mean_std.get(name, IMAGENET_MEAN_STD))


class _Unlabelled(torchvision.datasets.ImageFolder):
    """Every image in a tree, in sorted order, whatever its folders are called. The label is 0."""

    def find_classes(self, directory):
        return ["."], {".": 0}


def _image_folder(name, folder, split, labels):
    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder, give the one that holds "
                         + ("your images" if name == "folder" else "train/<class>/*.JPEG and val/<class>/*.JPEG"))
    root = folder / split
    if not root.is_dir():
        if name != "folder" or labels:
            raise InputError(f"--data {folder}: has no folder '{split}', it must hold {split}/<class>/<image files>")
        root = folder
    try:
        return torchvision.datasets.ImageFolder(root) if labels else _Unlabelled(root)
    except FileNotFoundError as error:
        raise InputError(f"--data {root}: holds no images where they are needed: "
                         f"{str(error).splitlines()[0].rstrip('. ')}") from error


def _cifar(name, folder, split):
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        return kind(folder, train=split == "train")
    except RuntimeError:    # not there, or damaged
        try:
            if local_rank() == 0:
                kind(folder, download=True)
            barrier()
            return kind(folder, train=split == "train")
        except (OSError, RuntimeError) as error:
            raise InputError(f"--data {folder}: no {name} there and it cannot be downloaded ({error}); "
                             "put the extracted archive into that folder") from error


# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------

def crop_box(rng, width, height, scale):
    """The box of torchvision's RandomResizedCrop: ten tries, then the largest central one of an allowed ratio.

    scale: (low, high) share of the area; the ratio of width to height is log-uniform in 3/4..4/3.
    Returns left, top, width, height in pixels.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for area, ratio, x, y in rng.random((10, 4)):
        area = width * height * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, max(w, 1), max(h, 1)


def random_crop(image, rng, size, scale):
    """uint8 [3, H, W] -> uint8 [3, size, size]: a random box, resized with antialiasing, mirrored half of the times."""
    left, top, width, height = crop_box(rng, image.shape[2], image.shape[1], scale)
    box = image[:, top:top + height, left:left + width]
    crop = F.interpolate(box[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return crop.flip(2) if rng.random() < 0.5 else crop


def center_view(image, size):
    """PIL -> uint8 [3, size, size], as the evaluation of ImageNet: resize to 256, crop 224 (in proportion).

    Up to 32 pixels the whole image is taken.
    """
    return pil_to_tensor(center_crop(resize(image, size if size <= 32 else size * 256 // 224), [size, size]))


class _Batches(torch.utils.data.Dataset):
    """Makes whole batches in a worker process, from a list of (epoch, index)."""

    def __init__(self, image_set, seed=0):
        self.images, self.size, self.seed = image_set.images, image_set.image_size, seed

    def __len__(self):
        return len(self.images)

    def __getitems__(self, keys):
        """The batch; or, since an exception would lose its one line on the way, an InputError to be raised."""
        try:
            return self.batch(keys)
        except InputError as error:
            return error

    def load(self, index):
        """(RGB image, label)."""
        try:
            image, label = self.images[index]
            return image.convert("RGB"), label
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            path = self.images.samples[index][0] if hasattr(self.images, "samples") else f"image {index}"
            raise InputError(f"{path}: not a readable image ({error}), remove or replace it") from error

    def generator(self, epoch, index):
        return np.random.default_rng((self.seed, _VIEWS, epoch, index))


class TwoViews(_Batches):
    """Batches (view a, view b, index): each view (crops uint8 [B, 3, size, size], draws float32 [B, num_draws]).

    num_draws: how many uniform random numbers the device stage wants for a view (`Augment.num_draws`).
    """

    def __init__(self, image_set, seed, crop_min, num_draws):
        super().__init__(image_set, seed)
        self.scale, self.num_draws = (crop_min, 1.0), num_draws

    def batch(self, keys):
        crops = torch.empty(2, len(keys), self.size, self.size, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
        draws = np.empty((2, len(keys), self.num_draws), dtype=np.float32)
        for row, (epoch, index) in enumerate(keys):
            image = pil_to_tensor(self.load(index)[0])
            rng = self.generator(epoch, index)
            for view in range(2):
                crops[view, row] = random_crop(image, rng, self.size, self.scale)
                draws[view, row] = rng.random(self.num_draws, dtype=np.float32)
        draws = torch.from_numpy(draws)
        return (crops[0], draws[0]), (crops[1], draws[1]), torch.tensor([index for _, index in keys])


class Labelled(_Batches):
    """Batches (crops uint8 [B, 3, size, size], labels [B]): random crops if `augment`, else the centre."""

    def __init__(self, image_set, seed=0, augment=False):
        super().__init__(image_set, seed)
        self.augment = augment

    def batch(self, keys):
        crops = torch.empty(len(keys), self.size, self.size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        labels = torch.empty(len(keys), dtype=torch.int64)
        for row, (epoch, index) in enumerate(keys):
            image, labels[row] = self.load(index)
            if self.augment:
                crops[row] = random_crop(pil_to_tensor(image), self.generator(epoch, index), self.size, (0.08, 1.0))
            else:
                crops[row] = center_view(image, self.size)
        return crops, labels


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------

class EpochSampler(torch.utils.data.Sampler):
    """This rank's share of each global batch, as lists of (epoch, index).

    All ranks cut the same order, which depends on (seed, epoch) alone, so no image is seen twice in an epoch.
    drop_last: leave out the last incomplete global batch (other images each epoch, since the order changes).
    """

    def __init__(self, num_images, batch_size, seed=0, shuffle=False, drop_last=False):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.epoch = 0

    def __len__(self):
        """Global batches in an epoch."""
        return self.num_images // self.batch_size if self.drop_last else -(-self.num_images // self.batch_size)

    def __iter__(self):
        order = np.arange(self.num_images)
        if self.shuffle:
            np.random.default_rng((self.seed, _ORDER, self.epoch, 0)).shuffle(order)
        for step in range(len(self)):
            batch = order[step * self.batch_size:(step + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in np.array_split(batch, world_size())[rank()]]


class Loader:
    """Batches of a data set, made by worker processes. `loader.epoch(e)` iterates over epoch e."""

    def __init__(self, batches, sampler, workers, device):
        workers = workers_per_rank(workers)
        self.sampler = sampler
        self.loader = torch.utils.data.DataLoader(
            batches, batch_sampler=sampler, collate_fn=_as_made, num_workers=workers, persistent_workers=workers > 0,
            pin_memory=device.type == "cuda")

    def __len__(self):
        return len(self.sampler)

    def epoch(self, epoch):
        self.sampler.epoch = epoch
        for batch in self.loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch


def _as_made(batch):
    return batch


def workers_per_rank(workers):
    """Of `--workers` for this machine: this rank's share, at least one, and no more processes than cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(1, workers) and max(1, min(workers, cores) // ranks_here())
