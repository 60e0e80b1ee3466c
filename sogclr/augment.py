"""The color augmentations of SimCLR, for a whole batch at once on the device, with separate parameters per image.

Worker processes decode and crop (`sogclr.loader`) and return uint8 crops with the uniform random numbers that determine
the rest. Every operation here is a branch-free formula over a batch, so it runs the same on CPU and GPU and never
synchronizes with the device. Recipe: SimCLR / BYOL as in the authors' release.
"""

import math

import torch
import torch.nn as nn
import torchvision.transforms as T
from PIL import ImageFilter

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
P_JITTER, P_GRAYSCALE = 0.8, 0.2
SIGMA = 0.1, 2.0        # of the blur, in pixels
CPU_PIXELS = 2**16      # in a part of a batch
_GRAYSCALE = 0.2989, 0.587, 0.114


class Normalize(nn.Module):
    """Normalize uint8 crops [B, 3, H, W] to float32 by the data set's mean and standard deviation per channel."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images):
        return (images.float() / 255 - self.mean) / self.std

    def undo(self, images):
        """Normalized images [B, 3, H, W] -> float32 in [0, 1], for display."""
        return (images.float() * self.std + self.mean).clamp(0, 1)


class Augment(nn.Module):
    """Color jitter, grayscale, blur and normalization of crops from the loader.

    images: uint8 [..., B, 3, S, S], already flipped; uniforms: float32 [..., B, num_uniforms] uniform in [0, 1); on any
    device. Returns [..., B, 3, S, S], normalized, on the device of this module. Float images come from `pil_recipe` and
    are already augmented.
    blur: whether to blur (the authors do not at 32 pixels); dtype, memory_format: of the result.
    Computes in float32, but in float16 for a 16-bit result on a GPU, where memory traffic takes the time: that is off
    by 0.04 gray levels on average and by less than one at most (photos); bfloat16 rounds by 0.15 on average.
    """

    num_uniforms = 11

    def __init__(self, mean, std, blur, dtype=torch.float32, memory_format=torch.contiguous_format):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.blur, self.dtype, self.memory_format = blur, dtype, memory_format

    @torch.no_grad()
    def forward(self, images, uniforms):
        device, shape = self.normalize.mean.device, images.shape
        images = images.flatten(0, -4).to(device, non_blocking=True)
        if not images.is_floating_point():
            uniforms = uniforms.flatten(0, -2).to(device, non_blocking=True)
            # A GPU wants few kernels, a CPU what fits into its cache.
            n = len(images) if images.is_cuda else max(1, CPU_PIXELS // shape[-1]**2)
            parts = zip(images.split(n), uniforms.split(n), strict=True)
            with torch.autocast(device.type, enabled=False):
                images = [self.augmented(*part) for part in parts]
            images = images[0] if len(images) == 1 else torch.cat(images)
        return images.to(self.dtype, memory_format=self.memory_format).unflatten(0, shape[:-3])

    def augmented(self, images, uniforms):
        """[B, 3, S, S], [B, num_uniforms] -> [B, 3, S, S]"""
        dtype = torch.float16 if images.is_cuda and self.dtype.itemsize == 2 else torch.float32
        # Contiguous channels, since most operations are per channel.
        images = images.to(dtype, memory_format=torch.contiguous_format) / 255
        order, factors = jitter_parameters(uniforms[:, :9])
        images = color_jitter(images, order, factors.to(dtype))
        images = torch.lerp(images, grayscale(images), (uniforms[:, 9] < P_GRAYSCALE).to(images)[:, None, None, None])
        if self.blur:
            images = gaussian_blur(images, SIGMA[0] + (SIGMA[1] - SIGMA[0]) * uniforms[:, 10])
        return (images - self.normalize.mean.to(dtype)) / self.normalize.std.to(dtype)


def jitter_parameters(uniforms):
    """Uniforms [B, 9] -> order [B, 4] of the operations (0 brightness, 1 contrast, 2 saturation, 3 hue) and their
    factors [B, 4], which change nothing if no jitter is applied (probability 1 - P_JITTER).
    """
    order = uniforms[:, :4].argsort(dim=1)
    applied = uniforms[:, 4:5] < P_JITTER
    brightness, contrast, saturation, hue = (applied * (2 * uniforms[:, 5:9] - 1)).unbind(1)       # each in -1..1
    return order, torch.stack([1 + BRIGHTNESS * brightness, 1 + CONTRAST * contrast,
                               1 + SATURATION * saturation, HUE * hue], dim=1)


def color_jitter(images, order, factors):
    """torchvision's ColorJitter with the given parameters for each image.

    images: [B, 3, H, W] in [0, 1]; order: [B, 4] the operation at each position; factors: [B, 4] by operation.

    Brightness, contrast and saturation are one formula, a blend with black, the mean gray, or the grayscale image. Hue
    is the most expensive, so it runs once for all images: three blends, then hue, then three blends, which change
    nothing if an image has no operation left.
    """
    # The operation at each position, [B, 4, 1, 1, 1], for all positions at once: on a GPU a small batch is bound by
    # kernel launches.
    operation, factor = (values[..., None, None, None] for values in (order, factors.gather(1, order)))
    contrast, saturation = (operation == 1).to(factor), (operation == 2).to(factor)
    hue_at = (operation == 3).int().argmax(1, keepdim=True)
    place = torch.arange(4, device=order.device).view(4, 1, 1, 1)
    before, after = torch.where(place < hue_at, factor, 1.0), torch.where(place > hue_at, factor, 1.0)
    for k in range(3):
        images = _blend(images, before[:, k], contrast[:, k], saturation[:, k])
    images = adjust_hue(images, factors[:, 3])
    for k in range(1, 4):
        images = _blend(images, after[:, k], contrast[:, k], saturation[:, k])
    return images


def _blend(images, factor, contrast, saturation):
    """Adjust brightness, or `contrast` or `saturation` for images with a 1 there (else 0), by a factor, where 1 changes
    nothing. All but the images are [B, 1, 1, 1].
    """
    gray = grayscale(images)
    mean = gray.mean(dim=(1, 2, 3), keepdim=True)
    other = torch.addcmul(mean * contrast, gray, saturation)
    return torch.lerp(other, images, factor).clamp_(0, 1)               # exactly `images` where factor is 1


def grayscale(images):
    """[B, 3, H, W] -> grayscale [B, 1, H, W], with torchvision's weights."""
    r, g, b = images.unbind(1)
    return (_GRAYSCALE[0] * r).add_(g, alpha=_GRAYSCALE[1]).add_(b, alpha=_GRAYSCALE[2])[:, None]


def adjust_hue(images, shift):
    """Rotate the hue of [B, 3, H, W] in [0, 1] by shift [B] turns, in HSV as torchvision does."""
    r, g, b = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = hue + 6 * shift[:, None, None]                                        # in sixths of a turn
    k = (hue[:, None] + torch.arange(5, 0, -2, device=hue.device)[:, None, None]) % 6      # [B, 3, H, W]
    return torch.addcmul(value[:, None], chroma[:, None], torch.minimum(k, 4 - k).clamp_(0, 1), value=-1)


def gaussian_blur(images, sigma):
    """Blur [B, 3, S, S] by Gaussians of sigma [B] pixels, truncated at 4 times the largest sigma, edges reflected.

    Computed as two matrix products, since each image has its own matrix for rows and columns.
    """
    matrix = _blur_matrix(images.shape[-1], sigma).to(images)[:, None]
    return matrix @ images @ matrix.mT


def _blur_matrix(size, sigma):
    """[B, size, size]: row i holds the pixel weights for blurred pixel i."""
    reach = min(math.ceil(4 * SIGMA[1]), size - 1)
    offsets = torch.arange(-reach, reach + 1, device=sigma.device)
    kernel = torch.exp(-offsets**2 / (2 * sigma[:, None] ** 2))
    kernel = kernel / kernel.sum(dim=1, keepdim=True)                           # [B, 2 reach + 1]
    source = torch.arange(size, device=sigma.device)[:, None] + offsets         # [size, 2 reach + 1]
    source = source.abs()                                                       # reflected at the first pixel
    source = (size - 1) - ((size - 1) - source).abs()                           # and at the last
    matrix = sigma.new_zeros(len(sigma), size, size)
    return matrix.scatter_add_(2, source.expand(len(sigma), -1, -1), kernel[:, None].expand(-1, size, -1))


class _PILBlur:
    """The authors' blur: Pillow's approximation of a Gaussian, with sigma uniform in SIGMA."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(*SIGMA))))


def pil_recipe(data, crop_min):
    """The authors' augmentation as composed of torchvision transforms per image: the reference for the batched one
    (`--augment pil`). data: an `ImageSet`. PIL image -> float32 [3, size, size].
    """
    jitter = T.ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUE)
    return T.Compose([T.RandomResizedCrop(data.image_size, scale=(crop_min, 1.0)),
                      T.RandomApply([jitter], p=P_JITTER),
                      T.RandomGrayscale(p=P_GRAYSCALE),
                      *([_PILBlur()] if data.blur else []),
                      T.RandomHorizontalFlip(),
                      T.ToTensor(),
                      T.Normalize(data.mean, data.std)])
