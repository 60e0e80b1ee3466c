"""Open data sets by name."""

import dataclasses
import os
import zlib
from pathlib import Path

import torchvision

from sogclr import InputError
from sogclr.distributed import barrier, broadcast_int, local_rank, log, rank
from sogclr.files import ImageFiles
from sogclr.shapes import Shapes

IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEAN_STD = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
            "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))}       # all others use ImageNet's


@dataclasses.dataclass
class ImageSet:
    """A data set and its properties. `images[i]` is `(PIL image, label)`, as in torchvision."""

    images: object
    image_size: int
    mean: tuple
    std: tuple

    @property
    def blur(self):
        """Whether to blur: the authors do, but not at CIFAR's 32 pixels."""
        return self.image_size > 32

    @property
    def fingerprint(self):
        """Identifies the data set in a run's record: `5000 images, digest 1f0c...`."""
        digest = getattr(self.images, "digest", None)
        return f"{len(self.images)} images" + (f", digest {digest}" if digest else "")


def open_data_set(name, folder, split, image_size=None, labels=True):
    """Open the data set called `name` (see `--data_name`).

    folder: its location, `data/<name>` if None; split: "train" or "val"; image_size: of the crops, None for the data
    set's default; labels: whether classes are needed. Raises InputError if images are missing, or differ among ranks.
    """
    folder = Path(folder or Path("data") / name)
    if name == "shapes":
        images = Shapes(split)
    elif name in ("cifar10", "cifar100"):
        images = _cifar(name, folder, split)
    else:
        images = _image_folder(name, folder, split, labels)
    data = ImageSet(images, image_size or default_image_size(name), *mean_and_std(name))
    here = zlib.crc32(data.fingerprint.encode())
    if here != broadcast_int(here):     # each rank lists its machine's folder
        raise InputError(f"--data {folder}: rank {rank()} sees other images ({data.fingerprint}) than rank 0, give all "
                         "machines the same")
    return data


def default_image_size(name):
    """The crop size, in pixels, of the data set called `name` if `--image-size` is left out."""
    return 32 if name in MEAN_STD else 224


def mean_and_std(name):
    """The channels' mean and standard deviation, of pixels in 0..1, that normalize the data set called `name`, or an
    unknown one, None.
    """
    return MEAN_STD.get(name, IMAGENET_MEAN_STD)


def trained_on(checkpoint):
    """The name of the data set and the image size that train.py or lincls.py recorded in a checkpoint; None and 224 if
    it is from other code.
    """
    settings = checkpoint.get("settings")
    if isinstance(settings, dict):
        name, image_size = settings.get("data_name"), settings.get("image_size")
        if isinstance(name, str) and isinstance(image_size, int):
            return name, image_size
    return None, 224


def open_train_and_val(name, folder, image_size=None, train=None):
    """Open the training images, unless given, and the validation images, with labels. Raises InputError also if their
    classes differ.
    """
    train = train or open_data_set(name, folder, "train", image_size)
    val = open_data_set(name, folder, "val", image_size)
    classes, others = train.images.classes, val.images.classes
    if classes != others:
        first = min(set(classes) ^ set(others))
        raise InputError(f"--data {folder or Path('data') / name}: train and val have different classes "
                         f"({len(classes)} and {len(others)}), {first!r} is only in "
                         f"{'train' if first in classes else 'val'}, make their folders the same")
    return train, val


def _image_folder(name, folder, split, labels):
    if not os.path.isdir(folder):       # also False if inside a folder that may not be searched
        raise InputError(f"--data {folder}: no such folder, or not readable, pass the one that contains "
                         + ("train/<class>/ and val/<class>/" if labels else "your images"))
    root = folder / split
    if not os.path.isdir(root):
        if name != "folder" or labels:
            raise InputError(f"--data {folder}: has no folder '{split}', it must contain {split}/<class>/<image files>"
                             + " (to pretrain on images without classes use --data_name folder)" * (name != "folder"))
        root = folder
    images = ImageFiles(root, labels)
    classes = {"imagenet1000": 1000, "imagenet100": 100}.get(name)
    if split == "train" and classes not in (None, len(images.classes)):
        log(f"=> note: {root} has {len(images.classes)} classes, not the {classes} of {name}; "
            "use --data_name folder for other images")
    return images


def _cifar(name, folder, split):
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    problem = "the download did not complete"
    if local_rank() == 0:
        try:
            kind(folder, download=True)     # does nothing if the files exist and are intact
        except (OSError, RuntimeError) as error:
            problem = error
    barrier()
    try:
        return kind(folder, train=split == "train")
    except (OSError, RuntimeError) as error:
        raise InputError(f"--data {folder}: has no {name}, and it cannot be downloaded ({problem}); put "
                         f"{kind.base_folder} from the archive into that folder, or use --data_name folder if it "
                         "contains image files") from error
