"""What only a GPU can show. Skipped without one."""

import pytest
import torch

from sogclr.augment import Augment
from sogclr.loss import ContrastiveLoss, GlobalContrastiveLoss
from sogclr.optimizer import LARS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def no_waiting():
    """Any call that waits for the device raises."""
    def on():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    yield on
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["dcl", "cl"])
def test_loss_and_lars_never_wait_for_the_device(kind, no_waiting):
    """Forward, backward, estimator, LARS and zero_grad: no synchronisation."""
    criterion = (GlobalContrastiveLoss(1000) if kind == "dcl" else ContrastiveLoss()).cuda()
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


def test_loss_equals_the_cpus():
    """Loss, gradients and u in float64 must be the CPU's."""
    z1, z2 = torch.randn(2, 32, 8, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        criterion = GlobalContrastiveLoss(100).double().to(device)
        a, b = (z.detach().to(device).requires_grad_() for z in (z1, z2))
        loss = criterion(a, b, torch.arange(32))
        loss.backward()
        results.append([value.detach().cpu() for value in (loss, a.grad, b.grad, criterion.u)])
    assert all(torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in zip(*results, strict=True))


def test_augmentation_equals_the_cpus(no_waiting):
    """The same draws must give the same pixels, without waiting for the device."""
    crops = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    draws = torch.rand(16, Augment.num_draws)
    stage = Augment((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), blur=True)
    expected = stage((crops, draws))
    stage, view = stage.cuda(), (crops.cuda(), draws.cuda())
    no_waiting()
    ours = stage(view)
    torch.cuda.set_sync_debug_mode("default")
    assert (ours.cpu() - expected).abs().max() < 1e-4
