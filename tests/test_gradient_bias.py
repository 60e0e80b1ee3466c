"""How far a small batch's gradient points away from that of the global loss."""

import argparse
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import newest

from scripts.experiments import gradient_bias
from scripts.experiments.gradient_bias import agreement, batches, bias_and_noise, gradient, log_scores, measure
from sogclr import checkpoint
from sogclr.loss import ContrastiveLoss, GlobalContrastiveLoss

N, TAU = 128, 0.1


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


@pytest.fixture
def z(generator):
    """Images in a few clusters, with distinct views: projections [N, 2, 16]."""
    images = F.normalize(torch.randn(8, 16, generator=generator), dim=1).repeat_interleave(N // 8, dim=0)
    images = images + 0.2 * torch.randn(N, 16, generator=generator)
    z = images[:, None] + 0.1 * torch.randn(N, 2, 16, generator=generator)
    return F.normalize(z, dim=2)


def global_gradient(z):
    return gradient(GlobalContrastiveLoss(N, TAU, gamma=1.0), z, torch.arange(N))


def sogclr(gamma):
    return lambda: GlobalContrastiveLoss(N, TAU, gamma)


def test_bias_is_separated_from_noise(generator):
    """The angle of the mean must be right although every pass is mostly noise, with an error that reflects how much of
    that is left.
    """
    truth, across = torch.randn(2, 30_000, generator=generator)
    across -= (across @ truth) / (truth @ truth) * truth
    mean = 3 * (truth + math.tan(math.radians(20)) * across * truth.norm() / across.norm())
    noise = 2 * mean.square().mean().sqrt()
    passes = (mean + noise * torch.randn(10, len(mean), generator=generator) for _ in range(40))
    bias, error, ratio = torch.tensor([bias_and_noise(gradients, truth) for gradients in passes]).T
    assert bias.mean().item() == pytest.approx(20, abs=0.5)
    assert ratio.mean().item() == pytest.approx(2, rel=0.02)
    assert error.mean().item() == pytest.approx(bias.std().item(), rel=0.4)


def test_every_image_counts_once_per_pass(generator):
    """Also if the batch size does not divide their number, and every batch must be full, of different images."""
    cut = list(batches(N, 50, generator))
    assert [len(rows.unique()) for rows, _ in cut] == 3 * [50]
    assert sorted(torch.cat([rows[:new] for rows, new in cut]).tolist()) == list(range(N))


def test_the_whole_data_set_is_without_bias_and_noise(z, generator):
    """In one batch of all images the mean is the global gradient itself."""
    figures = measure(sogclr(1.0), [], z, N, global_gradient(z), 4, generator)
    assert figures == pytest.approx((0, 0, 0), abs=0.05)


def test_simclr_approaches_the_global_gradient_as_the_batch_grows(z, generator):
    """Bias and noise must decrease from batch size to batch size."""
    (bias, _, noise), (bias_large, _, noise_large) = (
        measure(lambda: ContrastiveLoss(TAU), [], z, size, global_gradient(z), 20, generator) for size in (8, 64))
    assert bias > 1.2 * bias_large > 5
    assert noise > 3 * noise_large > 0


def test_with_u_of_many_visits_a_small_batch_does_no_harm(z, generator):
    """The paper's claim: where u has become the score among all images, the mean gradient of small batches must be the
    global one. (Both views are the same here, so that an image has one score.) Without u it is not.
    """
    z = z[:, :1].expand(-1, 2, -1).contiguous()
    with_u, without = (measure(sogclr(gamma), visits, z, 8, global_gradient(z), 10, generator)[0]
                       for gamma, visits in ((0.05, 40 * [z]), (1.0, [])))
    assert with_u < 0.3 * without
    assert without > 25


def test_images_that_u_has_not_seen_are_left_out(z):
    """A u equal to the scores must agree with them, also where it is not yet known for some images."""
    log_u = log_scores(z, TAU) + math.log(2)
    log_u[5:20] = -math.inf
    line = agreement(log_u, z, TAU)
    assert "correlation of the logarithms 1.00" in line
    assert line.endswith("u / g 2.00")


def network_of(path):
    args = argparse.Namespace(checkpoint=path, data=None, batch_sizes=[20], images=20, workers=1)
    saved = checkpoint.load(path, "CHECKPOINT", ("epoch", "state_dict", "settings"))
    return gradient_bias.Network(args, saved, torch.device("cpu"))


@pytest.mark.slow
def test_gradient_bias_of_a_checkpoint(pretrained, imagenet, tmp_path, monkeypatch, capsys):
    """It must show each loss at each batch size; with one batch of all images neither SogCLR's gradient nor the score
    with BatchNorm's batch statistics is off. GCL, and how far u agrees with g, must be those of their definitions.
    Invalid input gives one line.
    """
    def bias(*args):
        monkeypatch.setattr(sys, "argv", ["gradient_bias.py", *map(str, args)])
        gradient_bias.main()
        return [re.split(r" *\| *", line) for line in capsys.readouterr().out.splitlines()]

    path = newest(pretrained[1])
    saved = torch.load(path, weights_only=True)
    few = "--images", 20, "--visits", 3, "--passes", 3, "-j", 1
    _, head, _, *rows, _, (gcl,), (u,), remark = bias(path, "--batch-sizes", 5, 20, "--gamma", 1, 0.2, *few)
    assert head == ["", "loss", "`--t`", "`--gamma`", "batch 5", "batch 20", ""]
    assert [row[1:4] for row in rows] == [["SimCLR", "0.1", ""], ["DCL", "0.1", "1"], ["SogCLR", "0.1", "0.2"],
                                          ["g within a batch / among all", "0.1", ""]]
    assert all(re.fullmatch(r"\d+\.\d°, \d+\.\d\d", cell) for row in rows[:3] for cell in row[4:6])
    assert rows[1][5] == "0.0°, 0.00"
    assert rows[2][5] != rows[1][5]         # u has seen other views
    assert float(rows[3][4]) < float(rows[3][5]) == 1
    a, b = network_of(path).project(2, 20).unbind(1)
    others = ~torch.eye(20, dtype=torch.bool)
    g = [torch.cat([(x @ y.T / 0.1).exp()[others].view(20, 19) for y in (a, b)], 1).mean(1) for x in (a, b)]
    expected = (0.1 * (g[0] * g[1]).log() - 2 * (a * b).sum(1)).mean().item()
    printed = re.fullmatch(r"GCL, with all 20 images: (\S+) at --t 0.1", gcl)[1]
    assert float(printed) == pytest.approx(expected, abs=1e-4)
    chosen = np.sort(np.random.default_rng(0).permutation(24)[:20])
    log_u, log_g = (np.log(x.numpy()) for x in (saved["u"][chosen, 0], (g[0] + g[1]) / 2))
    assert re.findall(r"-?\d+\.\d\d", u.partition(":")[2]) == [f"{value:.2f}" for value in (
        np.corrcoef(log_u, log_g)[0, 1], log_u.std(ddof=1), log_g.std(ddof=1), np.exp((log_u - log_g).mean()))]
    assert remark[0].startswith("20 images, 3 visits, 3 passes; ")

    foreign, other = tmp_path / "foreign.pth.tar", tmp_path / "other.pth.tar"
    torch.save({"epoch": 1, "state_dict": {}}, foreign)
    torch.save({"epoch": 1, "state_dict": {}, "settings": {"lr": 0.1}}, other)
    for args, message in (((path, "--batch-sizes", 25), "--batch-sizes 25: only 24 images are used"),
                          ((path, "--data", imagenet / "val"), "has no folder 'train'"),
                          ((foreign,), "lacks settings"), ((other,), "does not record how it was trained")):
        with pytest.raises(SystemExit, match="2"):
            bias(*args)
        assert message in capsys.readouterr().err
