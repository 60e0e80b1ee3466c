"""Command-line flags: a parser with one-line errors, and the flags that train.py and lincls.py share."""

import argparse
import math
import os
import re
import sys
from pathlib import Path

import torch

from sogclr import InputError
from sogclr.builder import ARCHITECTURES
from sogclr.datasets import default_image_size
from sogclr.distributed import escape_output, log

DATA_SETS = ("imagenet1000", "imagenet100", "cifar10", "cifar100", "folder", "shapes")


class _Help(argparse.HelpFormatter):
    """Appends the default, if any, to every help text that does not state it in words."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default in ("", argparse.SUPPRESS) \
            or "(default" in action.help
        return action.help if silent else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An `argparse` parser with one-line errors, exit code 2, and defaults in the help."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):      # parse_args calls it, too
        escape_output()
        words = sys.argv[1:] if args is None else list(args)
        for before, word in zip(["", *words], words, strict=False):
            if word == "" or re.fullmatch("--[^=]*=", word):
                flag = word or (before if before.startswith("-") else "without a flag")
                self.error(f"argument {flag}: is empty, as if a variable were not set")
        return super().parse_known_args(words, namespace)

    def error(self, message):
        name, _, rest = message.partition(": ")
        if name == "unrecognized arguments" and os.path.isdir(rest):        # as in MoCo and SimSiam
            message += f" (pass the data set's folder as --data {rest})"
        self.exit(2, f"{self.prog}: error: {message}\n")

    def flag(self, name):
        """The flag that sets `args.<name>`, in its first long form."""
        return next(option for action in self._actions if action.dest == name
                    for option in action.option_strings if option.startswith("--"))

    def command_line(self, args):
        """The flags of the settings in `args` that differ from their defaults, as a list of words."""
        words = []
        for name, value in vars(args).items():
            if value != self.get_default(name):
                values = [] if value is True else value if isinstance(value, list) else [value]
                words += [self.flag(name), *map(str, values)]
        return words

    def require_same(self, made_with, now, source):
        """Raise InputError if a setting differs from that in a checkpoint, naming the flag and both values.

        made_with, now: {a flag's dest: value}; entries in only one of them are not compared.
        source: the flag and file that `made_with` is from.
        """
        for action in self._actions:
            before, value = made_with.get(action.dest), now.get(action.dest)
            if before != value and action.dest in made_with and action.dest in now:
                flag = self.flag(action.dest)
                before, value = (" ".join(map(str, given)) if isinstance(given, list) else given
                                 for given in (before, value))
                hint = f"leave {flag} out" if before == action.default else f"pass {flag} {before}"
                raise InputError(f"{source}: was made with {flag} {before}, not {value}; {hint}, or start a new run")


def output_file(text):
    """A `type=` for argparse: the Path of an output file, rejected before any work is done if it cannot be written."""
    path = Path(text)
    try:
        writable = not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise argparse.ArgumentTypeError(f"must be a writable file in an existing folder, got {text!r}")
    return path


def refuse(*cases):
    """Raise InputError for the first contradiction. cases: (whether flags contradict each other, the message)."""
    for contradicts, line in cases:
        if contradicts:
            raise InputError(line)


def number(kind, interval):
    """A `type=` for argparse: an int or float in an interval such as `"(0, 1]"`.

    `nan` is in no interval, so it is always rejected.
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} in {interval.replace('inf', 'infinity')}, got {text!r}")
        return value

    return parse


class _OneOrMore(argparse.Action):
    """For a flag with one or more values: stores one as itself, several as a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def add_loading_flags(group):
    """Add the flags of how images are read to a parser or a group of its flags."""
    group.add_argument("-j", "--workers", default=32, type=number(int, "[0, inf)"), metavar="N",
                       help="data loading processes on this machine, shared by its ranks: at most one per core, but at "
                            "least one per rank if not 0")
    group.add_argument("--bad-images", default="stop", choices=("stop", "skip"),
                       help="on an unreadable file: stop, or skip and report it (several, and more than 1%% of all, "
                            "stop anyway)")


def add_shared_flags(parser, *, batch_size, epochs, lr, weight_decay, lr_help, momentum_of, several=False):
    """Add the flags that both scripts share and return their groups. The keywords are the defaults and texts that
    differ.

    several: whether --lr and --wd take several values.
    """
    values = {"nargs": "+", "action": _OneOrMore} if several else {}
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="path to the data set (default: data/<data_name>)")
    data.add_argument("--data_name", default="imagenet1000", choices=DATA_SETS,
                      help="data set: ImageNet in DIR/train and DIR/val, CIFAR (downloaded if missing), 'folder' for "
                           "any tree of images, 'shapes' for generated images")
    data.add_argument("--image-size", type=number(int, "[8, inf)"), metavar="PIXELS",
                      help="size of the square crops, the same in train.py and lincls.py "
                           "(default: 224; 32 for cifar10, cifar100 and shapes)")
    add_loading_flags(data)

    model = parser.add_argument_group("model")
    model.add_argument("-a", "--arch", default="resnet50", choices=ARCHITECTURES, metavar="ARCH",
                       help="torchvision ResNet: " + " | ".join(ARCHITECTURES))
    model.add_argument("--stem", default="auto", choices=("auto", "imagenet", "cifar"),
                       help="first layers: 'imagenet' is 7x7 stride 2 and max-pool, 'cifar' is 3x3 stride 1 without "
                            "pooling, 'auto' uses cifar up to 32 pixels")

    optim = parser.add_argument_group("optimization")
    optim.add_argument("--epochs", default=epochs, type=number(int, "[1, inf)"), metavar="N",
                       help="total epochs to run")
    optim.add_argument("--start-epoch", type=number(int, "[0, inf)"), metavar="N",
                       help="first epoch, counted from 0 (default: 0, or where --resume left off)")
    optim.add_argument("-b", "--batch-size", default=batch_size, type=number(int, "[1, inf)"), metavar="N",
                       help="global batch size, over all GPUs of all machines")
    optim.add_argument("--lr", "--learning-rate", dest="lr", default=lr, type=number(float, "(0, inf)"), metavar="LR",
                       help=lr_help + "; several values train one classifier each in one pass" * several, **values)
    optim.add_argument("--momentum", default=0.9, type=number(float, "[0, 1)"), metavar="M",
                       help=f"{momentum_of} momentum")
    optim.add_argument("--wd", "--weight-decay", dest="weight_decay", default=weight_decay,
                       type=number(float, "[0, inf)"), metavar="W",
                       help="weight decay" + "; several values: each with every learning rate" * several, **values)
    optim.add_argument("--precision", choices=("bf16", "fp16", "fp32"),
                       help="precision of the encoder; the loss is always float32; with fp32, GPU convolutions use "
                            "TF32 (default: bf16 on GPUs that support it, else fp16; fp32 on the CPU)")
    optim.add_argument("--seed", type=number(int, "[0, 4294967295]"), metavar="N",
                       help="seed for weights, data order and augmentation; also makes cuDNN deterministic "
                            "(default: a new one, printed)")

    run = parser.add_argument_group("run")
    run.add_argument("--save_dir", default="./saved_models/", metavar="DIR",
                     help="parent of the run folders, each named after its run's settings")
    run.add_argument("--resume", default="", metavar="PATH",
                     help="checkpoint to resume from; 'auto' is this run's newest intact one, if any")
    run.add_argument("--save-minutes", default=30.0, type=number(float, "[0, inf)"), metavar="MINUTES",
                     help="also write checkpoint_last within an epoch, this long after the last save; 0 is never")
    run.add_argument("-p", "--print-freq", default=10, type=number(int, "[1, inf)"), metavar="N",
                     help="steps between progress lines")

    devices = parser.add_argument_group(
        "devices", "Without any of these flags: all visible GPUs, or the CPU. Under torchrun, its environment is used.")
    devices.add_argument("--gpu", type=number(int, "[0, inf)"), metavar="N", help="use only this GPU")
    devices.add_argument("--multiprocessing-distributed", action="store_true",
                         help="start one process per GPU on this machine")
    devices.add_argument("--world-size", default=-1, type=number(int, "[-1, inf)"), metavar="N",
                         help="number of machines with --multiprocessing-distributed, else of processes; -1 is one")
    devices.add_argument("--rank", default=-1, type=number(int, "[-1, inf)"), metavar="N",
                         help="rank of this machine (or process), from 0; -1 is 0")
    devices.add_argument("--dist-url", metavar="URL",
                         help="rendezvous of several processes, tcp://HOST:PORT or env:// (default: a free local port)")
    devices.add_argument("--dist-backend", choices=("nccl", "gloo"),
                         help="communication backend (default: nccl on GPUs, gloo on the CPU)")
    return {"data": data, "model": model, "optimization": optim, "run": run, "devices": devices}


def data_label(args):
    """The data set's name in a run folder's name; for --data_name folder, also that folder's name."""
    return args.data_name if args.data_name != "folder" else f"folder-{Path(args.data or 'data/folder').resolve().name}"


def non_defaults(parser, args, names):
    """The named settings that differ from their defaults, for a run folder's name: `_seed_1_crop_min_0.2`."""
    defaults = {name: parser.get_default(name) for name in names} | {"image_size": default_image_size(args.data_name)}
    return "".join(f"_{name}_{getattr(args, name)}" for name in names
                   if getattr(args, name) not in (defaults[name], None))


def resolve_precision(precision, device):
    """`--precision` (None for this device's default) -> "bf16", "fp16" or "fp32", and its torch dtype.

    On a GPU, float32 follows torch's defaults, which are what we want: convolutions in TF32, matrix products, which
    make up the loss, in full float32. Logs a note if the CPU lacks fast instructions for the precision.
    """
    if precision is None:
        precision = "fp32"
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and precision != "fp32" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        log(f"=> note: on a CPU without AVX-512, {precision} is many times slower than fp32; pass --precision fp32")
    return precision, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
