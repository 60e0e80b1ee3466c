"""Faults in long runs: signals, kills, and resuming afterwards, with the real scripts.

`scripts/tools/stress_test.py` does the same for longer, at random moments.
"""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import PYTHON, ROOT, TINY, Process, call, load, losses, newest, run, send_in_step, two_ranks

import lincls
import train
from scripts.tools.stress_test import same
from sogclr import datasets, loader, monitor
from sogclr import run as run_module
from sogclr.launch import AGAIN_SECONDS, free_port

pytestmark = [pytest.mark.usefixtures("no_gpu"), pytest.mark.slow]


@pytest.mark.parametrize(("module", "workers", "number", "flags", "steps"), [
    (train, 0, signal.SIGTERM, "", 2), (train, 2, signal.SIGUSR1, "--knn-freq 1", 3), (lincls, 1, signal.SIGINT, "", 2),
    (lincls, 0, signal.SIGTERM, "--features cached --lr 0.1 0.5", 2),
    (lincls, 0, signal.SIGTERM, "--finetune --precision fp16 --image-size 8", 3)])
def test_stopped_in_an_epoch_and_resumed_equals_uninterrupted(module, workers, number, flags, steps, imagenet,
                                                              tmp_path, monkeypatch, capfd):
    """A signal must finish the step, save and exit with 75; the same command must then give bit-identical results."""
    command = ["--data", imagenet, *TINY, "--seed", 1, "--epochs", 2, "--workers", workers, "--resume", "auto",
               *flags.split()]
    straight = call(module, *command, "--save_dir", tmp_path / "straight")
    send_in_step(steps - 1, number, monkeypatch.setattr)        # in the second step of epoch 0, or its last
    reports, evaluate = [], monitor.evaluate_knn
    monkeypatch.setattr(monitor, "evaluate_knn", lambda *args: reports.append(steps) or evaluate(*args))
    with pytest.raises(SystemExit, match="75"):
        call(module, *command, "--save_dir", tmp_path / "cut")
    assert len(reports) == ("--knn-freq" in flags)      # also for the epoch in whose last step the signal came
    assert (load(tmp_path / "cut")["epoch"], load(tmp_path / "cut")["step"]) == divmod(steps, 3)
    assert f"=> {number.name}: stops after this step" in capfd.readouterr().err
    resumed = call(module, *command, "--save_dir", tmp_path / "cut")
    assert any(line.endswith({2: "after 0 epochs and 2 steps", 3: "after 1 epochs"}[steps]) for line in resumed)
    assert losses(resumed) == losses(straight)[steps:]
    assert same(load(tmp_path / "straight"), load(tmp_path / "cut"))


# A script that gets a signal in one of its functions.
STOPS = """
import os, signal, time, {module}

def stop(*_, **__):
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(600)

{module}.{function} = stop
{module}.launch({module}.main_worker, {module}.PARSER.parse_args())
"""


@pytest.mark.parametrize(("module", "function", "flag"), [
    ("train", "set_lr", "--dry-run"), ("lincls", "extract", "--logistic"), ("lincls", "evaluate_knn", "--knn")])
def test_a_signal_stops_at_once_where_nothing_can_be_saved(module, function, flag, imagenet, tmp_path):
    """With exit code 75, as if it had been saved: the same command starts again."""
    _, error = run(PYTHON, "-c", STOPS.format(module=module, function=function), "--data", imagenet, *TINY,
                   "--save_dir", tmp_path, flag, code=75)
    assert error == "=> SIGUSR1: stops at once, with nothing to save\n"


# train.py with an error in its second step. It prints how many workers are left at the end, before torch ends them.
FAILS = """
import atexit, multiprocessing, sys, train
from sogclr import InputError

def fail(*_):
    if next(step):
        atexit.register(lambda: print(len(multiprocessing.active_children()), "workers"))
        raise {error}("no memory")

step = iter(range(2))
train.set_lr = fail
train.launch(train.main_worker, train.PARSER.parse_args())
"""


@pytest.mark.parametrize(("error", "code"), [("RuntimeError", 1), ("InputError", 2)])
def test_an_error_leaves_no_worker(error, code, imagenet, tmp_path):
    """Torch could wait 5 seconds for each. Also in a rank, which does not even wait for other ranks."""
    command = [PYTHON, "-c", FAILS.format(error=error), "--data", imagenet, *TINY, "--save_dir", tmp_path]
    alone = run(*command, "--workers", 2, code=code)
    assert alone[0].endswith("\n0 workers\n")
    ranked = run(*command, "--seed", 2, code=code,      # a seed of its own gives it a folder of its own
                 TORCHELASTIC_RUN_ID="1", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0",
                 MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    assert "workers" not in ranked[0]
    for _, text in (alone, ranked):
        assert ("Traceback" in text) == (error == "RuntimeError")
        assert text.endswith("RuntimeError: no memory\n" if error == "RuntimeError" else "error: no memory\n")


def test_saves_in_an_epoch(imagenet, tmp_path, monkeypatch):
    """--save-minutes must write checkpoint_last within an epoch, and 0 never."""
    saves = []
    monkeypatch.setattr(run_module.checkpoint.Writer, "save", lambda self, state, *_: saves.append(state["step"]))
    for minutes, expected in ((1e-9, [1, 2, 0]), (0, [0])):
        saves.clear()
        call(train, "--data", imagenet, *TINY, "--epochs", 1, "--save_dir", tmp_path / str(minutes),
             "--save-minutes", minutes)
        assert saves == expected


def test_save_freq(imagenet, tmp_path):
    """Every --save-freq-th epoch and the last three are kept."""
    call(train, "--data", imagenet, *TINY, "--batch-size", 24, "--epochs", 6, "--save-freq", 2, "--save_dir", tmp_path)
    assert {path.name for path in tmp_path.rglob("checkpoint_0*")} == {
        f"checkpoint_{epoch:04d}.pth.tar" for epoch in (0, 2, 3, 4, 5)}


def brute_force_knn(path, imagenet):
    """kNN-20 of a checkpoint of TINY in percent, with none of our code but the center crop."""
    encoder = torchvision.models.resnet18()
    encoder.fc = torch.nn.Identity()
    state = torch.load(path, weights_only=True)["state_dict"]
    encoder.load_state_dict({key.removeprefix("module.base_encoder."): value for key, value in state.items()
                             if ".fc." not in key})
    sets = [torchvision.datasets.ImageFolder(imagenet / split) for split in ("train", "val")]
    images = torch.stack([loader.center_view(image, 32) for data in sets for image, _ in data])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in datasets.IMAGENET_MEAN_STD)
    with torch.no_grad():
        features = torch.nn.functional.normalize(encoder.eval()((images / 255 - mean) / std).double())
    bank, queries = features.split([len(data) for data in sets])
    similarity, nearest = (queries @ bank.T).topk(20)
    votes = torch.zeros(len(queries), 3, dtype=torch.float64)
    votes.scatter_add_(1, torch.tensor(sets[0].targets)[nearest], (similarity / 0.07).exp())
    return 100 * float((votes.argmax(1) == torch.tensor(sets[1].targets)).double().mean())


def test_torchrun_restarts_what_has_died(imagenet, tmp_path):
    """If a rank is killed under the torchrun recipe, both must reconnect and continue, and the command succeed. The two
    must split the batch, print one log, and report the kNN accuracy of the saved encoder.
    """
    with Process("bash", ROOT / "scripts" / "pretrain_imagenet1k_torchrun.sh", *TINY, "--epochs", 12, "--seed",
                 5, "--knn-freq", 12, PYTHON=PYTHON, GPUS="2", DATA=str(imagenet), SAVE_DIR=str(tmp_path),
                 PYTHONWARNINGS="default") as process:
        process.wait_for("Epoch: [1]")
        while not list(tmp_path.rglob("checkpoint_last.pth.tar")):      # is written in the background
            assert process.poll() is None
            time.sleep(0.1)
        (lock,) = tmp_path.rglob("lock")        # rank 0 has written its number into it
        os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
        after, _ = process.end()
    assert after.count("=> resumed") == 1
    assert after.count("(4 per rank)") == 1
    knn = brute_force_knn(newest(tmp_path, "checkpoint_0011.pth.tar"), imagenet)
    assert re.search(rf" \* Epoch 11 effective_rank \d+\.\d kNN-20 {re.escape(f'{knn:.1f}')} kNN-200 ", after)
    assert load(tmp_path)["epoch"] == 12
    assert (load(tmp_path)["u"] > 0).all()


def test_two_ranks_stopped_and_killed_equal_undisturbed(imagenet, tmp_path):
    """A signal to one rank must stop both, within an epoch; a killed rank must be reported by the other, which must not
    hang; and `--resume auto` must then give the undisturbed run, bit for bit.
    """
    flags = ["--data", imagenet, *TINY, "--epochs", 4, "--seed", 3, "--resume", "auto"]
    with two_ranks(train, *flags, "--save_dir", tmp_path / "straight") as (first, second):
        first.end()
        assert second.end() == ("", "")         # one log

    flags += ["--save_dir", tmp_path / "cut"]
    with two_ranks(train, *flags, sends=(None, (0, signal.SIGUSR1))) as (first, second):
        output, _ = first.end(75)
        second.end(75)
    assert re.search(r"=> stopped after epoch 0, step \d; --resume auto", output)

    for killed in (1, 0):
        sends = [None, None]
        sends[killed] = (4, signal.SIGKILL)
        with two_ranks(train, *flags, sends=sends) as ranks:
            _, error = ranks[1 - killed].end(1)
        assert re.search(r"train.py: another rank has ended \(.+\), so the run stops; --resume", error)
        assert "Traceback" not in error

    with two_ranks(train, *flags) as (first, second):
        output, _ = first.end()
        second.end()
    assert "=> resumed" in output
    assert same(load(tmp_path / "straight"), load(tmp_path / "cut"))
    assert newest(tmp_path / "cut", "checkpoint_0003.pth.tar").exists()


def test_a_last_save_that_fails_is_one_line(imagenet, tmp_path):
    """Rank 0 must report it and exit with 2; the other rank must end too, without a traceback."""
    # Started by hand, as on two machines, with files of at most 1000 kB.
    command = ["bash", "-c", 'ulimit -f 1000; exec "$0" "$@"', PYTHON, ROOT / "train.py", "--data", imagenet, *TINY,
               "--epochs", 1, "--seed", 3, "--save_dir", tmp_path, "--world-size", 2, "--dist-url",
               f"tcp://localhost:{free_port()}", "--rank"]
    with Process(*command, 0) as first, Process(*command, 1) as second:
        _, error = first.end(2)
        _, other_error = second.end(1, 2)
        assert "the last save failed: File too large" in error
        assert "Traceback" not in error + other_error


SRUN = """
import os, signal, subprocess, sys
nodes = [subprocess.Popen(sys.argv[2:], env=os.environ | {"SLURM_NODEID": str(node), "PYTHONUNBUFFERED": "1"},
                          stdout=subprocess.PIPE, text=True) for node in (0, 1)]
for line in nodes[0].stdout:
    print(line, end="", flush=True)
    if "Epoch: [1][0/" in line:
        nodes[1].send_signal(signal.SIGUSR1)
nodes[1].stdout.read()
sys.exit(max(node.wait() for node in nodes))
"""


def test_slurm_requeues_a_stopped_job(imagenet, tmp_path):
    """Two machines (processes here) must form one run; after SLURM's warning to one of them, which must forward it to
    the process that it has started, all must save and exit with 75, and the job must be requeued.
    """
    for name, text in (("srun", f"#!{sys.executable}{SRUN}"), ("scontrol", f"""#!/bin/sh
[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/requeued
""")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    output, _ = run("bash", ROOT / "scripts" / "slurm.sh", "--data", imagenet, *TINY, "--epochs", 1000,
                    "--save_dir", tmp_path / "saved", code=75, PATH=f"{tmp_path}:{os.environ['PATH']}",
                    PYTHON=PYTHON, SLURM_SUBMIT_DIR=str(ROOT), SLURM_NNODES="2", SLURM_JOB_NODELIST="any",
                    SLURM_JOB_ID=str(os.getpid()), SLURM_CPUS_PER_TASK="2", PYTHONWARNINGS="default")
    assert "(4 per rank)" in output
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert load(tmp_path / "saved")["epoch"] >= 1


def test_a_run_is_saved_although_nobody_reads_its_output(imagenet, tmp_path):
    """With `2>&1 | tee`, Ctrl-C ends tee first; with `| head`, the reader ends early."""
    with Process(PYTHON, ROOT / "train.py", "--data", imagenet, *TINY, "--epochs", 1000, "--save_dir",
                 tmp_path) as process:
        process.wait_for("Epoch: [1][0")
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 75
    assert load(tmp_path)["epoch"] >= 1


def test_a_second_ctrl_c_ends_a_process_that_hangs(imagenet, tmp_path):
    """It does not react to the first signal; the second must end all and leave no process behind. Other signals must
    not: launchers send them even after all is saved.
    """
    with Process(PYTHON, ROOT / "train.py", "--data", imagenet, *TINY, "--epochs", 1000, "--save_dir", tmp_path,
                 "--multiprocessing-distributed", "--dist-backend", "gloo") as launcher:
        launcher.wait_for("Epoch: [0]")
        (lock,) = tmp_path.rglob("lock")        # the rank has written its number into it
        rank = int(lock.read_text().split()[1])
        os.kill(rank, signal.SIGSTOP)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            launcher.send_signal(number)
            time.sleep(AGAIN_SECONDS + 1)
            assert launcher.poll() is None
        while launcher.poll() is None:      # twice if it has heard of the first ones late
            launcher.send_signal(signal.SIGINT)
            time.sleep(1)
        for _ in range(600):        # the system takes a moment to end it
            status = Path(f"/proc/{rank}/status")
            if not status.exists() or "State:\tZ" in status.read_text():
                break
            time.sleep(0.1)
        else:
            pytest.fail("the rank was left behind")
        _, error = launcher.end(128 + signal.SIGINT)        # after the rank, which has the same output
        assert "=> stopped at once" in error
