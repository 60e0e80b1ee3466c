"""The losses against slow NumPy loops written from the paper, and their mathematical properties."""

import math

import numpy as np
import pytest
import torch

from sogclr.isogclr import RobustGlobalContrastiveLoss
from sogclr.loss import ContrastiveLoss, GlobalContrastiveLoss, gamma_at
from sogclr.monitor import alignment_and_uniformity


def unit(z):
    return z / np.linalg.norm(z)


def reference(z1, z2, index, u, temperature, gamma):
    """The paper's method, loop by loop, in float64: loss, gradients of both views, the new u, and for each image of the
    batch, of its two views, U and the mean of w s.

    u is a dict {image: value}; an image that is not in it was never visited. temperature: of all, or {image: value}.
    """
    B, D = z1.shape
    x = {(i, v): unit(z[i]) for v, z in (("a", z1), ("b", z2)) for i in range(B)}
    grad = {key: np.zeros(D) for key in x}
    count = 2 * (B - 1)
    total, new_u, scores = 0.0, dict(u), {}
    for i in range(B):
        image = int(index[i])
        tau = temperature[image] if isinstance(temperature, dict) else temperature
        total += -2 * x[i, "a"] @ x[i, "b"] / B
        grad[i, "a"] += -2 * x[i, "b"] / B
        grad[i, "b"] += -2 * x[i, "a"] / B
        U, mean_ws = {}, dict.fromkeys("ab", 0.0)
        for v in "ab":
            negatives = [(j, w) for j in range(B) if j != i for w in "ab"]
            assert len(negatives) == count
            g = sum(math.exp(x[i, v] @ x[n] / tau) for n in negatives) / count
            gamma_i = gamma if image in u else 1.0
            U[v] = (1 - gamma_i) * u.get(image, 0.0) + gamma_i * g
            for n in negatives:
                weight = math.exp(x[i, v] @ x[n] / tau) / U[v]
                total += weight * (x[i, v] @ x[n]) / count / B
                mean_ws[v] += weight * (x[i, v] @ x[n]) / count
                grad[i, v] += weight * x[n] / count / B
                grad[n] += weight * x[i, v] / count / B
        new_u[image] = (U["a"] + U["b"]) / 2
        scores[image] = [(U[v], mean_ws[v]) for v in "ab"]

    def through_normalization(z, v):
        rows = []
        for i in range(B):
            n = x[i, v]
            rows.append((grad[i, v] - n * (n @ grad[i, v])) / np.linalg.norm(z[i]))
        return np.array(rows)

    return total, through_normalization(z1, "a"), through_normalization(z2, "b"), new_u, scores


def gap(ours, theirs):
    """Largest error, relative to the largest value."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())


def relative_gap(ours, theirs):
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return (np.abs(ours - theirs) / theirs).max()


def views(B=8, D=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
                 for _ in range(2))


def run(criterion, z1, z2, index, autocast=False):
    """Loss and gradients of one step on copies of the views. autocast: whether the loss is called inside."""
    z1, z2 = z1.detach().clone().requires_grad_(), z2.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = criterion(z1, z2, index)
    loss.backward()
    return loss.detach(), z1.grad, z2.grad


@pytest.mark.parametrize(("temperature", "gamma", "dtype", "tolerance"), [
    *((temperature, gamma, dtype, tolerance)
      for temperature, gamma in ((0.1, 0.9), (0.5, 0.3), (1.0, 1.0), (0.07, 0.99))
      for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5))),
    (0.03, 0.9, torch.float64, 1e-10),
    (0.005, 0.9, torch.float64, 1e-10),
    (0.005, 0.9, torch.float32, 2e-4),      # a similarity's rounding, 6e-8, is 1e-5 of s / tau, and of its exponential
])
def test_equals_the_papers_formulas_over_many_steps(temperature, gamma, dtype, tolerance):
    """Loss, gradient of both views and u must equal the loops over 35 steps with revisits and mixed first visits."""
    N, B = 30, 8
    criterion = GlobalContrastiveLoss(N, temperature, gamma).to(dtype)
    rng, u, mixed = np.random.default_rng(7), {}, 0
    for step in range(35):
        index = torch.from_numpy(rng.choice(N, B, replace=False))
        mixed += 0 < sum(int(i) in u for i in index) < B
        z1, z2 = views(B, 5, seed=step, dtype=dtype)
        expected = reference(*(z.detach().double().numpy() for z in (z1, z2)), index, u, temperature, gamma)
        loss, grad1, grad2 = run(criterion, z1, z2, index)
        u = expected[3]
        assert gap(loss, expected[0]) < tolerance
        assert gap(grad1, expected[1]) < tolerance
        assert gap(grad2, expected[2]) < tolerance
        assert relative_gap(criterion.log_u.double().exp()[list(u)], list(u.values())) < tolerance
        assert all(criterion.u[i] == 0 for i in range(N) if i not in u)
    assert mixed >= 3


@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_gamma_one_is_plain_autograd_of_the_log_form(temperature):
    """With gamma = 1 the gradient must be that of mean_i [tau log g_i^a + tau log g_i^b - 2 s_ii]."""
    z1, z2 = views(9, 6)
    _, grad1, grad2 = run(GlobalContrastiveLoss(9, temperature, gamma=1.0).double(), z1, z2, torch.arange(9))
    n1, n2 = torch.nn.functional.normalize(z1, dim=1), torch.nn.functional.normalize(z2, dim=1)
    others = ~torch.eye(9, dtype=torch.bool)
    total = -2 * (n1 * n2).sum()
    for anchor in (n1, n2):
        exponentials = torch.cat([(anchor @ n1.T / temperature).exp()[others].view(9, 8),
                                  (anchor @ n2.T / temperature).exp()[others].view(9, 8)], dim=1)
        total = total + temperature * exponentials.mean(1).log().sum()
    (total / 9).backward()
    assert gap(grad1, z1.grad) < 1e-12
    assert gap(grad2, z2.grad) < 1e-12


def test_swapping_the_views_changes_nothing():
    """Loss and u must not change, and the gradients must swap."""
    z1, z2 = views()
    one, other = (GlobalContrastiveLoss(20).double() for _ in range(2))
    index = torch.arange(3, 11)
    for _ in range(3):
        loss, grad1, grad2 = run(one, z1, z2, index)
        swapped, swapped2, swapped1 = run(other, z2, z1, index)
        assert gap(loss, swapped) < 1e-14
        assert gap(grad1, swapped1) < 1e-14
        assert gap(grad2, swapped2) < 1e-14
        assert relative_gap(one.u[index], other.u[index]) < 1e-14


def test_permuting_the_batch_permutes():
    """The loss must not change; u and gradients must follow their images."""
    z1, z2 = views()
    one, other = (GlobalContrastiveLoss(20).double() for _ in range(2))
    index, order = torch.arange(3, 11), torch.tensor([5, 0, 7, 2, 1, 6, 4, 3])
    for _ in range(3):
        loss, grad1, _ = run(one, z1, z2, index)
        permuted, permuted1, _ = run(other, z1[order], z2[order], index[order])
        assert gap(loss, permuted) < 1e-14
        assert gap(grad1[order], permuted1) < 1e-14
        assert relative_gap(one.u[index], other.u[index]) < 1e-14


def test_estimator_of_absent_images_does_not_move():
    """`u` of images outside the batch must be bit-identical before and after."""
    criterion = GlobalContrastiveLoss(20)
    run(criterion, *views(dtype=torch.float32), torch.arange(8))
    before = criterion.log_u.clone()
    run(criterion, *views(seed=1, dtype=torch.float32), torch.arange(4, 12))
    assert torch.equal(criterion.log_u[:4], before[:4])
    assert torch.equal(criterion.log_u[12:], before[12:])
    assert (criterion.log_u[4:12] != before[4:12]).all()


def test_age_counts_steps_since_the_last_visit():
    """An image's age must be 0 in a step that visits it, grow by one in each other, and be missing before the first."""
    criterion, ages = GlobalContrastiveLoss(20), dict.fromkeys(range(20), None)
    for step in range(6):
        index = torch.randperm(20, generator=torch.Generator().manual_seed(step))[:4]
        run(criterion, *(view[:4] for view in views(dtype=torch.float32)), index)
        ages = {i: 0 if i in index else None if age is None else age + 1 for i, age in ages.items()}
        assert criterion.age.tolist() == [age for age in ages.values() if age is not None]
    assert max(criterion.age) > 1


def full_mean(z1, z2, temperature):
    """g of every image over the whole data set, averaged over its two views."""
    n = [torch.nn.functional.normalize(z.detach(), dim=1) for z in (z1, z2)]
    others = 1 - torch.eye(len(z1), dtype=torch.float64)
    return sum(((x @ y.T / temperature).exp() * others).sum(1) for x in n for y in n) / (4 * (len(z1) - 1))


@pytest.mark.parametrize("gamma", [0.9, 0.25])
def test_estimator_converges_at_the_rate_of_gamma(gamma):
    """On frozen features, all seen at each step, |u_t - g| must be (1 - gamma)^t |u_0 - g|, whatever u_0."""
    z1, z2 = views(12)
    g = full_mean(z1, z2, 0.1)
    criterion = GlobalContrastiveLoss(12, 0.1, gamma).double()
    criterion.u = 50 * g
    for t in range(1, 20):
        run(criterion, z1, z2, torch.arange(12))
        assert gap((criterion.u - g) / g, (1 - gamma) ** t * 49) < 1e-10


def test_estimator_of_small_batches_reaches_the_global_mean():
    """On frozen features seen in random batches, u must fluctuate about the data set's g without bias, with at most
    gamma / (2 - gamma) of the variance of a single batch's g: the small batch does not harm.
    """
    N, B, gamma = 24, 4, 0.1
    z1, z2 = views(N, 5)
    g = full_mean(z1, z2, 0.5)
    averaged, single = (GlobalContrastiveLoss(N, 0.5, gamma).double(), GlobalContrastiveLoss(N, 0.5, 1.0).double())
    rng, seen = np.random.default_rng(0), {averaged: [], single: []}
    for step in range(6000):
        index = torch.from_numpy(rng.choice(N, B, replace=False))
        for criterion in seen:
            with torch.no_grad():
                criterion(z1[index], z2[index], index)
            if step > 600:
                seen[criterion].append(criterion.u.clone())
    smooth, rough = (torch.stack(seen[criterion]) for criterion in (averaged, single))
    # u takes a new value only every N/B steps, which leaves mean and variance over time unchanged
    visits = 5400 * B / N
    assert ((smooth.mean(0) - g).abs() / (rough.std(0) / visits**0.5)).max() < 5      # standard errors
    ratio = (smooth.var(0) / rough.var(0)).mean()
    assert 0.7 < ratio / (gamma / (2 - gamma)) < 1.2


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.0113, 0.005])
@pytest.mark.parametrize("case", ["random", "identical views", "identical images", "opposite views"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_every_temperature(temperature, case, dtype):
    """Loss, gradient and log u must be finite over repeated steps, also inside autocast."""
    z1, z2 = views(6, 8, dtype=dtype)
    z2 = {"random": z2, "identical views": z1, "identical images": z1[:1].expand(6, 8), "opposite views": -z1}[case]
    z1 = z1[:1].expand(6, 8) if case == "identical images" else z1
    criterion = GlobalContrastiveLoss(6, temperature)
    for _ in range(3):
        loss, grad1, grad2 = run(criterion, z1, z2, torch.arange(6), autocast=True)
        assert loss.dtype == torch.float32
        assert all(value.isfinite().all() for value in (loss, grad1, grad2, criterion.log_u))
    assert all(value.isfinite() for value in (criterion.gcl(), *alignment_and_uniformity(criterion.keys)))


def test_autocast_does_not_change_the_loss():
    """The loss and its gradient must be computed in float32, even inside autocast."""
    z1, z2 = views(dtype=torch.float32)
    outside, inside = (run(GlobalContrastiveLoss(8), z1, z2, torch.arange(8), autocast) for autocast in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


def test_estimator_is_saved_and_restored_exactly():
    """The next step after a `state_dict` round trip must be bit-identical; `u` must read and write in linear space."""
    z1, z2 = views(dtype=torch.float32)
    criterion = GlobalContrastiveLoss(20, temperature=0.005)
    run(criterion, z1, z2, torch.arange(8))
    other = GlobalContrastiveLoss(20, temperature=0.005)
    other.load_state_dict(criterion.state_dict())
    for a, b in zip(run(criterion, z2, z1, torch.arange(4, 12)), run(other, z2, z1, torch.arange(4, 12)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(criterion.log_u, other.log_u)
    assert torch.equal(criterion.age, other.age)
    other.u = torch.tensor([0.0, 2.0] * 10)[:, None]
    assert torch.allclose(other.u, torch.tensor([0.0, 2.0] * 10))
    assert other.log_u[0] == -math.inf


@pytest.mark.parametrize(("z1", "z2", "index", "message"), [
    ((8, 5), (8, 5), [0, 1, 2, 3, 4, 5, 6, 20], "index must be in 0 to 19"),
    ((8, 5), (8, 5), [-1, 1, 2, 3, 4, 5, 6, 7], "index must be in 0 to 19"),
    ((8, 5), (8, 5), [0, 1, 2, 3, 4, 5, 6, 6], "appears twice"),
    ((8, 5), (8, 5), [0, 1, 2], r"index must be \[8\]"),
    ((8, 5), (7, 5), [0, 1, 2, 3, 4, 5, 6, 7], "views must both be"),
    ((8, 5, 1), (8, 5, 1), [0, 1, 2, 3, 4, 5, 6, 7], "views must both be"),
    ((1, 5), (1, 5), [0], "at least 2 images"),
])
def test_bad_input_is_refused(z1, z2, index, message):
    """A clear ValueError, and the estimator untouched."""
    criterion = GlobalContrastiveLoss(20)
    with pytest.raises(ValueError, match=message):
        criterion(torch.randn(z1), torch.randn(z2), torch.tensor(index))
    assert (criterion.u == 0).all()


def test_gamma_schedule():
    """1 at the start, halfway in the middle, --gamma at the end of the decay and after it."""
    assert [gamma_at(epoch, 0.8, 100) for epoch in (0, 50, 100, 799)] == pytest.approx([1, 0.9, 0.8, 0.8])


@pytest.mark.parametrize(("temperature", "gamma"), [(0, 0.9), (-1, 0.9), (math.nan, 0.9), (0.1, 0), (0.1, 1.5)])
def test_bad_settings_are_refused(temperature, gamma):
    """temperature > 0 and 0 < gamma <= 1, else a ValueError."""
    with pytest.raises(ValueError, match="must be"):
        GlobalContrastiveLoss(20, temperature, gamma)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr_equals_slow_loops(temperature):
    """NT-Xent must be -log of the positive's fraction of itself and the 2(B-1) negatives, summed over both views."""
    z1, z2 = views()
    x = {(i, v): unit(z[i].detach().numpy()) for v, z in (("a", z1), ("b", z2)) for i in range(8)}
    total = 0.0
    for (i, v), anchor in x.items():
        scores = {key: math.exp(anchor @ other / temperature) for key, other in x.items() if key != (i, v)}
        total -= math.log(scores[i, "b" if v == "a" else "a"] / sum(scores.values())) / 8
    loss = ContrastiveLoss(temperature)(z1, z2).detach()
    assert abs(float(loss) - total) < 1e-12


@pytest.mark.parametrize("make", [
    lambda: GlobalContrastiveLoss(20, gamma=0.3), lambda: RobustGlobalContrastiveLoss(20, gamma=0.3, eta=0.1),
    ContrastiveLoss], ids=["dcl", "isogclr", "cl"])
def test_groups_are_batches_of_their_own(make):
    """Loss, gradients, the monitored value and all estimators must be those of the batch's groups, one after another;
    groups that do not divide it are refused.
    """
    whole, parts = make().double(), make().double()
    whole.group_size = 4
    for step in range(3):
        z1, z2 = views(12, seed=step)
        index = torch.randperm(20, generator=torch.Generator().manual_seed(step))[:12]
        values = []
        for group in torch.arange(12).split(4):
            values.append((*run(parts, z1[group], z2[group], index[group]), parts.gcl()))
        loss, grad1, grad2, gcl = zip(*values, strict=True)
        for ours, theirs in zip((*run(whole, z1, z2, index), whole.gcl()),
                                (sum(loss) / 3, torch.cat(grad1) / 3, torch.cat(grad2) / 3, sum(gcl) / 3), strict=True):
            assert gap(ours, theirs) < 1e-12
        for name, ours in whole.named_buffers():
            if name not in ("batches", "last_visit"):
                assert torch.allclose(ours, dict(parts.named_buffers())[name], rtol=1e-12, atol=0)
    for size in (0, 1, 5, 24):
        whole.group_size = size
        with pytest.raises(ValueError, match="must be at least 2 and divide the batch of 12 images"):
            whole(z1, z2, index)


@pytest.mark.parametrize("kind", ["dcl", "cl"])
def test_diagnostics_equal_their_definitions(kind):
    """gcl, alignment and uniformity must equal loops over images and pairs."""
    z1, z2 = views()
    temperature, gamma = 0.2, 0.7
    criterion = GlobalContrastiveLoss(8, temperature, gamma).double() if kind == "dcl" else ContrastiveLoss(temperature)
    u = {}
    for _ in range(2 if kind == "dcl" else 1):
        previous = u
        criterion(z1, z2, torch.arange(8))
        u = reference(z1.detach().numpy(), z2.detach().numpy(), torch.arange(8), u, temperature, gamma)[3]
    x = {(i, v): unit(z[i].detach().numpy()) for v, z in (("a", z1), ("b", z2)) for i in range(8)}
    gcl, spread = 0.0, {"a": [], "b": []}
    for (i, v), anchor in x.items():
        g = np.mean([math.exp(anchor @ other / temperature) for (j, _), other in x.items() if j != i])
        U = (1 - gamma) * previous[i] + gamma * g if previous else g
        gcl += temperature * math.log(U) / 8 - x[i, "a"] @ x[i, "b"] / 8
        spread[v] += [math.exp(-2 * np.sum((anchor - x[j, v]) ** 2)) for j in range(8) if j != i]
    alignment, uniformity = alignment_and_uniformity(criterion.keys)
    assert abs(float(criterion.gcl()) - gcl) < 1e-12
    assert abs(float(alignment) - np.mean([np.sum((x[i, "a"] - x[i, "b"]) ** 2) for i in range(8)])) < 1e-12
    expected = (math.log(np.mean(spread["a"])) + math.log(np.mean(spread["b"]))) / 2
    assert abs(float(uniformity) - expected) < 1e-12
