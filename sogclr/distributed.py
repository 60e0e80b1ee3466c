"""Processes: how they start, who they are, and what they exchange. Everything works in a single process too."""

import inspect
import os
import secrets
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from sogclr import InputError


def rank():
    """This process's number, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """This process's number on its own machine; it chooses the GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def ranks_here():
    """How many processes of this run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def gpu_count():
    """The GPUs that torch can use: none where the driver does not fit, although the machine may show some."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_names(device):
    """What this run computes on, for people: `4 x NVIDIA H200`."""
    name = "CPU, this will be slow" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"{world_size()} x {name}"


def log(line):
    """Print a line, once for all ranks."""
    if rank() == 0:
        print(line, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Start
# ---------------------------------------------------------------------------------------------------------------------

def launch(main_worker, args):
    """Run `main_worker(args, device)` in every process that the flags, or torchrun's environment, ask for.

    - under torchrun: this process is one of them;
    - `--multiprocessing-distributed`, or several visible GPUs and no flag: starts one process a GPU;
    - `--world-size N --rank R` alone: this process is number R of N;
    - else a single process, on `--gpu`, on the only GPU, or on the CPU.

    `args.fresh_seed` is a new random number, the same in all of them, for a run without `--seed`.
    An InputError ends all of them with one line and exit code 2.
    """
    try:
        _check(args)
        args.fresh_seed = secrets.randbits(32)
        gpus = gpu_count()
        several_gpus = gpus > 1 and args.gpu is None and args.world_size <= 1
        if dist.is_torchelastic_launched():
            _start(main_worker, args, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
        elif args.multiprocessing_distributed or several_gpus:
            nodes, per_node = max(args.world_size, 1), max(gpus, 1)
            url = args.dist_url or f"tcp://localhost:{_free_port()}"
            why = "" if args.multiprocessing_distributed else ", one for each visible GPU (--gpu N takes one alone)"
            print(f"=> {per_node} process{'es' if per_node > 1 else ''} on this machine{why}", flush=True)
            mp.spawn(_spawned, nprocs=per_node, args=(main_worker, args, max(args.rank, 0), nodes, per_node, url))
        elif args.world_size > 1:
            _start(main_worker, args, args.rank, args.world_size, args.dist_url)
        else:
            _start(main_worker, args)
    except InputError as error:
        _exit_with(error)
    except KeyboardInterrupt:
        print("=> interrupted; --resume auto with the same command continues after the last whole epoch",
              file=sys.stderr)
        sys.exit(130)
    except mp.ProcessExitedException as error:
        if error.exit_code != 2:    # else that process has said why: it was an InputError
            print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if error.exit_code == 2 else 1)


def _check(args):
    """Refuse flags that contradict each other or this machine, before anything is started."""
    gpus = gpu_count()
    given = args.multiprocessing_distributed or args.world_size > 1 or args.rank > 0
    if args.gpu is not None and args.gpu >= gpus:
        raise InputError(f"--gpu {args.gpu}: this machine shows {gpus} GPU{'' if gpus == 1 else 's'}, "
                         + (f"numbered 0 to {gpus - 1}" if gpus else "leave the flag out to run on the CPU"))
    if args.gpu is not None and args.multiprocessing_distributed:
        raise InputError("--gpu and --multiprocessing-distributed: one GPU or all of them, leave one flag out")
    if args.dist_backend == "nccl" and not gpus:
        raise InputError("--dist-backend nccl: needs GPUs and this machine shows none, leave the flag out")
    if dist.is_torchelastic_launched():
        if given or args.dist_url or args.gpu is not None:
            raise InputError("--world-size, --rank, --dist-url, --gpu, --multiprocessing-distributed: "
                             "torchrun sets these, leave them out")
        if gpus and ranks_here() > gpus:
            raise InputError(f"torchrun --nproc-per-node {ranks_here()}: this machine shows {gpus} GPUs")
    if args.world_size == 0:
        raise InputError("--world-size 0: must be at least 1, or left out")
    if args.rank >= max(args.world_size, 1):
        raise InputError(f"--rank {args.rank}: must be below --world-size {max(args.world_size, 1)}")
    if args.world_size > 1 and (args.rank < 0 or not args.dist_url):
        raise InputError(f"--world-size {args.world_size}: needs --rank (0 to {args.world_size - 1}) "
                         "and --dist-url tcp://HOST:PORT of rank 0")


def _free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _spawned(i, main_worker, args, node, nodes, per_node, url):
    os.environ.update(LOCAL_RANK=str(i), LOCAL_WORLD_SIZE=str(per_node))
    try:
        _start(main_worker, args, node * per_node + i, nodes * per_node, url)
    except InputError as error:
        _exit_with(error)


def _exit_with(error):
    """One line and exit code 2. Of several ranks the first to fail speaks: the others may have met the same fault, or
    none, or may be stopped by the launcher before they can.
    """
    if _is_first_to_fail():
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(2)     # an orderly exit could wait for collectives that the other ranks will never join
    sys.exit(2)


def _is_first_to_fail():
    if not dist.is_initialized():
        return local_rank() == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:        # the store went with the rank that kept it, so that one was first
        return False


def _start(main_worker, args, rank=0, world=1, url=None):
    """Choose the device, join the process group if there is one, and run `main_worker(args, device)`."""
    device = torch.device("cpu")
    if gpu_count():
        index = args.gpu if args.gpu is not None else int(os.environ.get("LOCAL_RANK", rank)) % gpu_count()
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if url is not None:
        backend = args.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
        try:
            dist.init_process_group(backend, init_method=url, world_size=world, rank=rank,
                                    device_id=device if backend == "nccl" else None)
            args.fresh_seed = broadcast_int(args.fresh_seed, device)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"--dist-url {url}: no process group: {str(error).splitlines()[0]}") from error
    main_worker(args, device)
    if dist.is_initialized():       # not after an error: other ranks may be waiting in a collective
        dist.destroy_process_group()


def set_seed(args, saved):
    """Seed the weights and return the run's seed: `--seed`, else the one in the checkpoint `saved`, else a new one.

    Data order and augmentation do not use torch's generator; they are seeded with the returned number.
    """
    seed = args.seed if args.seed is not None else saved.get("seed", args.fresh_seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = args.seed is not None
    torch.backends.cudnn.benchmark = args.seed is None
    return seed


def data_parallel(model, device):
    """The model itself in a single process, else in DistributedDataParallel, which may take it for granted
    (`static_graph`) that every step uses every parameter, as often as the first step did.

    Buffers are not synchronised at each forward: SyncBatchNorm keeps its statistics equal on GPUs, and on CPUs, where
    BatchNorm is each rank's own, rank 0's are saved.
    """
    if world_size() == 1:
        return model
    # torch 2.15 deprecates the one name, earlier releases do not know the other
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                   gradient_as_bucket_view=True, static_graph=True, **{buffers: False})


# ---------------------------------------------------------------------------------------------------------------------
# Exchange
# ---------------------------------------------------------------------------------------------------------------------

def broadcast_int(value, device):
    """Rank 0's integer, on every rank."""
    if world_size() == 1:
        return value
    box = torch.tensor([value], dtype=torch.int64, device=device)
    dist.broadcast(box, src=0)
    return int(box.item())


def require_same(value, what, device):
    """Raise InputError on a rank whose integer differs from rank 0's."""
    first = broadcast_int(value, device)
    if value != first:
        raise InputError(f"{what}: rank 0 has {first}, but rank {rank()} has {value}")


def barrier():
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor):
    """Replace the tensor by its sum over the ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather(tensor):
    """[b, ...] on every rank -> [B, ...] in the order of ranks, on every rank. No gradient."""
    if world_size() == 1:
        return tensor
    gathered = tensor.new_empty((world_size() * len(tensor), *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered
