#!/usr/bin/env python3
"""Kill a run at random moments and resume it until it ends: it must be bit-identical to an undisturbed one.

    python scripts/tools/stress_test.py [--kills 25]

Two processes on the CPU train on image files; `kill -9` hits one or both of them between two saves or while a
checkpoint is being written, and both while they start; then the same command starts again, with --resume auto. Takes
about 20 seconds per kill. Exits with 1 if the results differ.
"""

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sogclr import checkpoint
from sogclr.flags import Parser, number
from sogclr.launch import free_port

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
IMAGES, BATCH = 64, 8
TIMEOUT_SECONDS = 60        # for the survivor of a kill to end


class Run:
    """A run of two processes, started as if by hand on two machines."""

    def __init__(self, data, folder, epochs):
        url = f"tcp://localhost:{free_port()}"
        flags = ["--data_name", "folder", "--data", data, "--arch", "resnet18", "--image-size", 32,
                 "--stem", "imagenet", "--batch-size", BATCH, "--epochs", epochs, "--workers", 2, "--seed", 1,
                 "--save_dir", folder, "--save-minutes", 0.005, "--print-freq", 1, "--resume", "auto",
                 "--world-size", 2, "--dist-url", url]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.lines, self.errors = [], []
        self.ranks = [subprocess.Popen([sys.executable, TRAIN, *map(str, flags), "--rank", str(rank)],
                                       env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                      for rank in (0, 1)]
        for process in self.ranks:
            for stream, lines in ((process.stdout, self.lines), (process.stderr, self.errors)):
                threading.Thread(target=lambda stream=stream, lines=lines: lines.extend(stream), daemon=True).start()

    def wait_for(self, condition, seconds):
        """Whether the condition becomes true within that time, while both processes are alive."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and all(process.poll() is None for process in self.ranks):
            if condition():
                return True
            time.sleep(0.001)
        return False

    def steps(self):
        return [line for line in self.lines if line.startswith("Epoch: ")]

    def end(self, seconds=None):
        codes = [process.wait(seconds) for process in self.ranks]
        if any(code > 1 for code in codes):
            sys.exit("".join(["the run failed on its own:\n", *self.lines, *self.errors]))
        return codes


def kill_at_random(run, folder, rng):
    """Kill processes at a random moment; return the moment's name, or None if the run had already ended."""
    moment = rng.choice(("starting", "between saves", "between saves", "saving", "saving"))
    if moment == "starting":
        run.wait_for(lambda: False, rng.uniform(0, 10))
    else:
        run.wait_for(run.steps, TIMEOUT_SECONDS * 4)
        run.wait_for(lambda: False, rng.uniform(0, 2))
    saving = any(folder.rglob("*.part"))
    if moment == "saving":
        saving = run.wait_for(lambda: any(folder.rglob("*.part")), 10)
        run.wait_for(lambda: False, rng.uniform(0, 0.05))
    if any(process.poll() is not None for process in run.ranks):
        return None
    # Before they connect, one would wait ten minutes for the other, which could be slow to start.
    for process in rng.choice((run.ranks, run.ranks[:1], run.ranks[1:])) if run.steps() else run.ranks:
        process.kill()
    return "saving" if saving else "between saves" if run.steps() else "starting"


def same(a, b):
    """Whether two checkpoints are bit-identical, ignoring settings and timings."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in ("settings", "seconds"))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--kills", default=25, type=number(int, "[1, inf)"), metavar="N", help="number of kills")
    parser.add_argument("--seed", default=0, type=number(int, "[0, inf)"), metavar="N", help="seed of the moments")
    args = parser.parse_args()
    rng, pixels = random.Random(args.seed), np.random.default_rng(0)
    epochs = 4 + 3 * args.kills
    with tempfile.TemporaryDirectory() as temporary:
        data, straight, cut = (Path(temporary) / name for name in ("images", "straight", "cut"))
        data.mkdir()
        for k in range(IMAGES):
            Image.fromarray(pixels.integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(data / f"{k}.jpg")

        start = time.monotonic()
        Run(data, straight, epochs).end()
        print(f"undisturbed: {epochs} epochs of {IMAGES // BATCH} steps, {time.monotonic() - start:.0f} s", flush=True)
        moments, seconds = [], []
        while len(moments) < args.kills:
            run = Run(data, cut, epochs)
            moment = kill_at_random(run, cut, rng)
            if moment is None:
                break
            killed = time.monotonic()
            run.end(TIMEOUT_SECONDS)
            moments.append(moment)
            seconds.append(time.monotonic() - killed)
            skipped = sum("=> skipped" in line for line in run.lines)
            print(f"kill {len(moments)}: {moment}, after {len(run.steps())} steps of this start, {skipped} damaged "
                  f"files skipped, survivor ended after {seconds[-1]:.1f} s", flush=True)
        Run(data, cut, epochs).end()
        results = [checkpoint.load(next(folder.rglob(checkpoint.LAST)), "") for folder in (straight, cut)]
    counts = ", ".join(f"{moments.count(moment)} {moment}" for moment in ("starting", "between saves", "saving"))
    equal = same(*results)
    print(f"{len(moments)} kills ({counts}), survivors ended after at most {max(seconds, default=0):.1f} s: the result "
          + ("is bit-identical to the undisturbed run's" if equal else "is NOT that of the undisturbed run"))
    sys.exit(0 if equal and len(moments) == args.kills else 1)


if __name__ == "__main__":
    main()
