"""Communication between ranks. Everything also works in a single process; `sogclr.launch` starts several."""

import datetime
import os
import shutil
import sys

import torch
import torch.distributed as dist

from sogclr import InputError, one_line

TIMEOUT_SECONDS = 600       # how long a rank waits for another, at startup and in a collective

_cpu_group = None       # all ranks over gloo, for small host-side messages that do not wait for a GPU


def rank():
    """This process's rank, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Number of processes that train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """This process's rank on its own machine, which selects the GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def ranks_here():
    """Number of this run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def log(line, live=False):
    """Print a line on rank 0 only. live: the next line replaces it, on terminals only."""
    if rank() == 0:
        if live:
            line = line[:shutil.get_terminal_size().columns - 1]
        try:
            print(f"\r{line}\x1b[K" if sys.stdout.isatty() else line, end="" if live else "\n", flush=True)
        except BrokenPipeError:     # nobody reads any more (`| head`, a `tee` that has ended): the run goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def escape_output():
    """Let this process print any file name: escape what the terminal's encoding lacks instead of raising. Without a
    standard output, as some daemons start programs, print to nowhere.
    """
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if hasattr(sys.stdout, "reconfigure"):      # not in notebooks
        sys.stdout.reconfigure(errors="backslashreplace")


def join(url, rank, world_size, backend, device):
    """Initialize the process group. Raises InputError if the ranks do not connect."""
    global _cpu_group
    timeout = datetime.timedelta(seconds=TIMEOUT_SECONDS)
    try:
        dist.init_process_group(backend, init_method=url, world_size=world_size, rank=rank, timeout=timeout,
                                device_id=device if backend == "nccl" else None)
        _cpu_group = dist.new_group(backend="gloo", timeout=timeout)
    except (ValueError, dist.DistStoreError, dist.DistNetworkError) as error:
        raise InputError(f"--dist-url {url}: {world_size} processes did not connect ({str(error).splitlines()[0]}); "
                         f"start all of them within {TIMEOUT_SECONDS // 60} minutes with the same address") from error
    except RuntimeError as error:       # of NCCL or gloo
        raise InputError(f"--dist-backend {backend}: the processes cannot exchange data ({one_line(error)}); if it is "
                         "the network, choose its interface by GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME for GPUs); "
                         "NCCL_DEBUG=INFO prints more about GPUs") from error


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return all_gather(tensor)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce_sum(grad.clone(memory_format=torch.contiguous_format)).chunk(world_size())[rank()]


def gather_with_gradient(tensor):
    """Differentiable all-gather: [b, ...] on every rank -> [B, ...] in rank order, on every rank.

    Every rank's loss depends on all of it, so the gradient of a rank's local batch is the sum of all ranks' gradients.
    (A gather that returns only this rank's gradient gives the right loss but a wrong gradient.)
    """
    return _Gather.apply(tensor) if world_size() > 1 else tensor


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean):
        return all_reduce_sum(mean.clone()) / world_size()

    @staticmethod
    def backward(ctx, grad):
        return grad


def mean_over_ranks(values):
    """[b] on every rank -> the mean of all B values, 0-d, with the gradient of this rank's own mean, since DDP averages
    gradients over ranks.
    """
    return _Mean.apply(values.mean()) if world_size() > 1 else values.mean()


def all_gather(tensor):
    """[b, ...] on every rank -> [B, ...] in rank order, on every rank."""
    if world_size() == 1:
        return tensor
    gathered = tensor.new_empty((world_size() * len(tensor), *tensor.shape[1:]))
    # newer releases of torch deprecate all_gather_into_tensor, older ones lack all_gather_single
    into_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    into_tensor(gathered, tensor.contiguous())
    return gathered


def gather(tensor):
    """[n, ...] on each rank, with n differing by rank -> [N, ...] in rank order, on every rank.

    Holds only the result and, until it returns, the tensor itself.
    """
    if world_size() == 1:
        return tensor
    sizes = all_gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    gathered = tensor.new_empty((sum(sizes), *tensor.shape[1:]))
    for source, part in enumerate(gathered.split(sizes)):
        if source == rank():
            part.copy_(tensor)
        if len(part):
            dist.broadcast(part, src=source)
    return gathered


def all_reduce_sum(tensor):
    """Sum the tensor over ranks in place and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_int(value):
    """Rank 0's integer, on every rank."""
    if world_size() == 1:
        return value
    box = torch.tensor([value], dtype=torch.int64)
    dist.broadcast(box, src=0, group=_cpu_group)
    return int(box)


def start_any(flag):
    """Start checking whether a flag is true on any rank; returns a function that waits for the answer."""
    answer = torch.tensor([flag], dtype=torch.uint8)
    work = dist.all_reduce(answer, dist.ReduceOp.MAX, group=_cpu_group, async_op=True)
    return lambda: work.wait() and bool(answer)


def barrier():
    """Wait until every rank arrives."""
    if world_size() > 1:
        dist.barrier(group=_cpu_group)
