"""Tests that need a GPU; skipped without one."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_parallel import LAYERS, assert_whole, layer
from torch import nn

import train
from scripts.tools import benchmark
from sogclr import parallel
from sogclr.augment import Augment
from sogclr.isogclr import RobustGlobalContrastiveLoss
from sogclr.loss import ContrastiveLoss, GlobalContrastiveLoss
from sogclr.optimizer import LARS
from sogclr.parallel import SyncBatchNorm

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
              pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]     # torch's, at each use


@pytest.fixture
def no_waiting():
    """Any call that waits for the device raises."""
    def on():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    yield on
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "criterion", [GlobalContrastiveLoss(1000), RobustGlobalContrastiveLoss(1000), ContrastiveLoss()])
def test_loss_and_lars_never_wait_for_the_device(criterion, no_waiting):
    """Forward, backward, estimator, LARS and zero_grad: no synchronization."""
    criterion = criterion.cuda()
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).cuda()
    optimizer = LARS(model.parameters(), lr=0.1, weight_decay=1e-6)
    x = torch.randn(2, 64, 16, device="cuda")
    index = torch.randperm(1000)[:64].pin_memory()
    for step in range(3):
        if step:
            no_waiting()
        loss = criterion(model(x[0]), model(x[1]), index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_loss_equals_that_on_the_cpu():
    """Loss, gradients, u and temperatures in float64 must equal those on the CPU."""
    z1, z2 = torch.randn(2, 32, 8, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        criterion = RobustGlobalContrastiveLoss(100).double().to(device)
        a, b = (z.detach().to(device).requires_grad_() for z in (z1, z2))
        loss = criterion(a, b, torch.arange(32))
        loss.backward()
        results.append([value.detach().cpu() for value in (loss, a.grad, b.grad, criterion.u, criterion.tau)])
    assert all(torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in zip(*results, strict=True))


def test_augmentation_equals_that_on_the_cpu(no_waiting):
    """The same uniforms must give the same pixels, without waiting for the device."""
    crops = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    uniforms = torch.rand(16, Augment.num_uniforms)
    stage = Augment((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), blur=True)
    expected = stage(crops, uniforms)
    stage, view = stage.cuda(), (crops.cuda(), uniforms.cuda())
    no_waiting()
    ours = stage(*view)
    torch.cuda.set_sync_debug_mode("default")
    assert (ours.cpu() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("flags", [
    [], ["--loss_type", "cl"], ["--loss_type", "isogclr"], ["--precision", "fp32", "--augment", "pil"]])
def test_training_never_waits_for_the_device_between_two_prints(flags, imagenet, tmp_path, monkeypatch):
    """Whole steps of train.py, from the loader to LARS: no synchronization except when a line is printed."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        flags = [*flags, "--precision", "fp32"]     # the fp16 scaler has to wait
    steps, print_freq, seen = 6, 5, []              # an epoch prints at its first and last step
    set_lr = train.set_lr

    def watched(*args):
        """At the start of a step. The first epoch, in which libraries initialize, may wait."""
        watch = len(seen) > steps and len(seen) % steps % print_freq != 0
        torch.cuda.set_sync_debug_mode("error" if watch else "default")
        seen.append(watch)
        set_lr(*args)

    monkeypatch.setattr(train, "set_lr", watched)
    monkeypatch.setattr("sys.argv", ["train.py"])
    args = train.PARSER.parse_args(
        ["--data", str(imagenet), "--arch", "resnet18", "--stem", "imagenet", "--image-size", "64", "--batch-size", "4",
         "--workers", "1", "--gpu", "0", "--epochs", "2", "--warmup-epochs", "1", "--print-freq", str(print_freq),
         "--save_dir", str(tmp_path), *flags])
    try:
        train.launch(train.main_worker, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == [False] * 7 + [True] * 4 + [False]


def test_step_as_a_cuda_graph():
    """What benchmark.py replays must be the step: the same weights and u after as many."""
    args = SimpleNamespace(arch="resnet18", stem="imagenet", image_size=32, batch_size=8, precision="fp32")
    trainings = []
    for _ in range(2):
        torch.manual_seed(0)
        trainings.append(benchmark.Training(args, benchmark.ImageSet(None, 32, *benchmark.IMAGENET_MEAN_STD)))
    eager, graphed = trainings
    graphed.index = graphed.index.to("cuda")
    replay = benchmark.captured(graphed.full_step)      # after five steps
    for _ in range(5):
        eager.full_step()

    def weights(training):
        return torch.cat([p.detach().flatten() for p in training.model.parameters()])

    before = weights(eager)
    for _ in range(2):
        eager.full_step()
        replay()
    # Sums are in another order. Some BatchNorm weights alone would not suffice: their steps are lost in rounding.
    assert (weights(graphed) - weights(eager)).norm() < 0.05 * (weights(eager) - before).norm()
    assert torch.allclose(eager.criterion.log_u[eager.index], graphed.criterion.log_u[graphed.index], atol=1e-2)


def batch_norm_rank(rank, world, folder):
    torch.cuda.set_device(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/gloo", rank=rank, world_size=world)
    torch.save({case: layer(rank, world, *case, "cuda") for case in LAYERS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_sync_batch_norm_equals_that_of_the_whole_batch(tmp_path):
    """On two ranks over gloo on the same GPU."""
    mp.start_processes(batch_norm_rank, nprocs=2, args=(2, str(tmp_path)), start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case in LAYERS:
        assert_whole(ranks, *case)


def batch_norm_without_waiting(_, folder):
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{folder}/nccl", rank=0, world_size=1)

    def gathered(tensor):       # what several ranks do
        result = torch.empty_like(tensor)
        dist.all_gather_into_tensor(result, tensor)
        return result

    def reduced(tensor):
        dist.all_reduce(tensor)
        return tensor

    parallel.all_gather, parallel.all_reduce_sum = gathered, reduced
    layers = nn.Sequential(SyncBatchNorm(8), nn.Flatten(), SyncBatchNorm(72, affine=False)).cuda()
    x = torch.ones(4, 8, 3, 3, device="cuda").requires_grad_()
    for mode in ("default", "error"):       # what is initialized in the first call may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        layers(x).sum().backward()
    torch.cuda.set_sync_debug_mode("default")
    dist.destroy_process_group()


def test_sync_batch_norm_never_waits_for_the_device(tmp_path):
    """Neither forward nor backward, over NCCL."""
    mp.start_processes(batch_norm_without_waiting, nprocs=1, args=(str(tmp_path),), start_method="spawn")


@pytest.mark.parametrize("blur", [False, True])
def test_half_precision_augmentation(blur):
    """A 16-bit result is computed in float16, of noise here: off by 0.2 gray levels on average, at most by 4."""
    crops = torch.randint(0, 256, (2, 16, 3, 64, 64), dtype=torch.uint8)
    uniforms = torch.rand(2, 16, Augment.num_uniforms)
    expected = Augment((0.5,) * 3, (1 / 255,) * 3, blur)(crops, uniforms)       # in gray levels
    ours = Augment((0.5,) * 3, (1 / 255,) * 3, blur, torch.float16).cuda()(crops, uniforms).cpu()
    assert 1e-3 < (ours - expected).abs().mean() < 0.2
    assert (ours - expected).abs().max() < 4
