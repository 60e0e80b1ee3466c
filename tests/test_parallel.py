"""The model across real processes: W ranks with B/W images each must be one rank with B."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn

from sogclr import parallel
from sogclr.builder import SimCLR, resnet
from sogclr.loss import GlobalContrastiveLoss
from sogclr.parallel import SyncBatchNorm, data_parallel

B, SIZE, STEPS = 16, 16, 2
COLLECTIVES = "all_reduce", "all_gather_into_tensor", "all_gather_single"


class Kernels:
    """The kernels that torch has only for GPUs, in formulas. x: [b, C, H, W] or [b, C]."""

    def batch_norm_stats(x, eps):
        var, mean = torch.var_mean(x.transpose(0, 1).flatten(1), 1, correction=0)
        return mean, (var + eps)**-0.5

    def batch_norm_gather_stats_with_counts(x, means, invstds, running_mean, running_var, momentum, eps, counts):
        assert counts.dtype == running_mean.dtype
        n, mean = counts.sum(), (counts[:, None] * means).sum(0) / counts.sum()
        var = (counts[:, None] * (invstds**-2 - eps + (means - mean)**2)).sum(0) / n
        running_mean.mul_(1 - momentum).add_(momentum * mean)
        running_var.mul_(1 - momentum).add_(momentum * var * n / (n - 1))
        return mean, (var + eps)**-0.5

    def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
        x = (x.transpose(1, -1) - mean) * invstd
        return (x if weight is None else x * weight + bias).transpose(1, -1)

    def batch_norm_backward_reduce(grad, x, mean, invstd, weight, of_input, of_weight, of_bias):
        assert (of_input, of_weight, of_bias) == (True, weight is not None, weight is not None)
        grad, x = (values.transpose(1, -1).flatten(0, -2) for values in (grad, x))
        total, product = grad.sum(0), (grad * (x - mean)).sum(0)
        return total, product, product * invstd, total      # the last two also if there is no weight

    def batch_norm_backward_elemt(grad, x, mean, invstd, weight, total, product, counts):
        assert counts.dtype == torch.int32
        grad, x = grad.transpose(1, -1), x.transpose(1, -1)
        grad = grad - total / counts.sum() - (x - mean) * invstd**2 * product / counts.sum()
        return ((1 if weight is None else weight) * invstd * grad).transpose(1, -1)


def simclr(rank, world):
    """Two steps of SimCLR with ResNet-18 under SogCLR's loss: loss, gradients, and after the steps all buffers."""
    torch.manual_seed(0)
    model = SimCLR(resnet("resnet18", "cifar"), 8, 16).double()
    net, criterion = data_parallel(model, torch.device("cpu")), GlobalContrastiveLoss(B).double()
    views, record = torch.randn(STEPS, 2, B, 3, SIZE, SIZE, dtype=torch.float64), []
    local = slice(rank * B // world, (rank + 1) * B // world)
    for step in range(STEPS):
        loss = criterion(*net(*views[step, :, local]), torch.arange(B)[local])
        model.zero_grad()
        loss.backward()
        record += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad / p.grad.norm()
    return [*record, *(buffer.double() for buffer in model.buffers())], list(model.state_dict())


def layer(rank, world, kernels=None, last=False):
    """A layer's output, gradients and running statistics, with the GPU's code if there are kernels for it; and the
    collectives forward and backward. last: like the projection head's last layer.
    """
    torch.manual_seed(1)
    norm, shape = (nn.BatchNorm1d(5, affine=False), ()) if last else (nn.BatchNorm2d(5), (3, 4))
    for p in norm.double().parameters():
        nn.init.normal_(p)
    local = slice(rank * B // world, (rank + 1) * B // world)
    x, grad = torch.randn(2, B, 5, *shape, dtype=torch.float64)[:, local]
    x = (3 + 2 * x).requires_grad_()
    if world > 1:
        norm.__class__ = SyncBatchNorm
    calls = []

    def counted(function, *args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            if hasattr(dist, name):
                patch.setattr(dist, name, functools.partial(counted, getattr(dist, name)))
        if kernels:
            patch.setattr(parallel, "_normalize_on_cpu", parallel._NormalizeOnGPU.apply)
            for name in filter(lambda name: name.startswith("batch_norm"), vars(kernels)):
                patch.setattr(torch, name, getattr(kernels, name))
        y = norm(x)
        forward = len(calls)
        y.backward(grad)
    return ([y.detach(), x.grad, *(p.grad for p in norm.parameters()), norm.running_mean, norm.running_var],
            (calls[:forward], calls[forward:]))


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    record = {"simclr": simclr(rank, world)}
    for last in (True, False):
        record["CPU", last] = layer(rank, world, None, last)
        record["GPU", last] = layer(rank, world, Kernels, last)
    torch.save(record, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """Each rank's record."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, nprocs=request.param, args=(request.param, str(folder)), start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def assert_equal(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-10 * max(1, theirs.abs().max())


def test_split_batch_equals_whole_batch(ranks):
    """Loss, gradients and buffers must equal one process's to 1e-10; the state dict must have the same names."""
    whole, names = simclr(0, 1)
    for record in ranks:
        ours, our_names = record["simclr"]
        assert our_names == names
        for a, b in zip(ours, whole, strict=True):
            assert_equal(a, b)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("device", ["CPU", "GPU"])
def test_layer_equals_that_of_the_whole_batch(device, last, ranks):
    """To 1e-10, in one collective forward and one backward. The GPU's code runs here with its kernels in formulas."""
    (y, x_grad, *grads, mean, var), _ = layer(0, 1, None, last)
    ours = [record[device, last][0] for record in ranks]
    assert_equal(torch.cat([values[0] for values in ours]), y)
    assert_equal(torch.cat([values[1] for values in ours]), x_grad)
    for k, grad in enumerate(grads, 2):     # of weight and bias, which DDP adds up
        assert_equal(sum(values[k] for values in ours), grad)
    for *_, our_mean, our_var in ours:
        assert_equal(our_mean, mean)
        assert_equal(our_var, var)
    for record in ranks:
        forward, backward = record[device, last][1]
        assert len(forward) == 1
        assert backward == ["all_reduce"]
