"""What a GPU is asked to do, on a machine that has none: torch's fake tensors have a device, shapes and types, but no
values. So an operation between two devices fails, and so does a host that asks for a value, for which it would have to
wait. `test_gpu` runs the same for real.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sogclr.augment import Augment
from sogclr.builder import SimCLR, resnet
from sogclr.loss import ContrastiveLoss, GlobalContrastiveLoss, alignment_and_uniformity
from sogclr.optimizer import LARS

B, D, N = 8, 16, 100


class Calls(TorchDispatchMode):
    """`names`: those of the operations that a GPU is given, in their order."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and not function.is_view:
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.fixture
def fake_gpu():
    """All tensors made in the test are fake ones on a GPU."""
    with FakeTensorMode(), torch.device("cuda"):
        yield


def test_host_that_asks_is_noticed(fake_gpu):
    with pytest.raises(DataDependentOutputException):
        torch.zeros(3).sum().item()


@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("loss_type", [GlobalContrastiveLoss, ContrastiveLoss])
def test_loss(loss_type, temperature, fake_gpu):
    """Neither the loss, with indices from the host, nor what is shown of it may ask for a value."""
    criterion = loss_type(*[N] * (loss_type is GlobalContrastiveLoss), temperature).to("cuda")
    z1, z2 = torch.randn(2, B, D, requires_grad=True)
    for index in (torch.arange(B), torch.arange(B) + B):
        loss = criterion(z1, z2, index)
    shown = (loss, criterion.gcl(), *alignment_and_uniformity(criterion.keys))
    assert all(value.shape == () and value.device.type == "cuda" for value in shown)


@pytest.mark.parametrize("blur", [False, True])
def test_augmentation(blur, fake_gpu):
    """Of crops on the host or on the GPU."""
    stage = Augment((0.5,) * 3, (0.2,) * 3, blur, torch.bfloat16, torch.channels_last).to("cuda")
    for device in ("cpu", "cuda"):
        crops = torch.zeros(B, 3, 32, 32, dtype=torch.uint8, device=device)
        views = stage((crops, torch.rand(B, Augment.num_draws, device=device)))
        assert (views.shape, views.dtype, views.device.type) == (crops.shape, torch.bfloat16, "cuda")


def test_lars(fake_gpu):
    """A step, in as many launches for ResNet-50 as for ResNet-18: all parameters go together."""
    counts = set()
    for arch in ("resnet18", "resnet50"):
        params = list(SimCLR(resnet(arch), D).parameters())
        optimizer = LARS(params, lr=0.1, weight_decay=1e-6)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()        # in which its state is made
        with Calls() as calls:
            optimizer.step()
        counts.add(tuple(calls.names))
    assert len(counts) == 1
    assert len(counts.pop()) < 20
