"""Features of a data set's images: of all of them at once, or batch by batch."""

import math
import os

import torch
import torch.nn as nn

from sogclr import InputError
from sogclr.distributed import gather, rank, ranks_here, world_size


def extract(encode, loader, dtype, epoch=0):
    """This rank's share of a data set: features [n, C] in `dtype` and labels [n] int64, in the loader's order, on its
    device. `sogclr.distributed.gather` makes all ranks' of them, in which each image stands exactly once.

    encode: uint8 [b, 3, H, W] -> float [b, C], the frozen encoder with its normalisation, without gradients;
    loader: a `Loader` of `Labelled` batches; epoch: decides the order and the crops, where they are random.
    Holds one copy of the features: 2 n C bytes in half precision, for ImageNet-1K and C = 2048 5.2 GB over all ranks.
    Raises InputError as the loader does. n is less than the share by the images that `--bad-images skip` leaves out.
    """
    sampler = loader.sampler
    batches = [min(sampler.batch_size, sampler.num_images - step * sampler.batch_size) for step in range(len(sampler))]
    share = sum(batch // world_size() + (rank() < batch % world_size()) for batch in batches)
    features, labels, n = None, torch.empty(share, dtype=torch.int64), 0
    for images, target in loader.epoch(epoch):
        if features is None or len(images):         # the first batch tells C, even to a rank that has no images
            output = encode(images)
            if features is None:
                features = output.new_empty(share, output.shape[1], dtype=dtype)
            features[n:n + len(images)], labels[n:n + len(images)] = output, target
            n += len(images)
    return features[:n], labels[:n].to(loader.device)


class Encoder(nn.Module):
    """uint8 [b, 3, H, W] -> features, float32 [b, C].

    resnet: a torchvision ResNet whose `fc` is the identity; normalize: uint8 images -> its input;
    dtype: of its arithmetic, float32 or that of autocast.
    """

    def __init__(self, resnet, normalize, dtype):
        super().__init__()
        self.resnet, self.normalize, self.dtype = resnet, normalize, dtype

    def forward(self, images):
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.resnet(self.normalize(images)).float()


class FreshFeatures:
    """Batches (features float32 [b, C], labels [b]) of a loader's images, encoded when their turn has come.

    encode: uint8 [b, 3, H, W] -> float32 [b, C], under inference_mode; loader: a `Loader` of `Labelled` batches.
    """

    def __init__(self, encode, loader):
        self.encode, self.loader = encode, loader

    def __len__(self):
        return len(self.loader)

    def epoch(self, epoch, first_step=0):
        for images, labels in self.loader.epoch(epoch, first_step):
            yield self.encode(images).clone(), labels       # inference tensors cannot be saved for backward


class CachedFeatures:
    """Batches (features float32 [b, C], labels [b]) out of memory: each image is encoded once and for all.

    encode: as for `FreshFeatures`; num_features: C; passes: [(loader, its epoch)], V passes over the same images in the
    same order, on all ranks together; sampler: of the batches to be made. Epoch e is made of pass e mod V.

    Every rank holds all of it on its device, in half precision: 2 V N C bytes, for ImageNet-1K and C = 2048 5.2 GB a
    pass. Images that `--bad-images skip` leaves out are taken off the sampler too. Raises InputError where the memory
    is not there, before anything is computed, and where a feature does not fit half precision.
    """

    def __init__(self, encode, num_features, passes, sampler):
        device, shape = passes[0][0].device, (len(passes), sampler.num_images, num_features)
        require_memory(2 * math.prod(shape), device)
        self.features = torch.empty(shape, dtype=torch.float16, device=device)
        self.labels = torch.empty(sampler.num_images, dtype=torch.int64, device=device)
        self.sampler = sampler
        finite = torch.ones((), dtype=torch.bool, device=device)
        for features, (loader, epoch) in zip(self.features, passes, strict=True):
            n = 0
            for images, labels in loader.epoch(epoch):
                rows, labels = gather(encode(images).half()), gather(labels.to(device))
                features[n:n + len(rows)], self.labels[n:n + len(rows)] = rows, labels
                finite &= rows.isfinite().all()
                n += len(rows)
        sampler.num_images = n
        if not finite:
            raise InputError("--features cached: a feature is not finite or above 65504, the largest number of half "
                             "precision, leave the flag out")

    def __len__(self):
        return len(self.sampler)

    def epoch(self, epoch, first_step=0):
        self.sampler.epoch, self.sampler.first_step = epoch, first_step
        for _, share, _ in self.sampler:
            share = torch.tensor(share, dtype=torch.int64).to(self.labels.device, non_blocking=True)
            yield self.features[epoch % len(self.features), share].float(), self.labels[share]


def require_memory(wanted, device):
    """Raise InputError where a device has fewer bytes free than every rank wants on it."""
    free = math.inf
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif os.path.exists("/proc/meminfo"):
        wanted *= ranks_here()
        with open("/proc/meminfo") as file:
            free = next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    if wanted > free:
        raise InputError(f"--features cached: wants {wanted / 1e9:.1f} GB of memory on the {device.type}, which has "
                         f"{free / 1e9:.1f} GB free; take a smaller --cached-epochs, or leave the flag out")
