"""The features of a whole data set, computed once by a frozen encoder."""

import torch

from sogclr.distributed import rank, world_size


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
