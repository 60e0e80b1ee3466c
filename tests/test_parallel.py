"""The model across real processes: W ranks with B/W images each must be one rank with B."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn

from sogclr.builder import SimCLR, resnet
from sogclr.loss import GlobalContrastiveLoss
from sogclr.parallel import SyncBatchNorm, data_parallel

B, SIZE, STEPS = 16, 16, 2
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
LAYERS = list(itertools.product((False, True), TOLERANCES))     # last, dtype
COLLECTIVES = "all_reduce", "all_gather_into_tensor", "all_gather_single"


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


def layer(rank, world, last, dtype, device="cpu"):
    """A layer's output, gradients and running statistics, and the collectives forward and backward.

    last: like the projection head's last layer, else like an encoder's.
    """
    torch.manual_seed(1)
    norm, shape = (nn.BatchNorm1d(5, affine=False), ()) if last else (nn.BatchNorm2d(5), (3, 4))
    for p in norm.parameters():
        nn.init.normal_(p)
    norm.to(device, torch.promote_types(dtype, torch.float32))      # as in autocast
    local = slice(rank * B // world, (rank + 1) * B // world)
    x, grad = torch.randn(2, B, 5, *shape, dtype=torch.float64)[:, local].to(device, dtype)
    x = (3 + 2 * x).to(memory_format=torch.preserve_format if last else torch.channels_last).requires_grad_()
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
        y = norm(x)
        forward = len(calls)
        y.backward(grad)
    record = y.detach(), x.grad, *(p.grad for p in norm.parameters()), norm.running_mean, norm.running_var
    return [values.cpu() for values in record], (calls[:forward], calls[forward:])


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save({"simclr": simclr(rank, world), **{case: layer(rank, world, *case) for case in LAYERS}},
               f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """Each rank's record."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, nprocs=request.param, args=(request.param, str(folder)), start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def assert_equal(ours, theirs, tolerance=1e-10):
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())


def test_split_batch_equals_whole_batch(ranks):
    """Loss, gradients and buffers must equal one process's to 1e-10; the state dict must have the same names."""
    whole, names = simclr(0, 1)
    for record in ranks:
        ours, our_names = record["simclr"]
        assert our_names == names
        for a, b in zip(ours, whole, strict=True):
            assert_equal(a, b)


def assert_whole(ranks, last, dtype):
    """Together, the ranks' `layer` must be that of one process, to the dtype's rounding. Used by `test_gpu`, too."""
    (y, x_grad, *grads, mean, var), _ = layer(0, 1, last, dtype)
    ours, tolerance = [record[last, dtype][0] for record in ranks], TOLERANCES[dtype]
    assert_equal(torch.cat([values[0] for values in ours]), y, tolerance)
    assert_equal(torch.cat([values[1] for values in ours]), x_grad, tolerance)
    for k, grad in enumerate(grads, 2):     # of weight and bias, which DDP adds up
        assert_equal(sum(values[k] for values in ours), grad, tolerance)
    for *_, our_mean, our_var in ours:
        assert_equal(our_mean, mean, tolerance)
        assert_equal(our_var, var, tolerance)


@pytest.mark.parametrize(("last", "dtype"), LAYERS)
def test_layer_equals_that_of_the_whole_batch(last, dtype, ranks):
    """To 1e-10 in float64, and to the rounding of other types; in one collective forward and one backward."""
    assert_whole(ranks, last, dtype)
    for record in ranks:
        forward, backward = record[last, dtype][1]
        assert len(forward) == 1
        assert backward == ["all_reduce"]
