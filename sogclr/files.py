"""The image files in a folder, listed so that 14 million of them take little memory, and none of it twice."""

import hashlib
import os
import time
from array import array

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from sogclr import InputError
from sogclr.distributed import log


class ImageFiles:
    """`files[i] -> (RGB image, label)` for every image file in a tree, in the order of torchvision's ImageFolder.

    root: the folder; labels: whether its subfolders are classes (else every image has label 0, and images may be
    anywhere in it). Raises InputError if there are no images, or a class has none.

    The names are one byte array and the rest are number arrays. Forked workers share their pages with the parent and,
    with no reference counts to update, never copy them; each would copy a list of 14 million Python strings. Memory for
    N images with names of n bytes: (n + 12) N bytes, so 54 MB for ImageNet-1K (1.28 M, n = 30) and 600 MB for
    ImageNet-21K (14 M).
    """

    def __init__(self, root, labels):
        self.root = os.fsencode(root)
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if labels else ["."]
        if not self.classes:
            raise InputError(f"--data {root}: has no class folders, it must contain <class>/<image files>")
        names, ends, targets = bytearray(), array("q", [0]), array("i")
        last_line = time.monotonic()
        for label, folder in enumerate(self.classes):
            before = len(targets)
            for path in _image_paths(os.path.join(self.root, os.fsencode(folder)) if labels else self.root):
                names += path[len(self.root) + 1:]
                ends.append(len(names))
                targets.append(label)
                if not len(targets) % 4096 and time.monotonic() - last_line > 5:
                    last_line = time.monotonic()
                    log(f"=> listing {root}: {len(targets)} images, folder {label + 1} of {len(self.classes)}")
            if len(targets) == before:
                raise InputError(f"--data {root}: contains no images" + (f" of class '{folder}'" if labels else "")
                                 + f" (files named {', '.join(IMG_EXTENSIONS)})")
        self.names = np.frombuffer(names, dtype=np.uint8)
        self.ends = np.frombuffer(ends, dtype=np.int64)
        self.targets = np.frombuffer(targets, dtype=np.int32)

    def __len__(self):
        return len(self.targets)

    @property
    def digest(self):
        """16 hexadecimal digits that change with any image's name, class or position, but not with file contents."""
        return hashlib.sha256(self.names.tobytes() + self.ends.tobytes() + self.targets.tobytes()).hexdigest()[:16]

    def path(self, i):
        """The file's path as bytes, since names need not be UTF-8."""
        return os.path.join(self.root, self.names[self.ends[i]:self.ends[i + 1]].tobytes())

    def __getitem__(self, i):
        """Raises InputError if the file is not a readable image."""
        path = self.path(i)
        try:
            with open(path, "rb") as file:
                image = Image.open(file)
                image.load()
                if image.mode == "P" and "transparency" in image.info:
                    image = image.convert("RGBA")       # the same colors; Pillow warns about converting directly
                return image if image.mode == "RGB" else image.convert("RGB"), int(self.targets[i])
        except Exception as error:      # a damaged file can make a decoder raise anything
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or repr(error)
            name = path.decode("utf-8", "backslashreplace")
            raise InputError(f"{name}: not a readable image ({reason.replace(name, 'it').splitlines()[0]}), "
                             "remove or replace it, or use --bad-images skip") from error


def _image_paths(folder):
    """Paths of the image files below a folder, as bytes, in ImageFolder's order. Follows links."""
    for parent, _, files in sorted(os.walk(folder, followlinks=True), key=lambda entry: entry[0]):
        for name in sorted(files):
            if os.fsdecode(name).lower().endswith(IMG_EXTENSIONS):
                yield os.path.join(parent, name)
