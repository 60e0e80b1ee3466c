"""Processes: how they start, who they are, and what they exchange. Everything works in a single process too."""

import contextlib
import datetime
import inspect
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.parse

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from sogclr import InputError, Stopped

STOPPED = 75        # exit code after `Stopped` (EX_TEMPFAIL: try again)
PATIENCE = 600      # seconds that a rank waits for another, at the start and in a collective
GRACE = 10          # seconds that the other ranks of this machine have to end by themselves when one has failed

# Hosts exchange small things in a process group of their own, over gloo, so that no GPU is waited for.
_hosts = None


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


_live = False       # whether the terminal's last line is to be written over


def log(line, live=False):
    """Print a line, once for all ranks. live: the next one takes its place, on a terminal."""
    global _live
    if rank() == 0:
        if live:
            line = line[:shutil.get_terminal_size().columns - 1]
        print(f"\r{line}\x1b[K" if live or _live else line, end="" if live else "\n", flush=True)
        _live = live


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
    Ends all of them with one line and exit code 2 after an InputError, with `STOPPED` after a Stopped, and with 1 when
    a process has died.
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
            url = args.dist_url or f"tcp://localhost:{free_port()}"
            if not args.rank > 0:
                _require_free_port(url)
            why = "" if args.multiprocessing_distributed else ", one for each visible GPU (--gpu N takes one alone)"
            print(f"=> {per_node} process{'es' if per_node > 1 else ''} on this machine{why}", flush=True)
            context = mp.spawn(_spawned, nprocs=per_node, join=False,
                               args=(main_worker, args, max(args.rank, 0), nodes, per_node, url))
            _forward_signals(context.pids())
            while not context.join(grace_period=GRACE):
                pass
        elif args.world_size > 1:
            if args.rank == 0:
                _require_free_port(args.dist_url)
            _start(main_worker, args, args.rank, args.world_size, args.dist_url)
        else:
            _start(main_worker, args)
    except InputError as error:
        _exit_with(error)
    except KeyboardInterrupt:       # before the run has begun
        sys.exit(130)
    except mp.ProcessExitedException as error:
        _ignore_signals()       # srun, for one, ends the machines that are left when the first has stopped
        if error.exit_code not in (2, STOPPED):     # else that process has said why
            print(f"{os.path.basename(sys.argv[0])}: {error}; the run's other processes on this machine were stopped",
                  file=sys.stderr, flush=True)
        sys.exit(error.exit_code if error.exit_code in (2, STOPPED) else 1)


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
    if args.dist_url and not args.dist_url.startswith(("tcp://", "file://", "env://")):
        raise InputError(f"--dist-url {args.dist_url}: must be tcp://HOST:PORT or env://")
    here, lacking = os.environ.get("WORLD_SIZE"), {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if args.dist_url == "env://" and lacking and not dist.is_torchelastic_launched():
        raise InputError(f"--dist-url env://: the environment lacks {' and '.join(sorted(lacking))}, set it "
                         "or give tcp://HOST:PORT")
    if args.dist_url == "env://" and here and args.world_size > 1 and int(here) != args.world_size:
        raise InputError(f"--world-size {args.world_size}: the environment says WORLD_SIZE={here}, give that")
    if args.world_size > 1 and (args.rank < 0 or not args.dist_url):
        raise InputError(f"--world-size {args.world_size}: needs --rank (0 to {args.world_size - 1}) "
                         "and --dist-url tcp://HOST:PORT of rank 0")


def free_port():
    """The number of a port on this machine that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _require_free_port(url):
    """Raise InputError where rank 0 could not listen at `tcp://HOST:PORT`."""
    if not url.startswith("tcp://"):
        return
    try:
        port = urllib.parse.urlsplit(url).port
    except ValueError as error:
        raise InputError(f"--dist-url {url}: must be tcp://HOST:PORT with a number below 65536") from error
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)     # a port that was closed just now is free
        try:
            probe.bind(("", port or 0))
        except OSError as error:
            raise InputError(f"--dist-url {url}: port {port} cannot be used ({error.strerror}), "
                             "take another") from error


def _forward_signals(pids):
    """Hand on to the run's processes what is meant for them, in the process that only waits for them."""
    def forward(number, _):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):       # has ended
                os.kill(pid, number)
    for number in _Signals.STOP:
        signal.signal(number, forward)


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
    _exit_now(2)


def _exit_now(code):
    """Leave, among several ranks without the orderly exit that could wait for collectives which others never join."""
    if not dist.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    for thread in threading.enumerate():        # a checkpoint may be on its way to the disk
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(timeout=60)
    os._exit(code)


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
        patience = datetime.timedelta(seconds=PATIENCE)
        try:
            dist.init_process_group(backend, init_method=url, world_size=world, rank=rank, timeout=patience,
                                    device_id=device if backend == "nccl" else None)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"--dist-url {url}: {world} processes did not meet ({str(error).splitlines()[0]}); start "
                             f"all of them within {PATIENCE // 60} minutes, with the same address") from error
        global _hosts
        _hosts = dist.new_group(backend="gloo", timeout=patience)
        args.fresh_seed = broadcast_int(args.fresh_seed)
    stopped = False
    try:
        try:
            with _signals:
                main_worker(args, device)
        except Stopped as where:
            stopped = True
            log(f"=> stopped {where}; --resume auto with the same command goes on")
        if dist.is_initialized():       # not after an error: other ranks may be waiting in a collective
            barrier()                   # nor before rank 0 has saved
            dist.destroy_process_group()
    except RuntimeError as error:
        if "gloo" in str(error) or "NCCL" in str(error):        # a collective failed, so some rank is gone
            _name_the_lost()
        raise
    if stopped:
        sys.exit(STOPPED)


def _name_the_lost(patience=3):
    """Where another rank has ended: end this process with a line, said once for all ranks, that tells which it was.

    Those that are left report to the store, which lives on rank 0; patience: seconds to wait for their reports. Ranks
    that have not noticed by then, since they have nothing to do with the lost one directly, are named beside it.
    """
    me, ranks, silent, first = rank(), world_size(), None, True
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"alive/{me}", "")
        time.sleep(patience)
        silent = [str(other) for other in range(ranks) if not store.check([f"alive/{other}"])]
        first = store.add("lost", 1) == 1 and not store.check(["failed"])       # else that rank has said why
    except RuntimeError:
        pass
    if silent == []:        # nobody is gone: the error is another one
        return
    if silent is None:      # the store has gone with rank 0, which says why if it can
        who = f"rank 0 of {ranks} has ended"
    elif len(silent) == 1:
        who = f"rank {silent[0]} of {ranks} was lost"
    else:
        who = f"one of the ranks {', '.join(silent)} of {ranks} was lost"
    if first:
        print(f"{os.path.basename(sys.argv[0])}: {who}, so the run stops; --resume auto with the same command "
              "continues after the last save", file=sys.stderr, flush=True)
    _exit_now(1)


# ---------------------------------------------------------------------------------------------------------------------
# Stop
# ---------------------------------------------------------------------------------------------------------------------

class _Signals:
    """SIGTERM, SIGUSR1 (SLURM's warning) and SIGINT (Ctrl-C) ask the run to finish its step and save. Another one, at
    least `again` seconds later, stops it at once: launchers send a signal to a whole group and to each process.

    The first only sets a flag, in the main thread. A thread watches for the second, since the main one does not hear
    it while it waits for other ranks.
    """

    STOP = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT

    def __init__(self, again=2.0):
        self.again, self.asked = again, False
        self.pending = self.flag = None

    def __enter__(self):
        self.asked, self.pending = False, None
        receive, self.send = os.pipe()
        os.set_blocking(self.send, False)
        threading.Thread(target=self.watch, args=(receive,), daemon=True).start()
        self.wakeup = signal.set_wakeup_fd(self.send, warn_on_full_buffer=False)
        self.before = {number: signal.signal(number, self.ask) for number in self.STOP}

    def __exit__(self, kind, *_):
        if kind is Stopped:         # the launcher may send one more when the first rank is gone
            _ignore_signals()
        else:
            for number, handler in self.before.items():
                signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        os.close(self.send)

    def ask(self, number, _):
        self.asked = True

    def watch(self, receive):
        """In its own thread: say that the first signal has come, and end the process at the second."""
        first = None
        while number := os.read(receive, 1):
            if number[0] not in self.STOP:
                continue
            if first is None:
                first = time.monotonic()
                if local_rank() == 0:
                    print(f"=> {signal.Signals(number[0]).name}: stops after this step and saves; once more stops at "
                          "once", file=sys.stderr, flush=True)
            elif time.monotonic() > first + self.again:
                print("=> stopped at once", file=sys.stderr, flush=True)
                os._exit(128 + number[0])
        os.close(receive)


def _ignore_signals():
    for number in _Signals.STOP:
        signal.signal(number, signal.SIG_IGN)


_signals = _Signals()


def stop_requested():
    """Whether a signal has asked any rank to stop. To be asked once a step by every rank; all get the same answer.

    With several ranks it is that of the step before, so that no rank waits for the others' present one. Raises
    RuntimeError where another rank has died.
    """
    asked = _signals.asked
    if world_size() == 1:
        return asked
    answer = False
    if _signals.pending is not None:
        _signals.pending.wait()
        answer = bool(_signals.flag)
    _signals.flag = torch.tensor([asked], dtype=torch.uint8)
    _signals.pending = dist.all_reduce(_signals.flag, dist.ReduceOp.MAX, group=_hosts, async_op=True)
    return answer


def set_seed(args, saved):
    """Seed the weights and return the run's seed: `--seed`, else the one in the checkpoint `saved`, else a new one.

    Data order and augmentation do not use torch's generator; they are seeded with the returned number.
    """
    fresh = vars(args).pop("fresh_seed")       # is no setting
    seed = args.seed if args.seed is not None else saved.get("seed", fresh)
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

def broadcast_int(value):
    """Rank 0's integer, on every rank."""
    if world_size() == 1:
        return value
    box = torch.tensor([value], dtype=torch.int64)
    dist.broadcast(box, src=0, group=_hosts)
    return int(box)


def require_same(value, what):
    """Raise InputError on a rank whose integer differs from rank 0's."""
    first = broadcast_int(value)
    if value != first:
        raise InputError(f"{what}: rank 0 has {first}, but rank {rank()} has {value}")


def barrier():
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier(group=_hosts)


def broadcast(tensor):
    """Replace the tensor by rank 0's, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)


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
    # newer releases of torch deprecate the one name, older ones do not know the other
    into_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    into_tensor(gathered, tensor.contiguous())
    return gathered


def gather(tensor):
    """[n, ...] on each rank, where n is its own -> [N, ...] in the order of ranks, on every rank. No gradient.

    Holds the result and, until it returns, nothing beside it but the tensor itself.
    """
    if world_size() == 1:
        return tensor
    sizes = all_gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    whole = tensor.new_empty((sum(sizes), *tensor.shape[1:]))
    for source, part in enumerate(whole.split(sizes)):
        if source == rank():
            part.copy_(tensor)
        if len(part):
            dist.broadcast(part, src=source)
    return whole
