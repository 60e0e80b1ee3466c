"""LARS against its formula applied parameter by parameter, and what users expect of an optimizer."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sogclr.optimizer import LARS, lr_at, scaled_lr

SHAPES = [(4, 3), (5,), (2, 3, 3, 3), (1,), (3, 3), (2, 2), (6,)]


def reference(p, grad, mu, lr, weight_decay, momentum, trust):
    """One step for one parameter, in NumPy."""
    d = grad.copy()
    if p.ndim > 1:
        d = d + weight_decay * p
        p_norm, d_norm = math.sqrt((p**2).sum()), math.sqrt((d**2).sum())
        d = d * (trust * p_norm / d_norm if p_norm > 0 and d_norm > 0 else 1.0)
    mu = momentum * mu + d
    return p - lr * mu, mu


def parameters(dtype=torch.float64):
    """All kinds: matrices, kernels, vectors; the fifth is zero, the sixth gets zero gradients."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    values[4].zero_()
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    grads[5].zero_()
    if step % 3 == 1:
        grads[0] = grads[6] = None
    return grads


def set_gradients(params, step):
    for p, grad in zip(params, gradients(step), strict=True):
        p.grad = None if grad is None else grad.to(p.dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_equals_the_formula(weight_decay):
    """50 steps in float64 must equal the formula for each parameter, also without a gradient, or if a norm is 0."""
    params = parameters()
    ours = [p.detach().numpy().copy() for p in params]
    mus = [np.zeros_like(p) for p in ours]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02, "momentum": 0.5, "trust_coefficient": 0.1}]
    optimizer = LARS(groups, lr=0.3, weight_decay=weight_decay, momentum=0.9)
    for step in range(50):
        set_gradients(params, step)
        optimizer.step()
        for k, grad in enumerate(gradients(step)):
            if grad is not None:
                lr, momentum, trust = (0.3, 0.9, 0.001) if k < 3 else (0.02, 0.5, 0.1)
                ours[k], mus[k] = reference(ours[k], grad.numpy(), mus[k], lr, weight_decay, momentum, trust)
    for p, expected, mu in zip(params, ours, mus, strict=True):
        assert np.abs(p.detach().numpy() - expected).max() < 1e-10
        assert np.abs(optimizer.state[p]["mu"].numpy() - mu).max() < 1e-10


def test_vectors_are_neither_decayed_nor_scaled():
    """A one-dimensional parameter (BatchNorm, bias) must move only by lr * grad, however large decay and trust."""
    p = torch.nn.Parameter(torch.full((3,), 7.0))
    p.grad = torch.tensor([1.0, -2.0, 0.0])
    LARS([p], lr=0.5, weight_decay=10.0, trust_coefficient=100.0).step()
    assert torch.equal(p.detach(), torch.tensor([6.5, 8.0, 7.0]))


def test_resumed_equals_uninterrupted():
    """A run continued from `state_dict` must be bit-identical to one that was not interrupted."""
    straight, resumed = parameters(torch.float32), parameters(torch.float32)
    one, other = (LARS(params, lr=0.3, weight_decay=1e-4, momentum=0.9) for params in (straight, resumed))
    for step in range(20):
        if step == 8:
            state = other.state_dict()
            other = LARS(resumed, lr=123.0)
            other.load_state_dict(state)
        for params, optimizer in ((straight, one), (resumed, other)):
            set_gradients(params, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert set(other.state[resumed[0]]) == {"mu"}
    assert len(other.param_groups) == 1


def test_gradients_are_left_alone():
    """A step must not change the gradients: DDP's buckets and users who log them rely on it."""
    params = parameters()
    set_gradients(params, 0)
    LARS(params, lr=0.3, weight_decay=0.1).step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, gradients(0), strict=True))


def test_closure():
    """`step(closure)` must run it with gradients enabled and return its loss."""
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 4.0
    assert float((p**2).sum().detach()) < 4.0


def test_number_of_operations_does_not_grow_with_the_parameters():
    """One `_foreach` call for all parameters, not one call for each."""
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for n in (3, 30):
        params = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(n)]
        params += [torch.nn.Parameter(torch.randn(4)) for _ in range(n)]
        optimizer = LARS(params, lr=0.1, weight_decay=1e-4)
        for _ in range(2):      # the second step, when the state exists
            for p in params:
                p.grad = torch.ones_like(p)
            with Count() as count:
                optimizer.step()
        counts.append(count.calls)
    assert counts[0] == counts[1]


def test_learning_rate():
    """sqrt and linear scaling; a linear warm-up from 0; half a cosine that ends at 0."""
    assert scaled_lr(0.075, 256, "sqrt") == pytest.approx(1.2)
    assert scaled_lr(0.3, 512, "linear") == pytest.approx(0.6)
    assert [lr_at(epoch, 1.2, 100, 10) for epoch in (0, 5, 10, 55, 100)] == pytest.approx([0, 0.6, 1.2, 0.6, 0])
    assert lr_at(0, 1.2, 100, 0) == pytest.approx(1.2)
