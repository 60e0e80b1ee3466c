"""The batched color stage against torchvision's operations, and its parameters' distributions against the recipe."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

from sogclr import augment
from sogclr.augment import Augment, adjust_hue, color_jitter, gaussian_blur, jitter_parameters

B = 12


@pytest.fixture
def images():
    """Random images, including a gray one, a black one and one with saturated colors."""
    images = torch.rand(B, 3, 17, 23, generator=torch.Generator().manual_seed(0))
    images[0] = images[0, :1]
    images[1] = 0
    images[2] = (images[2] > 0.5).float()
    return images


def uniform(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_color_jitter_equals_torchvision(images):
    """Each image must get torchvision's operations, in its own order, with its own factors, to 1e-5."""
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(B)])
    factors = torch.cat([0.6 + 0.8 * uniform(B, 2), 0.8 + 0.4 * uniform(B, 1, seed=2),
                         0.2 * uniform(B, 1, seed=3) - 0.1], dim=1)
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    expected = images.clone()
    for i in range(B):
        for operation in order[i].tolist():
            expected[i] = operations[operation](expected[i], float(factors[i, operation]))
    assert (color_jitter(images, order, factors) - expected).abs().max() < 1e-5


def test_neutral_jitter_changes_nothing(images):
    """Factors 1, 1, 1, 0 must leave every image unchanged, in any order."""
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(B)])
    unchanged = color_jitter(images, order, torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(B, 4))
    assert (unchanged - images).abs().max() < 1e-6


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.05, 0.5])
def test_hue_equals_torchvision(images, shift):
    """Hue alone must equal torchvision's, to 1e-5."""
    expected = torch.stack([TF.adjust_hue(image, shift) for image in images])
    assert (adjust_hue(images, torch.full((B,), shift)) - expected).abs().max() < 1e-5


def test_blur_is_a_true_gaussian(images):
    """Each image must be convolved with the sampled Gaussian of its own sigma, edges reflected."""
    sigma = torch.linspace(0.1, 2.0, B)
    images = images[:, :, :, :17]
    blurred = gaussian_blur(images, sigma)
    for i in range(B):
        offsets = np.arange(-8, 9)
        kernel = np.exp(-offsets**2 / (2 * float(sigma[i]) ** 2))
        kernel /= kernel.sum()
        padded = np.pad(images[i].numpy().astype(np.float64), ((0, 0), (8, 8), (8, 8)), mode="reflect")
        rows = sum(k * padded[:, 8 + o:8 + o + 17] for k, o in zip(kernel, offsets, strict=True))
        expected = sum(k * rows[:, :, 8 + o:8 + o + 17] for k, o in zip(kernel, offsets, strict=True))
        assert np.abs(blurred[i].numpy() - expected).max() < 1e-5


def test_batch_equals_one_by_one():
    """An image's result must not depend on its neighbors in the batch, nor on the other view."""
    crops = torch.randint(0, 256, (2, B, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    uniforms = uniform(2, B, Augment.num_uniforms)
    stage = Augment((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), blur=True)
    together = stage(crops, uniforms)
    for view in range(2):
        assert torch.equal(together[view], stage(crops[view], uniforms[view]))
        alone = torch.cat([stage(crops[view, i:i + 1], uniforms[view, i:i + 1]) for i in range(B)])
        assert (together[view] - alone).abs().max() < 1e-5


def test_autocast_does_not_touch_the_pixels():
    """The arithmetic must be float32 even inside autocast, and `dtype` that of the result."""
    crops = torch.randint(0, 256, (B, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    uniforms = uniform(B, Augment.num_uniforms)
    mean_std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    outside = Augment(*mean_std, blur=True)(crops, uniforms)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Augment(*mean_std, blur=True)(crops, uniforms), outside)
        half = Augment(*mean_std, True, torch.bfloat16, torch.channels_last)(crops, uniforms)
    assert torch.equal(half, outside.bfloat16())
    assert half.is_contiguous(memory_format=torch.channels_last)


def test_normalization_uses_the_data_sets_statistics():
    """With uniforms that change nothing the result must be (x / 255 - mean) / std."""
    crops = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    uniforms = torch.full((4, Augment.num_uniforms), 0.999)       # neither jitter nor grayscale
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = TF.normalize(crops.float() / 255, mean, std)
    assert (Augment(mean, std, blur=False)(crops, uniforms) - expected).abs().max() < 1e-5


def uniformity(values, low, high):
    """The Kolmogorov-Smirnov distance of values from the uniform distribution on [low, high], in units of its
    1e-6 quantile for this many values: below 1 for a correct sampler.
    """
    ordered = (np.sort(np.asarray(values)) - low) / (high - low)
    n = len(ordered)
    distance = max((np.arange(1, n + 1) / n - ordered).max(), (ordered - np.arange(n) / n).max())
    return distance / np.sqrt(np.log(2 / 1e-6) / (2 * n))


def test_jitter_parameters_have_the_recipes_distribution():
    """p 0.8; brightness, contrast 0.6..1.4, saturation 0.8..1.2, hue -0.1..0.1, uniform; all 24 orders equally likely;
    separate per image. A wrong range or probability, or one sample for the whole batch, fails.
    """
    n = 20000
    order, factors = jitter_parameters(uniform(n, 9))
    applied = (factors != torch.tensor([1.0, 1.0, 1.0, 0.0])).any(1)
    assert abs(applied.float().mean() - 0.8) < 5 * (0.8 * 0.2 / n) ** 0.5
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert uniformity(factors[applied, column], low, high) < 1
        assert uniformity(factors[applied, column], low * 0.9, high * 0.9) > 1    # the test can fail
    counts = np.unique(order.numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert np.abs(counts - n / 24).max() < 5 * (n / 24) ** 0.5
    correlation = np.corrcoef(torch.cat([factors[applied], order[applied].float()], 1).T.numpy())
    assert np.abs(correlation[:4, :4] - np.eye(4)).max() < 0.05
    assert np.abs(correlation[:4, 4:]).max() < 0.05


def test_grayscale_and_blur_have_the_recipes_distribution(monkeypatch):
    """Grayscale p 0.2; blur sigma uniform in 0.1..2."""
    n, seen = 5000, []
    monkeypatch.setattr(augment, "gaussian_blur", lambda images, sigma: seen.append(sigma) or images)
    crops = torch.randint(0, 256, (1, 3, 1, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = Augment((0.0,) * 3, (1.0,) * 3, blur=True)(crops.expand(n, -1, -1, -1), uniform(n, Augment.num_uniforms))
    gray = (out - out[:, :1]).abs().amax(dim=(1, 2, 3)) < 1e-6
    assert abs(gray.float().mean() - 0.2) < 5 * (0.2 * 0.8 / n) ** 0.5
    assert uniformity(seen[0], 0.1, 2.0) < 1
