"""Faults in long runs: signals, kills, and resuming afterwards, with the real scripts.

`scripts/tools/stress_test.py` does the same for longer, at random moments.
"""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from test_scripts import ROOT, TINY, call, load, losses, newest, no_gpu  # noqa: F401 (a fixture)

import lincls
import train
from scripts.tools.stress_test import same
from sogclr import run as run_module
from sogclr.launch import free_port


@pytest.mark.parametrize(("module", "workers", "number", "flags", "steps"), [
    (train, 0, signal.SIGTERM, "", 5), (train, 2, signal.SIGUSR1, "--knn-freq 1", 6), (lincls, 1, signal.SIGINT, "", 5),
    (lincls, 0, signal.SIGTERM, "--features cached --lr 0.1 0.5", 5),
    (lincls, 0, signal.SIGTERM, "--finetune --precision fp16 --image-size 8", 6)])
def test_stopped_in_an_epoch_and_resumed_equals_uninterrupted(module, workers, number, flags, steps, imagenet,
                                                              tmp_path, monkeypatch, capfd):
    """A signal must finish the step, save and exit with 75; the same command must then give bit-identical results."""
    command = ["--data", imagenet, *TINY, "--seed", 1, "--epochs", 3, "--workers", workers, "--resume", "auto",
               *flags.split()]
    straight = call(module, *command, "--save_dir", tmp_path / "straight")
    calls, original = iter(range(100)), run_module.stop_requested

    def stop_requested():
        if next(calls) == steps - 1:        # in the second step of epoch 1, or its last
            os.kill(os.getpid(), number)
        return original()

    monkeypatch.setattr(run_module, "stop_requested", stop_requested)
    reports, evaluate = [], train.KNNMonitor.__call__
    monkeypatch.setattr(train.KNNMonitor, "__call__", lambda *args: reports.append(steps) or evaluate(*args))
    with pytest.raises(SystemExit, match="75"):
        call(module, *command, "--save_dir", tmp_path / "cut")
    assert len(reports) == 2 * ("--knn-freq" in flags)      # also for the epoch in whose last step the signal came
    assert (load(tmp_path / "cut")["epoch"], load(tmp_path / "cut")["step"]) == divmod(steps, 3)
    assert f"=> {number.name}: stops after this step" in capfd.readouterr().err
    resumed = call(module, *command, "--save_dir", tmp_path / "cut")
    assert any(line.endswith({5: "after 1 epochs and 2 steps", 6: "after 2 epochs"}[steps]) for line in resumed)
    assert losses(resumed) == losses(straight)[steps:]
    assert same(load(tmp_path / "straight"), load(tmp_path / "cut"))


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


class TwoRanks:
    """`train.py` as two processes started by hand, `rank[0]` and `rank[1]`. A context manager."""

    def __init__(self, *flags, launcher=()):
        url = f"tcp://localhost:{free_port()}"
        command = [*launcher, sys.executable, ROOT / "train.py", *TINY, "--world-size", 2, "--dist-url", url, *flags,
                   "--rank"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "error"}
        self.rank = [subprocess.Popen([str(part) for part in (*command, rank)], env=env, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in (0, 1)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.rank:
            process.kill()
            process.communicate()

    def wait_for(self, text):
        """Read rank 0's output up to a line that contains the text."""
        lines = []
        for line in self.rank[0].stdout:
            lines.append(line)
            if text in line:
                return lines
        raise AssertionError("".join(lines) + self.rank[0].stderr.read())

    def end(self):
        """Each rank's output, error output and exit code."""
        return [(*process.communicate(timeout=60), process.returncode) for process in self.rank]


def test_torchrun_restarts_what_has_died(imagenet, tmp_path):
    """If a rank is killed under the torchrun recipe, both must reconnect and continue, and the command succeed."""
    env = os.environ | {"PYTHON": sys.executable, "GPUS": "2", "DATA": str(imagenet), "SAVE_DIR": str(tmp_path),
                        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", ROOT / "scripts" / "pretrain_imagenet1k_torchrun.sh", *TINY, "--epochs", 5]
    with subprocess.Popen(list(map(str, command)), env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as run:
        for line in run.stdout:
            if line.startswith("Epoch: [2]"):
                break
        (lock,) = tmp_path.rglob("lock")        # rank 0 has written its number into it
        os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
        after = run.communicate(timeout=120)[0]
    assert run.returncode == 0
    assert "=> resumed" in after
    assert load(tmp_path)["epoch"] == 5


def test_two_ranks_stopped_and_killed_equal_undisturbed(imagenet, tmp_path):
    """A signal to one rank must stop both; a killed rank must be reported by the other, which must not hang; and
    `--resume auto` must then give the undisturbed run, bit for bit.
    """
    flags = ["--data", imagenet, "--epochs", 8, "--seed", 3, "--resume", "auto", "--save-minutes", 0.01]
    with TwoRanks(*flags, "--save_dir", tmp_path / "straight") as straight:
        assert [code for *_, code in straight.end()] == [0, 0]

    flags += ["--save_dir", tmp_path / "cut"]
    with TwoRanks(*flags) as run:
        run.wait_for("Epoch: [1][1/3]")
        run.rank[1].send_signal(signal.SIGUSR1)
        (out, _, code), (_, error, other) = run.end()
        assert (code, other) == (75, 75), error
        assert re.search(r"=> stopped after epoch \d+(, step \d)?; --resume auto", out)

    with TwoRanks(*flags) as run:
        run.wait_for("Epoch: [3][1/3]")
        run.rank[1].kill()
        start = time.monotonic()
        (_, error, code), _ = run.end()
        assert time.monotonic() - start < 30
        assert code == 1
        assert re.search(r"train.py: another rank has ended \(.* by peer.*\), so the run stops; --resume", error)
        assert "Traceback" not in error

    with TwoRanks(*flags) as run:
        run.wait_for("Epoch: [5][1/3]")
        run.rank[0].kill()
        _, (_, error, code) = run.end()
        assert code == 1
        assert "train.py: another rank has ended" in error

    with TwoRanks(*flags) as run:
        assert [code for *_, code in run.end()] == [0, 0]
    assert same(load(tmp_path / "straight"), load(tmp_path / "cut"))
    assert newest(tmp_path / "cut", "checkpoint_0007.pth.tar").exists()


def test_a_last_save_that_fails_is_one_line(imagenet, tmp_path):
    """Rank 0 must report it and exit with 2; the other rank must end too, without a traceback."""
    limited = ["bash", "-c", 'ulimit -f 1000; exec "$0" "$@"']        # in kB
    with TwoRanks("--data", imagenet, "--epochs", 1, "--seed", 3, "--save_dir", tmp_path, launcher=limited) as run:
        (_, error, code), (_, other_error, other) = run.end()
        assert code == 2
        assert "the last save failed: File too large" in error
        assert other in (1, 2)
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
    """Two machines (processes here) must form one run; after SLURM's warning to one of them all must save and exit with
    75, and the job must be requeued.
    """
    for name, text in (("srun", f"#!{sys.executable}{SRUN}"), ("scontrol", f"""#!/bin/sh
[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/requeued
""")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": f"{tmp_path}:{os.environ['PATH']}",
                        "PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "2",
                        "SLURM_JOB_NODELIST": "any", "SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_PER_TASK": "2"}
    command = ["bash", ROOT / "scripts" / "slurm.sh", "--data", imagenet, *TINY, "--epochs", 1000,
               "--save_dir", tmp_path / "saved"]
    done = subprocess.run(list(map(str, command)), env=env, text=True, capture_output=True, timeout=200)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "(4 per rank)" in done.stdout
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert load(tmp_path / "saved")["epoch"] >= 1


def test_a_run_is_saved_although_nobody_reads_its_errors(imagenet, tmp_path):
    """With `2>&1 | tee`, Ctrl-C ends tee first."""
    receive, send = os.pipe()
    command = [sys.executable, ROOT / "train.py", "--data", imagenet, *TINY, "--epochs", 1000, "--save_dir", tmp_path]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(list(map(str, command)), env=env, text=True, stdout=subprocess.PIPE, stderr=send) as process:
        next(line for line in process.stdout if "Epoch: [1][0" in line)
        os.close(send)
        os.close(receive)
        process.send_signal(signal.SIGINT)
        assert "=> stopped after epoch" in process.stdout.read()
        assert process.wait(60) == 75
    assert load(tmp_path)["epoch"] >= 1


class Launcher(subprocess.Popen):
    """`train.py --multiprocessing-distributed`, which starts processes and waits for them, after the first epoch."""

    def __init__(self, imagenet, tmp_path):
        command = [sys.executable, ROOT / "train.py", "--data", imagenet, *TINY, "--epochs", 1000, "--save_dir",
                   tmp_path, "--multiprocessing-distributed", "--dist-backend", "gloo"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        super().__init__(list(map(str, command)), env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        next(line for line in self.stdout if "Epoch: [1]" in line)


def test_a_signal_to_the_launcher_stops_its_processes(imagenet, tmp_path):
    """The process that the user sees must forward the signal, and end as the others do."""
    with Launcher(imagenet, tmp_path) as launcher:
        launcher.send_signal(signal.SIGTERM)
        assert "=> stopped after epoch" in launcher.stdout.read()
        assert launcher.wait(60) == 75


def test_a_second_ctrl_c_ends_a_process_that_hangs(imagenet, tmp_path):
    """It does not react to the first signal; the second must end all and leave no process behind. Other signals must
    not: launchers send them even after all is saved.
    """
    with Launcher(imagenet, tmp_path) as launcher:
        (lock,) = tmp_path.rglob("lock")        # the rank has written its number into it
        rank = int(lock.read_text().split()[1])
        os.kill(rank, signal.SIGSTOP)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            assert launcher.poll() is None
            launcher.send_signal(number)
            time.sleep(3)
        assert launcher.wait(60) == 128 + signal.SIGINT
        assert "=> stopped at once" in launcher.stderr.read()
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)
