"""The built-in data set of generated images, for a first run without any download.

The class of an image is its figure (disc, triangle, square, cross, ring) and the figure's texture (plain, striped).
Colors, position, size, rotation and background are random and independent of it, so that what survives the
augmentations is what determines the class.
"""

import numpy as np
from PIL import Image

FIGURES = ("disc", "triangle", "square", "cross", "ring")
TEXTURES = ("plain", "striped")
SIZE = 40               # pixels per side; views are cropped from it
LENGTHS = {"train": 2500, "val": 1000}


class Shapes:
    """`shapes[i] -> (PIL image, label)`, like torchvision's data sets. The same images on every machine.

    split: "train" or "val".
    """

    def __init__(self, split):
        n = LENGTHS[split]
        self.classes = [f"{texture} {figure}" for figure in FIGURES for texture in TEXTURES]
        self.targets = [i % len(self.classes) for i in range(n)]
        self.data = draw(np.array(self.targets), np.random.default_rng(list(LENGTHS).index(split)))

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return Image.fromarray(self.data[i]), self.targets[i]


def draw(labels, rng):
    """labels [N] -> images [N, SIZE, SIZE, 3] uint8."""
    n = len(labels)

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    angle, radius = uniform(0, 2 * np.pi, 1, 1), uniform(0.45, 0.75, 1, 1)
    shift_x, shift_y = uniform(-0.25, 0.25, 1, 1), uniform(-0.25, 0.25, 1, 1)
    # Two colors for the figure and two for the background, of any hue, well separated in brightness.
    colors = uniform(0, 1, 4, 3)
    light = uniform(0, 0.35, 4, 1)
    figure_is_light = rng.random((n, 1, 1)) < 0.5
    bright = np.concatenate([np.repeat(figure_is_light, 2, 1), np.repeat(~figure_is_light, 2, 1)], axis=1)
    colors = np.where(bright, 1 - 0.45 * colors, 0.45 * colors) * (1 - 0.3 * light)
    stripes = uniform(0, np.pi, 1, 1), uniform(7, 9, 1, 1)                                      # angle, frequency
    slope = uniform(0, 2 * np.pi, 1, 1), uniform(0.5, 2.5, 1, 1), uniform(0, 2 * np.pi, 1, 1)   # and phase

    random = labels, angle, radius, shift_x, shift_y, colors, *stripes, *slope
    images = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for start in range(0, n, 50):       # few at a time, so that they stay in the processor's cache
        part = slice(start, start + 50)
        image = _paint(*(values[part] for values in random)) + rng.normal(0, 0.03, images[part].shape)
        images[part] = np.clip(image, 0, 1) * 255
    return images


def _paint(labels, angle, radius, shift_x, shift_y, colors, stripes_angle, stripes_frequency, *slope):
    """Images without noise in [0, 1], from random parameters. Coordinates run from -1 to 1 over the image."""
    figure, texture = labels // len(TEXTURES), labels % len(TEXTURES)
    axis = ((np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE) * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")                       # [SIZE, SIZE]

    # The figure's own coordinates: shifted, rotated and scaled, so that it extends to about 1.
    dx, dy = x - shift_x, y - shift_y
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / radius              # [N, SIZE, SIZE]
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / radius
    distance = np.choose(figure[:, None, None], _distances(u, v))       # negative inside
    pixel = 2 / SIZE / radius
    inside = np.clip(0.5 - distance / pixel, 0, 1)[..., None]

    stripes = np.where(texture[:, None, None] == 1, _stripes(u, v, stripes_angle, stripes_frequency), 0)
    front = _mix(colors[:, 0], colors[:, 1] * 0.3 + 0.7 * (1 - colors[:, 0]), stripes)
    back = _mix(colors[:, 2], colors[:, 3], _stripes(x, y, *slope))
    return inside * front + (1 - inside) * back


def _distances(u, v):
    """Approximate distance of each point from each figure's edge, in the order of FIGURES."""
    r = np.hypot(u, v)
    half = np.sqrt(3) / 2
    triangle = np.maximum(np.maximum(half * u + 0.5 * v, -half * u + 0.5 * v), -v) - 0.5
    square = np.maximum(abs(u), abs(v)) - 0.72
    cross = np.minimum(np.maximum(abs(u) - 0.95, abs(v) - 0.27), np.maximum(abs(u) - 0.27, abs(v) - 0.95))
    return r - 0.82, triangle, square, cross, abs(r - 0.7) - 0.22


def _stripes(u, v, angle, frequency, phase=0.0):
    """A wave between 0 and 1 across the plane."""
    return 0.5 + 0.5 * np.sin(frequency * (np.cos(angle) * u + np.sin(angle) * v) * 1.5 + phase)


def _mix(a, b, fraction):
    """Blend colors a and b [N, 3] by fraction [N, SIZE, SIZE] -> [N, SIZE, SIZE, 3]."""
    return a[:, None, None] + (b - a)[:, None, None] * fraction[..., None]
