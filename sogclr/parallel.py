"""A model on several ranks: DistributedDataParallel, and BatchNorm over the global batch."""

import inspect

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from sogclr.distributed import all_gather, all_reduce_sum, gather_with_gradient, world_size


def data_parallel(model, device):
    """Convert a model's BatchNorm in place to `SyncBatchNorm` and wrap the model in DistributedDataParallel; or return
    it unchanged in a single process. Every step must use every parameter as often as the first did (`static_graph`).

    No buffer is broadcast: every rank computes the same statistics.
    """
    if world_size() == 1:
        return model
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SyncBatchNorm
    # torch 2.15 deprecates broadcast_buffers, earlier releases lack forward_sync_buffers
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                   gradient_as_bucket_view=True, static_graph=True, **{buffers: False})


class SyncBatchNorm(_BatchNorm):
    """BatchNorm of the global batch: W ranks with b images each normalize as one rank with W b images.

    torch's SyncBatchNorm lets ranks have different numbers of images, for which the host waits for the GPU three times
    per layer, and it needs GPUs. Here the numbers are equal, so that nothing waits: a call costs one collective forward
    and one backward. Parameters, buffers and state dict are BatchNorm's; it must track running statistics, and
    `momentum` must be a number.
    """

    def _check_input_dim(self, x):
        """BatchNorm1d and BatchNorm2d differ only in this."""

    def forward(self, x):
        """[b, C] or [b, C, H, W] -> the same shape."""
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        normalize = _NormalizeOnGPU.apply if x.is_cuda else _normalize_on_cpu
        return normalize(x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps)


def _normalize_on_cpu(x, weight, bias, running_mean, running_var, momentum, eps):
    """Normalize by the mean and variance per channel of all ranks' x, and update the running statistics."""
    def per_channel(values):
        return values.view(-1, *[1] * (x.ndim - 2))

    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, running_mean.dtype))
    local_var, local_mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    means, variances = gather_with_gradient(torch.stack([local_mean, local_var])[None]).unbind(1)       # [W, C] each
    mean = means.mean(0)
    var = (variances + (means - mean).square()).mean(0)
    with torch.no_grad():
        count = world_size() * x.numel() // x.shape[1]
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * count / (count - 1), momentum)
    x = (x - per_channel(mean)) * per_channel((var + eps).rsqrt())
    return (x if weight is None else torch.addcmul(per_channel(bias), x, per_channel(weight))).to(dtype)


class _NormalizeOnGPU(torch.autograd.Function):
    """`_normalize_on_cpu` by the kernels of torch's SyncBatchNorm."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        x = _dense(x)
        counts = running_mean.new_full((world_size(),), x.numel() // x.shape[1])
        local = torch.stack(torch.batch_norm_stats(x, eps))     # mean and 1 / standard deviation, [2, C]
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, *all_gather(local[None]).unbind(1), running_mean, running_var, momentum, eps, counts)
        ctx.save_for_backward(x, weight, mean, invstd, counts.int())
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, invstd, counts = ctx.saved_tensors
        grad, affine = _dense(grad), weight is not None
        *sums, weight_grad, bias_grad = torch.batch_norm_backward_reduce(
            grad, x, mean, invstd, weight, True, affine, affine)
        # Only these sums cross ranks: DDP averages the gradients of weight and bias. The kernel returns some even if
        # the layer has neither.
        x_grad = torch.batch_norm_backward_elemt(
            grad, x, mean, invstd, weight, *all_reduce_sum(torch.stack(sums)), counts)
        return x_grad, *((weight_grad, bias_grad) if affine else (None, None)), None, None, None, None


def _dense(x):
    """x in one of the two memory formats of the kernels."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
