"""Logistic regression: the optimum, against Newton's method in NumPy, on any number of ranks and from any start."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from sogclr import logistic
from sogclr.logistic import LogisticEvaluation, fit, measure, to_principal_axes
from sogclr.subset import held_out

N, C, K, L2 = 60, 5, 3, 0.7


def problem():
    """Features [N, C] that differ in scale and are not centered, and labels [N], not separable."""
    rng = np.random.default_rng(0)
    labels = rng.integers(K, size=N)
    features = rng.normal(size=(K, C))[labels] + 1.5 * rng.normal(size=(N, C))
    return torch.from_numpy(features * 2.0 ** np.arange(C) + 3), torch.from_numpy(labels)


def newton(x, y):
    """The weights [K, C + 1] that minimize sum cross-entropy + L2 / 2 |W|^2, by Newton's method."""
    x, weights = np.hstack([x, np.ones((N, 1))]), np.zeros((K, C + 1))
    penalty = np.tile(np.append(np.full(C, L2), 1e-9), K)       # tiny for b, whose mean over classes has no effect
    for _ in range(50):
        p = np.exp(x @ weights.T)
        p /= p.sum(1, keepdims=True)
        gradient = ((p - np.eye(K)[y]).T @ x).ravel() + penalty * weights.ravel()
        curvature = np.einsum("nk,kl->nkl", p, np.eye(K)) - np.einsum("nk,nl->nkl", p, p)
        hessian = np.einsum("nkl,nc,nd->kcld", curvature, x, x).reshape(K * (C + 1), -1) + np.diag(penalty)
        weights = weights - np.linalg.solve(hessian, gradient).reshape(K, C + 1)
    return weights


def solve(rank=0, world=1, start=None):
    """Features on their principal axes and the weights of `fit`, in which rank 0 has more rows than rank 1."""
    x, y = problem()
    mine = slice(None) if world == 1 else (slice(0, 45), slice(45, N))[rank]
    features = x[mine].clone()
    variances = to_principal_axes(features)
    weights, outcome = fit(features, y[mine], K, L2, variances, start, tolerance=1e-8)
    assert outcome["converged"]
    return features, weights


def worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(solve(rank, 2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def centered(weights):
    """Adding a number to every class's b changes nothing."""
    weights = weights.clone()
    weights[:, -1] -= weights[:, -1].mean()
    return weights


def test_it_is_the_optimum(tmp_path):
    """That of Newton's method, from two starts, and on two ranks with unequal parts."""
    features, weights = solve()
    expected = centered(torch.from_numpy(newton(features.numpy(), problem()[1].numpy())))
    assert torch.allclose(centered(weights), expected, rtol=0, atol=1e-6)
    again = solve(start=torch.from_numpy(np.random.default_rng(1).normal(size=(K, C + 1))))[1]
    assert torch.allclose(centered(again), expected, rtol=0, atol=1e-6)
    mp.start_processes(worker, nprocs=2, args=(str(tmp_path),), start_method="forkserver")
    for rank in range(2):
        assert torch.allclose(centered(torch.load(tmp_path / f"{rank}.pt")[1]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(1, 5))
def test_l2_is_the_best_of_all_on_held_out_images(seed):
    """The search must choose the least held-out cross-entropy of all 45, each fitted from 0, then fit all images."""
    x, y = problem()
    evaluation = LogisticEvaluation(x[:40].float(), torch.arange(40), y[:40].numpy(), x[40:].float(), y[40:], K)
    results = evaluation.search(seed)
    held = held_out(y[:40].numpy(), seed)
    kept, others = (evaluation.part(np.flatnonzero(part)) for part in (~held, held))
    losses = [measure(fit(*kept, K, l2, evaluation.variances)[0], *others)["loss"] for l2 in logistic.L2]
    assert results["l2"] == logistic.L2[np.argmin(losses)]
    curve = [point["held_out_loss"] for point in results["curve"]]
    assert curve == pytest.approx(losses[:len(curve)], rel=1e-4)
    with_all = evaluation.evaluate(np.arange(40), results["l2"])
    assert results["loss"] == pytest.approx(with_all["loss"], rel=1e-4)


def test_validation_images_have_no_part_in_the_choice():
    """With other validation labels the curve and the choice must be the same, to the last bit."""
    chosen = []
    for shift in (0, 1):
        x, y = problem()
        evaluation = LogisticEvaluation(x[:40].float(), torch.arange(40), y[:40].numpy(), x[40:].float(),
                                        (y[40:] + shift) % K, K)
        results = evaluation.search(seed=1)
        chosen.append((results["l2"], results["curve"]))
    assert chosen[0] == chosen[1]


def test_a_fit_that_does_not_converge_is_reported():
    x, y = problem()
    variances = to_principal_axes(x)
    assert not fit(x, y, K, 1e-6, variances, max_iterations=2)[1]["converged"]
    assert fit(x, y, K, 1e-6, variances)[1]["converged"]
