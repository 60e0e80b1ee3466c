"""Progress lines, accuracy, and a guard against non-finite losses."""

import math
import sys
import time

import torch

from sogclr import InputError
from sogclr.distributed import world_size


class AverageMeter:
    """The latest and the average value of a quantity. Device tensors stay on the device until they are printed."""

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

    @property
    def latest(self):
        return f"{self.name} {float(self.value):{self.form}}"

    def __str__(self):
        return f"{self.latest} ({self.average:{self.form}})"


class Progress:
    """Iterates over an epoch's batches, as (step, batch), and formats progress lines with images/s and the time left:
    as in MoCo in a file or a pipe; with a bar on a terminal, where `live` means that each line replaces the one before.

    batches: with `epoch(epoch, first_step)`; epoch, first_step: where to begin; epochs: of the run; batch_size: global.
    Speed, waiting and time left exclude an epoch's first step, in which workers start and kernels are selected, or the
    first `skip` steps.
    """

    def __init__(self, batches, epoch, first_step, epochs, batch_size, skip=1):
        self.batches, self.epoch, self.first_step, self.batch_size = batches, epoch, first_step, batch_size
        self.skip = skip
        self.steps = len(batches)
        self.steps_left = (epochs - epoch) * self.steps - first_step        # in the whole run
        self.step_time, self.data_time = AverageMeter("Time"), AverageMeter("Data")
        self.done = 0
        self.start = self.now = time.perf_counter()
        self.before = 0, self.start, 0.0        # what does not count: steps, their end, seconds of waiting for data
        self.live = sys.stdout.isatty()

    def __iter__(self):
        for step, batch in enumerate(self.batches.epoch(self.epoch, self.first_step), self.first_step):
            self.data_time.update(time.perf_counter() - self.now)
            self.step = step
            yield step, batch

    def step_done(self):
        """Call after each step."""
        now = time.perf_counter()
        if self.done in (1, self.skip):     # this is the first step that counts; until there are `skip`, the second is
            self.before = self.done, self.now, self.data_time.sum - self.data_time.value
        self.step_time.update(now - self.now)
        self.now = now
        self.done += 1

    def counted(self):
        """The steps that count, their seconds, and of these the seconds of waiting for data."""
        steps, end, waited = self.before
        return max(self.done - steps, 1), max(self.now - end, 1e-9), self.data_time.sum - waited

    @property
    def seconds_per_step(self):
        steps, seconds, _ = self.counted()
        return seconds / steps

    @property
    def images_per_second(self):
        return self.batch_size / self.seconds_per_step

    @property
    def waiting(self):
        """The fraction of the time spent waiting for data."""
        _, seconds, waited = self.counted()
        return f"data wait {waited / seconds:.0%}"

    def line(self, *meters):
        """`Epoch: [3][  10/5004]  Time 0.121 (0.125)  ...  812 images/s  ETA 3:12:44`, times in seconds."""
        place, speed = f"{self.step:{len(str(self.steps))}d}/{self.steps}", f"{self.images_per_second:.0f} images/s"
        run = clock((self.steps_left - self.done) * self.seconds_per_step)
        if not self.live:
            return "  ".join([f"Epoch: [{self.epoch}][{place}]", str(self.step_time), str(self.data_time),
                              *map(str, meters), speed, f"ETA {run}"])
        bar = "#" * (10 * (self.step + 1) // self.steps)
        latest = (meter.latest if isinstance(meter, AverageMeter) else meter for meter in meters)
        return "  ".join([f"Epoch {self.epoch} [{bar:-<10}] {place}", speed, self.waiting, *latest,
                          f"ETA {clock((self.steps - self.step - 1) * self.seconds_per_step)}, run {run}"])

    def summary(self, *meters):
        """One line at the epoch's end, with the meters' averages and when the run will end."""
        left = self.steps_left - self.done
        end = time.strftime("%d %b %H:%M", time.localtime(time.time() + left * self.seconds_per_step))
        values = "  ".join(f"{meter.name} {meter.average:{meter.form}}" for meter in meters if meter.count)
        return (f" * Epoch {self.epoch}  {values}  in {clock(self.now - self.start)}, "
                f"{self.images_per_second:.0f} images/s, {self.waiting}" + f", the run ends about {end}" * (left > 0))


class NanGuard:
    """Ends a run whose loss has become infinite or nan, before anything affected is saved.

    On a CPU this happens before that loss's gradient is computed. A GPU is not waited for: the host learns of it some
    steps later, when the weights in memory are corrupted, but those on disk are not.
    hint: what to try, for the message.
    """

    def __init__(self, device, hint):
        self.hint = hint
        self.total = torch.zeros((), device=device)     # of all losses: once non-finite, never finite again
        self.pending = None                             # keys and place of the total being copied to the host
        if device.type == "cuda":
            self.host, self.arrived = torch.zeros((), pin_memory=True), torch.cuda.Event()

    def check(self, loss, keys, place):
        """loss: 0-d, the global batch's; keys: [2B, D] its projections; place: epoch and step, as text.

        Raises InputError, naming the ranks with non-finite projections.
        """
        self.total = self.total + loss.detach()
        if not self.total.is_cuda:
            self._raise_unless_finite(float(self.total), keys, place)
        elif self.pending is None or self.arrived.query():
            if self.pending:
                self._raise_unless_finite(float(self.host), *self.pending)
            self.host.copy_(self.total, non_blocking=True)
            self.arrived.record()
            self.pending = keys, place

    def _raise_unless_finite(self, total, keys, place):
        if not math.isfinite(total):
            spoiled = (~keys.isfinite().all(1)).view(2, world_size(), -1).any(2).any(0)        # [ranks]
            ranks = ", ".join(map(str, spoiled.nonzero().flatten().tolist())) or "none"
            raise InputError(f"the loss is {total} in {place} (ranks with non-finite projections: {ranks}); "
                             f"{self.hint}; saved checkpoints are unaffected")

    def check_weights(self, model, place):
        """Wait for the device, and raise InputError if a loss or a weight is not finite. Call before each save."""
        total = self.total + torch.stack([parameter.detach().sum() for parameter in model.parameters()]).sum()
        if not math.isfinite(total):
            raise InputError(f"the loss or a weight is not finite in {place}; {self.hint}; "
                             "saved checkpoints are unaffected")


def clock(seconds):
    """Seconds -> `H:MM:SS`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def correct_in_top(output, target, ks):
    """output [B, C] scores, target [B] -> [len(ks)] number of targets among the k highest scores."""
    best = output.topk(min(max(ks), output.shape[1]), dim=1).indices
    hits = best == target[:, None]
    return torch.stack([hits[:, :k].sum() for k in ks])
