"""Progress lines, accuracy, and a watch over the loss."""

import math
import time

import torch

from sogclr import InputError


class AverageMeter:
    """The latest and the average value of something. Device tensors stay on the device until they are printed."""

    def __init__(self, name, form=".3f"):
        self.name, self.form = name, form
        self.value, self.sum, self.count = 0.0, 0.0, 0

    def update(self, value, n=1):
        self.value = value
        self.sum = self.sum + value * n
        self.count += n

    @property
    def average(self):
        return float(self.sum) / max(self.count, 1)

    def __str__(self):
        return f"{self.name} {float(self.value):{self.form}} ({self.average:{self.form}})"


class Progress:
    """The lines of one epoch, in MoCo's manner, with images/s and the time until the run's end.

    steps: in this epoch; images: in a global batch; steps_left: in the whole run, from this epoch's first step on.
    """

    def __init__(self, prefix, steps, images, steps_left):
        self.prefix, self.steps, self.images, self.steps_left = prefix, steps, images, steps_left
        self.step_time, self.data_time = AverageMeter("Time"), AverageMeter("Data")
        self.done = 0
        self.start = self.now = time.perf_counter()

    def loaded(self):
        """The batch has arrived."""
        self.data_time.update(time.perf_counter() - self.now)

    def stepped(self):
        """The step is done."""
        now = time.perf_counter()
        self.step_time.update(now - self.now)
        self.now = now
        self.done += 1

    @property
    def images_per_second(self):
        return self.done * self.images / max(self.now - self.start, 1e-9)

    def line(self, step, meters):
        """`Epoch: [3][  10/5004]  Time 0.121 (0.125)  ...  812 images/s  ETA 3:12:44`, times in seconds."""
        left = (self.now - self.start) / max(self.done, 1) * max(self.steps_left - self.done, 0)
        place = f"{self.prefix}[{step:{len(str(self.steps))}d}/{self.steps}]"
        return "  ".join([place, str(self.step_time), str(self.data_time), *map(str, meters),
                          f"{self.images_per_second:.0f} images/s", f"ETA {clock(left)}"])


class LossWatch:
    """Ends a run whose loss has become infinite or not a number, before anything of it is saved.

    On a CPU it does so before that loss's gradient is taken. A GPU is not waited for: the host learns it some steps
    later, when the weights in memory are spoiled, but those on disk are not.
    cure: what to try, for the message.
    """

    def __init__(self, device, cure):
        self.device, self.cure = device, cure
        self.total = torch.zeros((), device=device)     # of all losses: once not finite, never finite again
        self.on_its_way = None
        if device.type == "cuda":
            self.host, self.arrived = torch.zeros((), pin_memory=True), torch.cuda.Event()

    def add(self, loss, keys, ranks, place):
        """loss: 0-d, the global batch's; keys: [2B, D] its projections; place: epoch and step, in words.

        Raises InputError, which names the ranks whose projections are not finite.
        """
        self.total = self.total + loss.detach()
        if self.device.type == "cpu":
            self.check(float(self.total), keys, ranks, place)
        elif self.on_its_way is None or self.arrived.query():
            if self.on_its_way:
                self.check(float(self.host), *self.on_its_way)
            self.host.copy_(self.total, non_blocking=True)
            self.arrived.record()
            self.on_its_way = keys, ranks, place

    def check(self, total, keys, ranks, place):
        if math.isfinite(total):
            return
        images = (~keys.isfinite().all(1)).view(2, ranks, -1).any(2).any(0)         # [ranks]
        spoiled = ", ".join(str(rank) for rank in images.nonzero().flatten().tolist()) or "none"
        raise InputError(f"the loss is {total} in {place} (ranks with projections that are not finite: {spoiled}); "
                         f"{self.cure}; the checkpoints are from before")

    def check_weights(self, model, place):
        """Wait for the device, and raise InputError if a loss or a weight is not finite. Before each save."""
        total = self.total + torch.stack([parameter.detach().sum() for parameter in model.parameters()]).sum()
        if not math.isfinite(total):
            raise InputError(f"the loss or a weight is not finite in {place}; {self.cure}; "
                             "the checkpoints are from before")


def clock(seconds):
    """Seconds -> `H:MM:SS`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def correct_in_top(output, target, ks):
    """output [B, C] scores, target [B] -> [len(ks)] how many targets are among the k highest scores."""
    best = output.topk(min(max(ks), output.shape[1]), dim=1).indices
    hits = best == target[:, None]
    return torch.stack([hits[:, :k].sum() for k in ks])
