"""Batches of images: their crops, their order, and their transfer to the device.

Worker processes read and decode each image once and make its uint8 crops; color augmentation runs in whole batches on
the device (`sogclr.augment`). The randomness of image i in epoch e depends only on (seed, e, i), not on the number of
workers or ranks.
"""

import dataclasses
import gc
import math
import os
import shutil
import signal
import sys
import threading
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from sogclr import InputError
from sogclr.distributed import log, rank, ranks_here, world_size

# Purposes of random numbers. Each generator is seeded by (seed, purpose, epoch, image).
_ORDER, _VIEWS = 0, 1


# ---------------------------------------------------------------------------------------------------------------------
# Crops
# ---------------------------------------------------------------------------------------------------------------------

def crop_box(rng, width, height, scale):
    """A box as in torchvision's RandomResizedCrop: ten tries, then the largest central one of an allowed ratio.

    scale: (low, high) fraction of the area; the ratio of width to height is log-uniform in 3/4..4/3.
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
    """uint8 [3, H, W] -> uint8 [3, size, size]: a random box, resized with antialiasing, flipped half the time."""
    left, top, width, height = crop_box(rng, image.shape[2], image.shape[1], scale)
    # As a batch of one with channels_last strides, PIL's layout, so that the fast kernel is used.
    box = image.permute(1, 2, 0)[None, top:top + height, left:left + width].permute(0, 3, 1, 2)
    crop = F.interpolate(box, size=(size, size), mode="bilinear", antialias=True)[0]
    return crop.flip(2) if rng.random() < 0.5 else crop


def center_view(image, size):
    """PIL -> uint8 [3, size, size] as in ImageNet evaluation: resize to 256, center crop 224 (in proportion).

    Up to 32 pixels the whole image is used. Of an image more than 16 times as long as wide, resized at full length it
    would take gigabytes, only the middle is resized.
    """
    longest = 16 * min(image.size)
    if max(image.size) > longest:       # of the same parity, so that the middle stays the middle
        image = center_crop(image, [min(length, longest + length % 2) for length in reversed(image.size)])
    return pil_to_tensor(center_crop(resize(image, size if size <= 32 else size * 256 // 224), [size, size]))


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Batch:
    """What a worker returns: the batch itself, the images it could not read, as {index: one line}, and warnings."""

    content: tuple      # of tensors, or of arrays on their way through a pipe
    bad: dict
    warned: tuple = ()

    def pin_memory(self):
        """What DataLoader's thread calls for a GPU: from pinned memory it copies while the host goes on."""
        return dataclasses.replace(self, content=tuple(torch.as_tensor(part).pin_memory() for part in self.content))


class _Batches(torch.utils.data.Dataset):
    """Makes complete batches in a worker process, of uint8 images by default.

    image_set: an `ImageSet`; bad_images: "stop" at an image that cannot be read, or "skip" it.
    `bytes_per_image`: of what a worker returns.
    """

    def __init__(self, image_set, seed, bad_images):
        self.images, self.size, self.seed = image_set.images, image_set.image_size, seed
        self.bad_images, self.bytes_per_image = bad_images, 3 * self.size**2

    def __len__(self):
        return len(self.images)

    def __getitems__(self, item):
        """A `Batch` for what `EpochSampler` yields; or the InputError to raise, since an exception would lose its one
        line in transit.
        """
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                batch = self.make(*item)
            return dataclasses.replace(batch, warned=tuple(str(warning.message) for warning in caught))
        except InputError as error:
            return error

    def read(self, wanted, replacements):
        """Read the wanted images, [(index, RGB image, label)], and report the unreadable ones, {index: one line}.

        A skipped image is replaced by the next readable replacement, under the replacement's own index: an estimator
        must only see its own image.
        """
        good, bad, replacements = [], {}, iter(replacements)
        for index in wanted:
            while index is not None:
                try:
                    good.append((index, *self.images[index]))
                    break
                except InputError as error:
                    if self.bad_images == "stop":
                        raise InputError(f"{error}, remove or replace it, or use --bad-images skip") from error
                    bad[index] = str(error)
                    index = next(replacements, None)
        return good, bad

    def generator(self, epoch, index):
        return np.random.default_rng((self.seed, _VIEWS, epoch, index))


class TwoViewBatches(_Batches):
    """Batches (crops uint8 [2, B, 3, size, size], uniforms float32 [2, B, U], index [B]) of two views per image.

    num_uniforms: U, how many uniform random numbers the augmentation needs per view (`Augment.num_uniforms`);
    recipe: None, or a torchvision transform that makes a complete view [3, size, size] of a PIL image in the worker:
    then batches are (float32 [2, B, 3, size, size], [2, B, 0], index [B]).
    """

    def __init__(self, image_set, seed, crop_min, num_uniforms, bad_images="stop", recipe=None):
        super().__init__(image_set, seed, bad_images)
        self.scale, self.num_uniforms, self.recipe = (crop_min, 1.0), num_uniforms, recipe
        self.bytes_per_image *= 2 * (4 if recipe else 1)

    def make(self, epoch, wanted, replacements):
        good, bad = self.read(wanted, replacements)
        if len(good) < len(wanted):
            raise InputError(f"--bad-images skip: {len(bad)} unreadable images in one batch and its replacements, "
                             f"remove or replace them; the first is {next(iter(bad.values()))}")
        views = self.with_recipe(epoch, good) if self.recipe else self.with_crops(epoch, good)
        return Batch((*views, torch.tensor([index for index, _, _ in good])), bad)

    def with_crops(self, epoch, good):
        crops = torch.empty(2, len(good), self.size, self.size, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
        uniforms = torch.empty(2, len(good), self.num_uniforms)
        for row, (index, image, _) in enumerate(good):
            image = pil_to_tensor(image)
            rng = self.generator(epoch, index)
            for view in range(2):
                crops[view, row] = random_crop(image, rng, self.size, self.scale)
                rng.random(dtype=np.float32, out=uniforms[view, row].numpy())
        return crops, uniforms

    def with_recipe(self, epoch, good):
        images = torch.empty(2, len(good), 3, self.size, self.size)
        with torch.random.fork_rng(devices=[]):
            for row, (index, image, _) in enumerate(good):
                torch.manual_seed(int(self.generator(epoch, index).integers(2**63)))
                for view in range(2):
                    images[view, row] = self.recipe(image)
        return images, torch.empty(2, len(good), 0)


class LabeledBatches(_Batches):
    """Batches (crops uint8 [B, 3, size, size], labels [B]): random crops if `augment`, else center crops.

    A skipped image is replaced if `augment`; for evaluation it is left out, so that none is counted twice.
    """

    def __init__(self, image_set, seed=0, augment=False, bad_images="stop"):
        super().__init__(image_set, seed, bad_images)
        self.augment = augment

    def make(self, epoch, wanted, replacements):
        good, bad = self.read(wanted, replacements if self.augment else ())
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
    """This rank's local batch of each global batch of an epoch, as (epoch, indices, indices of replacements).

    All ranks split the same order, which depends only on (seed, epoch), so no image is seen twice in an epoch. The
    replacements for unreadable images are the rank's next local batch: no other rank has them now.
    drop_last: drop the last incomplete global batch (different images each epoch, since the order changes).
    `epoch`, `first_step`: where the next iteration begins. Holds 8 bytes per image during an epoch.
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

        def local_batch(step):
            batch = order[step * self.batch_size:(step + 1) * self.batch_size]
            return np.array_split(batch, world_size())[rank()].tolist()

        for step in range(self.first_step, len(self)):
            yield self.epoch, local_batch(step), local_batch((step + 1) % len(self)) if len(self) > 1 else []


def check_batch_size(batch_size, num_images, flag="--batch-size"):
    """Raise InputError if a batch cannot be split equally over ranks, as BatchNorm needs, or images are too few."""
    ranks = world_size()
    if batch_size % ranks or batch_size < 2 * ranks:
        raise InputError(f"{flag} {batch_size}: must be at least 2" if ranks == 1 else
                         f"{flag} {batch_size}: cannot be split equally over {ranks} processes with at least 2 images "
                         f"each, use a multiple of {ranks} from {2 * ranks} up")
    if batch_size > num_images:
        raise InputError(f"{flag} {batch_size}: the data set has only {num_images} images, use a smaller batch")


# ---------------------------------------------------------------------------------------------------------------------
# Loader
# ---------------------------------------------------------------------------------------------------------------------

class Loader:
    """Batches on the device, made by worker processes, one epoch at a time: `for ... in loader.epoch(e)`.

    batches: `TwoViewBatches` or `LabeledBatches`, whose last item, indices or labels, stays on the host; batch_size:
    global; workers: processes on this machine, over all its ranks; keep_workers: from epoch to epoch, else they end
    with each; order: `EpochSampler`'s seed, shuffle, drop_last.
    """

    MOST_BAD = 0.01     # fraction of a rank's images in an epoch, at least one; more stop the run even if skipped
    MOST_WARNINGS = 20

    def __init__(self, batches, batch_size, workers, device, keep_workers=False, **order):
        self.sampler = EpochSampler(len(batches), batch_size, **order)
        self.num_images, self.device = len(batches), device
        self.skipped, self.warned = set(), set()        # indices and lines that have been reported
        workers = workers_per_rank(workers)
        local_batch = -(-batch_size // world_size()) * batches.bytes_per_image
        through_pipes = workers > 0 and not _fits_shared_memory(workers * ranks_here() * 3 * local_batch)   # 2 ahead
        self.loader = torch.utils.data.DataLoader(
            batches, batch_sampler=self.sampler, collate_fn=_as_arrays if through_pipes else _as_made,
            num_workers=workers, pin_memory=device.type == "cuda", worker_init_fn=_start_worker,
            # Not the default: spawn in a rank that was spawned, forkserver from Python 3.14 on. Such a worker imports
            # torch and copies the list of files; a forked one shares both, and never touches the GPU.
            multiprocessing_context="fork" if workers > 0 and sys.platform == "linux" else None,
            persistent_workers=workers > 0 and keep_workers)
        self.ahead = workers * (self.loader.prefetch_factor or 0)       # batches that workers may have ready

    def __len__(self):
        """Steps in an epoch."""
        return len(self.sampler)

    def epoch(self, epoch, first_step=0):
        """Yield the batches from `first_step` on; earlier ones are neither read nor decoded. Raises a worker's
        InputError, or one for too many bad images.
        """
        self.sampler.epoch, self.sampler.first_step = epoch, first_step
        allowed, bad_now = max(1, self.MOST_BAD * self.num_images / world_size()), 0
        for batch in self.loader:
            if isinstance(batch, InputError):
                raise batch
            bad_now += len(batch.bad)
            self.report(batch)
            if bad_now > allowed:
                raise InputError(f"--bad-images skip: {bad_now} unreadable images so far in epoch {epoch}, more than "
                                 f"{self.MOST_BAD:.0%} of the data set, remove or replace them; one is "
                                 f"{next(iter(batch.bad.values()))}")
            *images, last = map(torch.as_tensor, batch.content)
            yield *(part.to(self.device, non_blocking=True) for part in images), last

    def report(self, batch):
        """Report each unreadable file and each warning once, on the rank that read it."""
        for index, line in batch.bad.items():
            if index not in self.skipped:
                self.skipped.add(index)
                print(f"=> skipped {line} ({len(self.skipped)} skipped by rank {rank()})", file=sys.stderr, flush=True)
        for line in batch.warned:
            if line not in self.warned and len(self.warned) < self.MOST_WARNINGS:
                self.warned.add(line)
                print(f"=> warning: {line}"
                      + " (further warnings are not printed)" * (len(self.warned) == self.MOST_WARNINGS),
                      file=sys.stderr, flush=True)


def _as_made(batch):
    return batch


def _as_arrays(batch):
    """Workers send tensors via shared memory, but arrays through a pipe."""
    if isinstance(batch, InputError):
        return batch
    return dataclasses.replace(batch, content=tuple(part.numpy() for part in batch.content))


def _fits_shared_memory(wanted):
    """Whether /dev/shm has space for this many bytes of batches. Containers often have 64 MiB, and a worker is killed
    if it is full.
    """
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:     # this system shares memory differently
        return True
    if free < wanted:
        log(f"=> /dev/shm has only {free / 2**20:.0f} of the {wanted / 2**20:.0f} MiB that the workers' batches need: "
            "pipes are used instead, which is slower (docker --shm-size or --ipc=host gives more, fewer --workers need "
            "less)")
    return free >= wanted


def _start_worker(worker):
    """Keep a worker's memory shared with the rank's, and make it ignore signals that stop a run, which are often sent
    to all its processes. It continues until its own rank ends it, which torch does with SIGTERM if it must, or is gone.
    """
    gc.freeze()     # a collection would write to all objects, and thereby copy 80 MB
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
    """This rank's part of this machine's `--workers`: at least one if not 0, and no more than cores."""
    return min(1, workers) and max(1, min(workers, available_cores()) // ranks_here())


def available_cores():
    """How many of this machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
