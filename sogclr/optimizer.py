"""LARS, and the learning rate as a function of the epoch."""

import math

import torch


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), as MoCo v3 and SogCLR use it.

    For a parameter of more than one dimension, d = grad + weight_decay * p, then d *= trust * |p| / |d|
    (d is left as it is where either norm is 0). For one dimension (BatchNorm, biases), d = grad: no decay, no scaling.
    Then mu = momentum * mu + d and p -= lr * mu.

    params: iterable of parameters or of groups; state: `mu`, a tensor like its parameter.
    Parameters are updated together by torch's `_foreach` operations, and nothing waits for the device.
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
            for matrices in _in_portions([p for p in params if p.ndim > 1]):
                updates = torch._foreach_add(_grads(matrices), matrices, alpha=group["weight_decay"])
                ratio = _trust_ratio(matrices, updates, group["trust_coefficient"])
                mus = self._decayed_mus(matrices, group["momentum"])
                torch._foreach_addcmul_(mus, updates, _like(matrices, ratio))
                torch._foreach_add_(matrices, mus, alpha=-group["lr"])
            for vectors in _in_portions([p for p in params if p.ndim <= 1]):
                mus = self._decayed_mus(vectors, group["momentum"])
                torch._foreach_add_(mus, _grads(vectors))
                torch._foreach_add_(vectors, mus, alpha=-group["lr"])
        return loss

    def _decayed_mus(self, params, momentum):
        """momentum * mu of each parameter, in place; zeros before the first step."""
        for p in params:
            if "mu" not in self.state[p]:
                self.state[p]["mu"] = torch.zeros_like(p)
        mus = [self.state[p]["mu"] for p in params]
        torch._foreach_mul_(mus, momentum)
        return mus


def _in_portions(params, cpu_elements=2**20):
    """On a GPU all parameters at once, so that few kernels are launched; on a CPU what fits its cache, at least one."""
    portion, elements = [], 0
    for p in params:
        portion.append(p)
        elements += p.numel()
        if elements >= cpu_elements and not p.is_cuda:
            yield portion
            portion, elements = [], 0
    if portion:
        yield portion


def _grads(params):
    return [p.grad for p in params]


def _trust_ratio(params, updates, trust_coefficient):
    """[P] trust * |p| / |d|, or 1 where either norm is 0."""
    param_norm = torch.stack(torch._foreach_norm(params))
    update_norm = torch.stack(torch._foreach_norm(updates))
    return torch.where((param_norm > 0) & (update_norm > 0), trust_coefficient * param_norm / update_norm, 1.0)


def _like(params, values):
    """values [P] -> a list of tensors that multiply the parameters.

    On a GPU a `_foreach` operation takes a kernel for each 0-d tensor but one for many tensors of equal shapes, and so
    does `cat`: there each value is spread over its parameter's shape.
    """
    if not values.is_cuda:
        return list(values.unbind())
    return _spread(params, values)


def _spread(params, values):
    sizes = [p.numel() for p in params]
    flat = torch.cat([value.expand(size) for value, size in zip(values, sizes, strict=True)])
    return [part.as_strided(p.shape, p.stride()) for part, p in zip(flat.split(sizes), params, strict=True)]


def scaled_lr(lr, batch_size, scaling):
    """The peak learning rate: `sqrt`: lr * sqrt(B), as SogCLR; `linear`: lr * B / 256, as MoCo v3."""
    return lr * math.sqrt(batch_size) if scaling == "sqrt" else lr * batch_size / 256


def lr_at(epoch, peak, epochs, warmup_epochs=0):
    """Linear warm-up from 0, then half a cosine to 0. `epoch` counts in fractions: epoch + step / steps."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def set_lr(optimizer, lr):
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
