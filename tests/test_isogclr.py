"""The robust loss against slow NumPy loops, and the mathematical properties of its temperatures."""

import math
import weakref

import numpy as np
import pytest
import torch
from test_loss import gap, reference, relative_gap, run, unit, views

from sogclr.isogclr import RobustGlobalContrastiveLoss
from sogclr.loss import GlobalContrastiveLoss


def scores_of(x, i, v):
    """The similarities of view v of image i to the views of all other images. x: {view: unit rows}"""
    return np.array([x[v][i] @ x[w][j] for j in range(len(x[v])) if j != i for w in x])


def unit_views(z1, z2):
    return {v: np.array([unit(row) for row in z.detach().numpy()]) for v, z in (("a", z1), ("b", z2))}


@pytest.mark.parametrize(("temperature", "gamma", "rho", "eta", "beta"), [
    (0.125, 0.9, 0.3, 0.01, 0.9), (0.25, 0.3, 1.0, 0.2, 0.5), (0.25, 1.0, 0.6, 0.5, 1.0)])
def test_equals_the_papers_formulas_over_many_steps(temperature, gamma, rho, eta, beta):
    """Loss, gradient of both views, u, v, tau and the monitored value must equal the loops over 35 steps, to 1e-10."""
    N, B, tau_min, tau_max = 30, 8, 0.0625, 0.5     # exact in float32, as is where they start
    criterion = RobustGlobalContrastiveLoss(N, temperature, gamma, rho, tau_min, tau_max, eta, beta).double()
    rng, u, tau, v, clipped = np.random.default_rng(7), {}, dict.fromkeys(range(N), temperature), np.zeros(N), set()
    for step in range(35):
        index = torch.from_numpy(rng.choice(N, B, replace=False))
        z1, z2 = views(B, 5, seed=step)
        loss, grad1, grad2, u, scores = reference(*(z.detach().numpy() for z in (z1, z2)), index, u, tau, gamma)
        ours = run(criterion, z1, z2, index)
        x = unit_views(z1, z2)
        robust = np.mean([sum(tau[image] * (math.log(U) + rho) for U, _ in scores[image]) - 2 * x["a"][k] @ x["b"][k]
                          for k, image in enumerate(scores)])
        for image, of_views in scores.items():
            G = np.mean([math.log(U) + rho - mean_ws / tau[image] for U, mean_ws in of_views])
            v[image] = (1 - beta) * v[image] + beta * G
            tau[image] = min(max(tau[image] - eta * v[image], tau_min), tau_max)
            clipped.add(tau[image])
        for value, expected in zip((*ours, criterion.gcl(), criterion.v), (loss, grad1, grad2, robust, v), strict=True):
            assert gap(value, expected) < 1e-10
        assert relative_gap(criterion.u[list(u)], list(u.values())) < 1e-10
        assert relative_gap(criterion.tau, list(tau.values())) < 1e-10
    assert eta < 0.1 or {tau_min, tau_max} & clipped
    assert len(set(tau.values())) > 10


def test_temperatures_follow_the_derivative():
    """With U = g, v of weight 1 must be the derivative of tau (log g + rho), by finite differences, over the views."""
    z1, z2 = views(9, 6)
    criterion = RobustGlobalContrastiveLoss(9, 0.25, gamma=1.0, rho=0.7, beta=1.0).double()
    run(criterion, z1, z2, torch.arange(9))
    x, h = unit_views(z1, z2), 1e-5

    def objective(tau, i):
        return np.mean([tau * (math.log(np.exp(scores_of(x, i, v) / tau).mean()) + 0.7) for v in x])

    slopes = [(objective(0.25 + h, i) - objective(0.25 - h, i)) / (2 * h) for i in range(9)]
    assert gap(criterion.v, slopes) < 1e-9
    assert min(slopes) < 0 < max(slopes)


def test_fixed_point_is_a_kl_divergence_of_rho():
    """On frozen features, every temperature must settle where the softmax over the negatives is rho nats from uniform,
    or at a bound: the lower one if it is less peaked even there, the upper one if it is more.
    """
    rho, tau_min, tau_max = 0.65, 0.28125, 0.34375
    z1, z2 = views(12)
    criterion = RobustGlobalContrastiveLoss(12, 0.3125, 1.0, rho, tau_min, tau_max, eta=0.05).double()
    for _ in range(2000):
        with torch.no_grad():
            criterion(z1, z2, torch.arange(12))
    x, where = unit_views(z1, z2), {"lower": [], "inside": [], "upper": []}
    for i, tau in enumerate(criterion.tau.tolist()):
        divergence = 0
        for v in x:
            p = np.exp(scores_of(x, i, v) / tau)
            p /= p.sum()
            divergence += (p * np.log(p * len(p))).sum() / 2        # KL(p || uniform), mean of the views
        where["lower" if tau == tau_min else "upper" if tau == tau_max else "inside"].append(divergence)
    assert max(where["lower"]) < rho < min(where["upper"])
    assert where["inside"] == pytest.approx([rho] * len(where["inside"]), abs=1e-9)
    assert len(where["inside"]) >= 3


def test_without_a_learning_rate_it_is_the_global_contrastive_loss():
    """With eta 0 loss, gradients and u must be bit-equal, though v moves."""
    robust, plain = RobustGlobalContrastiveLoss(20, 0.07, 0.8, eta=0), GlobalContrastiveLoss(20, 0.07, 0.8)
    for step in range(4):
        index = torch.randperm(20, generator=torch.Generator().manual_seed(step))[:8]
        z1, z2 = views(seed=step, dtype=torch.float32)
        for ours, theirs in zip(run(robust, z1, z2, index), run(plain, z1, z2, index), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(robust.log_u, plain.log_u)
    assert (robust.tau == torch.tensor(0.07)).all()
    assert (robust.v != 0).any()


class Saved:
    """A tensor that autograd keeps for the backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()       # of an output, the graph would be in a cycle


def test_no_step_leaves_a_graph_behind():
    """After 200 steps nothing that autograd saved may be alive, with or without a backward pass."""
    criterion, alive, saved = RobustGlobalContrastiveLoss(40), weakref.WeakSet(), 0

    def pack(tensor):
        alive.add(kept := Saved(tensor))
        return kept

    z1, z2 = views(dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        for step in range(200):
            loss = criterion(z1, z2, torch.arange(8) + step % 32)
            saved += len(alive)
            if step % 2:
                loss.backward()
            del loss
            assert not alive
    assert saved > 200


def test_finite_between_extreme_temperatures():
    """Loss, gradient and all buffers must be finite while temperatures jump between bounds far apart."""
    criterion = RobustGlobalContrastiveLoss(8, 0.1, 0.2, rho=1.0, tau_min=0.005, tau_max=20, eta=1.0)
    seen = set()
    for step in range(30):
        loss, grad1, grad2 = run(criterion, *views(seed=step, dtype=torch.float32), torch.arange(8), autocast=True)
        assert all(value.isfinite().all() for value in (loss, grad1, grad2, criterion.gcl(), *criterion.buffers()))
        seen |= set(criterion.tau.tolist())
    assert min(seen) == pytest.approx(0.005)
    assert max(seen) > 1


@pytest.mark.parametrize("setting", [
    {"temperature": 0.01}, {"temperature": 0.8}, {"tau_min": 0}, {"tau_min": math.nan}, {"rho": -1}, {"rho": math.nan},
    {"eta": -0.1}, {"beta": 0}, {"beta": 1.1}, {"gamma": 0}])
def test_bad_settings_are_refused(setting):
    """Bounds in order and around the first temperature, rho and eta at least 0, beta in (0, 1], else a ValueError."""
    with pytest.raises(ValueError, match="must be"):
        RobustGlobalContrastiveLoss(20, **setting)
