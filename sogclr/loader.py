"""Data sets by name, the two views of an image, and the order in which images are seen.

The worker processes read and decode an image once and cut its crops as uint8; colour is done in whole batches on the
device (`sogclr.augment`). What is drawn for image i in epoch e depends on (seed, e, i) alone: neither on the number of
workers nor on the number of ranks.
"""

import dataclasses
import math
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from sogclr import InputError
from sogclr.distributed import barrier, local_rank, log, rank, ranks_here, world_size
from sogclr.files import ImageFiles
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


def fingerprint(images):
    """What tells one data set from another, for a run's record: `5000 images, digest 1f0c...`."""
    return f"{len(images)} images" + (f", digest {images.digest}" if hasattr(images, "digest") else "")


def _image_folder(name, folder, split, labels):
    if not os.path.isdir(folder):       # False, too, where it lies in a folder that may not be searched
        raise InputError(f"--data {folder}: no such folder that can be read, give the one that holds "
                         + ("train/<class>/ and val/<class>/" if labels else "your images"))
    root = folder / split
    if not os.path.isdir(root):
        if name != "folder" or labels:
            raise InputError(f"--data {folder}: has no folder '{split}', it must hold {split}/<class>/<image files>"
                             + " (to pretrain on images without classes give --data_name folder)" * (name != "folder"))
        root = folder
    try:
        images = ImageFiles(root, labels)
        classes = {"imagenet1000": 1000, "imagenet100": 100}.get(name)
        if split == "train" and classes not in (None, len(images.classes)):
            log(f"=> note: {root} has {len(images.classes)} classes, not the {classes} of {name}; "
                "--data_name folder is for other images")
        return images
    except OSError as error:
        raise InputError(f"--data {root}: cannot be listed: {error.strerror}") from error


def _cifar(name, folder, split):
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    problem = "the download did not complete"
    if local_rank() == 0:
        try:
            kind(folder, download=True)     # does nothing where the files are there and whole
        except (OSError, RuntimeError) as error:
            problem = error
    barrier()
    try:
        return kind(folder, train=split == "train")
    except (OSError, RuntimeError) as error:
        raise InputError(f"--data {folder}: no {name} there and it cannot be downloaded ({problem}); put "
                         f"{kind.base_folder} from the archive into that folder, or give --data_name folder where it "
                         "holds image files") from error


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
    # As a batch of one whose strides say channels_last, as PIL's pixels lie: so the fast kernel is taken.
    box = image.permute(1, 2, 0)[None, top:top + height, left:left + width].permute(0, 3, 1, 2)
    crop = F.interpolate(box, size=(size, size), mode="bilinear", antialias=True)[0]
    return crop.flip(2) if rng.random() < 0.5 else crop


def center_view(image, size):
    """PIL -> uint8 [3, size, size], as the evaluation of ImageNet: resize to 256, crop 224 (in proportion).

    Up to 32 pixels the whole image is taken.
    """
    return pil_to_tensor(center_crop(resize(image, size if size <= 32 else size * 256 // 224), [size, size]))


class Batch(NamedTuple):
    """What a worker hands over: the batch itself, and which images it could not read, as {index: one line}."""

    content: tuple
    bad: dict


class _Batches(torch.utils.data.Dataset):
    """Makes whole batches in a worker process.

    bad_images: "stop" at an image that cannot be read, or "skip" it.
    bytes_per_image: of what a worker hands over, set by each kind.
    """

    def __init__(self, image_set, seed, bad_images):
        self.images, self.size, self.seed = image_set.images, image_set.image_size, seed
        self.bad_images = bad_images

    def __len__(self):
        return len(self.images)

    def __getitems__(self, share):
        """A `Batch`; or, since an exception would lose its one line on the way, the InputError to be raised."""
        try:
            return self.make(*share)
        except InputError as error:
            return error

    def read(self, wanted, spare):
        """The images [(index, RGB image, label)] of a share and the unreadable ones {index: one line}.

        Where images are skipped, each is replaced by the next readable one of `spare`, under that one's own index:
        an estimator must only see its own image.
        """
        good, bad, spare = [], {}, iter(spare)
        for index in wanted:
            while index is not None:
                try:
                    good.append((index, *self.images[index]))
                    break
                except InputError as error:
                    if self.bad_images == "stop":
                        raise
                    bad[index] = str(error)
                    index = next(spare, None)
        return good, bad

    def generator(self, epoch, index):
        return np.random.default_rng((self.seed, _VIEWS, epoch, index))


class TwoViews(_Batches):
    """Batches (view a, view b, index): each view (crops uint8 [B, 3, size, size], draws float32 [B, num_draws]).

    num_draws: how many uniform random numbers the device stage wants for a view (`Augment.num_draws`);
    recipe: None, or a torchvision transform that makes a whole view [3, size, size] of a PIL image here, in the worker:
    then each view is (float32 [B, 3, size, size], [B, 0]).
    """

    def __init__(self, image_set, seed, crop_min, num_draws, bad_images="stop", recipe=None):
        super().__init__(image_set, seed, bad_images)
        self.scale, self.num_draws, self.recipe = (crop_min, 1.0), num_draws, recipe
        self.bytes_per_image = 2 * 3 * self.size**2 * (4 if recipe else 1)

    def make(self, epoch, wanted, spare):
        good, bad = self.read(wanted, spare)
        if len(good) < len(wanted):
            raise InputError(f"--bad-images skip: {len(bad)} unreadable images in one batch and its spare images, "
                             f"such as {next(iter(bad.values()))}")
        views = self.with_recipe(epoch, good) if self.recipe else self.with_crops(epoch, good)
        return Batch((*views, torch.tensor([index for index, _, _ in good])), bad)

    def with_crops(self, epoch, good):
        crops = torch.empty(2, len(good), self.size, self.size, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
        draws = np.empty((2, len(good), self.num_draws), dtype=np.float32)
        for row, (index, image, _) in enumerate(good):
            image = pil_to_tensor(image)
            rng = self.generator(epoch, index)
            for view in range(2):
                crops[view, row] = random_crop(image, rng, self.size, self.scale)
                draws[view, row] = rng.random(self.num_draws, dtype=np.float32)
        return zip(crops, torch.from_numpy(draws), strict=True)

    def with_recipe(self, epoch, good):
        images = torch.empty(2, len(good), 3, self.size, self.size)
        with torch.random.fork_rng(devices=[]):
            for row, (index, image, _) in enumerate(good):
                torch.manual_seed(int(self.generator(epoch, index).integers(2**63)))
                for view in range(2):
                    images[view, row] = self.recipe(image)
        return zip(images, torch.empty(2, len(good), 0), strict=True)


class Labelled(_Batches):
    """Batches (crops uint8 [B, 3, size, size], labels [B]): random crops if `augment`, else the centre.

    replace: whether a skipped image is replaced by a spare one, by default if `augment`; for evaluation it is left out
    rather, so that none is counted twice.
    """

    def __init__(self, image_set, seed=0, augment=False, bad_images="stop", replace=None):
        super().__init__(image_set, seed, bad_images)
        self.augment, self.bytes_per_image = augment, 3 * self.size**2
        self.replace = augment if replace is None else replace

    def make(self, epoch, wanted, spare):
        good, bad = self.read(wanted, spare if self.replace else ())
        crops = torch.empty(len(good), self.size, self.size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for row, (index, image, _) in enumerate(good):
            if self.augment:
                crops[row] = random_crop(pil_to_tensor(image), self.generator(epoch, index), self.size, (0.08, 1.0))
            else:
                crops[row] = center_view(image, self.size)
        return Batch((crops, torch.tensor([label for _, _, label in good], dtype=torch.int64)), bad)


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------

class EpochSampler(torch.utils.data.Sampler):
    """This rank's share of each global batch, as (epoch, indices, spare indices).

    All ranks cut the same order, which depends on (seed, epoch) alone, so no image is seen twice in an epoch. The spare
    ones, which replace unreadable images, are the rank's share of the next batch: no other rank has them now.
    drop_last: leave out the last incomplete global batch (other images each epoch, since the order changes).
    Holds 8 bytes an image while an epoch runs.
    """

    def __init__(self, num_images, batch_size, seed=0, shuffle=False, drop_last=False):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.epoch = self.first_step = 0

    def __len__(self):
        """Global batches in an epoch."""
        return self.num_images // self.batch_size if self.drop_last else -(-self.num_images // self.batch_size)

    def __iter__(self):
        order = np.arange(self.num_images)
        if self.shuffle:
            np.random.default_rng((self.seed, _ORDER, self.epoch, 0)).shuffle(order)

        def share(step):
            batch = order[step * self.batch_size:(step + 1) * self.batch_size]
            return np.array_split(batch, world_size())[rank()].tolist()

        for step in range(self.first_step, len(self)):
            spare = share((step + 1) % len(self)) if len(self) > 1 else []
            yield self.epoch, share(step), spare


class Loader:
    """Batches of a data set, made by worker processes, copied to the device, and there prepared for their use.

    prepare: None, or what to do with each view on the device (the `Augment` of train.py).
    `loader.epoch(e)` iterates over epoch e. Indices stay on the host, where they can be checked without waiting.
    On a GPU a batch is copied and prepared on a side stream while the step before it runs.
    """

    MOST_BAD = 0.01     # of a rank's images in an epoch; more stop the run although they are skipped

    def __init__(self, batches, sampler, workers, device, prepare=None):
        workers = workers_per_rank(workers)
        share = -(-sampler.batch_size // world_size()) * batches.bytes_per_image
        through_pipes = workers > 0 and not _fits_shared_memory(workers * ranks_here() * 3 * share)    # 2 made ahead
        self.sampler, self.device, self.prepare = sampler, device, prepare
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.reported = set()
        self.loader = torch.utils.data.DataLoader(
            batches, batch_sampler=sampler, collate_fn=_as_arrays if through_pipes else _as_made, num_workers=workers,
            pin_memory=device.type == "cuda", worker_init_fn=_leave_signals_to_the_rank,
            persistent_workers=workers > 0 and sampler.shuffle)     # evaluation's workers end with it

    def __len__(self):
        return len(self.sampler)

    def epoch(self, epoch, first_step=0):
        """The batches from `first_step` on; those before it are neither read nor decoded."""
        contents = self.contents(epoch, first_step)
        return map(self.upload, contents) if self.side is None else self.ahead(contents)

    def contents(self, epoch, first_step):
        """The workers' batches on the host. Raises the InputError that a worker met, or one at too many bad images."""
        self.sampler.epoch, self.sampler.first_step = epoch, first_step
        allowed, bad_now = self.MOST_BAD * self.sampler.num_images / world_size(), 0
        for batch in self.loader:
            if isinstance(batch, InputError):
                raise batch
            bad_now += len(batch.bad)
            self.report(batch.bad)
            if bad_now > allowed:
                raise InputError(f"--bad-images skip: {bad_now} unreadable images by now in epoch {epoch}, more than "
                                 f"{self.MOST_BAD:.0%} of the data set, such as {next(iter(batch.bad.values()))}")
            yield batch.content

    def ahead(self, contents):
        """`upload` on the side stream, one batch ahead of the caller, whose stream waits for a batch's own event alone.

        Memory: a tensor belongs to the side stream, where it was made. `record_stream` keeps it from being handed out
        there again until the caller's stream has done what it was given before the tensor was dropped. The pinned
        source of a copy is kept by its allocator until the copy is done.
        """
        self.side.wait_stream(torch.cuda.current_stream(self.device))   # what `prepare` reads was made there
        ready = None
        for content in contents:
            with torch.cuda.stream(self.side):
                coming = self.upload(content), self.side.record_event()
            if ready:
                yield self.handed_over(*ready)
            ready = coming
        if ready:
            yield self.handed_over(*ready)

    def handed_over(self, batch, event):
        """The batch, for use on the caller's stream."""
        main = torch.cuda.current_stream(self.device)
        main.wait_event(event)
        for view in batch[:-1]:
            for tensor in view if isinstance(view, tuple) else (view,):
                tensor.record_stream(main)
        return batch

    def upload(self, content):
        """Copy the images (and what is drawn for them) to the device and prepare them; the last item stays on the host.
        """
        views = (_to_device(view, self.device) for view in content[:-1])
        return *(map(self.prepare, views) if self.prepare else views), torch.as_tensor(content[-1])

    def report(self, bad):
        """Each unreadable file once, by the rank that met it."""
        for index, line in bad.items():
            if index not in self.reported:
                self.reported.add(index)
                print(f"=> skipped {line} ({len(self.reported)} skipped by rank {rank()})", file=sys.stderr, flush=True)


def _to_device(part, device):
    if isinstance(part, (tuple, list)):     # pinning makes lists of tuples in some releases of torch
        return tuple(_to_device(item, device) for item in part)
    return torch.as_tensor(part).to(device, non_blocking=True)


def _as_made(batch):
    return batch


def _as_arrays(batch):
    """The same with arrays for tensors: workers hand over tensors in shared memory, but arrays through a pipe."""
    if isinstance(batch, InputError):
        return batch

    def convert(part):
        return part.numpy() if isinstance(part, torch.Tensor) else tuple(map(convert, part))

    return batch._replace(content=convert(batch.content))


def _fits_shared_memory(wanted):
    """Whether /dev/shm has room for so many bytes of batches. Containers often have 64 MiB, and a worker that finds it
    full is killed.
    """
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:     # this system shares memory in another way
        return True
    if free < wanted:
        log(f"=> /dev/shm has only {free / 2**20:.0f} of the {wanted / 2**20:.0f} MiB that the workers' batches want: "
            "they come through pipes, which is slower (docker --shm-size or --ipc=host gives more, --workers wants "
            "less)")
    return free >= wanted


def _leave_signals_to_the_rank(worker):
    """What stops a run is often sent to all its processes. A worker goes on until its own rank ends it, which torch
    does by SIGTERM where it must, or is gone.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):     # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_rank, args=(os.getppid(),), daemon=True).start()


def _end_with_the_rank(rank_process):
    while True:
        arrived = signal.sigtimedwait({signal.SIGTERM}, 5)
        if os.getppid() != rank_process or (arrived and arrived.si_pid == rank_process):
            os._exit(0)


def workers_per_rank(workers):
    """Of `--workers` for this machine: this rank's share, at least one, and no more processes than cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(1, workers) and max(1, min(workers, cores) // ranks_here())
