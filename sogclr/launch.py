"""How the processes of a run start, hear signals, and end: who is started, which line is said, which exit code."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import urllib.parse

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sogclr import InputError, Stopped, distributed
from sogclr.distributed import local_rank, log, ranks_here, world_size
from sogclr.flags import refuse

STOPPED = 75            # exit code after `Stopped` (EX_TEMPFAIL: try again)
GRACE_SECONDS = 10      # for the other ranks of this machine to end by themselves when one has failed
AGAIN_SECONDS = 2       # until another signal is a second one: launchers send one to a group and to each process


def launch(main_worker, args):
    """Run `main_worker(args, device)` in every process that the flags, or torchrun's environment, ask for.

    - under torchrun: this process is one of them;
    - `--multiprocessing-distributed`, or several visible GPUs and no flag: starts one process per GPU;
    - `--world-size N --rank R` alone: this process is number R of N;
    - else a single process, on `--gpu`, on the only GPU, or on the CPU.

    Ends all of them with one line and exit code 2 after an InputError, with `STOPPED` after a Stopped, and with 1 when
    a process has died.
    """
    try:
        _check(args)
        if dist.is_torchelastic_launched():
            _start(main_worker, args, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
        elif args.multiprocessing_distributed or (gpu_count() > 1 and args.gpu is None and args.world_size <= 1):
            _spawn(main_worker, args)
        elif args.world_size > 1:
            _start(main_worker, args, args.rank, args.world_size, args.dist_url)
        else:
            _start(main_worker, args)
    except InputError as error:
        _fail(f"error: {error}", 2)
    except KeyboardInterrupt:       # before the run has begun
        sys.exit(130)


def _check(args):
    """Raise InputError where flags contradict each other, the environment or this machine."""
    gpus, torchrun = gpu_count(), dist.is_torchelastic_launched()
    several = args.multiprocessing_distributed or args.world_size > 1 or args.rank > 0
    told = int(os.environ.get("WORLD_SIZE", args.world_size))
    refuse(
        (args.gpu is not None and args.gpu >= gpus,
         f"--gpu {args.gpu}: this machine shows {gpus} GPU{'' if gpus == 1 else 's'}, "
         + (f"numbered 0 to {gpus - 1}" if gpus else "leave the flag out to run on the CPU")),
        (args.gpu is not None and args.multiprocessing_distributed,
         "--gpu and --multiprocessing-distributed: one GPU or all of them, leave one flag out"),
        (args.dist_backend == "nccl" and not gpus,
         "--dist-backend nccl: needs GPUs and this machine shows none, leave the flag out"),
        (torchrun and (several or args.dist_url or args.gpu is not None),
         "--world-size, --rank, --dist-url, --gpu, --multiprocessing-distributed: torchrun sets these, leave them out"),
        (torchrun and 0 < gpus < ranks_here(),
         f"torchrun --nproc-per-node {ranks_here()}: this machine shows {gpus} GPUs"),
        (args.world_size == 0, "--world-size 0: must be at least 1, or left out"),
        (args.rank >= max(args.world_size, 1),
         f"--rank {args.rank}: must be below --world-size {max(args.world_size, 1)}"),
        (args.dist_url and not args.dist_url.startswith(("tcp://", "file://", "env://")),
         f"--dist-url {args.dist_url}: must be tcp://HOST:PORT or env://"),
        (args.dist_url == "env://" and args.world_size not in (-1, told),
         f"--world-size {args.world_size}: the environment says WORLD_SIZE={told}, give that"),
        (args.world_size > 1 and (args.rank < 0 or not args.dist_url),
         f"--world-size {args.world_size}: needs --rank (0 to {args.world_size - 1}) and --dist-url tcp://HOST:PORT "
         "of rank 0"))
    if several and not args.rank > 0 and (args.dist_url or "").startswith("tcp://"):
        _require_free_port(args.dist_url)


def _require_free_port(url):
    """Raise InputError where rank 0, on this machine, cannot listen at `tcp://HOST:PORT`."""
    try:
        port = urllib.parse.urlsplit(url).port or 0
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)     # a port that was closed just now is free
            probe.bind(("", port))
    except ValueError as error:
        raise InputError(f"--dist-url {url}: must be tcp://HOST:PORT with a number below 65536") from error
    except OSError as error:
        raise InputError(f"--dist-url {url}: port {port} cannot be used ({error.strerror}), take another") from error


def free_port():
    """The number of a port on this machine that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def gpu_count():
    """The GPUs that torch can use: none where the driver does not fit, although the machine may show some."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _spawn(main_worker, args):
    """Start one process per GPU (one at all without GPUs), hand signals on to them, and end as they do."""
    nodes, per_node = max(args.world_size, 1), max(gpu_count(), 1)
    url = args.dist_url or f"tcp://localhost:{free_port()}"
    why = "" if args.multiprocessing_distributed else ", one for each visible GPU (--gpu N takes one alone)"
    print(f"=> {per_node} process{'es' if per_node > 1 else ''} on this machine{why}", flush=True)
    context = mp.spawn(_spawned, nprocs=per_node, join=False,
                       args=(main_worker, args, max(args.rank, 0), nodes, per_node, url))
    try:
        with _StopSignals(context.pids()):
            while not context.join(grace_period=GRACE_SECONDS):
                pass
    except mp.ProcessExitedException as error:
        if error.exit_code in (2, STOPPED):         # that process has said why
            sys.exit(error.exit_code)
        _fail(f"{error}; the run's other processes on this machine were stopped", 1)


def _spawned(i, main_worker, args, node, nodes, per_node, url):
    os.environ.update(LOCAL_RANK=str(i), LOCAL_WORLD_SIZE=str(per_node))
    _start(main_worker, args, node * per_node + i, nodes * per_node, url)


def _start(main_worker, args, rank=0, world_size=1, url=None):
    """Choose the device, join the process group if there is one, and run `main_worker(args, device)`."""
    device, stopped = torch.device("cpu"), False
    if gpu_count():
        index = args.gpu if args.gpu is not None else int(os.environ.get("LOCAL_RANK", rank)) % gpu_count()
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    try:
        if url is not None:
            backend = args.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
            distributed.join(url, rank, world_size, backend, device)
        try:
            with _signals:
                main_worker(args, device)
        except Stopped as where:
            stopped = True
            log(f"=> stopped {where}; --resume auto with the same command goes on")
        if dist.is_initialized():           # not after an error: other ranks may be waiting in a collective
            distributed.barrier()           # nor before rank 0 has saved
            dist.destroy_process_group()
    except InputError as error:
        _fail(f"error: {error}", 2)
    except RuntimeError as error:
        if not dist.is_initialized() or not ("gloo" in str(error) or "NCCL" in str(error)):
            raise
        _fail(f"another rank has ended ({str(error).splitlines()[0]}), so the run stops; --resume auto with the same "
              "command continues after the last save", 1)
    if stopped:
        sys.exit(STOPPED)


def _fail(line, code):
    """End this process with a line, said by the first of the ranks to fail: the others fail since it did."""
    if _is_first_to_fail():
        print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr, flush=True)
    if not dist.is_initialized():
        sys.exit(code)
    # Without the orderly exit, which could wait for collectives that others never join.
    sys.stdout.flush()
    for thread in threading.enumerate():        # a checkpoint may be on its way to the disk
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(timeout=60)
    os._exit(code)


def _is_first_to_fail():
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):     # the store has gone, and rank 0, which kept it
            return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    return local_rank() == 0


class _StopSignals:
    """SIGTERM, SIGUSR1 (SLURM's warning) and SIGINT (Ctrl-C) ask the run to finish its step and save; another one, at
    least AGAIN_SECONDS later, ends it at once.

    pids: of the processes that this one started; a signal is handed on to them, and a second one kills them. Python
    hears it between two operations: a rank that waits for others hears nothing, but the process that started it does.
    """

    NUMBERS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT

    def __init__(self, pids=()):
        self.pids = pids

    def __enter__(self):
        self.first = self.answer = None         # when the first one came; what the other ranks are being asked
        self.before = {number: signal.signal(number, self.hear) for number in self.NUMBERS}

    def __exit__(self, kind, *_):
        for number, handler in self.before.items():     # the launcher may send one more when the first rank has stopped
            signal.signal(number, signal.SIG_IGN if kind is Stopped else handler)

    def hear(self, number, _):
        again = self.first is not None and time.monotonic() > self.first + AGAIN_SECONDS
        self.first = self.first or time.monotonic()
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):       # has ended
                os.kill(pid, signal.SIGKILL if again else number)
        if again:
            os.write(2, b"=> stopped at once\n")        # print could have been interrupted in the middle of a line
            os._exit(128 + number)
        if not self.pids and local_rank() == 0:
            os.write(2, f"=> {signal.Signals(number).name}: stops after this step and saves; once more stops at once\n"
                     .encode())


_signals = _StopSignals()       # this process's


def stop_requested():
    """Whether a signal has asked any rank to stop. To be asked once per step by every rank; all get the same answer.

    With several ranks it is that of the step before, so that no rank waits for the others' present one. Raises
    RuntimeError where another rank has died.
    """
    asked = _signals.first is not None
    if world_size() == 1:
        return asked
    answer, _signals.answer = _signals.answer, distributed.start_any(asked)
    return answer is not None and answer()
