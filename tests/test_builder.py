"""The model's shape and names, which other people's checkpoints rely on."""

import pytest
import torch
import torchvision

from sogclr import InputError
from sogclr.builder import SimCLR, encoder_state, load_encoder, resnet


def test_projection_head_has_the_authors_layout():
    """`fc.<i>`: Linear without bias, BatchNorm1d, ReLU, ..., Linear without bias, BatchNorm1d without affine."""
    model = SimCLR(resnet("resnet18", zero_init_residual=True), dim=16, mlp_dim=32, num_proj_layers=3)
    kinds = [type(layer).__name__ for layer in model.base_encoder.fc]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    names = [name for name, _ in model.named_parameters() if ".fc." in name]
    assert names == [f"base_encoder.fc.{name}" for name in
                     ("0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias", "6.weight")]
    assert [tuple(model.base_encoder.fc[i].weight.shape) for i in (0, 3, 6)] == [(32, 512), (32, 32), (16, 32)]
    assert all(not block.bn2.weight.any() for block in model.base_encoder.layer1)       # zero-init residual


def test_views_are_normalised_apart():
    """Two forward passes, one a view: the second view's statistics must not touch the first view's projections."""
    model = SimCLR(resnet("resnet18"), dim=8, mlp_dim=16)
    x1, x2 = torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    z1, z2 = model(x1, x2)
    other, _ = model(x1, 5 * x2 + 1)
    assert z1.shape == z2.shape == (4, 8)
    assert torch.equal(z1, other)


def test_cifar_stem_keeps_the_resolution():
    """`stem="cifar"` must be a 3x3 convolution of stride 1 without pooling."""
    encoder = resnet("resnet18", "cifar")
    assert encoder.maxpool(encoder.conv1(torch.zeros(1, 3, 32, 32))).shape == (1, 64, 32, 32)
    assert resnet("resnet18").conv1.kernel_size == (7, 7)


@pytest.mark.parametrize("prefix", ["module.base_encoder.", "base_encoder.", "module.", ""])
def test_encoder_is_found_under_every_name(prefix):
    """load_encoder must give bit-equal features, whatever stands before the names, and leave `fc` alone."""
    torch.manual_seed(0)
    source = resnet("resnet18").eval()
    state = {prefix + key: value for key, value in source.state_dict().items() if not key.startswith("fc.")}
    state |= {prefix + "fc.0.weight": torch.zeros(32, 512)}
    model = torchvision.models.resnet18(num_classes=7).eval()
    head = model.fc.weight.clone()
    load_encoder(model, encoder_state({"state_dict": state}, "file"), "file")
    source.fc = model.fc
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(source(x), model(x))
    assert torch.equal(model.fc.weight, head)


def test_other_architecture_is_refused():
    """The error must name the file and what does not fit."""
    state = encoder_state({"state_dict": resnet("resnet18").state_dict()}, "file")
    with pytest.raises(InputError, match=r"file: does not fit .*layer1\.0\.bn3"):
        load_encoder(resnet("resnet50"), state, "file")
    with pytest.raises(InputError, match=r"conv1\.weight is \[64, 3, 7, 7\], not \[64, 3, 3, 3\]"):
        load_encoder(resnet("resnet18", "cifar"), state, "file")
    with pytest.raises(InputError, match="holds no ResNet"):
        encoder_state({"state_dict": {"x": torch.zeros(1)}}, "file")
