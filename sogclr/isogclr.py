"""The robust global contrastive loss of iSogCLR, which learns a temperature for each image.

Qiu et al., ICML 2023, arXiv 2305.11965, "Not All Semantics are Created Equal: Contrastive Self-supervised Learning with
Automatic Temperature Individualization". In the notation of `sogclr.loss`, with g_i at the image's own tau_i, it is

    RGCL = mean_i [ min over tau_i of tau_i (log g_i^a + rho) + tau_i (log g_i^b + rho) - 2 s(z_i^a, z_i^b) ]

with tau_i in [tau_min, tau_max]: the terms with tau_i are the largest expected score of the negatives over weights p_i
(one set per view) whose KL divergences from uniform are at most rho on average. The gradient for the projections is
SogCLR's with tau_i for tau: the tau_i before the logarithm and the 1/tau_i of the score cancel. For tau_i it is, as the
mean of the views, and with U for g as everywhere:

    G_i    = 1/2 sum over a, b of [ log U_i + rho - mean_j w_ij s(z_i, z_j) / tau_i ]
    v_i   <- (1 - beta) v_i + beta G_i                             from 0
    tau_i <- clip(tau_i - eta v_i, tau_min, tau_max)               after the loss, which uses the old tau_i

Where U = g, G_i = rho - KL(p_i || uniform) with p_ij proportional to exp(s(z_i, z_j) / tau_i): tau_i rises while the
softmax over the negatives is more than rho nats from uniform. But u_i is from earlier visits, at other temperatures:
with a small gamma and a large eta tau_i swings about that point instead of settling.
"""

import torch

from sogclr.distributed import all_gather
from sogclr.loss import GlobalContrastiveLoss


class RobustGlobalContrastiveLoss(GlobalContrastiveLoss):
    """The global contrastive loss with a temperature for each image: `isogclr`.

    num_samples, gamma: as in `GlobalContrastiveLoss`; temperature: the one to start from; rho: >= 0, the KL divergence
    from uniform, in nats, that the temperatures aim at; tau_min, tau_max: their bounds; eta: >= 0, their learning rate;
    beta: in (0, 1], weight of the new value in `v`. With eta 0 it is `GlobalContrastiveLoss`.

    Two buffers are added, both [N] float32 and equal on all ranks: the temperatures `tau`, and `v`, the moving averages
    of their gradients.
    """

    def __init__(self, num_samples, temperature=0.1, gamma=0.9, rho=0.3, tau_min=0.05, tau_max=0.7, eta=0.01, beta=0.9):
        super().__init__(num_samples, temperature, gamma)
        if not 0 < tau_min <= temperature <= tau_max:
            raise ValueError(f"must be 0 < tau_min <= temperature <= tau_max, got {tau_min}, {temperature}, {tau_max}")
        if not (rho >= 0 and eta >= 0 and 0 < beta <= 1):
            raise ValueError(f"rho and eta must be at least 0 and beta in (0, 1], got {rho}, {eta}, {beta}")
        self.rho, self.tau_min, self.tau_max, self.eta, self.beta = rho, tau_min, tau_max, eta, beta
        self.register_buffer("tau", torch.full((num_samples,), float(temperature)))
        self.register_buffer("v", torch.zeros(num_samples))
        self.batch_tau = None       # [B] the last batch's temperatures, in its loss

    def gcl(self):
        """The last batch's estimate of RGCL, with U for g, 0-d: the value to monitor.

        Without the terms with rho it would fall with every rise of a temperature.
        """
        z1, z2 = self.keys.chunk(2)
        return (self.batch_tau * (self.log_U.sum(1) + 2 * self.rho) - 2 * (z1 * z2).sum(1)).mean()

    def _tau(self, index):
        return self.tau[index].repeat(2)[:, None]

    def _update(self, batch, mean_ws):
        super()._update(batch, mean_ws)
        tau = self.batch_tau = self.tau[batch]                                                      # [B]
        G = (self.log_U + self.rho - all_gather(mean_ws.T) / tau[:, None]).mean(1).to(tau.dtype)    # [B]
        v = self.v[batch] = (1 - self.beta) * self.v[batch] + self.beta * G
        self.tau[batch] = (tau - self.eta * v).clamp(self.tau_min, self.tau_max)
