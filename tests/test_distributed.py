"""The loss across real processes: W ranks with B/W images each must be one rank with B, in loss, u and gradient."""

import math

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from sogclr import InputError, distributed
from sogclr.isogclr import RobustGlobalContrastiveLoss
from sogclr.launch import free_port
from sogclr.loss import ContrastiveLoss, GlobalContrastiveLoss
from sogclr.monitor import alignment_and_uniformity

N, B, STEPS, TEMPERATURE = 20, 8, 4, 0.1
CASES = ("dcl", "cl", "isogclr", "dcl with unused parameters", "dcl resumed", "isogclr resumed", "dcl in groups",
         "cl in groups", "isogclr in groups")


class Net(torch.nn.Module):
    """Two layers, and an extra one that only some forward passes use."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5))
        self.extra = torch.nn.Linear(5, 5)

    def forward(self, x1, x2, extra):
        z1, z2 = self.body(x1), self.body(x2)
        return (self.extra(z1), self.extra(z2)) if extra else (z1, z2)


def new_criterion(case):
    kind, _, _ = case.partition(" ")
    criterion = (ContrastiveLoss(TEMPERATURE) if kind == "cl" else GlobalContrastiveLoss(N, TEMPERATURE)
                 if kind == "dcl" else RobustGlobalContrastiveLoss(N, TEMPERATURE)).double()
    criterion.group_size = B // 2 if "groups" in case else None     # each is on one or two ranks
    return criterion


def trajectory(case, rank, world):
    """STEPS steps of plain gradient descent on this rank's local batch: each step's loss, the monitored values, the
    estimators (u, v, tau, ages), and gradients.
    """
    torch.manual_seed(0)
    model, criterion = Net().double(), new_criterion(case)
    net = model
    if world > 1:
        net = DistributedDataParallel(model, find_unused_parameters=True)
    data = torch.randn(STEPS, 2, B, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(s))[:B] for s in range(STEPS)])
    local = slice(rank * B // world, (rank + 1) * B // world)
    record = []
    for step in range(STEPS):
        if "resumed" in case and step == 2:
            state = criterion.state_dict()
            criterion = new_criterion(case)
            criterion.load_state_dict(state)
        z1, z2 = net(*data[step, :, local], extra=case != "dcl with unused parameters" or step % 2 == 0)
        loss = criterion(z1, z2, order[step, local])
        model.zero_grad()
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        watched = torch.stack([criterion.gcl(), *alignment_and_uniformity(criterion.keys)])
        finite = [value.exp().flatten() for value in criterion.buffers()]       # log_u may be -inf
        estimators = torch.cat(finite or [torch.zeros(1)])
        record.append([loss.detach(), watched, estimators, *grads])
        with torch.no_grad():
            for p, grad in zip(model.parameters(), grads, strict=True):
                p -= 0.1 * grad
    return record


def worker(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    record = {case: trajectory(case, rank, world) for case in CASES}
    try:    # two ranks see the same image
        index = torch.arange(rank * 3, rank * 3 + 4)
        GlobalContrastiveLoss(N)(torch.randn(4, 5), torch.randn(4, 5), index)
    except ValueError as error:
        record["duplicate"] = str(error)
    torch.save(record, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """Each rank's record of a run with 2 or 4 processes."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    mp.start_processes(worker, nprocs=world, args=(world, str(folder)), start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("case", CASES)
def test_split_batch_equals_whole_batch(ranks, case):
    """Each rank's loss, u, ages, GCL, alignment, uniformity and DDP gradients must equal one process's on the whole
    batch, to 1e-10.
    """
    whole = trajectory(case, 0, 1)
    assert max(float(value.abs().max()) for value in whole[0][3:]) > 0.01       # there is a gradient to compare
    for record in ranks:
        for ours, theirs in zip(record[case], whole, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert (a - b).abs().max() <= 1e-10 * max(1.0, float(b.abs().max()))


def test_image_on_two_ranks_is_refused(ranks):
    """One image in two ranks' local batches must be an error on every rank."""
    assert all("appears twice" in record["duplicate"] for record in ranks)


def test_one_process_needs_no_group():
    """Without a process group the module must act as one rank of one."""
    x = torch.randn(3, 2)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_gather(x) is x
    assert math.isclose(float(distributed.all_reduce_sum(torch.tensor(2.5))), 2.5)


def test_processes_that_cannot_start(monkeypatch):
    """It must be said whether they did not find each other or cannot use the network, over gloo or NCCL."""
    def join(backend="gloo"):
        distributed.join(f"tcp://localhost:{free_port()}", 0, 1, backend, torch.device("cpu"))

    with monkeypatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "nowhere")
        with pytest.raises(InputError, match=r"--dist-backend gloo: .*Unable to find address for: nowhere.*_IFNAME"):
            join()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(distributed.dist, "init_process_group", fail)
    error = torch.distributed.DistBackendError("NCCL error in: init.cpp:42, unhandled system error")
    with pytest.raises(InputError, match=r"--dist-backend nccl: .*unhandled system error"):
        join("nccl")
    error = torch.distributed.DistNetworkError("The client socket has timed out after 600000ms")
    with pytest.raises(InputError, match=r"--dist-url tcp://localhost:.* 1 processes did not connect"):
        join("nccl")
