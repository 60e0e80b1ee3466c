#!/usr/bin/env python3
"""Does a small batch harm? Trains SimCLR, DCL and SogCLR with equal settings at several batch sizes, and compares them.

    python scripts/experiments/batch_size.py PRESET --data DIR      PRESET is cpu, small, gpu, ...: see --help

Each run is pretrained by train.py and evaluated by lincls.py: with linear classifiers at eight learning rates on cached
features (in `gpu`, `cpu` and `gamma` also on those of random crops), by logistic regression, and by kNN. All other
flags are passed to train.py, for example `--epochs 60 --gamma 0.2`. The same command continues after an interruption
and skips what is done, and runs with other settings may be added to the same --out; its results.md has the tables of
them all.

DCL (decoupled contrastive learning, arXiv 2110.06848; not `--loss_type dcl`, which is SogCLR) is SimCLR without the
positive in the denominator. It is trained as SogCLR with gamma 1, which has no moving average, so that the effects of
the two can be told apart. (Its gradient, too, has the factor tau, which LARS removes except for BatchNorm's weights.)
"""

import argparse
import itertools
import os
import shlex
import signal
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lincls
import train
from scripts.experiments import collect_results
from sogclr import InputError
from sogclr.flags import DATA_SETS, Parser, number
from sogclr.launch import STOPPED
from sogclr.loader import available_cores
from sogclr.run import file_name

ROOT, CORES = Path(train.__file__).resolve().parent, available_cores()


FLAGS_OF_METHOD = {"simclr": "--loss_type cl", "decoupled": "--loss_type dcl --gamma 1", "sogclr": "--loss_type dcl",
                   "isogclr": "--loss_type isogclr"}


class Preset(NamedTuple):
    """A study: flags of train.py and of what is compared. Each variant is a further set of runs with other flags."""

    about: str
    flags: str
    batch_sizes: tuple
    protocols: tuple            # flags of lincls.py for each
    varied: str = "batch_size"  # the setting of train.py that takes the batch sizes
    methods: tuple = ("simclr", "decoupled", "sogclr")
    variants: tuple = ()
    seeds: tuple = (1, 2, 3)
    images: tuple = ()          # how many training and validation images to take, (): all
    held_out: bool = False      # take the validation images from the training split


RATES = "--lr 0.001 0.003 0.01 0.03 0.1 0.3 1 3"
QUICK = f"{RATES} --features cached", "--logistic", "--knn"
SMALL = "--stem imagenet --warmup-epochs 1 --learning-rate-scaling sqrt --crop-min 0.2 --wd 1e-6"
CPU = Preset("5,000 images of CIFAR-10, batch 16 to 256", f"{SMALL} --precision bf16 --epochs 12 --lr 0.075 --t 0.1",
             (16, 64, 256), (f"{RATES} --batch-size 256 --epochs 10", *QUICK), images=(5000, 5000))
PRESETS = {
    "gpu": Preset("all of CIFAR-10, batch 32 to 512, the authors' settings",
                  "--epochs 200 --lr 1.0 --learning-rate-scaling linear --wd 1e-4 --t 0.3", (32, 64, 128, 256, 512),
                  (RATES, *QUICK)),
    "cpu": CPU,
    "small": CPU._replace(
        about="5,000 images, batch 64, of which the loss sees 4 to 64 at a time (--loss-batch-size)",
        flags=f"{SMALL} --precision fp32 --epochs 12 --lr 0.075 --t 0.1 --gamma 0.2 --batch-size 64",
        batch_sizes=(4, 8, 16, 64), protocols=QUICK, varied="loss_batch_size"),
    "gamma": CPU._replace(about="5,000 images, batch 16: other gammas and temperatures", batch_sizes=(16,), variants=(
        "--gamma 0.2", "--t 0.05", "--t 0.05 --gamma 0.2")),
    "search": Preset(
        "settings for batch 64, chosen on held-out training images", f"{SMALL} --precision bf16 --epochs 10 --lr 0.15 "
        "--t 0.2", (64,), QUICK, methods=("simclr", "sogclr"), variants=(
            "--t 0.1", "--t 0.4", "--lr 0.3", "--lr 0.075", "--lr 0.0375", "--t 0.1 --lr 0.075",
            "--t 0.07 --lr 0.075", "--t 0.05 --lr 0.075", "--crop-min 0.08", "--wd 1e-4", "--gamma 0.5",
            "--gamma 0.2"), seeds=(1,), images=(5000, 5000), held_out=True),
    "rho": CPU._replace(about="iSogCLR's rho for batch 64, on the same", batch_sizes=(64,), protocols=QUICK,
                        methods=("isogclr",), seeds=(1,), held_out=True,
                        variants=("--rho 0.2", "--rho 0.4", "--rho 1", "--rho 2"))}

# What this script decides itself, and what to do instead.
OWN = {"loss_type": "use --methods", "seed": "use --seeds", "save_dir": "use --out", "dry_run": "use --plan",
       "resume": "leave it out", "start_epoch": "leave it out"}


def parse():
    """This script's flags, those that are not given from the preset, and the flags for train.py."""
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("preset", choices=PRESETS, help="; ".join(
        f"{name}: {preset.about}" for name, preset in PRESETS.items()))
    parser.add_argument("--methods", nargs="+", choices=FLAGS_OF_METHOD,
                        help="SimCLR, DCL (decoupled), SogCLR, iSogCLR (default: the preset's)")
    parser.add_argument("--batch-sizes", nargs="+", type=number(int, "[2, inf)"), metavar="N",
                        help="batch sizes to compare, with the preset small those of the loss (default: the preset's)")
    parser.add_argument("--seeds", nargs="+", type=number(int, "[0, inf)"), metavar="N",
                        help="seeds, each of which is a run (default: the preset's)")
    parser.add_argument("--images", nargs=2, type=number(int, "[1, inf)"), metavar=("TRAIN", "VAL"),
                        help="number of training and validation images to use (default: the preset's)")
    parser.add_argument("--data_name", default="cifar10", choices=DATA_SETS, help="data set")
    parser.add_argument("--data", metavar="DIR", help="its folder (default: data/<data_name>)")
    parser.add_argument("--out", type=os.path.abspath, metavar="DIR",
                        help="runs, logs and results.md (default: saved_models/batch_size_<preset>)")
    parser.add_argument("--jobs", default=1, type=number(int, "[1, inf)"), metavar="N", help="runs at a time")
    parser.add_argument("--plan", action="store_true", help="print the commands and stop")
    args, extra = parser.parse_known_args()
    for name, value in PRESETS[args.preset]._asdict().items():
        setattr(args, name, getattr(args, name, None) or value)
    args.out = Path(args.out or ROOT / "saved_models" / f"batch_size_{args.preset}")
    args.data = os.path.abspath(args.data or ROOT / "data" / args.data_name)
    own = OWN | {args.varied: "use --batch-sizes"}
    given = train.PARSER.parse_args(extra, argparse.Namespace(**dict.fromkeys(own)))     # None instead of the defaults
    for name, hint in own.items():
        if getattr(given, name) is not None:
            parser.error(f"{train.PARSER.flag(name)}: set by this script, {hint}")
    return parser, args, extra


def part_of(args):
    """The data flags of all runs, and the command that makes the folder of images first, or None."""
    if not args.images:
        return ["--data_name", args.data_name, "--data", args.data], None
    source = args.data_name
    if source == "folder":      # one --out may serve several folders
        source = f"{Path(args.data).name}_{zlib.crc32(os.fsencode(args.data)):08x}"
    folder = args.out / file_name("_".join(["images", source, *map(str, args.images), *["held_out"] * args.held_out]))
    return ["--data_name", "folder", "--data", folder], [
        "scripts/tools/make_subset.py", folder, "--data_name", args.data_name, "--data", args.data,
        "--train", args.images[0], "--val", args.images[1], *["--held-out"] * args.held_out]


def plan(args, extra, data):
    """{name of a run: its [(command, file that exists once it is done)]}. A wrong flag exits with one line; flags that
    contradict each other raise InputError.
    """
    runs = {}
    defaults = ["--arch", "resnet18", "--image-size", 32, "--workers", max(CORES // args.jobs, 1), "--save-freq", 1000,
                "--print-freq", 100, *args.flags.split(), *extra]
    common = [*data, "--save_dir", args.out, "--resume", "auto"]
    for seed, variant, batch_size, method in itertools.product(args.seeds, ("", *args.variants), args.batch_sizes,
                                                               args.methods):
        flags = [*defaults, *variant.split(), *common, *FLAGS_OF_METHOD[method].split(), train.PARSER.flag(args.varied),
                 batch_size, "--seed", seed]
        settings = train.PARSER.parse_args(list(map(str, flags)))
        # Runs that differ in what has no effect are one. (DCL's gamma, 1, is part of the method, so no setting either.)
        for name in (*train.GAMMA_FLAGS, *train.ISOGCLR_FLAGS):
            if collect_results.setting(vars(settings), name) is None and (name, settings.loss_type) != ("gamma", "dcl"):
                setattr(settings, name, train.PARSER.get_default(name))
        train.check_flags(settings)
        folder = args.out / train.run_name(settings)
        runs[folder.name] = [(["train.py", *train.PARSER.command_line(settings)], folder / "results.json")]
        for protocol in args.protocols:
            flags = [*common, "--pretrained", folder / "checkpoint_last.pth.tar", "--seed", seed]
            for name in ("arch", "image_size", "stem", "workers", "bad_images", "precision", "gpu"):
                if getattr(settings, name) is not None:
                    flags += [train.PARSER.flag(name), getattr(settings, name)]
            flags = [*map(str, flags), *protocol.split()]
            runs[folder.name].append((["lincls.py", *flags], lincls.run_folder(lincls.PARSER.parse_args(flags))
                                      / "results.json"))
    return runs


def run_all(runs, out, jobs):
    """Run them, `jobs` at a time, each with a log. After a failure or a signal, which the running ones get too, no more
    start. Returns the exit code: the first that is not 0.
    """
    codes, signals, processes, begun = [], [], set(), itertools.count(1)
    todo = sum(not result.exists() for steps in runs.values() for _, result in steps)
    env = {"OMP_NUM_THREADS": str(max(CORES // jobs, 1))} | os.environ

    def stop(signal_number, frame):
        codes.append(STOPPED)
        signals.append(signal_number)
        for process in list(processes):
            process.send_signal(signal_number)

    def do(name):
        for command, result in runs[name]:
            if codes or result.exists():
                continue
            print(f"=> {next(begun)} of {todo}: {command[0]}, {out / name}.log", flush=True)
            with open(out / f"{name}.log", "a+") as log:
                process = subprocess.Popen(python(command), cwd=ROOT, env=env, stdout=log, stderr=log)
                processes.add(process)
                if signals:         # one that arrived after the check of codes
                    process.send_signal(signals[0])
                code = process.wait()
                processes.remove(process)
                if code:
                    codes.append(code if code > 0 else 128 - code)      # as a shell does: -9 is 137
                    log.seek(0)
                    last_line = log.read().strip().rpartition("\n")[2]
                    print(f"=> code {codes[-1]}, {log.name}: {last_line}", file=sys.stderr)

    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signal_number, stop)
    with ThreadPoolExecutor(jobs) as threads:
        list(threads.map(do, runs))
    return codes[0] if codes else 0


def python(command):
    return [sys.executable, *map(str, command)]


def main():
    parser, args, extra = parse()
    data, make_images = part_of(args)
    try:
        runs = plan(args, extra, data)
    except InputError as error:
        parser.error(str(error))
    if args.plan:
        for command in [make_images, *(command for steps in runs.values() for command, _ in steps)]:
            if command:
                print(shlex.join(["python", *map(str, command)]))
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: cannot be made: {error.strerror}")
    code = run_all({make_images[1].name: [(make_images, make_images[1])]}, args.out, 1) if make_images else 0
    code = code or run_all(runs, args.out, args.jobs)
    if code == STOPPED:
        print("=> stopped; the same command continues", file=sys.stderr)
    if code:
        sys.exit(code)
    try:
        report = collect_results.report(*collect_results.read(args.out))
    except InputError as error:
        parser.error(str(error))
    (args.out / "results.md").write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    if "--plan" in sys.argv:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # for `| head`
    main()
