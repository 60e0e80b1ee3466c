"""A model on several ranks: DistributedDataParallel, and BatchNorm over the global batch."""

import inspect

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from sogclr.distributed import all_gather, all_reduce_sum, world_size


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
        return _Normalize.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps)


class _Normalize(torch.autograd.Function):
    """Normalize by all ranks' mean and variance per channel and update the running ones, by the kernels of torch's
    SyncBatchNorm.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        x = _dense(x)
        kernels = ctx.kernels = torch if x.is_cuda else _CPUKernels
        counts = running_mean.new_full((world_size(),), x.numel() // x.shape[1])
        local = torch.stack(kernels.batch_norm_stats(x, eps))       # mean and 1 / standard deviation, [2, C]
        mean, invstd = kernels.batch_norm_gather_stats_with_counts(
            x, *all_gather(local[None]).unbind(1), running_mean, running_var, momentum, eps, counts)
        ctx.save_for_backward(x, weight, mean, invstd, counts.int())
        return kernels.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, invstd, counts = ctx.saved_tensors
        grad, affine = _dense(grad), weight is not None
        *sums, weight_grad, bias_grad = ctx.kernels.batch_norm_backward_reduce(
            grad, x, mean, invstd, weight, True, affine, affine)
        # Only these sums cross ranks: DDP averages the gradients of weight and bias, which the kernel returns even if
        # the layer has neither.
        x_grad = ctx.kernels.batch_norm_backward_elemt(
            grad, x, mean, invstd, weight, *all_reduce_sum(torch.stack(sums)), counts)
        return x_grad, *((weight_grad, bias_grad) if affine else (None, None)), None, None, None, None


def _dense(x):
    """x in one of the two memory formats of the kernels."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


class _CPUKernels:
    """What the kernels of these names do, which torch has only for GPUs. x, grad: [b, C, ...]; counts: [W] values per
    channel; means, invstds: [W, C]; all others: [C].
    """

    def batch_norm_stats(x, eps):
        unused = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))      # set the precision
        mean, var = torch.batch_norm_update_stats(x, *unused, 0)
        return mean, (var + eps).rsqrt()

    def batch_norm_gather_stats_with_counts(x, means, invstds, running_mean, running_var, momentum, eps, counts):
        mean, count = means.mean(0), counts.sum()
        var = (invstds**-2 - eps + (means - mean).square()).mean(0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * count / (count - 1), momentum)
        return mean, (var + eps).rsqrt()

    def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
        return F.batch_norm(x, mean, invstd**-2 - eps, weight, bias, eps=eps)

    def batch_norm_backward_reduce(grad, x, mean, invstd, weight, *_):
        _, product, total = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, invstd, True, 0.0, [False, True, True])
        return total, product / invstd, product, total

    def batch_norm_backward_elemt(grad, x, mean, invstd, weight, total, product, counts):
        slope = -product * invstd**2 / counts.sum()
        shift = -total / counts.sum() - mean * slope
        scale = invstd if weight is None else invstd * weight
        slope, shift, scale = (values.view(-1, *[1] * (x.ndim - 2)) for values in (slope, shift, scale))
        return torch.addcmul(shift, x, slope).add_(grad).mul_(scale).to(x.dtype)
