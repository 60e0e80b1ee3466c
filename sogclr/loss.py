"""The global contrastive loss of SogCLR, which owns the moving averages `u`, and SimCLR's loss for comparison.

Names follow the paper (Yuan et al., ICML 2022, arXiv 2202.12387):

    B          images in the global batch, over all ranks; b = B / ranks of them on this rank
    z^a, z^b   [b, D] L2-normalized projections of the two views; s(x, y) = x . y; tau the temperature
    g_i^a      mean of exp(s(z_i^a, z_j)/tau) over its negatives z_j: both views of all other images j, 2(B-1) in total

The objective is the global contrastive loss, for which g has all other images of the data set as negatives:

    GCL = mean_i [ tau log g_i^a + tau log g_i^b - 2 s(z_i^a, z_i^b) ]

Its gradient has g in the denominator, where a small batch's g does harm. SogCLR puts a moving average there:

    u_i        moving average of g_i, one per image of the data set; 0 before the image's first visit
    U_i^a      (1 - gamma_i) u_i + gamma_i g_i^a, with gamma_i = 1 on the first visit and gamma after it; U_i^b likewise
    w_ij^a     exp(s(z_i^a, z_j)/tau) / U_i^a, held fixed; w_ij^b likewise
    u_i     <- (U_i^a + U_i^b) / 2
    loss     = mean_i [ -2 s(z_i^a, z_i^b) + 1/(2(B-1)) sum_j (w_ij^a s(z_i^a, z_j) + w_ij^b s(z_i^b, z_j)) ]

so that the gradient of `loss` is that of GCL with 1/U for 1/g: the tau before the logarithm and the 1/tau of the score
cancel. Exponentials are stored as their logarithms, since exp(1/tau) overflows float32 below tau = 0.0113.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from sogclr.distributed import all_gather, gather_with_gradient, mean_over_ranks, rank, world_size


def similarities(z1, z2, group_size=None):
    """The similarities of this rank's views to all views of the global batch.

    z1, z2: [b, D] the two views' projections, not normalized, with the same b on each rank; group_size: see `_Loss`.
    Returns, in float32 or higher even inside autocast: keys [2B, D], the unit projections of all ranks, views a before
    views b, with their gradient; s [2b, 2B], the similarity of each view of this rank (a before b) to each key;
    positive [b], that of an image's two views; is_negative [2b, 2B], whether the key is a view of another image of
    the group; and count, how many negatives each view has.
    Raises ValueError if the views' shapes differ, if there is only one image, or if groups do not divide the batch.
    """
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"the two views must both be [B, D], got {list(z1.shape)} and {list(z2.shape)}")
    b, B = len(z1), len(z1) * world_size()
    size = B if group_size is None else group_size
    if B < 2:
        raise ValueError("the batch must have at least 2 images: a single one has no negatives")
    if size < 2 or B % size:
        raise ValueError(f"group_size must be at least 2 and divide the batch of {B} images, got {size}")
    with torch.autocast(z1.device.type, enabled=False):
        z = F.normalize(torch.cat([z1, z2]).to(torch.promote_types(z1.dtype, torch.float32)), dim=1)    # [2b, D]
        z1, z2 = z.chunk(2)
        keys = gather_with_gradient(torch.stack([z1, z2], dim=1))               # [B, 2, D]
        keys = keys.transpose(0, 1).flatten(0, 1)                               # [2B, D]
        s = z @ keys.T
    image = torch.arange(B, device=s.device).expand(2, B)                       # of each key
    own, image = image[:, rank() * b:(rank() + 1) * b].reshape(-1, 1), image.flatten()      # own: of this rank's views
    is_negative = (own != image) & (own // size == image // size)
    return keys, s, (z1 * z2).sum(1), is_negative, 2 * (size - 1)


class _Loss(nn.Module):
    """What both losses share: the temperature, and public values of the last global batch, equal on all ranks.

    keys: [2B, D] the unit projections, views a before views b; log_U: [B, 2] of U_i^a and U_i^b; both detached.

    group_size: None, or the number of images in a group. The global batch is then cut into groups, in its order; only
    images of the same group are negatives, and B in the formulas is the group's size.
    """

    def __init__(self, temperature=0.1):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature
        self.group_size = self.keys = self.log_U = None

    @torch.no_grad()
    def gcl(self):
        """The last batch's estimate of GCL, with U for g, 0-d: the value to monitor."""
        z1, z2 = self.keys.chunk(2)
        return (self.temperature * self.log_U.sum(1) - 2 * (z1 * z2).sum(1)).mean()


class GlobalContrastiveLoss(_Loss):
    """The global contrastive loss, called `dcl` (dynamic contrastive loss) in the authors' code.

    num_samples: N, the size of the data set; temperature: tau > 0; gamma: in (0, 1], weight of the new value in `u`.

    The moving averages are the buffer `log_u` ([N] float32, -inf before the first visit). Two more are `batches`, the
    number of batches so far, and `last_visit` ([N] int32), its value when an image was last seen, -1 if unknown.
    """

    def __init__(self, num_samples, temperature=0.1, gamma=0.9):
        super().__init__(temperature)
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {gamma}")
        self.gamma = gamma
        self.register_buffer("log_u", torch.full((num_samples,), -math.inf))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int32))
        self.register_buffer("last_visit", torch.full((num_samples,), -1, dtype=torch.int32))

    @property
    def u(self):
        """[N] the moving averages, 0 for images never visited."""
        return self.log_u.exp()

    @u.setter
    def u(self, u):
        self.log_u.copy_(torch.as_tensor(u).reshape(-1).log())

    @property
    def age(self):
        """How many batches ago each image was last visited, where known: [at most N] int32, in the images' order."""
        return (self.batches - self.last_visit)[self.last_visit >= 0]

    def forward(self, z1, z2, index):
        """The loss of the global batch, 0-d, the same on all ranks; also updates `u` of its images.

        z1, z2: [b, D] the two views' projections, not normalized; index: [b] the images' indices in the data set.
        Under DDP, which averages gradients over ranks, its gradient is that of one process with all B images. The value
        itself says little and may be negative: monitor `gcl()`.

        Call `backward()` outside autocast, as torch recommends: inside, torch computes the gradient of the similarities
        in half precision. Needs about 4.3 float32 matrices [2b, 2B] at a time: 1.1 GiB at B = 4096 on one device.
        Raises ValueError if shapes do not match, or an image is out of range or appears twice. (For an index on a GPU
        only the shape is checked, since reading it would wait for the GPU.)
        """
        keys, s, positive, is_negative, count = similarities(z1, z2, self.group_size)
        if index.shape != positive.shape:
            raise ValueError(f"index must be [{len(positive)}], one for each image, got {list(index.shape)}")
        self._check(index)
        index = index.to(s.device, non_blocking=True)
        with torch.no_grad():
            logits = (s / self._tau(index)).masked_fill(~is_negative, -math.inf)        # [2b, 2B]
            log_g = logits.logsumexp(1).view(2, -1) - math.log(count)                   # [2, b]
            log_u = self.log_u[index].to(s.dtype)                                       # [b], from earlier visits
            log_kept = log_u + (math.log1p(-self.gamma) if self.gamma < 1 else -math.inf)
            log_U = torch.logaddexp(log_kept, math.log(self.gamma) + log_g)             # [2, b]
            log_U = torch.where(log_u == -math.inf, log_g, log_U)                       # gamma_i = 1 on the first visit
            w = (logits - log_U.view(-1, 1)).exp()                                      # [2b, 2B]
            self.keys, self.log_U = keys.detach(), all_gather(log_U.T)
        ws = (w * s).sum(1).view(2, -1)                                                 # [2, b] sum_j w_ij s_ij
        self._update(all_gather(index), ws.detach() / count)
        return mean_over_ranks(ws.sum(0) / count - 2 * positive)

    def _tau(self, index):
        """The temperature of this rank's views: a number, or [2b, 1]. index: [b] their images."""
        return self.temperature

    def _update(self, batch, mean_ws):
        """u_i <- (U_i^a + U_i^b) / 2, on all ranks.

        batch: [B] the global batch's images, in the order of log_U; mean_ws: [2, b] this rank's mean_j w_ij s_ij.
        """
        self._check(batch)      # again: on CPUs an image may be on two ranks
        self.log_u[batch] = (self.log_U.logsumexp(1) - math.log(2)).to(self.log_u.dtype)
        self.batches += 1
        self.last_visit[batch] = self.batches

    def _check(self, index):
        if index.device.type == "cpu":
            ordered, last = index.sort().values, len(self.log_u) - 1
            if ordered[0] < 0 or ordered[-1] > last:
                raise ValueError(f"index must be in 0 to {last}, got {int(ordered[0])} to {int(ordered[-1])}")
            if (ordered[1:] == ordered[:-1]).any():
                raise ValueError("an image appears twice in the batch, but its u can take only one value")


def gamma_at(epoch, gamma, decay_epochs):
    """The cosine schedule of gamma: 1 in epoch 0, `gamma` from epoch `decay_epochs` on, half a cosine in between."""
    return gamma + (1 - gamma) * 0.5 * (1 + math.cos(math.pi * min(epoch / decay_epochs, 1)))


class ContrastiveLoss(_Loss):
    """NT-Xent, the loss of SimCLR (Chen et al., ICML 2020, arXiv 2002.05709): `cl`, the baseline.

    The cross-entropy of the positive among itself and the 2(B-1) negatives, summed over the two views and averaged over
    the images; without the factor tau that GCL has. Its `gcl()` uses this batch's g for U.
    """

    def forward(self, z1, z2, index=None):
        """z1, z2: [b, D] not normalized; index is not needed. Returns and raises like `GlobalContrastiveLoss`."""
        keys, s, positive, is_negative, count = similarities(z1, z2, self.group_size)
        logits = (s / self.temperature).masked_fill(~is_negative, -math.inf)            # [2b, 2B]
        log_sum, positive = logits.logsumexp(1).view(2, -1), positive / self.temperature
        self.keys, self.log_U = keys.detach(), all_gather(log_sum.detach().T - math.log(count))
        return mean_over_ranks((torch.logaddexp(log_sum, positive) - positive).sum(0))
