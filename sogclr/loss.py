"""The global contrastive loss of SogCLR, which owns the moving averages `u`, and SimCLR's loss to compare with.

Names follow the paper (Yuan et al., arXiv 2202.12387) and hold in the whole file:

    B      images in the global batch, over all ranks; b = B / ranks of them on this rank
    z^a, z^b   [b, D] L2-normalised projections of the two views; s(x, y) = x . y; tau the temperature
    g_i^a  mean of exp(s(z_i^a, z)/tau) over the 2(B-1) views z of *other* images; g_i^b likewise
    u_i    moving average of g_i, one for each image of the data set; 0 before the image's first visit
    U_i^a  (1 - gamma_i) u_i + gamma_i g_i^a, with gamma_i = 1 on the first visit and gamma after; U_i^b likewise
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from sogclr.distributed import all_gather, all_gather_with_gradient, all_reduce_sum, rank, world_size

# Similarities are computed a block of anchors at a time: the block (elements, not bytes) fits a CPU's cache, and on a
# GPU it is large enough to be a single block at the usual batch sizes.
_BLOCK = {"cpu": 2**18, "cuda": 2**25}


def _outside_autocast(forward):
    """The loss is computed in float32 or better, also where the caller forgot to leave autocast."""
    @functools.wraps(forward)
    def wrapped(self, z1, z2, index=None):
        with torch.autocast(z1.device.type, enabled=False):
            return forward(self, z1, z2, index)
    return wrapped


class GlobalContrastiveLoss(nn.Module):
    """The global contrastive loss, called `dcl` (dynamic contrastive loss) in the authors' code.

    num_samples: N, the size of the data set; temperature: tau > 0; gamma: in (0, 1], weight of the new in `u`.

    The estimator is kept as its logarithm (`log_u`, [N] float32, -inf before the first visit), because exp(1/tau)
    leaves float32 below tau = 0.0113. It is a buffer: it moves with `.to(device)` and is part of `state_dict()`.
    """

    def __init__(self, num_samples, temperature=0.1, gamma=0.9):
        super().__init__()
        _check_temperature(temperature)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {gamma}")
        self.temperature, self.gamma = temperature, gamma
        self.register_buffer("log_u", torch.full((num_samples,), -math.inf))
        self.last_batch = None      # what `diagnostics` reads: z^a, z^b [B, D], log U [B, 2], all detached

    @property
    def u(self):
        """[N] the moving averages, 0 where an image was never visited."""
        return self.log_u.exp()

    @u.setter
    def u(self, u):
        self.log_u.copy_(torch.as_tensor(u).reshape(-1).log())

    @_outside_autocast
    def forward(self, z1, z2, index):
        """z1, z2: [b, D] the two views' projections, not normalised; index: [b] the images' places in the data set.

        Returns the loss of the *global* batch: the same value on every rank, with this rank's share of the gradient,
        so that DDP's average over the ranks is the gradient of one process with all B images. Updates `u` of the batch.

        Its value is a surrogate with the right gradient and may be negative: watch `diagnostics()["gcl"]`.
        An index on the CPU is checked (range, duplicates); one on a GPU is not, since that would stall the device.
        Raises ValueError.
        """
        z1, z2 = _normalized(z1, z2)
        b = len(z1)
        _check_index(index, b, len(self.log_u))
        index = index.to(self.log_u.device, non_blocking=True)
        Z1, Z2 = _gathered(z1, z2)
        anchors, keys = torch.cat([z1, z2]), torch.cat([Z1, Z2])            # [2b, D], [2B, D]

        with torch.no_grad():
            log_u = self.log_u[index].to(z1.dtype)
            # log of (1 - gamma_i) u_i, and log gamma_i: an image's first visit takes the new value alone
            log_old = log_u + (math.log1p(-self.gamma) if self.gamma < 1 else -math.inf)
            log_gamma = torch.zeros_like(log_u).masked_fill(log_u > -math.inf, math.log(self.gamma))
            log_U, expected, d_anchors, d_keys = _negatives(
                anchors, keys, self.temperature, log_old.repeat(2), log_gamma.repeat(2))
            log_U, expected = log_U.view(2, b).T, expected.view(2, b).sum(0)                    # [b, 2], [b]
            value = expected - 2 * (z1 * z2).sum(1)                                             # [b]
            # One exchange tells every rank every image's estimator and loss; float64 holds an index exactly.
            batch = all_gather(torch.cat([index[:, None], log_U, value[:, None]], dim=1).double())
            self._update(batch[:, 0].long(), batch[:, 1:3])
            self.last_batch = Z1.detach(), Z2.detach(), batch[:, 1:3]

        # The gradient was computed block by block beside the value: `linear` carries it, and adds exactly 0.
        linear = -2 * (z1 * z2).sum() + (anchors * d_anchors).sum() + (keys * d_keys).sum()
        return batch[:, 3].mean().to(z1.dtype) + (linear - linear.detach()) / b

    def _update(self, index, log_U):
        """u_i <- (U_i^a + U_i^b) / 2, for the whole global batch, on every rank alike."""
        if index.device.type == "cpu" and world_size() > 1:
            _check_index(index, len(index), len(self.log_u))
        self.log_u[index] = (torch.logaddexp(log_U[:, 0], log_U[:, 1]) - math.log(2)).to(self.log_u.dtype)

    @torch.no_grad()
    def diagnostics(self):
        """What a person watches, of the last global batch, the same on every rank: a dict of 0-d tensors.

        gcl: mean_i tau log U_i^a + tau log U_i^b - 2 s(z_i^a, z_i^b), the estimate of the global contrastive loss;
        alignment: mean |z_i^a - z_i^b|^2; uniformity: log mean exp(-2 |z_i - z_j|^2) over pairs of different images in
        the same view (Wang and Isola, arXiv 2005.10242).
        """
        Z1, Z2, log_U = self.last_batch
        return _diagnostics(Z1, Z2, self.temperature, log_U)


class ContrastiveLoss(nn.Module):
    """NT-Xent, the loss of SimCLR (Chen et al., arXiv 2002.05709): `cl`, the baseline.

    The positive's cross-entropy among itself and the 2(B-1) negatives of `GlobalContrastiveLoss`, summed over the two
    views and averaged over the images.
    """

    def __init__(self, temperature=0.1):
        super().__init__()
        _check_temperature(temperature)
        self.temperature = temperature
        self.last_batch = None

    @_outside_autocast
    def forward(self, z1, z2, index=None):
        """z1, z2: [b, D] not normalised; index is not needed. Returns and raises as `GlobalContrastiveLoss`."""
        z1, z2 = _normalized(z1, z2)
        b, B = len(z1), len(z1) * world_size()
        Z1, Z2 = _gathered(z1, z2)
        logits = torch.cat([z1, z2]) @ torch.cat([Z1, Z2]).T / self.temperature                 # [2b, 2B]
        own1, own2 = _own_keys(b, B, z1.device).T                                               # [2b] each
        view1 = torch.arange(2 * b, device=z1.device) < b
        logits = logits.scatter(1, torch.where(view1, own1, own2)[:, None], -math.inf)          # the anchor itself
        loss = F.cross_entropy(logits, torch.where(view1, own2, own1), reduction="sum") / b
        self.last_batch = Z1.detach(), Z2.detach()
        # every rank shows the global batch's value, and keeps its own share of the gradient
        return all_reduce_sum(loss.detach().clone()) / world_size() + (loss - loss.detach())

    @torch.no_grad()
    def diagnostics(self):
        """As `GlobalContrastiveLoss.diagnostics`, with g of this batch in the place of U."""
        Z1, Z2 = self.last_batch
        keys = torch.cat([Z1, Z2])
        none = torch.full((len(keys),), -math.inf, dtype=keys.dtype, device=keys.device)
        log_g = _negatives(keys, keys, self.temperature, none, torch.zeros_like(none), shard=0)[0]
        return _diagnostics(Z1, Z2, self.temperature, log_g.view(2, -1).T)


def _negatives(anchors, keys, temperature, log_old, log_gamma, shard=None):
    """The sum over the negatives, its gradient and the estimator, without ever holding all similarities at once.

    anchors: [2b, D] this rank's views a, then its views b; keys: [2B, D] all views a, then all views b;
    log_old, log_gamma: [2b] log of (1 - gamma_i) u_i, and of gamma_i.

    Returns, with w_ij = exp(s_ij / tau) / U_i taken as constant:
    log_U     [2b]    log of (1 - gamma_i) u_i + gamma_i g_i
    expected  [2b]    1/(2(B-1)) sum_j w_ij s_ij
    d_anchors [2b, D], d_keys [2B, D]   the gradient of `expected.sum()`
    """
    b, B = len(anchors) // 2, len(keys) // 2
    own = _own_keys(b, B, anchors.device, shard)
    log_U, expected = torch.empty_like(log_old), torch.empty_like(log_old)
    d_anchors, d_keys = torch.empty_like(anchors), torch.zeros_like(keys)
    log_count = math.log(2 * (B - 1))
    block = max(1, _BLOCK.get(anchors.device.type, 2**25) // (2 * B))
    for start in range(0, 2 * b, block):
        rows = slice(start, start + block)
        w = (anchors[rows] / temperature) @ keys.T                              # s/tau; a block of [2b, 2B]
        w.scatter_(1, own[rows], -math.inf)                                     # neither the positive nor itself
        top = w.amax(1, keepdim=True)
        w.sub_(top).exp_()
        log_g = top[:, 0] + w.sum(1).log() - log_count
        log_U[rows] = torch.logaddexp(log_old[rows], log_gamma[rows] + log_g)
        w.mul_((top - log_U[rows, None] - log_count).exp())                     # w_ij / (2(B-1)); at most 1/gamma
        d_anchors[rows] = w @ keys
        expected[rows] = (anchors[rows] * d_anchors[rows]).sum(1)
        d_keys.addmm_(w.T, anchors[rows])
    return log_U, expected, d_anchors, d_keys


def _own_keys(b, B, device, shard=None):
    """[2b, 2] the two places among the keys that show the anchor's own image: in views a and in views b."""
    first = (rank() if shard is None else shard) * b
    image = torch.arange(first, first + b, device=device).repeat(2)
    return torch.stack([image, image + B], dim=1)


def _normalized(z1, z2):
    """Unit rows, in float32 or better; at least two images over all ranks."""
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"the two views must be [B, D] and alike, got {list(z1.shape)} and {list(z2.shape)}")
    if len(z1) * world_size() < 2:
        raise ValueError("the batch must hold at least 2 images: one alone has no negatives")
    return tuple(F.normalize(z.float() if z.dtype in (torch.float16, torch.bfloat16) else z, dim=1) for z in (z1, z2))


def _gathered(z1, z2):
    """[b, D] twice -> [B, D] twice: every rank's projections, in one differentiable exchange."""
    return all_gather_with_gradient(torch.cat([z1, z2], dim=1)).chunk(2, dim=1)


def _diagnostics(Z1, Z2, temperature, log_U):
    positive = (Z1 * Z2).sum(1)
    B = len(Z1)
    apart = []
    for Z in (Z1, Z2):
        potential = (4 * (Z @ Z.T) - 4).fill_diagonal_(-math.inf)       # -2 |x - y|^2 of unit vectors
        apart.append(potential.flatten().logsumexp(0) - math.log(B * (B - 1)))
    return {"gcl": (temperature * log_U.sum(1) - 2 * positive).mean(),
            "alignment": (2 - 2 * positive).mean(),
            "uniformity": (apart[0] + apart[1]) / 2}


def _check_temperature(temperature):
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def _check_index(index, length, num_samples):
    if index.shape != (length,):
        raise ValueError(f"index must be [{length}], one for each image, got {list(index.shape)}")
    if index.device.type == "cpu" and length:
        if index.min() < 0 or index.max() >= num_samples:
            raise ValueError(f"index must lie in 0 to {num_samples - 1}, got {int(index.min())} to {int(index.max())}")
        if len(index.unique()) < length:
            raise ValueError("an image appears twice in the batch; its estimator can take one value only")
