"""How far a small batch's gradient points away from that of the global loss."""

import math

import pytest
import torch
import torch.nn.functional as F

from scripts.gradient_bias import Passes, gradient, measure
from sogclr.loss import ContrastiveLoss, GlobalContrastiveLoss

N, TAU = 128, 0.1


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


@pytest.fixture
def visit(generator):
    """Images in a few clusters, their two views apart: index [N], projections [N, 2, 16]."""
    images = F.normalize(torch.randn(8, 16, generator=generator), dim=1).repeat_interleave(N // 8, dim=0)
    images = images + 0.2 * torch.randn(N, 16, generator=generator)
    z = images[:, None] + 0.1 * torch.randn(N, 2, 16, generator=generator)
    return torch.randperm(N, generator=generator), F.normalize(z, dim=2)


def global_gradient(visit):
    return gradient(GlobalContrastiveLoss(N, TAU, gamma=1.0), visit[1], torch.arange(N))


def test_bias_is_told_from_noise(generator):
    """The angle of the mean must come out right although every pass is mostly noise, and some images are left out."""
    truth = torch.randn(2000, 2, 8, generator=generator)
    across = torch.randn(2000, 2, 8, generator=generator)
    across *= truth.norm() / across.norm()
    across -= (across * truth).sum() / truth.square().sum() * truth
    mean = 3 * (truth + math.tan(math.radians(20)) * across)
    passes, noise = Passes(), mean.square().mean().sqrt() * 2
    for _ in range(10):
        present = (torch.rand(2000, generator=generator) < 0.9).float()
        passes.add((mean + noise * torch.randn(mean.shape, generator=generator)) * present[:, None, None], present)
    assert passes.against(truth) == pytest.approx((20, 2), rel=0.06)


def test_the_whole_data_set_is_without_bias_and_noise(visit, generator):
    """In one batch of all images the mean is the global gradient itself."""
    bias, noise = measure(GlobalContrastiveLoss(N, TAU, gamma=1.0), visit, N, global_gradient(visit), 4, generator)
    assert (bias, noise) == pytest.approx((0, 0), abs=0.05)


def test_simclr_comes_near_the_global_gradient_as_the_batch_grows(visit, generator):
    """Its bias must fall from batch to batch, and so must the noise."""
    truth = global_gradient(visit)
    (bias, noise), (bias_large, noise_large) = (
        measure(ContrastiveLoss(TAU), visit, size, truth, 20, generator) for size in (8, 64))
    assert bias > 1.2 * bias_large > 5
    assert noise > 3 * noise_large > 0


def test_with_the_true_u_a_small_batch_does_not_harm(visit, generator):
    """The paper's claim: where u is the score among all images, the mean gradient of the smallest batches is the global
    one. (Both views are the same here, so that an image has one score.) Without u it is not.
    """
    index, z = visit
    z = z[:, :1].expand(-1, 2, -1).contiguous()
    everything = GlobalContrastiveLoss(N, TAU, gamma=1.0)
    everything(*z.unbind(1), index)
    with_u = GlobalContrastiveLoss(N, TAU, gamma=1e-6)
    with_u.load_state_dict(everything.state_dict())
    truth = global_gradient((index, z))
    with_u, without = (measure(criterion, (index, z), 4, truth, 40, generator)[0]
                       for criterion in (with_u, GlobalContrastiveLoss(N, TAU, gamma=1.0)))
    assert with_u < 15
    assert without > 45
