#!/usr/bin/env python3
"""Measures the speed and memory of training, next to a reference in the same run.

    python scripts/tools/benchmark.py all --data DIR       all below but data, in a few minutes: the report's tables
    python scripts/tools/benchmark.py step                 the training step, and the encoder's passes alone
    python scripts/tools/benchmark.py train --data DIR     training on the images in DIR, and the plain recipe
    python scripts/tools/benchmark.py lincls --data DIR    linear evaluation on the images in DIR
    python scripts/tools/benchmark.py data --data DIR      two 224-pixel views of each image, by worker processes

Runs on the GPU if there is one, else on the CPU. Variants are interleaved, and each figure is the median over the
repeats, because machines are noisy. Tables are in Markdown; --json FILE also writes the figures to a file.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sogclr import InputError
from sogclr.augment import Augment, Normalize, pil_recipe
from sogclr.builder import ARCHITECTURES, SimCLR, choose_stem, memory_format, resnet
from sogclr.datasets import IMAGENET_MEAN_STD, ImageSet, open_data_set
from sogclr.features import Encoder
from sogclr.flags import Parser, number, output_file, resolve_precision
from sogclr.isogclr import RobustGlobalContrastiveLoss
from sogclr.loader import LabeledBatches, Loader, TwoViewBatches, available_cores
from sogclr.loss import GlobalContrastiveLoss
from sogclr.optimizer import LARS
from sogclr.report import environment_info

os.environ.setdefault("KINETO_LOG_LEVEL", "99")     # the profiler logs to stderr otherwise
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMAGENET_IMAGES, CROP_MIN = 1_281_167, 0.08
COUNTED = 40 if DEVICE.type == "cuda" else 4        # steps, if there are as many images
FLOOR = "floor: encoder alone"
CASES = [("resnet50", 224, 256), ("resnet50", 224, 64), ("resnet18", 32, 512), ("resnet18", 32, 64)]     # of `all`
CPU_CASES = [("resnet18", 64, 64), ("resnet18", 32, 64)]
synchronize = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None


def timed(function, batches, skip=0):
    """Call function(*batch) for each batch and return the mean time in ms, not counting the first `skip` calls."""
    batches = iter(batches)
    for _ in range(skip):
        function(*next(batches))
    synchronize()
    start, calls = time.perf_counter(), 0
    for batch in batches:
        function(*batch)
        calls += 1
    synchronize()
    return 1000 * (time.perf_counter() - start) / calls


def timed_with(loader, function):
    """Like `timed`, for at most COUNTED batches of a loader after those that its workers prepare ahead."""
    skip = loader.ahead + 1
    return timed(function, itertools.islice(loader.epoch(0), skip + COUNTED), skip)


def compare(variants, repeats, batch_size, ratios, speed="pairs/s"):
    """Interleave the variants, {name: function that returns a time in ms}, and return a row of medians for each.

    batch_size: what takes such a time; ratios: {column: function of a variant's time and of all times in its repeat};
    speed: its column.
    """
    runs = [{name: function() for name, function in variants.items()} for _ in range(1 + repeats)][1:]      # warmed up
    rows = []
    for name in variants:
        ms = statistics.median(run[name] for run in runs)
        # Ratios are taken within a repeat, where a slow spell of the machine cancels out.
        rows.append({"what": name, "ms": ms, speed: 1000 * batch_size / ms} | {
            column: statistics.median(ratio(run[name], run) for run in runs) for column, ratio in ratios.items()})
    return rows


def on_the_gpu(function):
    """Return a call's number of kernels and copies, their time, and its peak memory on top of weights and gradients."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile(acc_events=True) as record:
        function()
        torch.cuda.synchronize()
    kernels = [event for event in record.events()
               if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation]
    return {"kernels": len(kernels), "GPU ms": sum(event.time_range.elapsed_us() for event in kernels) / 1000,
            "peak MiB": (torch.cuda.max_memory_allocated() - before) / 2**20}


def captured(function):
    """Capture a function without arguments as a CUDA graph and return a function that replays it."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):      # libraries choose their kernels, and the optimizer creates its state
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def resident_views(batch_size, image_size):
    """Return two views of random pixels, with the types and strides of the loader's, on the device."""
    crops = torch.randint(256, (2, batch_size, image_size, image_size, 3), dtype=torch.uint8, device=DEVICE)
    return crops.permute(0, 1, 4, 2, 3), torch.rand(2, batch_size, Augment.num_uniforms, device=DEVICE)


class Training:
    """train.py's step with its defaults, in one process, and the inputs to measure it and its parts alone."""

    def __init__(self, args, data, precision=None, layout=None):
        self.precision, self.dtype = resolve_precision(precision or args.precision, DEVICE)
        layout = layout or memory_format(DEVICE, self.dtype)
        encoder = resnet(args.arch, choose_stem(args.stem, data.image_size), zero_init_residual=True)
        self.model = SimCLR(encoder).to(DEVICE, memory_format=layout)
        self.augment = Augment(data.mean, data.std, data.blur, self.dtype, layout).to(DEVICE)
        self.criterion = GlobalContrastiveLoss(IMAGENET_IMAGES).to(DEVICE)
        self.optimizer = LARS(self.model.parameters(), lr=1e-3, weight_decay=1e-6)
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=self.precision == "fp16")
        self.views = resident_views(args.batch_size, data.image_size)
        # On the host and pinned, as from the loader.
        self.index = torch.randperm(IMAGENET_IMAGES, pin_memory=DEVICE.type == "cuda")[:args.batch_size]
        self.images = self.augment(*self.views)
        self.z = [z.detach().requires_grad_() for z in self.encode(*self.images)]
        self.z_grads = [torch.randn_like(z) for z in self.z]

    def encode(self, images1, images2):
        with torch.autocast(DEVICE.type, self.dtype, enabled=self.precision != "fp32"):
            return self.model(images1, images2)

    def step(self, crops, uniforms, index):
        loss = self.criterion(*self.encode(*self.augment(crops, uniforms)), index)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def full_step(self):
        self.step(*self.views, self.index)

    def floor(self):
        """Run both views forward and backward through the encoder, which no code around it can avoid."""
        z = self.encode(*self.images)
        self.optimizer.zero_grad()
        torch.autograd.backward(z, self.z_grads)


class PlainTraining(Training):
    """The step as it is usually written: fp16, contiguous images augmented by PIL, and the loss read every time."""

    def __init__(self, args, data):
        super().__init__(args, data, "fp16" if DEVICE.type == "cuda" else "fp32", torch.contiguous_format)
        self.criterion = PlainLoss(IMAGENET_IMAGES)
        self.optimizer = OneByOne(self.model.parameters(), lr=1e-3, weight_decay=1e-6)

    def step(self, *batch):
        return super().step(*batch).item()


class PlainLoss:
    """GlobalContrastiveLoss as it is usually written: exponentials instead of their logarithms, and `u` on the host."""

    def __init__(self, num_samples, temperature=0.1, gamma=0.9):
        self.u, self.temperature, self.gamma = torch.zeros(num_samples, 1), temperature, gamma

    def __call__(self, z1, z2, index):
        z1, z2 = (torch.nn.functional.normalize(z.float(), dim=1) for z in (z1, z2))
        is_negative = (1 - torch.eye(len(z1), device=z1.device)).repeat(1, 2)
        loss, new_u = 0, 0
        for anchor, other in ((z1, z2), (z2, z1)):
            s = anchor @ torch.cat([other, anchor]).T                                   # [B, 2B]
            scores = is_negative * (s.detach() / self.temperature).exp() / (2 * len(z1) - 2)
            U = (1 - self.gamma) * self.u[index].to(s.device) + self.gamma * scores.sum(1, keepdim=True)
            loss = loss + (scores / U * s).sum(1) - s.diagonal()
            new_u = new_u + U.cpu() / 2
        self.u[index] = new_u
        return loss.mean()


class OneByOne(LARS):
    """LARS one tensor at a time, as in MoCo v3 and the authors' release."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                d = p.grad
                if p.ndim > 1:
                    d = d.add(p, alpha=group["weight_decay"])
                    p_norm, d_norm = torch.norm(p), torch.norm(d)
                    ratio = group["trust_coefficient"] * p_norm / d_norm
                    d = d.mul(torch.where((p_norm > 0) & (d_norm > 0), ratio, 1.0))
                if not self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
                mu = self.state[p]["mu"].mul_(group["momentum"]).add_(d)
                p.add_(mu, alpha=-group["lr"])


def benchmark_step(args):
    """Measure train.py's step and its parts, from crops that are already on the device."""
    data = ImageSet(None, args.image_size, *IMAGENET_MEAN_STD)
    ours, spare = Training(args, data), Training(args, data)
    robust = RobustGlobalContrastiveLoss(IMAGENET_IMAGES).to(DEVICE)
    spare.floor()       # gives LARS alone its gradients: those of an fp16 step can be infinite and ruin the weights
    parts = {"of which augment": lambda: ours.augment(*ours.views),
             "of which loss": lambda: torch.autograd.grad(ours.criterion(*ours.z, ours.index), ours.z),
             "of which LARS": spare.optimizer.step,
             "loss of iSogCLR": lambda: torch.autograd.grad(robust(*ours.z, ours.index), ours.z),
             "LARS, one tensor at a time": OneByOne(spare.model.parameters(), lr=1e-3, weight_decay=1e-6).step}
    variants = {FLOOR: ours.floor, "full step": ours.full_step, **parts}
    if args.cuda_graph:
        graphed = Training(args, data)
        graphed.index = graphed.index.to(DEVICE)        # a graph can neither copy it from the host nor check it there
        variants["full step as a CUDA graph"] = captured(graphed.full_step)
    calls = [()] * (10 if DEVICE.type == "cuda" else 1)     # training keeps a GPU's queue full
    rows = compare({name: (lambda call=call: timed(call, calls)) for name, call in variants.items()},
                   args.repeats, args.batch_size, {"% of floor": lambda ms, run: 100 * ms / run[FLOOR]})
    describe(args, ours.precision, rows[1]["pairs/s"])
    for row in rows:
        row["pairs/s"] = None if row["what"] in parts else row["pairs/s"]       # a part alone trains on no pairs
        if DEVICE.type == "cuda":
            row |= on_the_gpu(variants[row["what"]])
            row["peak MiB"] = None if "graph" in row["what"] else row["peak MiB"]       # its memory is there already
    return rows


def benchmark_train(args):
    """Measure training from image files: what is left of the floor's speed, and the gain over the plain recipe."""
    data = open_data_set("folder", args.data, "train", args.image_size, labels=False)
    loader, plain_loader = (new_loader(two_views(data, pil), args) for pil in (False, True))
    training, plain = Training(args, data), PlainTraining(args, data)
    variants = {FLOOR: lambda: timed(training.floor, [()] * COUNTED),
                "full step": lambda: timed(training.full_step, [()] * COUNTED),
                "full step and loader": lambda: timed_with(loader, training.step),
                "plain recipe and loader": lambda: timed_with(plain_loader, plain.step)}
    rows = compare(variants, args.repeats, args.batch_size, {
        "% of floor's speed": lambda ms, run: 100 * run[FLOOR] / ms,
        "times the plain recipe": lambda ms, run: run["plain recipe and loader"] / ms})
    describe(args, training.precision, rows[2]["pairs/s"])
    return rows


def benchmark_lincls(args):
    """Measure lincls.py's step on frozen features, of random crops and of crops that are already on the device."""
    data = open_data_set("folder", args.data, "train", args.image_size, labels=False)
    loader = new_loader(LabeledBatches(data, augment=True, bad_images="skip"), args)
    precision, dtype = resolve_precision(args.precision, DEVICE)
    network = resnet(args.arch, choose_stem(args.stem, args.image_size))
    classifier, network.fc = network.fc.to(DEVICE), torch.nn.Identity()
    network.to(memory_format=memory_format(DEVICE, dtype))
    encoder = Encoder(network, Normalize(data.mean, data.std), dtype).to(DEVICE).eval()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9)

    def step(images, target):
        with torch.inference_mode():
            features = encoder(images)
        loss = torch.nn.functional.cross_entropy(classifier(features.clone()), target.to(DEVICE, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    resident = resident_views(args.batch_size, args.image_size)[0][0], torch.zeros(args.batch_size, dtype=torch.int64)
    describe(args, precision)
    return compare({"step": lambda: timed(step, [resident] * COUNTED),
                    "step and loader": lambda: timed_with(loader, step)}, args.repeats, args.batch_size, {}, "images/s")


def benchmark_steps(args):
    """Measure the step of each network, image size and batch size of `all`: a row for each."""
    rows = []
    for case in cases():
        of = {row["what"]: row for row in benchmark_step(with_flags(args, **case))}
        full = of["full step"]
        rows.append({"step": "{arch}, {image_size} px, batch {batch_size}".format(**case),
                     "encoder alone, ms": of[FLOOR]["ms"], "full step, ms": full["ms"], "pairs/s": full["pairs/s"],
                     "peak MiB": full.get("peak MiB"),
                     **{f"{part}, ms": of[f"of which {part}"]["ms"] for part in ("augment", "loss", "LARS")}})
    return rows


def benchmark_data(args):
    """Measure the whole recipe by PIL in the workers, and its two halves: uint8 crops there, color on the device."""
    data = open_data_set("folder", args.data, "train", 224, labels=False)
    args = with_flags(args, batch_size=8)
    color, views = Augment(data.mean, data.std, data.blur).to(DEVICE), resident_views(args.batch_size, 224)

    def epoch_of(workers, pil=False):
        loader = new_loader(two_views(data, pil), with_flags(args, workers=workers), torch.device("cpu"))
        return lambda: timed_with(loader, lambda *_: None)

    return compare({"PIL recipe, 1 worker": epoch_of(1, pil=True),
                    "uint8 crops, 1 worker": epoch_of(1), "uint8 crops, 2 workers": epoch_of(2),
                    "color on the device": lambda: timed(lambda: color(*views), [()] * 4)},
                   args.repeats, args.batch_size, {"times PIL": lambda ms, run: run["PIL recipe, 1 worker"] / ms})


def cases():
    """Return the networks, image sizes and batch sizes of `all`, each as flags."""
    return [dict(zip(("arch", "image_size", "batch_size"), case, strict=True))
            for case in (CASES if DEVICE.type == "cuda" else CPU_CASES)]


def with_flags(args, **flags):
    return argparse.Namespace(**vars(args) | flags)


def two_views(data, pil):
    recipe = pil_recipe(data, CROP_MIN) if pil else None
    return TwoViewBatches(data, 0, CROP_MIN, Augment.num_uniforms, "skip", recipe)


def new_loader(batches, args, device=None):
    """Return a loader with enough batches to count some after those that its workers prepare ahead."""
    loader = Loader(batches, args.batch_size, args.workers, device or DEVICE, keep_workers=True,
                    shuffle=True, drop_last=True)
    least = loader.ahead + 3
    if len(loader) < least:
        raise InputError(f"--data {args.data}: its {len(batches)} images are fewer than {least} batches of "
                         f"{args.batch_size}, give more (links to the same ones will do), or fewer --workers")
    return loader


def describe(args, precision, pairs_per_second=None):
    """Print what was measured and, if it is the ImageNet-1K recipe's network and image size, the hours it takes."""
    print(f"{args.arch} at {args.image_size} pixels, batch {args.batch_size}, {precision}")
    if pairs_per_second and (args.arch, args.image_size) == ("resnet50", 224) and args.stem != "cifar":
        hours = IMAGENET_IMAGES / pairs_per_second / 3600
        print(f"extrapolated: {IMAGENET_IMAGES:,} images at {pairs_per_second:.1f} pairs/s are {100 * hours:.1f} hours "
              f"for 100 epochs, {800 * hours:.1f} hours for 800")


def table(rows):
    """Print dicts with equal keys as a table in Markdown: the first column is text, the others are figures."""
    def cell(value):
        return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    lines = [list(rows[0]), *([what, *map(cell, figures)] for what, *figures in map(dict.values, rows))]
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    lines.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in widths)])
    print()
    for what, *figures in lines:
        print("|", " | ".join([what.ljust(first), *map(str.rjust, figures, widths)]), "|", flush=True)
    print()


def main():
    gpu, modes = DEVICE.type == "cuda", {"step": benchmark_step, "train": benchmark_train, "lincls": benchmark_lincls,
                                         "data": benchmark_data}
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("all", *modes), help="what to measure")
    parser.add_argument("--data", metavar="DIR", help="a folder of images, which step does without")
    parser.add_argument("--repeats", type=number(int, "[1, inf)"), default=3, metavar="N", help="of each measurement")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--cuda-graph", action="store_true", help="for step: measure it as a CUDA graph, too")
    flag = parser.add_argument_group("for step, train and lincls, as in train.py").add_argument
    flag("-a", "--arch", default="resnet50" if gpu else "resnet18", choices=ARCHITECTURES, metavar="ARCH", help="model")
    flag("--stem", default="auto", choices=("auto", "imagenet", "cifar"), help="its first layers")
    flag("--image-size", default=224 if gpu else 64, type=number(int, "[8, inf)"), metavar="PIXELS", help="of crops")
    flag("-b", "--batch-size", default=256 if gpu else 64, type=number(int, "[2, inf)"), metavar="N", help="in images")
    flag("--precision", choices=("bf16", "fp16", "fp32"), help="of the encoder (default: this device's)")
    flag("-j", "--workers", default=32, type=number(int, "[0, inf)"), metavar="N", help="at most the cores")
    args = parser.parse_args()
    # The scaler of fp16 waits for the device, which a graph cannot.
    if args.cuda_graph and not (args.mode == "step" and gpu and resolve_precision(args.precision, DEVICE)[0] != "fp16"):
        parser.error("--cuda-graph: needs step, a GPU and --precision bf16 or fp32, leave it out otherwise")

    torch.backends.cudnn.benchmark = True       # as train.py without --seed
    machine = environment_info(DEVICE)
    commit = (machine["commit"] or "unknown")[:7] + " with changes" * (machine["clean"] is False)
    print(f"{machine['device']}, {available_cores()} CPU cores, {machine['threads']} threads, torch "
          f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}, commit {commit}")
    tables = {}
    if args.mode == "all":      # training and evaluation of the first case
        args = with_flags(args, **cases()[0])
        modes = {"train": benchmark_train, "lincls": benchmark_lincls, "step": benchmark_steps}
    else:
        modes = {args.mode: modes[args.mode]}
    try:
        for mode, benchmark in modes.items():
            tables[mode] = benchmark(args)
            table(tables[mode])
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    if args.json:
        args.json.write_text(json.dumps({**machine, "tables": tables}, indent=2) + "\n")


if __name__ == "__main__":
    main()
