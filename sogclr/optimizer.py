"""LARS, and the learning rate as a function of the epoch."""

import math

import torch


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), as MoCo v3 and SogCLR use it.

    For a parameter of more than one dimension, d = grad + weight_decay * p, then d *= trust * |p| / |d|
    (d is unchanged if either norm is 0). For one dimension (BatchNorm, biases), d = grad: no decay, no scaling.
    Then mu = momentum * mu + d and p -= lr * mu.

    params: iterable of parameters or of groups; state: `mu`, a tensor like its parameter.
    All parameters of a group are updated together, by torch's `_foreach` operations; nothing waits for the device.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9, trust_coefficient=0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum,
                                  "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
            d = []
            if matrices:
                d = torch._foreach_add([p.grad for p in matrices], matrices, alpha=group["weight_decay"])
                p_norm, d_norm = (torch.stack(torch._foreach_norm(tensors)) for tensors in (matrices, d))
                ratio = torch.where((p_norm > 0) & (d_norm > 0), group["trust_coefficient"] * p_norm / d_norm, 1.0)
                torch._foreach_mul_(d, ratio.unbind())
            if params:
                params = matrices + vectors
                for p in params:
                    if not self.state[p]:
                        self.state[p]["mu"] = torch.zeros_like(p)
                mu = [self.state[p]["mu"] for p in params]
                torch._foreach_mul_(mu, group["momentum"])
                torch._foreach_add_(mu, [*d, *(p.grad for p in vectors)])
                torch._foreach_add_(params, mu, alpha=-group["lr"])
        return loss


def scaled_lr(lr, batch_size, scaling):
    """The peak learning rate: `sqrt`: lr * sqrt(B), as in SogCLR; `linear`: lr * B / 256, as in MoCo v3."""
    return lr * math.sqrt(batch_size) if scaling == "sqrt" else lr * batch_size / 256


def lr_at(epoch, peak, epochs, warmup_epochs=0):
    """Linear warm-up from 0, then half a cosine to 0. `epoch` is fractional: epoch + step / steps."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def set_lr(optimizer, lr):
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
