"""The global contrastive loss of SogCLR, which owns the moving averages `u`, and SimCLR's loss to compare with.

Names follow the paper (Yuan et al., arXiv 2202.12387) and hold in the whole file:

    B      images in the global batch, over all ranks; b = B / ranks of them on this rank
    z^a, z^b   [b, D] L2-normalised projections of the two views; s(x, y) = x . y; tau the temperature
    g_i^a  mean of exp(s(z_i^a, z)/tau) over the 2(B-1) views z of *other* images; g_i^b likewise
    u_i    moving average of g_i, one for each image of the data set; 0 before the image's first visit
    U_i^a  (1 - gamma_i) u_i + gamma_i g_i^a, with gamma_i = 1 on the first visit and gamma after; U_i^b likewise
    w_ij^a exp(s(z_i^a, z_j)/tau) / U_i^a, held fixed; w_ij^b likewise

    u_i  <- (U_i^a + U_i^b) / 2
    loss  = mean_i [ -2 s(z_i^a, z_i^b) + 1/(2(B-1)) sum_j (w_ij^a s(z_i^a, z_j) + w_ij^b s(z_i^b, z_j)) ]

`plain_global_contrastive_loss` is the loss as the paper writes it, for one process. The classes compute the same in log
space, across ranks, and faster, because a similarity is symmetric: z_i's gradient from its own negatives is
sum_j w_ij z_j, that from being a negative of others is sum_j w_ji z_j, and w_ji is the same score exp(s_ij/tau) over
another U. So every rank, told all U, sums both for its own images in a single product, and the ranks need not exchange
gradients at all.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from sogclr.distributed import all_gather, all_reduce_sum, rank, world_size

# Scores are computed a block of anchors at a time: the block (elements, not bytes) fits a CPU's cache, and on a GPU it
# is large enough to be a single block at the usual batch sizes.
_BLOCK = {"cpu": 3 * 2**18, "cuda": 2**25}


def _outside_autocast(forward):
    """The loss is computed in float32 or better, also where the caller forgot to leave autocast."""
    @functools.wraps(forward)
    def wrapped(self, z1, *args):
        with torch.autocast(z1.device.type, enabled=False):
            return forward(self, z1, *args)
    return wrapped


class GlobalContrastiveLoss(nn.Module):
    """The global contrastive loss, called `dcl` (dynamic contrastive loss) in the authors' code.

    num_samples: N, the size of the data set; temperature: tau > 0; gamma: in (0, 1], weight of the new in `u`.

    The estimator is kept as its logarithm (`log_u`, [N] float32, -inf before the first visit), because exp(1/tau)
    leaves float32 below tau = 0.0113. It is a buffer: it moves with `.to(device)` and is part of `state_dict()`.
    So are `batches`, the number of batches seen so far, and `last_visit`, [N] int32: that number when an image was last
    in one, -1 where that is not known.
    """

    def __init__(self, num_samples, temperature=0.1, gamma=0.9):
        super().__init__()
        _check_temperature(temperature)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {gamma}")
        self.temperature, self.gamma = temperature, gamma
        self.register_buffer("log_u", torch.full((num_samples,), -math.inf))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int32))
        self.register_buffer("last_visit", torch.full((num_samples,), -1, dtype=torch.int32))
        self.keys = self.log_U = None       # of the last global batch: all views [2B, D] and their log U [2B]
        self.scores = None

    @property
    def u(self):
        """[N] the moving averages, 0 where an image was never visited."""
        return self.log_u.exp()

    @u.setter
    def u(self, u):
        self.log_u.copy_(torch.as_tensor(u).reshape(-1).log())

    @property
    def age(self):
        """How many batches ago each image was visited, where that is known: [at most N] int32, in the images' order."""
        return (self.batches - self.last_visit)[self.last_visit >= 0]

    @_outside_autocast
    def forward(self, z1, z2, index):
        """z1, z2: [b, D] the two views' projections, not normalised; index: [b] the images' places in the data set.

        Returns the loss of the *global* batch: the same value on every rank, with this rank's share of the gradient,
        so that DDP's average over the ranks is the gradient of one process with all B images. Updates `u` of the batch.

        Its value is a surrogate with the right gradient and may be negative: watch `gcl()`.
        Raises ValueError. An index on the CPU is checked for range and duplicates; one on a GPU is not, since that
        would stall the device, nor are duplicates on two GPUs (`EpochSampler` shows no image twice).
        """
        z = _views(z1, z2)                                                      # [2b, D] views a, then views b
        b = len(z) // 2
        _check_index(index, b, len(self.log_u))
        index = index.to(self.log_u.device, non_blocking=True)

        with torch.no_grad():
            anchors, norm = _unit_rows(z)
            keys = self.keys = _all_views(anchors)                              # [2B, D]
            log_count = math.log(len(keys) - 2)                                 # of the 2(B-1) negatives
            scores = self.scores = _Scores(anchors, keys, self.temperature, exclude_positive=True, reuse=self.scores)
            log_g = scores.log_sum - log_count                                  # [2b]

            log_u = self.log_u[index].to(log_g.dtype)
            # log of (1 - gamma_i) u_i, and log gamma_i: an image's first visit takes the new value alone
            log_old = log_u + (math.log1p(-self.gamma) if self.gamma < 1 else -math.inf)
            log_gamma = torch.zeros_like(log_u).masked_fill(log_u > -math.inf, math.log(self.gamma))
            log_U = torch.logaddexp(log_old, log_gamma + log_g.view(2, b))      # [2, b]
            # One exchange tells every rank every image's U; float64 holds an index exactly.
            batch = all_gather(torch.stack([index.double(), *log_U.double()], dim=1))           # [B, 3]
            log_U = self.log_U = batch[:, 1:].T.flatten().to(log_g.dtype)       # [2B]
            self._update(batch[:, 0].long(), log_U)

            # sum_j (w_ij + w_ji) z_j / (2(B-1)), with w_ij = exp(s_ij/tau) / U_i
            gradient = scores.times_keys(-log_U - log_count).sub_(_positives(anchors), alpha=2)  # [2b, D]
            # With w fixed the loss is quadratic in the unit rows, so that its value is half of row . gradient.
            value = (anchors * gradient).sum() / (2 * b)
        return _Loss.apply(z, anchors, norm, gradient, value)

    def _update(self, index, log_U):
        """u_i <- (U_i^a + U_i^b) / 2, for the whole global batch, on every rank alike."""
        if index.device.type == "cpu" and world_size() > 1:
            _check_index(index, len(index), len(self.log_u))
        self.log_u[index] = (torch.logaddexp(*log_U.chunk(2)) - math.log(2)).to(self.log_u.dtype)
        self.batches += 1
        self.last_visit[index] = self.batches

    @torch.no_grad()
    def gcl(self):
        """What a person watches, of the last global batch, the same on every rank, 0-d: mean_i of
        tau log U_i^a + tau log U_i^b - 2 s(z_i^a, z_i^b), the estimate of the global contrastive loss.
        """
        return _gcl(self.keys, self.log_U, self.temperature)


def plain_global_contrastive_loss(z1, z2, u, temperature, gamma):
    """The loss as the paper writes it, for one process and in linear space: the page to read beside the class above,
    which computes the same in blocks, in log space and across ranks, and is tested against it.

    z1, z2: [B, D] not normalised; u: [B] the batch's moving averages. Returns the loss and the new u [B].
    """
    B = len(z1)
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    keys = torch.cat([z1, z2])                                                  # [2B, D]
    others = 1 - torch.eye(B, dtype=z1.dtype, device=z1.device).repeat(1, 2)    # 0 where the key is of the same image
    gamma = torch.where(u > 0, gamma, torch.ones_like(u))
    loss, U = -2 * (z1 * z2).sum(1), []
    for anchors in (z1, z2):
        s = anchors @ keys.T                                                    # [B, 2B]
        scores = (s.detach() / temperature).exp() * others
        g = scores.sum(1) / (2 * (B - 1))
        U.append((1 - gamma) * u + gamma * g)
        w = scores / U[-1][:, None]
        loss = loss + (w * s).sum(1) / (2 * (B - 1))
    return loss.mean(), (U[0] + U[1]) / 2


def gamma_at(epoch, gamma, decay_epochs):
    """The cosine schedule of gamma: 1 in epoch 0, `gamma` from epoch `decay_epochs` on, half a cosine between."""
    return gamma + (1 - gamma) * 0.5 * (1 + math.cos(math.pi * min(epoch / decay_epochs, 1)))


class ContrastiveLoss(nn.Module):
    """NT-Xent, the loss of SimCLR (Chen et al., arXiv 2002.05709): `cl`, the baseline.

    The positive's cross-entropy among itself and the 2(B-1) negatives of `GlobalContrastiveLoss`, summed over the two
    views and averaged over the images.
    """

    def __init__(self, temperature=0.1):
        super().__init__()
        _check_temperature(temperature)
        self.temperature = temperature
        self.keys = self.scores = self.negatives = None     # of the last global batch: all views [2B, D]

    @_outside_autocast
    def forward(self, z1, z2, index=None):
        """z1, z2: [b, D] not normalised; index is not needed. Returns and raises as `GlobalContrastiveLoss`."""
        z = _views(z1, z2)
        b, tau = len(z) // 2, self.temperature
        with torch.no_grad():
            anchors, norm = _unit_rows(z)
            keys = self.keys = _all_views(anchors)
            scores = self.scores = _Scores(anchors, keys, tau, exclude_positive=False, reuse=self.scores)
            # sum_j (p_ij + p_ji) z_j / tau, with p_ij the share of view j in the softmax of anchor i
            positives = _positives(anchors)
            gradient = (scores.times_keys(-_all_views(scores.log_sum)) - 2 * positives) / tau   # [2b, D]
            value = (scores.log_sum.sum() - (anchors * positives).sum() / tau) / b
        return _Loss.apply(z, anchors, norm, gradient, value)

    @torch.no_grad()
    def gcl(self):
        """As `GlobalContrastiveLoss.gcl`, with g of this batch in the place of U."""
        scores = self.negatives = _Scores(self.keys, self.keys, self.temperature, exclude_positive=True,
                                          reuse=self.negatives)
        return _gcl(self.keys, scores.log_sum - math.log(len(self.keys) - 2), self.temperature)


class _Block(NamedTuple):
    """Some rows of the matrix of scores."""

    rows: slice                 # of which anchors
    columns: slice              # with which keys
    scores: torch.Tensor        # [rows, columns]
    excluded: torch.Tensor      # [rows, 1 or 2] the columns of the anchor itself, and of its positive
    below: slice | None         # the anchors that stand mirrored in this block, none where `right` is None
    right: torch.Tensor | None  # [rows, below] view of the columns that are their scores


class _Scores:
    """exp(s_ij / tau) of this rank's 2b anchors i with all 2B views j, but for the anchor itself and, if so asked, its
    positive. Held in blocks of rows. On one rank the matrix is symmetric: then what lies left of a block's diagonal is
    neither computed nor held, because it stands, mirrored, on the right of the blocks above.

    anchors: [2b, D]; keys: [2B, D]; reuse: the scores of an earlier step, whose memory is taken over, since fresh
    memory costs a CPU many page faults.
    log_sum: [2b] log of each anchor's sum over j.
    """

    def __init__(self, anchors, keys, temperature, exclude_positive, reuse=None):
        self.layout = len(anchors), len(keys), anchors.dtype, anchors.device
        if reuse is not None and reuse.layout == self.layout:
            self.itself, self.blocks = reuse.itself, reuse.blocks
        else:
            self._allocate(anchors, exclude_positive)
        # Since |s| <= 1, all scores and their sums fit float32, unless tau is small. Then s / tau itself is kept, and
        # exp is taken when each row's scale is known.
        self.small_tau = temperature < 1 / 30
        add, total = (torch.logaddexp, torch.logsumexp) if self.small_tau else (torch.add, torch.sum)
        sums = anchors.new_full((len(anchors),), -math.inf if self.small_tau else 0.0)
        for rows, columns, scores, excluded, below, right in self.blocks:
            scores.addmm_(anchors[rows], keys[columns].T, beta=0, alpha=1 / temperature)
            scores.scatter_(1, excluded, -math.inf)
            if not self.small_tau:
                scores.exp_()
            sums[rows] = add(sums[rows], total(scores, 1))
            if below:
                sums[below] = add(sums[below], total(right, 0))
        self.keys, self.log_sum = keys, sums if self.small_tau else sums.log_()

    def times_keys(self, log_weight):
        """log_weight [2B] -> sum_j exp(s_ij / tau) (weight_i + weight_j) key_j, [2b, D]. Can be called once: the scores
        are overwritten.
        """
        product = self.keys.new_zeros(len(self.itself), self.keys.shape[1])
        weight = log_weight if self.small_tau else log_weight.exp()
        own = weight[self.itself, None]
        for rows, columns, scores, _, below, right in self.blocks:
            if self.small_tau:
                torch.add((scores + own[rows]).exp_(), (scores + weight[columns]).exp_(), out=scores)
            else:
                scores.mul_(own[rows] + weight[columns])
            product[rows].addmm_(scores, self.keys[columns])
            if below:
                product[below].addmm_(right.T, self.keys[rows])
        return product

    def _allocate(self, anchors, exclude_positive):
        rows, columns = self.layout[:2]
        b, B, symmetric = rows // 2, columns // 2, rows == columns
        image = torch.arange(b, device=anchors.device) + (0 if symmetric else rank() * b)
        self.itself = torch.cat([image, image + B])                             # [2b] the anchors among the keys
        excluded = torch.stack([self.itself, (self.itself + B) % columns], dim=1)[:, :1 + exclude_positive]
        size = max(1, _BLOCK.get(anchors.device.type, 2**25) // columns)
        if symmetric and anchors.device.type == "cpu":
            size = min(size, b)         # where launches cost nothing, half of a small matrix can be spared too
        self.blocks = []
        for start in range(0, rows, size):
            stop, first = min(start + size, rows), start if symmetric else 0
            scores = anchors.new_empty(stop - start, columns - first)
            # A positive that lies left of the block is excluded where it stands mirrored: name the anchor twice here.
            here = excluded[start:stop] - first
            here = torch.where(here < 0, here[:, :1], here)
            mirrored = symmetric and stop < rows
            self.blocks.append(_Block(slice(start, stop), slice(first, columns), scores, here,
                                      slice(stop, rows) if mirrored else None,
                                      scores[:, stop - first:] if mirrored else None))


def _views(z1, z2):
    """[b, D] twice -> [2b, D], views a before views b, in float32 or better."""
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"the two views must be [B, D] and alike, got {list(z1.shape)} and {list(z2.shape)}")
    if len(z1) * world_size() < 2:
        raise ValueError("the batch must hold at least 2 images: one alone has no negatives")
    z = torch.cat([z1, z2])
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def _unit_rows(z):
    """[2b, D] -> z / |z| [2b, D], and |z| [2b, 1]."""
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(1e-12)
    return z / norm, norm


def _all_views(anchors):
    """[2b, ...] of this rank -> [2B, ...] of all ranks, views a before views b. No gradient."""
    every = all_gather(anchors.detach())
    return every.unflatten(0, (world_size(), 2, -1)).transpose(0, 1).flatten(0, 2)


def _positives(anchors):
    """[2b, D] -> [2b, D] the other view of each anchor's image."""
    return anchors.detach().roll(len(anchors) // 2, dims=0)


class _Loss(torch.autograd.Function):
    """A value that was computed together with its gradient.

    z: [2b, D]; anchors: [2b, D] its unit rows; norm: [2b, 1]; gradient: [2b, D] with respect to the unit rows, for the
    sum over this rank's images. The value becomes the mean over the ranks.
    """

    @staticmethod
    def forward(ctx, z, anchors, norm, gradient, value):
        along = (anchors * gradient).sum(1, keepdim=True)
        ctx.save_for_backward((gradient - along * anchors) / (len(z) // 2 * norm))      # through z -> z / |z|
        return all_reduce_sum(value) / world_size()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None, None, None, None


def _gcl(keys, log_U, temperature):
    positives = torch.linalg.vecdot(*keys.chunk(2))
    return (temperature * log_U.sum() - 2 * positives.sum()) / len(positives)


@torch.no_grad()
def alignment_and_uniformity(keys):
    """How close the two views of an image are, and how evenly the images are spread (Wang and Isola, arXiv 2005.10242).

    keys: [2B, D] unit rows, views a before views b (`criterion.keys`). Returns two 0-d tensors:
    mean |z_i^a - z_i^b|^2, and log mean exp(-2 |z_i - z_j|^2) over pairs of different images in the same view.
    """
    Z1, Z2 = keys.chunk(2)
    B, uniformity = len(Z1), 0
    for Z in (Z1, Z2):
        potential = (4 * (Z @ Z.T) - 4).fill_diagonal_(-math.inf)       # -2 |x - y|^2 of unit vectors
        uniformity = uniformity + (potential.flatten().logsumexp(0) - math.log(B * (B - 1))) / 2
    return (2 - 2 * torch.linalg.vecdot(Z1, Z2)).mean(), uniformity


def _check_temperature(temperature):
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def _check_index(index, length, num_samples):
    if index.shape != (length,):
        raise ValueError(f"index must be [{length}], one for each image, got {list(index.shape)}")
    if index.device.type == "cpu":
        ordered = index.sort().values
        if ordered[0] < 0 or ordered[-1] >= num_samples:
            raise ValueError(f"index must lie in 0 to {num_samples - 1}, got {int(ordered[0])} to {int(ordered[-1])}")
        if (ordered[1:] == ordered[:-1]).any():
            raise ValueError("an image appears twice in the batch; its estimator can take one value only")
