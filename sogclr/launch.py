"""How a run's processes start, handle signals, and end: which are started, which message and which exit code."""

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.parse

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sogclr import InputError, Stopped, distributed, one_line
from sogclr.distributed import escape_output, local_rank, log, ranks_here, world_size
from sogclr.flags import refuse

STOPPED = 75            # exit code after a signal (EX_TEMPFAIL: try again)
GRACE_SECONDS = 10      # for the other ranks on this machine to end on their own after one has failed
LOOKUP_SECONDS = 30     # for the host name of another machine to get an address; a cluster's machines start one by one
AGAIN_SECONDS = 2       # until another signal counts as a second one: launchers signal a group and each process
# Parts of a collective's error message, over gloo or NCCL, if another rank does not respond.
LOST = "by peer", "closed", "broken pipe", "timed out", "timeout", "remote process"


def launch(main_worker, args):
    """Run `main_worker(args, device)` in every process that the flags or torchrun's environment request.

    - under torchrun: this process is one of them;
    - `--multiprocessing-distributed`, or several visible GPUs and no flag: starts one process per GPU;
    - `--world-size N --rank R` alone: this process is rank R of N;
    - else a single process, on `--gpu`, on the only GPU, or on the CPU.

    All end with one line and exit code 2 after an InputError, with `STOPPED` after a signal, with 1 if a process has
    died, and with one traceback and 1 after any other error.
    """
    try:
        _check_flags(args)
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


def _check_flags(args):
    """Raise InputError if flags contradict each other, the environment or this machine."""
    gpus, torchrun = gpu_count(), dist.is_torchelastic_launched()
    several = args.multiprocessing_distributed or args.world_size > 1 or args.rank > 0
    told = os.environ.get("WORLD_SIZE") or str(args.world_size)
    refuse(
        (args.gpu is not None and args.gpu >= gpus,
         f"--gpu {args.gpu}: this machine has {gpus} visible GPU{'' if gpus == 1 else 's'}, "
         + (f"numbered 0 to {gpus - 1}" if gpus else "leave the flag out to run on the CPU")),
        (args.gpu is not None and args.multiprocessing_distributed,
         "--gpu and --multiprocessing-distributed: one GPU or all of them, leave one flag out"),
        (args.dist_backend == "nccl" and not gpus,
         "--dist-backend nccl: needs GPUs but none are visible, leave the flag out"),
        (torchrun and (several or args.dist_url or args.gpu is not None),
         "--world-size, --rank, --dist-url, --gpu, --multiprocessing-distributed: torchrun sets these, leave them out"),
        (torchrun and 0 < gpus < ranks_here(),
         f"torchrun --nproc-per-node {ranks_here()}: this machine has {gpus} visible GPUs"),
        (args.world_size == 0, "--world-size 0: must be at least 1, or left out"),
        (args.rank >= max(args.world_size, 1),
         f"--rank {args.rank}: must be below --world-size {max(args.world_size, 1)}"),
        (args.dist_url and not args.dist_url.startswith(("tcp://", "file://", "env://")),
         f"--dist-url {args.dist_url}: must be tcp://HOST:PORT or env://"),
        (args.dist_url == "env://" and str(args.world_size) not in ("-1", told),
         f"--world-size {args.world_size}: the environment sets WORLD_SIZE={told}, use that"),
        (args.world_size > 1 and (args.rank < 0 or not args.dist_url),
         f"--world-size {args.world_size}: needs --rank (0 to {args.world_size - 1}) and --dist-url tcp://HOST:PORT "
         "of rank 0"))
    if (args.dist_url or "").startswith("tcp://"):
        _require_port(args.dist_url, free=(several or gpus > 1) and args.rank <= 0)


def _require_port(url, free):
    """Raise InputError if `tcp://HOST:PORT` has no port, or it must be free and this machine cannot listen on it."""
    try:
        port = urllib.parse.urlsplit(url).port
    except ValueError:
        port = None
    if not port:
        raise InputError(f"--dist-url {url}: must be tcp://HOST:PORT with a number below 65536")
    if not free:
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)     # a port closed just now is free
            probe.bind(("", port))
    except OSError as error:
        raise InputError(f"--dist-url {url}: port {port} cannot be used ({error.strerror}), use another") from error


def _require_address(url, world_size):
    """Raise InputError if rank 0's host name has no address: torch would try in silence until its timeout."""
    host = os.environ.get("MASTER_ADDR") if url == "env://" else urllib.parse.urlsplit(url).hostname
    end = time.monotonic() + (LOOKUP_SECONDS if world_size > ranks_here() else 0)
    while host:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() < end:
                time.sleep(1)
            elif dist.is_torchelastic_launched():
                raise InputError(f"torchrun: this machine cannot look up the host name {host} of rank 0 ({error}); on "
                                 "one machine pass torchrun --local-addr localhost, on several the first one's "
                                 "address, or add the name to /etc/hosts") from error
            else:
                raise InputError(f"--dist-url {url}: the host name {host} cannot be looked up ({error}), use its "
                                 "address, or add it to /etc/hosts") from error


def free_port():
    """The number of a port that is currently free on this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def gpu_count():
    """Number of GPUs that torch can use: 0 if the driver does not match, even if the machine has some."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _spawn(main_worker, args):
    """Start one process per GPU (one in total without GPUs), forward signals to them, and end as they do."""
    nodes, per_node = max(args.world_size, 1), max(gpu_count(), 1)
    url = args.dist_url or f"tcp://localhost:{free_port()}"
    why = "" if args.multiprocessing_distributed else ", one per visible GPU (--gpu N uses only one)"
    print(f"=> {per_node} process{'es' if per_node > 1 else ''} on this machine{why}", flush=True)
    context = mp.spawn(_spawned, nprocs=per_node, join=False,
                       args=(main_worker, args, max(args.rank, 0), nodes, per_node, url))
    try:
        with _ForwardedSignals(context.pids()):
            while not context.join(grace_period=GRACE_SECONDS):
                pass
    except mp.ProcessExitedException as error:
        if error.exit_code in (2, STOPPED):         # that process has printed why
            sys.exit(error.exit_code)
        _fail(f"{error}; the run's other processes on this machine were stopped", 1)


def _spawned(i, main_worker, args, node, nodes, per_node, url):
    escape_output()
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
            _require_address(url, world_size)
            backend = args.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
            distributed.join(url, rank, world_size, backend, device)
        try:
            with _signals:
                main_worker(args, device)
        except Stopped as where:
            stopped = True
            log(f"=> stopped {where}; --resume auto with the same command continues")
        if dist.is_initialized():           # not after an error: other ranks may be waiting in a collective
            distributed.barrier()           # nor before rank 0 has saved
            dist.destroy_process_group()
    except Exception as error:
        # The error keeps the loaders through its frames' variables, and when the process ends, torch may wait 5 seconds
        # for each worker of a loader that is still there.
        traceback.clear_frames(error.__traceback__)
        text = one_line(error)
        if isinstance(error, InputError):
            _fail(f"error: {error}", 2)
        if not dist.is_initialized():
            raise
        if isinstance(error, RuntimeError) and any(sign in text.lower() for sign in LOST):
            text = re.sub(r"^\[\S*\] ", "", text).split(". ")[0]        # without the C++ line and the advice
            _fail(f"another rank has ended ({text}), so the run stops; --resume auto with the same command continues "
                  "from the last save", 1, lost=True)
        if _is_first_to_fail(lost=False):
            traceback.print_exc()
        _end(1)
    if stopped:
        sys.exit(STOPPED)


def _fail(line, code, lost=False):
    """End this process with a line, printed only by the first rank to fail: the others fail because it did.

    lost: whether another rank has ended, perhaps without a message.
    """
    if _is_first_to_fail(lost):
        print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr, flush=True)
    if not dist.is_initialized():
        sys.exit(code)
    _end(code)


def _end(code):
    """End this rank without the orderly exit, which could wait for collectives that others never join."""
    sys.stdout.flush()
    for thread in threading.enumerate():        # a checkpoint may still be in progress
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(timeout=60)
    os._exit(code)


def _is_first_to_fail(lost):
    if not dist.is_initialized():
        return local_rank() == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:        # the store is gone, and rank 0, which hosted it: it was first, if it could print
        return lost and local_rank() == 0


class _Signals:
    """Context manager that passes SIGTERM, SIGUSR1 (SLURM's warning) and SIGINT (Ctrl-C) to `hear`. Python calls it
    between two operations: a process stuck in one, e.g. a rank waiting for others, does not react.
    """

    NUMBERS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT

    def __enter__(self):
        self.first = None       # when the first one arrived, on the monotonic clock
        self.saves = True       # whether the run has anything to save
        self.before = {number: signal.signal(number, self.listen) for number in self.NUMBERS}

    def __exit__(self, kind, *_):
        stopped = kind in (Stopped, mp.ProcessExitedException)      # launchers send one more after others have ended
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if stopped else handler)

    def listen(self, number, _):
        again = self.first is not None and time.monotonic() > self.first + AGAIN_SECONDS
        self.first = self.first or time.monotonic()
        self.hear(number, again)

    def end_at_once(self, number):
        _say("=> stopped at once")
        os._exit(128 + number)


class _StopSignals(_Signals):
    """In a rank: the first signal asks the run to finish its step and save, another ends it at once. A run with nothing
    to save ends at the first one.
    """

    first = answer = None       # answer: a function that waits for the ranks' answer

    def hear(self, number, again):
        if again:
            self.end_at_once(number)
        if local_rank() == 0:
            _say(f"=> {signal.Signals(number).name}: " + (
                "stops after this step and saves, or finishes after the last one; a second signal stops at once"
                if self.saves else "stops at once, with nothing to save"))
        if not self.saves:
            os._exit(STOPPED)


class _ForwardedSignals(_Signals):
    """In the launching process: forwards each signal to the processes it started, pids; a second Ctrl-C kills them."""

    def __init__(self, pids):
        self.pids = pids

    def hear(self, number, again):
        kill = again and number == signal.SIGINT        # launchers send other signals even after all is saved
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):       # has ended
                os.kill(pid, signal.SIGKILL if kill else number)
        if kill:
            self.end_at_once(number)


def _say(line):
    """Print to stderr from a signal handler, where print may have been interrupted in the middle of a line, and where
    nobody may be left to read it.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


_signals = _StopSignals()       # this process's


def nothing_to_save():
    """Call at the beginning of a run that has nothing to save: a signal then ends it at once, also with `STOPPED`."""
    _signals.saves = False


def stop_requested():
    """Whether a signal has asked any rank to stop. Call once per step on every rank; all get the same answer.

    With several ranks it is the previous step's, so that no rank waits for the others' current one. Raises RuntimeError
    if another rank has died.
    """
    asked = _signals.first is not None
    if world_size() == 1:
        return asked
    answer, _signals.answer = _signals.answer, distributed.start_any(asked)
    return answer is not None and answer()
