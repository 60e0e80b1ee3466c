"""What a GPU is asked to do, on a machine that has none: torch's fake tensors have a device, shapes and types, but no
values. So an operation between two devices fails, and so does a host that asks for a value or for a copy, for which it
would have to wait. Forward alone: autograd wants a real GPU. `test_gpu` runs the same for real.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sogclr import augment
from sogclr.augment import Augment
from sogclr.builder import SimCLR, resnet
from sogclr.isogclr import RobustGlobalContrastiveLoss
from sogclr.loss import ContrastiveLoss, GlobalContrastiveLoss
from sogclr.monitor import alignment_and_uniformity
from sogclr.optimizer import LARS

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 11) and not torch.cuda.is_available(),
                                reason="older releases need a driver even for fake tensors, 2.6 ends the process")
B, D, N = 8, 16, 100


class Calls(TorchDispatchMode):
    """Records the `names` of the operations requested, except views, in order. A copy to the host fails."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and not function.is_view:
            self.names.append(function.name())
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            assert not any(isinstance(arg, torch.Tensor) and arg.device.type == "cuda" for arg in args), function
        return result


@pytest.fixture
def fake_gpu():
    """All tensors created in the test are fake ones on a GPU. Requested operations are recorded."""
    with FakeTensorMode(), torch.device("cuda"), Calls() as calls:
        yield calls


def test_reading_from_the_host_is_noticed(fake_gpu):
    with pytest.raises(DataDependentOutputException):
        torch.zeros(3).sum().item()
    with pytest.raises(AssertionError, match="_to_copy"):
        torch.zeros(3).cpu()
    with pytest.raises(AssertionError, match="copy_"):
        torch.zeros(3, device="cpu").copy_(torch.ones(3))


@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("loss_type", [GlobalContrastiveLoss, RobustGlobalContrastiveLoss, ContrastiveLoss])
def test_loss(loss_type, temperature, fake_gpu, monkeypatch):
    """Neither the loss, with indices from the host, nor its monitored values may read from the device."""
    monkeypatch.setattr(GlobalContrastiveLoss, "_check", lambda *_: None)       # which reads the indices
    bounds = [0.9, 0.3, 0.001] * (loss_type is RobustGlobalContrastiveLoss)
    criterion = loss_type(*[N] * (loss_type is not ContrastiveLoss), temperature, *bounds).to("cuda")
    z1, z2 = torch.randn(2, B, D, requires_grad=True)
    for index in torch.arange(2 * B, device="cpu").chunk(2):
        loss = criterion(z1, z2, index)
    shown = (loss, criterion.gcl(), *alignment_and_uniformity(criterion.keys))
    assert all(value.shape == () and value.device.type == "cuda" for value in shown)


@pytest.mark.parametrize(("dtype", "computed_in"), [(torch.bfloat16, torch.float16), (torch.float32, torch.float32)])
@pytest.mark.parametrize("blur", [False, True])
def test_augmentation(blur, dtype, computed_in, fake_gpu, monkeypatch):
    """With crops on the host or on the GPU; both views in hardly more operations than now, since they bound small
    batches; in half precision if the result is.
    """
    seen, grayscale = [], augment.grayscale
    monkeypatch.setattr(augment, "grayscale", lambda images: seen.append(images.dtype) or grayscale(images))
    stage = Augment((0.5,) * 3, (0.2,) * 3, blur, dtype, torch.channels_last).to("cuda")
    for device in ("cpu", "cuda"):
        crops = torch.zeros(2, B, 3, 32, 32, dtype=torch.uint8, device=device)
        uniforms = torch.rand(2, B, Augment.num_uniforms, device=device)
        fake_gpu.names.clear()
        views = stage(crops, uniforms)
        assert len(fake_gpu.names) <= 120 + 30 * blur
        assert (views.shape, views.dtype, views.device.type) == (crops.shape, dtype, "cuda")
    assert set(seen) == {computed_in}


def test_lars(fake_gpu):
    """A step, in as many operations for ResNet-50 as for ResNet-18: all parameters are updated together."""
    counts = set()
    for arch in ("resnet18", "resnet50"):
        params = list(SimCLR(resnet(arch), D).parameters())
        optimizer = LARS(params, lr=0.1, weight_decay=1e-6)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()        # in which its state is made
        fake_gpu.names.clear()
        optimizer.step()
        counts.add(tuple(fake_gpu.names))
    assert len(counts) == 1
    assert len(counts.pop()) < 20
