#!/usr/bin/env python3
"""Speed and memory of training and of its parts, each beside the plain way to write it, in the same run.

    python scripts/tools/benchmark.py step [--json FILE]     the training step, beside the encoder's passes alone
    python scripts/tools/benchmark.py train --data DIR       training on the images in DIR, beside the plain recipe
    python scripts/tools/benchmark.py lincls [--json FILE]   frozen features, as for the linear evaluation
    python scripts/tools/benchmark.py loss [--json FILE]     GlobalContrastiveLoss, forward and backward
    python scripts/tools/benchmark.py lars [--json FILE]     one LARS step on ResNet-50
    python scripts/tools/benchmark.py save [--json FILE]     how long a ResNet-50 run stops to save, in $TMPDIR
    python scripts/tools/benchmark.py data --data DIR        two 224-pixel views of each image, by worker processes

The first three take train.py's --arch, --image-size, --batch-size, --precision, --stem and --workers; by default they
measure ResNet-50 at 224 pixels in batches of 256 on a GPU, ResNet-18 at 64 pixels in batches of 64 on the CPU.
Each figure is the median over repeats in which the variants are interleaved, since machines are noisy. Runs on the
GPU if there is one, else on the CPU.
"""

import dataclasses
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sogclr import InputError, checkpoint
from sogclr.augment import Augment, Normalize, pil_recipe
from sogclr.builder import SimCLR, choose_stem, memory_format, resnet
from sogclr.datasets import IMAGENET_MEAN_STD, ImageSet, open_data_set
from sogclr.flags import ARCHITECTURES, Parser, number, output_file, resolve_precision
from sogclr.loader import EpochSampler, Loader, TwoViewBatches, workers_per_rank
from sogclr.loss import GlobalContrastiveLoss
from sogclr.optimizer import LARS
from sogclr.subset import Subset

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMAGENET_IMAGES = 1_281_167


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def interleaved(variants, repeats, calls=1):
    """{name: function} -> {name: [ms of a call in each repeat]}. `calls`: in a row."""
    times = {name: [] for name in variants}
    for repeat in range(repeats + 2):       # two to warm up
        for name, function in variants.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize()
            if repeat >= 2:
                times[name].append(1000 * (time.perf_counter() - start) / calls)
    return times


def milliseconds(variants, repeats):
    """The median time of each function in a dict."""
    return {name: statistics.median(times) for name, times in interleaved(variants, repeats).items()}


def median_ratio(times, others):
    """Of two variants' times: the median of each repeat's ratio, which a slow spell of the machine does not move."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def peak_bytes(function):
    """The most memory that a call holds at a time beyond what was there before it."""
    function()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def on_the_gpu(function):
    """What a call gives the GPU to do: how many kernels and copies, and how many ms they take. A call that takes much
    longer is bound by the host.
    """
    function()
    synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as record:
        function()
        synchronize()
    kernels = [event for event in record.events()
               if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    return {"kernels": len(kernels), "GPU ms": sum(event.time_range.elapsed_us() for event in kernels) / 1000}


def captured(function):
    """The same, without arguments or a result, as a CUDA graph: all its launches become one."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):      # in which libraries choose their kernels, and the optimizer makes its state
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def table(rows):
    """Print dicts with equal keys as columns."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        return "" if value is None else str(value)

    columns = {key: [key, *(cell(row[key]) for row in rows)] for key in rows[0]}
    widths = {key: max(map(len, cells)) for key, cells in columns.items()}
    for line in zip(*columns.values(), strict=True):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths.values(), strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def resident_view(args):
    """A view as the loader makes it, of random crops, on the device."""
    crops = torch.randint(0, 256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8)
    uniforms = torch.rand(args.batch_size, Augment.num_uniforms)
    return crops.to(DEVICE, memory_format=torch.channels_last), uniforms.to(DEVICE)


class Training:
    """train.py's step in one process, with its defaults, and the parts of it."""

    def __init__(self, args, data):
        self.precision, self.dtype = resolve_precision(args.precision, DEVICE)
        encoder = resnet(args.arch, choose_stem(args.stem, data.image_size), zero_init_residual=True)
        layout = memory_format(DEVICE, self.dtype)
        self.model = SimCLR(encoder).to(DEVICE, memory_format=layout)
        self.augment = Augment(data.mean, data.std, data.blur, self.dtype, layout).to(DEVICE)
        self.criterion = GlobalContrastiveLoss(IMAGENET_IMAGES).to(DEVICE)
        self.optimizer = LARS(self.model.parameters(), lr=1e-3, weight_decay=1e-6)
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=self.precision == "fp16")
        # What the parts work on when they are measured alone.
        self.views = resident_view(args), resident_view(args)
        self.index = torch.randperm(IMAGENET_IMAGES)[:args.batch_size]
        if DEVICE.type == "cuda":
            self.index = self.index.pin_memory()        # as from the loader
        self.images = [self.augment(view) for view in self.views]
        self.z = [z.detach().requires_grad_() for z in self.encode(*self.images)]
        self.z_grads = [torch.randn_like(z) for z in self.z]

    def encode(self, images1, images2):
        with torch.autocast(DEVICE.type, self.dtype, enabled=self.precision != "fp32"):
            return self.model(images1, images2)

    def step(self, view1, view2, index):
        loss = self.criterion(*self.encode(self.augment(view1), self.augment(view2)), index)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def full_step(self):
        self.step(*self.views, self.index)

    def floor(self):
        """The two views' passes forward and backward through the encoder, which no code around it can save."""
        z = self.encode(*self.images)
        self.optimizer.zero_grad()
        torch.autograd.backward(z, self.z_grads)

    def augment_alone(self):
        for view in self.views:
            self.augment(view)

    def loss_alone(self):
        self.criterion(*self.z, self.index).backward()
        for z in self.z:
            z.grad = None


class PlainTraining:
    """The step as it is usually written: fp16 with a scaler, contiguous images, the estimator on the host, one
    parameter at a time, and the loss read in every step. On the CPU fp32.
    """

    def __init__(self, args, data):
        encoder = resnet(args.arch, choose_stem(args.stem, data.image_size), zero_init_residual=True)
        self.model = SimCLR(encoder).to(DEVICE)
        self.criterion = DirectTranscription(IMAGENET_IMAGES)
        self.optimizer = OneByOne(self.model.parameters(), lr=1e-3, weight_decay=1e-6)
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=DEVICE.type == "cuda")

    def step(self, view1, view2, index):
        view1, view2 = (images.to(DEVICE, non_blocking=True) for images, _ in (view1, view2))
        with torch.autocast(DEVICE.type, torch.float16, enabled=self.scaler.is_enabled()):
            z1, z2 = self.model(view1, view2)
        loss = self.criterion(z1.float(), z2.float(), index)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()


def describe(args, training):
    print(f"{args.arch} at {args.image_size} pixels, batch {args.batch_size}, {training.precision}")


def extrapolate(args, pairs_per_second):
    """What a speed means for ImageNet-1K, where it was measured on that recipe's network and size."""
    if (args.arch, args.image_size) == ("resnet50", 224) and args.stem != "cifar":
        for epochs in (100, 800):
            hours = epochs * IMAGENET_IMAGES / pairs_per_second / 3600
            print(f"extrapolated: {epochs} epochs * {IMAGENET_IMAGES:,} images / {pairs_per_second:.1f} pairs/s / 3600 "
                  f"= {hours:.1f} hours")


def benchmark_step(args):
    """train.py's step from crops that are on the device already, beside the encoder's passes alone."""
    def training():
        return Training(args, ImageSet(None, args.image_size, *IMAGENET_MEAN_STD))

    ours = training()
    variants = {"floor: encoder alone": ours.floor, "full step": ours.full_step,
                   "of which augment": ours.augment_alone, "of which loss": ours.loss_alone,
                   "of which LARS": ours.optimizer.step}
    if args.cuda_graph:
        if DEVICE.type != "cuda" or ours.precision == "fp16":       # whose scaler waits for the device
            raise InputError("--cuda-graph: needs a GPU, and --precision bf16 or fp32")
        graphed = training()
        graphed.index = graphed.index.to(DEVICE)        # a graph can neither take it from the host nor check it there
        variants["full step as a CUDA graph"] = captured(graphed.full_step)
    if args.compile:
        compiled = training()
        compiled.model = torch.compile(compiled.model)
        variants["full step, encoder compiled"] = compiled.full_step
    calls = 10 if DEVICE.type == "cuda" else 1      # training keeps a GPU's queue full
    times = interleaved(variants, args.repeats, calls)
    floor, rows = next(iter(times.values())), []
    for name, values in times.items():
        ms, whole = statistics.median(values), not name.startswith("of which")      # a part alone trains nothing
        rows.append({"what": name, "ms": ms, "% of floor": 100 * median_ratio(values, floor),
                     "pairs/s": 1000 * args.batch_size / ms if whole else None, "peak MiB": None})
        if DEVICE.type == "cuda":
            rows[-1] |= on_the_gpu(variants[name])
    for row, function in zip(rows[:2], (ours.floor, ours.full_step), strict=True):
        row["peak MiB"] = peak_bytes(lambda function=function: (function(), ours.optimizer.zero_grad())) / 2**20
    describe(args, ours)
    print("peak memory: activations, gradients and what else a step allocates")
    extrapolate(args, rows[1]["pairs/s"])
    return rows


def benchmark_train(args):
    """End to end from image files: what remains of the encoder's own speed, and the gain over the plain recipe."""
    data = open_images(args, args.image_size)
    steps = min(len(data.images) // args.batch_size, 100 if DEVICE.type == "cuda" else 10)     # in a repeat
    if steps < 2:
        raise InputError(f"--data {args.data}: holds {len(data.images)} images, 2 batches of --batch-size "
                         f"{args.batch_size} are needed at least")
    data = dataclasses.replace(data, images=Subset(data.images, range(steps * args.batch_size)))
    training, plain = Training(args, data), PlainTraining(args, data)
    loader = Loader(TwoViewBatches(data, 0, 0.08, Augment.num_uniforms, "skip"), args.batch_size, args.workers, DEVICE,
                    shuffle=True, drop_last=True)
    workers = workers_per_rank(args.workers)
    plain_loader = torch.utils.data.DataLoader(
        TwoViewBatches(data, 0, 0.08, Augment.num_uniforms, "skip", pil_recipe(data, 0.08)),
        batch_sampler=EpochSampler(len(data.images), args.batch_size, shuffle=True, drop_last=True),
        collate_fn=as_made, num_workers=workers, pin_memory=DEVICE.type == "cuda", persistent_workers=workers > 0)
    variants = {     # the step, and a repeat's batches
        "floor: encoder alone": (training.floor, lambda repeat: itertools.repeat((), steps)),
        "full step": (training.full_step, lambda repeat: itertools.repeat((), steps)),
        "full step and loader": (training.step, loader.epoch),
        "plain recipe and loader": (plain.step, lambda repeat: (batch.content for batch in plain_loader))}
    times = {name: [] for name in variants}
    for repeat in range(max(args.repeats // 6, 1) + 1):       # one to warm up
        for name, (step, epoch) in variants.items():
            batches = iter(epoch(repeat))
            step(*next(batches))        # when the workers' first batches are there
            synchronize()
            start = time.perf_counter()
            for batch in batches:
                step(*batch)
            synchronize()
            if repeat:
                times[name].append(1000 * (time.perf_counter() - start) / (steps - 1))
    floor, *_, slowest = times.values()
    rows = []
    for name, values in times.items():
        ms = statistics.median(values)
        rows.append({"what": name, "ms": ms, "pairs/s": 1000 * args.batch_size / ms,
                     "% of floor's speed": 100 * median_ratio(floor, values),
                     "times the plain recipe": median_ratio(slowest, values)})
    describe(args, training)
    print(f"repeats of {steps} steps, the first of each not counted; {workers} workers")
    extrapolate(args, rows[2]["pairs/s"])
    return rows


def open_images(args, image_size):
    """The images of --data, without their classes."""
    if not args.data:
        raise InputError(f"{args.mode}: give a folder of images with --data DIR")
    return open_data_set("folder", args.data, "train", image_size, labels=False)


# ---------------------------------------------------------------------------------------------------------------------
# Linear evaluation
# ---------------------------------------------------------------------------------------------------------------------

def benchmark_lincls(args):
    """The frozen encoder's features as lincls.py computes them, against float32, contiguous, under no_grad."""
    precision, dtype = resolve_precision(args.precision, DEVICE)
    crops, _ = resident_view(args)
    normalize = Normalize(*IMAGENET_MEAN_STD).to(DEVICE)
    encoders = {}
    for name, layout in (("ours", memory_format(DEVICE, dtype)), ("plain", torch.contiguous_format)):
        encoder = resnet(args.arch, choose_stem(args.stem, args.image_size))
        encoder.fc = torch.nn.Identity()
        encoders[name] = encoder.requires_grad_(False).eval().to(DEVICE, memory_format=layout)

    @torch.inference_mode()
    def ours():
        with torch.autocast(DEVICE.type, dtype, enabled=precision != "fp32"):
            return encoders["ours"](normalize(crops)).float()

    contiguous = crops.contiguous()

    @torch.no_grad()
    def plain():
        return encoders["plain"](normalize(contiguous))

    times = interleaved({"ours": ours, "plain": plain}, args.repeats, 10 if DEVICE.type == "cuda" else 1)
    ms = {name: statistics.median(values) for name, values in times.items()}
    print(f"features of {args.arch} at {args.image_size} pixels, batch {args.batch_size}: {precision} under inference "
          "mode, against fp32, contiguous, under no_grad")
    return [{"plain ms": ms["plain"], "ours ms": ms["ours"], "ratio": median_ratio(times["plain"], times["ours"]),
             "ours images/s": 1000 * args.batch_size / ms["ours"]}]


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------

class DirectTranscription:
    """The loss written down directly: masks as one-hot matrices, logits side by side, the estimator on the host."""

    def __init__(self, num_samples, temperature=0.1, gamma=0.9):
        self.temperature, self.gamma = temperature, gamma
        self.u = torch.zeros(num_samples, 1)

    def __call__(self, z1, z2, index):
        z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        B = len(z1)
        self_mask = F.one_hot(torch.arange(B), B).to(z1.device)
        positive = F.one_hot(torch.arange(B), 2 * B).to(z1.device)
        losses, new = 0, 0
        for anchor, other in ((z1, z2), (z2, z1)):
            logits = torch.cat([anchor @ other.T, anchor @ anchor.T - 1e9 * self_mask], dim=1)      # [B, 2B]
            scores = torch.exp(logits / self.temperature) * (1 - positive)
            g = scores.sum(1, keepdim=True) / (2 * (B - 1))
            u = (1 - self.gamma) * self.u[index].to(z1.device) + self.gamma * g
            new = new + u.detach().cpu() / 2
            weights = (scores / u).detach()
            expected = (weights * logits).sum(1, keepdim=True) / (2 * (B - 1))
            losses = losses - (positive * (logits - expected)).sum(1)
        self.u[index] = new
        return losses.mean()


def benchmark_loss(args):
    """GlobalContrastiveLoss against the direct transcription, N of ImageNet-1K, D = 128."""
    N, D, rows = IMAGENET_IMAGES, 128, []
    for B in (64, 256, 1024, 4096):
        z1, z2 = (torch.randn(B, D, device=DEVICE, requires_grad=True) for _ in range(2))
        index = torch.randperm(N)[:B]

        def step(criterion, z1=z1, z2=z2, index=index):
            criterion(z1, z2, index).backward()
            z1.grad = z2.grad = None

        losses = {"ours": GlobalContrastiveLoss(N).to(DEVICE), "direct": DirectTranscription(N)}
        variants = {name: lambda criterion=criterion: step(criterion) for name, criterion in losses.items()}
        ms = milliseconds(variants, args.repeats if B <= 1024 else max(args.repeats // 6, 1))
        matrix = B * 2 * B * 4      # one [B, 2B] float32 matrix
        memory = {name: peak_bytes(function) / matrix for name, function in variants.items()}
        rows.append({"B": B, "direct ms": ms["direct"], "ours ms": ms["ours"], "ratio": ms["direct"] / ms["ours"],
                     "direct [B, 2B]": memory["direct"], "ours [B, 2B]": memory["ours"]})
    print("forward and backward; peak extra memory in [B, 2B] float32 matrices")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# LARS
# ---------------------------------------------------------------------------------------------------------------------

class OneByOne(torch.optim.Optimizer):
    """LARS written down directly, one parameter at a time."""

    def __init__(self, params, lr, weight_decay, momentum=0.9, trust_coefficient=0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum,
                                  "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                d = p.grad
                if p.ndim > 1:
                    d = d.add(p, alpha=group["weight_decay"])
                    p_norm, d_norm = torch.norm(p), torch.norm(d)
                    one = torch.ones_like(p_norm)
                    d = d.mul(torch.where(p_norm > 0, torch.where(
                        d_norm > 0, group["trust_coefficient"] * p_norm / d_norm, one), one))
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(d)
                p.add_(state["mu"], alpha=-group["lr"])


def benchmark_lars(args):
    """One step on ResNet-50's parameters."""
    variants, memory = {}, {}
    for name, kind in (("direct", OneByOne), ("ours", LARS)):
        model = torchvision.models.resnet50().to(DEVICE)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        variants[name] = kind(model.parameters(), lr=1e-3, weight_decay=1e-6).step
        memory[name] = peak_bytes(variants[name]) / 2**20
    ms = milliseconds(variants, args.repeats)
    print("one step on ResNet-50 (25.6 M parameters); peak extra memory in MiB")
    return [{"direct ms": ms["direct"], "ours ms": ms["ours"], "ratio": ms["direct"] / ms["ours"],
             "direct MiB": memory["direct"], "ours MiB": memory["ours"]}]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

def benchmark_save(args):
    """How long the next step waits for a checkpoint of ImageNet-1K's recipe that is written before it, and for ours."""
    model = SimCLR(resnet("resnet50")).to(DEVICE)
    criterion = GlobalContrastiveLoss(IMAGENET_IMAGES).to(DEVICE)
    optimizer = LARS(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    seconds = {"direct": [], "ours": [], "ours, on disk": []}
    with tempfile.TemporaryDirectory() as folder:
        file, writer = Path(folder) / "direct.pth.tar", checkpoint.Writer(Path(folder))
        for repeat in range(max(args.repeats // 3, 1) + 1):     # one to warm up
            state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "u": criterion.u[:, None].float(), "log_u": criterion.log_u}
            synchronize()
            start = time.perf_counter()
            torch.save(state, file)
            direct = time.perf_counter()
            writer.save(state)
            copied = time.perf_counter()
            writer.close()
            written = time.perf_counter()
            if repeat:
                for values, value in zip(seconds.values(), (direct - start, copied - direct, written - direct),
                                         strict=True):
                    values.append(value)
        size = file.stat().st_size / 2**20
    figures = {f"{name} s": statistics.median(values) for name, values in seconds.items()}
    print(f"a checkpoint of {size:.0f} MiB; seconds before the next step, and until ours is flushed to the disk")
    return [figures | {"ratio": median_ratio(seconds["direct"], seconds["ours"])}]


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

def pin_to_a_core(worker):
    """Each worker process on a core of its own, so that one worker is one core's work."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[worker % len(cores)]})


def as_made(batch):
    return batch


def benchmark_data(args):
    """The PIL recipe in the workers, against two uint8 crops there and the color on the device."""
    data = open_images(args, 224)
    size, batch_size = data.image_size, min(16, len(data.images) // 4)
    if not batch_size:
        raise InputError(f"--data {args.data}: holds {len(data.images)} images, 4 are needed at least")
    sampler = EpochSampler(len(data.images), batch_size, shuffle=True, drop_last=True)
    pil = pil_recipe(data, 0.08)
    loaders = {}
    for name, recipe, workers in (("pil_1", pil, 1), ("ours_1", None, 1), ("ours_2", None, 2)):
        loaders[name] = torch.utils.data.DataLoader(
            TwoViewBatches(data, 0, 0.08, Augment.num_uniforms, "skip", recipe), batch_sampler=sampler,
            collate_fn=as_made, num_workers=workers, worker_init_fn=pin_to_a_core, persistent_workers=True)
    rates = {name: [] for name in loaders}
    for repeat in range(max(args.repeats // 6, 1) + 1):       # one to warm up
        for name, loader in loaders.items():
            batches = iter(loader)
            next(batches)
            start = time.perf_counter()
            pairs = sum(len(batch.content[2]) for batch in batches)     # all but the first
            if repeat:
                rates[name].append(pairs / (time.perf_counter() - start))
    figures = {name: statistics.median(values) for name, values in rates.items()}
    stage = Augment(data.mean, data.std, data.blur).to(DEVICE)
    crops = torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8, device=DEVICE)
    view = crops, torch.rand(64, Augment.num_uniforms, device=DEVICE)
    ms = milliseconds({"device": lambda: (stage(view), stage(view))}, max(args.repeats // 6, 1))["device"]
    print(f"image pairs/s at {size} pixels: workers by recipe and number, and the color on the device apart")
    return [figures | {"ours_1 / pil_1": figures["ours_1"] / figures["pil_1"],
                       "ours_2 / ours_1": figures["ours_2"] / figures["ours_1"], "device": 64 / ms * 1000}]


MODES = {"step": benchmark_step, "train": benchmark_train, "lincls": benchmark_lincls,
         "loss": benchmark_loss, "lars": benchmark_lars, "save": benchmark_save, "data": benchmark_data}


def build_parser():
    gpu = DEVICE.type == "cuda"
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("mode", choices=tuple(MODES), help="what to measure")
    parser.add_argument("--repeats", default=30, type=number(int, "[1, inf)"), metavar="N",
                        help="repeats, fewer in the longest cases")
    parser.add_argument("--data", metavar="DIR", help="for train and data: a folder of images")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the figures there")
    training = parser.add_argument_group("step, train and lincls", "As in train.py.")
    training.add_argument("-a", "--arch", default="resnet50" if gpu else "resnet18", choices=ARCHITECTURES,
                          metavar="ARCH", help="torchvision ResNet")
    training.add_argument("--stem", default="auto", choices=("auto", "imagenet", "cifar"), help="first layers")
    training.add_argument("--image-size", default=224 if gpu else 64, type=number(int, "[8, inf)"), metavar="PIXELS",
                          help="side of the square crop")
    training.add_argument("-b", "--batch-size", default=256 if gpu else 64, type=number(int, "[2, inf)"), metavar="N",
                          help="images in a batch")
    training.add_argument("--precision", choices=("bf16", "fp16", "fp32"),
                          help="of our encoder (default: bf16 on a GPU that has it, else fp16; fp32 on the CPU)")
    training.add_argument("-j", "--workers", default=32, type=number(int, "[0, inf)"), metavar="N",
                          help="for train: data loading processes, at most one a core")
    step = parser.add_argument_group("step", "What train.py does not do, as further rows.")
    step.add_argument("--cuda-graph", action="store_true",
                      help="the step as a CUDA graph, which needs its memory twice and leaves out the indices' check")
    step.add_argument("--compile", action="store_true",
                      help="the step with the encoder compiled by torch.compile, which takes a minute")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    if args.mode != "step" and (args.cuda_graph or args.compile):
        parser.error("--cuda-graph, --compile: belong to step")
    torch.backends.cudnn.benchmark = True       # as train.py without --seed
    hardware = torch.cuda.get_device_name() if DEVICE.type == "cuda" else \
        f"CPU ({platform.processor() or platform.machine()}), {torch.get_num_threads()} threads"
    print(f"{args.mode} on {hardware}, torch {torch.__version__}")
    try:
        rows = MODES[args.mode](args)
    except InputError as error:
        parser.error(str(error))
    table(rows)
    if args.json:
        report = {"mode": args.mode, "hardware": hardware, "torch": torch.__version__}
        report |= rows[0] if len(rows) == 1 else {"rows": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
