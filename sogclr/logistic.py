"""Multinomial logistic regression on frozen features: a linear classifier without a learning rate.

It is solved to its optimum by L-BFGS, with an L2 penalty that is chosen on held-out training images, as in Kornblith et
al. (CVPR 2019, arXiv 1805.08974) and SimCLR. For n images, K classes and features x_i [C]:

    min over W [K, C], b [K]    sum_i cross_entropy(W x_i + b, y_i) + l2 / 2 |W|^2

Every rank keeps its part of the features; sums go over all ranks, so that all of them find the same optimum.
"""

import statistics

import numpy as np
import torch
import torch.nn.functional as F

from sogclr import InputError
from sogclr.distributed import all_reduce_sum, log, rank, world_size
from sogclr.meters import correct_in_top
from sogclr.subset import held_out, shot_indices

L2 = tuple(10 ** (5 - k / 4) for k in range(45))    # 1e5 to 1e-6, from strong to weak
OVERFITTED = 0.01   # the search ends where the held-out cross-entropy is so much above the least
FEW_SHOT_L2 = 10.0  # with 1 to 10 images per class: those that could be held out are too few to choose by
CHUNK = 8192        # rows that are converted to float64 at a time


class LogisticEvaluation:
    """Evaluates features by logistic regression on all training images, or on some of them.

    features [n, C], index [n]: this rank's part of the training images, as from `features.extract`, index in targets
    (NumPy, [N]); val_features [m, C], val_labels [m]: its part of the validation images. Both features are replaced, in
    place, by their coordinates on the training features' principal axes.
    Raises InputError if a feature is not finite.
    """

    def __init__(self, features, index, targets, val_features, val_labels, num_classes):
        self.features, self.index, self.targets = features, index, targets
        self.val, self.num_classes = (val_features, val_labels), num_classes
        self.variances = to_principal_axes(features, val_features)

    def search(self, seed):
        """Evaluate with all training images, with the l2 of the least cross-entropy on a fifth of each class's, held
        out from the search. Accuracy would choose by chance: among few images it hardly differs.

        seed: of which are held out. Returns what `evaluate` does, their number, and the curve over l2 with what
        `measure` returns for them.
        """
        held, weights, curve = held_out(self.targets, seed), None, []
        rows = np.arange(len(self.targets))
        kept, others = self.part(rows[~held]), self.part(rows[held])
        for l2 in L2:
            weights, outcome = fit(*kept, self.num_classes, l2, self.variances, weights)    # starts at the last one
            measured = {f"held_out_{name}": value for name, value in measure(weights, *others).items()}
            curve.append({"l2": l2, **measured, **outcome})
            log("=> L2 {l2:.3g}: held-out loss {held_out_loss:.4f} Acc@1 {held_out_acc1:.2f}, {iterations} iterations"
                .format(**curve[-1]))
            chosen = min(curve, key=lambda point: point["held_out_loss"])
            if curve[-1]["held_out_loss"] > chosen["held_out_loss"] + OVERFITTED:
                break
        return {**self.evaluate(rows, chosen["l2"], weights), "held_out": int(held.sum()), "curve": curve}

    def few_shots(self, shots, draws, seed):
        """Evaluate with `shots` training images of each class, drawn by seed, seed + 1, ... Returns the mean and the
        standard deviation of the accuracies, and each draw's results, as from `evaluate`.
        """
        results = [self.evaluate(shot_indices(self.targets, shots, seed + draw)) for draw in range(draws)]
        summary = {}
        for name in ("acc1", "acc5"):
            values = [result[name] for result in results]
            summary[name] = statistics.mean(values)
            summary[f"{name}_deviation"] = statistics.stdev(values) if draws > 1 else float("nan")
        return {**summary, "draws": results}

    def evaluate(self, rows, l2=FEW_SHOT_L2, start=None):
        """Fit the training images with these indices, and return a dict: l2, what `measure` returns for the validation
        images, and how the fit went (see `fit`).
        """
        weights, outcome = fit(*self.part(rows), self.num_classes, l2, self.variances, start)
        return {"l2": l2, **measure(weights, *self.val), **outcome}

    def part(self, rows):
        """This rank's features [n, C] and labels [n] of the training images with these indices."""
        mine = torch.isin(self.index, torch.as_tensor(rows, device=self.index.device))
        labels = torch.as_tensor(self.targets, device=self.index.device)[self.index[mine]]
        return self.features[mine], labels.long()


def to_principal_axes(features, *others):
    """Center, rotate and scale features, in place, to a mean variance of 1. Returns their variances [C], float64.

    That does not change what a classifier can do; it gives l2 the same meaning for every encoder, and lets `fit` scale
    each direction by how much it varies. The others are transformed in the same way.
    """
    if all_reduce_sum(torch.stack([~part.isfinite().all() for part in (features, *others)]).sum()):
        raise InputError("--logistic: a feature is not finite, use another checkpoint or --precision fp32")
    C, n = features.shape[1], all_reduce_sum(torch.tensor(len(features), device=features.device))
    mean = all_reduce_sum(features.sum(0, dtype=torch.float64)) / n
    covariance = torch.zeros(C, C, dtype=torch.float64, device=features.device)
    for chunk in features.split(CHUNK):
        covariance += (chunk - mean).T @ (chunk - mean) / n
    variances, axes = torch.linalg.eigh(all_reduce_sum(covariance))
    axes = all_reduce_sum(axes * (rank() == 0))         # rank 0's: on other hardware they may have other signs
    scale = variances.sum().div(C).sqrt().clamp_min(1e-30)
    for part in (features, *others):
        for chunk in part.split(CHUNK):
            chunk.copy_((chunk - mean) @ (axes / scale))
    return (variances / scale**2).clamp_min(0)


def fit(features, labels, num_classes, l2, variances, start=None, tolerance=1e-6, max_iterations=1000):
    """Solve the regression. Returns the weights [K, C + 1], float64, the last column being b, the same on every rank;
    and {"iterations", "gradient_norm", "converged"}.

    features [n, C], labels [n]: this rank's part; variances [C]: from `to_principal_axes`; start: weights to start at,
    by default 0; tolerance: for the largest entry of the gradient of the objective divided by n, in the coordinates of
    the solver: weights times the square root of about the objective's curvature. They have the same optimum, and need
    far fewer steps.
    """
    n = all_reduce_sum(torch.tensor(len(features), device=features.device))
    scale = torch.cat([variances / num_classes + l2 / n, variances.new_tensor([1 / num_classes])]).sqrt()
    scaled = torch.zeros(num_classes, len(scale), dtype=torch.float64, device=features.device)
    if start is not None:
        scaled += start * scale
    scaled.requires_grad_()
    solver = torch.optim.LBFGS([scaled], max_iter=max_iterations, max_eval=2 * max_iterations, history_size=20,
                               tolerance_grad=tolerance, tolerance_change=0, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def objective():
        solver.zero_grad()
        loss = l2 / 2 * (scaled / scale)[:, :-1].square().sum() / n / world_size()
        loss.backward()
        for x, y in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            part = F.cross_entropy(logits(scaled / scale, x), y, reduction="sum") / n
            part.backward()
            loss = loss + part
        all_reduce_sum(scaled.grad)
        return all_reduce_sum(loss.detach())

    solver.step(objective)
    objective()
    largest = float(scaled.grad.abs().max())
    return (scaled / scale).detach(), {"iterations": solver.state[scaled]["n_iter"], "gradient_norm": float(
        scaled.grad.norm()), "converged": largest <= tolerance}


def logits(weights, features):
    """[K, C + 1], [n, C] -> [n, K], in float64"""
    return F.linear(features.double(), weights[:, :-1], weights[:, -1])


def measure(weights, features, labels):
    """{"acc1" and "acc5" in percent, "loss": the mean cross-entropy}, over all ranks. features [n, C], labels [n]: this
    rank's part.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=features.device)
    for x, y in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        output = logits(weights, x)
        sums[:2] += correct_in_top(output, y, (1, 5))
        sums[2] += F.cross_entropy(output, y, reduction="sum")
        sums[3] += len(y)
    top1, top5, loss, seen = all_reduce_sum(sums).tolist()
    return {"acc1": 100 * top1 / seen, "acc5": 100 * top5 / seen, "loss": loss / seen}
