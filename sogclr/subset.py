"""Class-balanced subsets of a data set, for evaluation with few labels."""

import os

import numpy as np

from sogclr import InputError

_SUBSET = 2     # purpose of the random numbers, in addition to the loader's 0 and 1


def balanced_indices(targets, percent, seed):
    """Indices of a class-balanced subset: [n] int64, ascending, n = percent of N rounded, but at least one per class.

    targets: N labels; percent: in (0, 100]; seed: determines, together with the labels, which images.

    Each class contributes the same number or one more, and a class with fewer contributes all. A smaller percentage is
    a subset of a larger one with the same seed.
    """
    indices, _ = _in_rounds(targets, seed)
    return np.sort(indices[:max(round(len(targets) * percent / 100), len(np.unique(targets)))])


def shot_indices(targets, shots, seed):
    """Indices of the first `shots` images of each class in the same order: [shots K] int64, ascending; fewer if a class
    has fewer.
    """
    indices, rounds = _in_rounds(targets, seed)
    return np.sort(indices[rounds < shots])


def held_out(targets, seed):
    """A mask [N] of a random fifth of each class's images, rounded down, but at least one if it has two or more."""
    indices, rounds = _in_rounds(targets, seed)
    sizes = np.bincount(targets)[np.asarray(targets)[indices]]                  # of each image's class
    mask = np.zeros(len(indices), dtype=bool)
    mask[indices] = rounds < np.where(sizes > 1, np.maximum(sizes // 5, 1), 0)
    return mask


def _in_rounds(targets, seed):
    """Random indices [N] in rounds of one image per class, as far as a class has more; and the round of each, [N]."""
    targets = np.asarray(targets)
    rng = np.random.default_rng((seed, _SUBSET))
    shuffled = rng.permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]           # each class in random order
    classes, sizes = np.unique(targets, return_counts=True)
    rounds = np.concatenate([np.arange(size) for size in sizes])                # [N] the position within its class
    places = np.repeat(rng.permutation(len(classes)), sizes)                    # [N] the class's position in a round
    order = np.lexsort((places, rounds))
    return by_class[order], rounds[order]


class Subset:
    """`subset[i] -> (PIL image, label)` for some of a data set's images. images: as in torchvision; indices: which."""

    def __init__(self, images, indices):
        self.images, self.indices, self.classes = images, indices, images.classes

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return self.images[self.indices[i]]

    @property
    def targets(self):
        return np.asarray(self.images.targets)[self.indices]

    def write_list(self, file):
        """Write one line per image: its path relative to the data set's folder, or its index if it has no own file.

        Raises InputError if the folder cannot be written.
        """
        lines = (str(i).encode() for i in self.indices)
        if hasattr(self.images, "path"):
            lines = (os.path.relpath(self.images.path(i), self.images.root) for i in self.indices)
        try:
            file.write_bytes(b"".join(line + b"\n" for line in lines))
        except OSError as error:
            raise InputError(f"--save_dir: {file} cannot be written: {error.strerror}") from error
