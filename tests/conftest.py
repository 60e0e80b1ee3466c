"""Real image files for the tests, in ImageNet's layout."""

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Results are compared bit for bit across processes, and sums depend on the number of threads."""
    torch.set_num_threads(1)


CLASSES = ("n01440764", "n01443537", "n01484850")


def write_image(path, seed, size=(48, 40)):
    """A JPEG of smooth random colors."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize(size, Image.Resampling.BICUBIC).save(path, "JPEG", quality=90)


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    """DIR/train/<wnid>/*.JPEG and DIR/val/<wnid>/*.JPEG: 3 classes, 8 training and 3 validation images each."""
    folder = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(CLASSES):
            for k in range(count):
                write_image(folder / split / name / f"{name}_{k}.JPEG", seed=100 * label + k + 50 * (split == "val"))
    return folder
