"""The image files in a folder, listed so that 14 million of them take little memory, and none of it twice."""

import functools
import hashlib
import heapq
import os
import time
import warnings
from array import array
from collections import Counter

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from sogclr import InputError, one_line, printable
from sogclr.distributed import log

# Folders that systems add, besides those whose names begin with a dot.
_LITTER = (b"__MACOSX", b"@eaDir", b"#recycle", b"@Recycle", b"$RECYCLE.BIN", b"System Volume Information",
           b"lost+found")
_ENDINGS = tuple(map(str.encode, IMG_EXTENSIONS))
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262       # tags of TIFF files


class ImageFiles:
    """`files[i] -> (RGB image, label)` for every image file in a tree, in the order of torchvision's ImageFolder.

    root: the folder; labels: whether its subfolders are classes (else every image has label 0, and images may be
    anywhere in it); flag: what named the folder, for messages. Hidden files and folders, those that systems add, and
    links to folders above or that are listed already (in the same class) are left out, which is logged. Raises
    InputError if there are no images, a class has none, or a folder cannot be read.

    The names are one byte array and the rest are number arrays. Forked workers share their pages with the parent and,
    with no reference counts to update, never copy them; each would copy a list of 14 million Python strings. Memory for
    N images with names of n bytes: (n + 12) N bytes, so 54 MB for ImageNet-1K (1.28 M, n = 30) and 600 MB for
    ImageNet-21K (14 M).
    """

    def __init__(self, root, labels, flag="--data"):
        self.root, left_out = os.fsencode(root), _LeftOut()
        prefix = len(os.path.join(self.root, b""))      # one separator, which the root may already end in
        above = _with_parents(real := os.path.realpath(self.root))
        if not labels:
            above.remove(real)      # where the listing starts
        names, ends, targets = bytearray(), array("q", [0]), array("i")
        try:
            self.classes = sorted(_classes(self.root, above, left_out)) if labels else ["."]
            if not self.classes:
                raise InputError(f"{flag} {root}: has no class folders, it must contain <class>/<image files>")
            last_line = time.monotonic()
            for label, folder in enumerate(self.classes):
                before = len(targets)
                start = os.path.join(self.root, os.fsencode(folder)) if labels else self.root
                for path in _image_paths(start, above, left_out):
                    names += path[prefix:]
                    ends.append(len(names))
                    targets.append(label)
                    if not len(targets) % 4096 and time.monotonic() - last_line > 5:
                        last_line = time.monotonic()
                        log(f"=> listing {root}: {len(targets)} images, folder {label + 1} of {len(self.classes)}")
                if len(targets) == before:
                    raise InputError(f"{flag} {root}: contains no images" + (f" of class {folder!r}" if labels else "")
                                     + f" (files named {', '.join(IMG_EXTENSIONS)})"
                                     + "".join(f"; {line}" for line in left_out.lines(0)))
        except OSError as error:
            raise InputError(f"{flag} {root}: cannot be listed: {os.fsdecode(error.filename)}: {error.strerror}"
                             ) from error
        for line in left_out.lines(len(targets)):
            log(f"=> note: {root}: {line}")
        self.names = np.frombuffer(names, dtype=np.uint8)
        self.ends = np.frombuffer(ends, dtype=np.int64)
        self.targets = np.frombuffer(targets, dtype=np.int32)

    def __len__(self):
        return len(self.targets)

    @functools.cached_property
    def digest(self):
        """16 hexadecimal digits that change with any image's name, class or position, but not with file contents."""
        digest = hashlib.sha256()
        for part in (self.names, self.ends, self.targets):
            digest.update(part)
        return digest.hexdigest()[:16]

    def path(self, i):
        """The file's path as bytes, since names need not be UTF-8."""
        return os.path.join(self.root, self.names[self.ends[i]:self.ends[i + 1]].tobytes())

    def __getitem__(self, i):
        """Raises InputError if the file is not a readable image. Pillow's warnings are given with the file's name."""
        path = self.path(i)
        name = printable(path)
        try:
            with open(path, "rb") as file, warnings.catch_warnings(record=True) as caught:
                for category in (UserWarning, RuntimeWarning):
                    warnings.simplefilter("always", category)
                image = _to_rgb(Image.open(file))
        except Exception as error:      # a damaged file can make a decoder raise anything
            reason = getattr(error, "strerror", None) or str(error) or repr(error)
            if isinstance(error, UnidentifiedImageError):
                reason = "empty, or of a format that Pillow does not know"
            raise InputError(f"{name}: not a readable image ({reason.splitlines()[0]})") from error
        for warning in caught:
            warnings.warn(f"{name}: {one_line(warning.message)}", stacklevel=2)
        return image, int(self.targets[i])


def _to_rgb(image):
    """Decode a PIL image as 8-bit RGB. 16-bit gray is scaled, since Pillow would clip it. Raises ValueError for pixels
    of 32 bits, whose range is unknown.
    """
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        tags = getattr(image, "tag_v2", {})         # of a TIFF, which can also have 12 bits, or 0 for white
        levels = np.asarray(image) / (2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1)
        levels = 1 - levels if tags.get(_PHOTOMETRIC) == 0 else levels
        image = Image.fromarray((255 * levels).round().clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}, whose range is unknown: convert it to 8 bits or unsigned 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")       # the same colors; Pillow warns about converting directly
    return image if image.mode == "RGB" else image.convert("RGB")


class _LeftOut:
    """Counts what a listing leaves out, by name, and files that are not images, by ending."""

    def __init__(self):
        self.hidden, self.repeated, self.broken, self.beside, self.endings = (Counter() for _ in range(5))

    def lines(self, images):
        """What the user should know about a listing with this many images."""
        for names, what in ((self.hidden, "hidden or system files and folders"),
                            (self.repeated, "links to folders above it or listed already"),
                            (self.broken, "links that lead nowhere"),
                            (self.beside, "images beside the class folders")):
            if names:
                yield f"left out {what} ({names.total()}, such as '{printable(min(names))}')"
        if 10 * self.endings.total() > images:
            counts = ", ".join(f"{count} {printable(ending) or 'without ending'}"
                               for ending, count in self.endings.most_common(5)) + ", ..." * (len(self.endings) > 5)
            yield (f"{self.endings.total()} files are not read as images ({counts}), only those named "
                   + ", ".join(IMG_EXTENSIONS))


def _scan(folder, left_out):
    """What is directly in a folder: its subfolders, [(path, whether it is a link)], and the names of its image files,
    all in bytes.
    """
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            name, link = entry.name, entry.is_symlink()
            is_folder = os.path.isdir(entry.path) if link else entry.is_dir()
            # A pipe would keep its reader waiting.
            is_image = not is_folder and name.lower().endswith(_ENDINGS) and (link or entry.is_file())
            if name.startswith(b".") or name in _LITTER:
                if is_folder or is_image:
                    left_out.hidden[name] += 1
            elif is_folder:
                folders.append((entry.path, link))
            elif is_image:
                files.append(name)
            elif link and not os.path.exists(entry.path):
                left_out.broken[name] += 1
            else:
                left_out.endings[os.path.splitext(name)[1].lower()] += 1
    return folders, files


def _classes(root, above, left_out):
    """Names of the subfolders. A link to a folder above is not a class."""
    folders, images = _scan(root, left_out)
    left_out.beside.update(images)
    for path, _ in folders:
        if os.path.realpath(path) in above:
            left_out.repeated[os.path.basename(path)] += 1
        else:
            yield os.fsdecode(os.path.basename(path))


def _image_paths(start, above, left_out):
    """Paths of the image files below a folder, as bytes, in ImageFolder's order.

    Follows links, but enters each folder once and none of those above, where a link would lead back here: images would
    be listed many times, or without end. Folders that are there without a link come first.
    """
    entered, found, links = set(above), [], [start]
    while links:
        link = heapq.heappop(links)
        folders = [(link, os.path.realpath(link))]
        while folders:
            folder, real = folders.pop()
            if real in entered:
                left_out.repeated[os.path.basename(folder)] += 1
                continue
            entered.add(real)
            inside, files = _scan(folder, left_out)
            found.append((folder, files))
            for path, is_link in inside:
                if is_link:
                    heapq.heappush(links, path)
                else:
                    folders.append((path, os.path.join(real, os.path.basename(path))))
    for folder, files in sorted(found):
        for name in sorted(files):
            yield os.path.join(folder, name)


def _with_parents(path):
    """The path itself and all folders above it."""
    paths = {path}
    while (parent := os.path.dirname(path)) != path:
        paths.add(path := parent)
    return paths
