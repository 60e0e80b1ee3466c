#!/usr/bin/env python3
"""Speed and memory of the parts, each beside the plain way to write it, in the same run.

    python scripts/benchmark.py loss [--json FILE]     GlobalContrastiveLoss, forward and backward
    python scripts/benchmark.py lars [--json FILE]     one LARS step on ResNet-50
    python scripts/benchmark.py data --data DIR        two 224-pixel views of each image in DIR, by worker processes

Each figure is the median over repeats in which the contestants take turns, since machines are noisy. Runs on the GPU if
there is one, else on the CPU.
"""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sogclr import InputError
from sogclr.augment import Augment, pil_recipe
from sogclr.flags import Parser, number
from sogclr.loader import EpochSampler, TwoViews, open_data_set
from sogclr.loss import GlobalContrastiveLoss
from sogclr.optimizer import LARS

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(contestants, repeats):
    """The median time of each function in a dict, taking turns."""
    times = {name: [] for name in contestants}
    for repeat in range(repeats + 2):       # two to warm up
        for name, function in contestants.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if repeat >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


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


def table(rows):
    """Print dicts with equal keys as columns."""
    columns = {key: [key, *(f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for row in rows)]
               for key in rows[0]}
    widths = {key: max(map(len, cells)) for key, cells in columns.items()}
    for line in zip(*columns.values(), strict=True):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths.values(), strict=True)))


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
    N, D, rows = 1_281_167, 128, []
    for B in (64, 256, 1024, 4096):
        z1, z2 = (torch.randn(B, D, device=DEVICE, requires_grad=True) for _ in range(2))
        index = torch.randperm(N)[:B]

        def step(criterion, z1=z1, z2=z2, index=index):
            criterion(z1, z2, index).backward()
            z1.grad = z2.grad = None

        losses = {"ours": GlobalContrastiveLoss(N).to(DEVICE), "direct": DirectTranscription(N)}
        contestants = {name: lambda criterion=criterion: step(criterion) for name, criterion in losses.items()}
        ms = milliseconds(contestants, args.repeats if B <= 1024 else max(args.repeats // 6, 1))
        matrix = B * 2 * B * 4      # one [B, 2B] float32 matrix
        memory = {name: peak_bytes(function) / matrix for name, function in contestants.items()}
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
    contestants, memory = {}, {}
    for name, kind in (("direct", OneByOne), ("ours", LARS)):
        model = torchvision.models.resnet50().to(DEVICE)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        contestants[name] = kind(model.parameters(), lr=1e-3, weight_decay=1e-6).step
        memory[name] = peak_bytes(contestants[name]) / 2**20
    ms = milliseconds(contestants, args.repeats)
    print("one step on ResNet-50 (25.6 M parameters); peak extra memory in MiB")
    return [{"direct ms": ms["direct"], "ours ms": ms["ours"], "ratio": ms["direct"] / ms["ours"],
             "direct MiB": memory["direct"], "ours MiB": memory["ours"]}]


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
    """The PIL recipe in the workers, against two uint8 crops there and the colour on the device."""
    if not args.data:
        raise InputError("data: give a folder of images with --data DIR")
    data = open_data_set("folder", args.data, "train", labels=False)
    size, batch_size = data.image_size, min(16, len(data.images) // 4)
    if not batch_size:
        raise InputError(f"--data {args.data}: holds {len(data.images)} images, 4 are needed at least")
    sampler = EpochSampler(len(data.images), batch_size, shuffle=True, drop_last=True)
    pil = pil_recipe(size, 0.08, data.mean, data.std, data.blur)
    loaders = {}
    for name, recipe, workers in (("pil_1", pil, 1), ("ours_1", None, 1), ("ours_2", None, 2)):
        loaders[name] = torch.utils.data.DataLoader(
            TwoViews(data, 0, 0.08, Augment.num_draws, "skip", recipe), batch_sampler=sampler, collate_fn=as_made,
            num_workers=workers, worker_init_fn=pin_to_a_core, persistent_workers=True)
    rates = {name: [] for name in loaders}
    for turn in range(max(args.repeats // 6, 1) + 1):       # one to warm up
        for name, loader in loaders.items():
            batches = iter(loader)
            next(batches)
            start = time.perf_counter()
            pairs = sum(len(batch.content[2]) for batch in batches)     # all but the first
            if turn:
                rates[name].append(pairs / (time.perf_counter() - start))
    figures = {name: statistics.median(values) for name, values in rates.items()}
    stage = Augment(data.mean, data.std, data.blur).to(DEVICE)
    crops = torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8, device=DEVICE)
    view = crops, torch.rand(64, Augment.num_draws, device=DEVICE)
    ms = milliseconds({"device": lambda: (stage(view), stage(view))}, max(args.repeats // 6, 1))["device"]
    print(f"image pairs/s at {size} pixels: workers by recipe and number, and the colour on the device apart")
    return [figures | {"ours_1 / pil_1": figures["ours_1"] / figures["pil_1"],
                       "ours_2 / ours_1": figures["ours_2"] / figures["ours_1"], "device": 64 / ms * 1000}]


MODES = {"loss": benchmark_loss, "lars": benchmark_lars, "data": benchmark_data}


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("mode", choices=tuple(MODES), help="what to measure")
    parser.add_argument("--repeats", default=30, type=number(int, "[1, inf)"), metavar="N",
                        help="repeats, fewer in the longest cases")
    parser.add_argument("--data", metavar="DIR", help="for data: a folder of images")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
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
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
