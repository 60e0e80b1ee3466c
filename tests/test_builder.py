"""The model's shapes and parameter names, on which other people's checkpoints rely."""

import argparse

import pytest
import torch
import torchvision

from sogclr import InputError, checkpoint
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


def test_views_are_normalized_separately():
    """Two forward passes, one per view: the second view's statistics must not touch the first view's projections."""
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


@pytest.mark.parametrize("size", [(32, 32), (16, 32), (8, 8), (40, 40)])
def test_small_maps_change_nothing(size):
    """Convolutions to a single pixel must have torchvision's outputs and gradients."""
    torch.manual_seed(0)
    ours, theirs = resnet("resnet18").double(), torchvision.models.resnet18().double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, *size, dtype=torch.float64)
    out, expected = ours(x), theirs(x)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    grads = [torch.autograd.grad((y * weight).sum(), model.parameters())
             for y, model in ((out, ours), (expected, theirs))]
    for (name, _), a, b in zip(ours.named_parameters(), *grads, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12 * float(b.abs().max())), name


# Other people's files, as they are on disk: (prefix of the names, what else is in the file)
FOREIGN = {
    "train.py": ("module.base_encoder.", {"module.base_encoder.fc.0.weight": torch.zeros(32, 512)}),
    "SimCLR, one process": ("base_encoder.", {}),
    "MoCo v1, v2": ("module.encoder_q.", {"module.encoder_q.fc.weight": torch.zeros(128, 512), "module.queue_ptr":
                    torch.zeros(1), "module.encoder_k.conv1.weight": torch.zeros(64, 3, 7, 7)}),
    "MoCo v3": ("module.base_encoder.", {"module.momentum_encoder.conv1.weight": torch.zeros(64, 3, 7, 7),
                                         "module.predictor.0.weight": torch.zeros(8, 8)}),
    "MoCo in Lightning": ("encoder_q.", {"encoder_k.conv1.weight": torch.zeros(64, 3, 7, 7)}),
    "SimSiam": ("module.encoder.", {"module.encoder.fc.6.bias": torch.zeros(2048), "module.predictor.0.weight":
                torch.zeros(8, 8)}),
    "Barlow Twins": ("module.backbone.", {"module.projector.0.weight": torch.zeros(8, 8)}),
    "Lightning": ("backbone.", {"backbone_momentum.conv1.weight": torch.zeros(64, 3, 7, 7), "epoch": 7, 3: "three"}),
    "Lightning's encoder": ("encoder.", {"projector.0.weight": torch.zeros(8, 8)}),
    "Lightning's model": ("model.", {"model.fc.bias": torch.zeros(10)}),
    "lincls.py": ("module.", {"module.fc.weight": torch.zeros(10, 512)}),
    "torchvision": ("", {"fc.weight": torch.zeros(1000, 512)}),
}


@pytest.mark.parametrize(("kind", "wrapper"), [*((kind, "state_dict") for kind in FOREIGN), ("MoCo v3", None),
                                               ("torchvision", None), ("torchvision", "model")])
def test_encoder_is_found_in_everybodys_files(kind, wrapper, tmp_path):
    """load_encoder must give bit-identical features, whatever the prefix and other entries, and leave `fc` alone;
    flags in the file or missing BatchNorm counters must not matter.
    """
    prefix, others = FOREIGN[kind]
    torch.manual_seed(0)
    source = resnet("resnet18").eval()
    source.bn1.running_mean.fill_(0.1)
    state = {prefix + key: value for key, value in source.state_dict().items() if not key.startswith("fc.")}
    if wrapper == "model":
        state = {key: value for key, value in state.items() if "num_batches" not in key}
    whole = {wrapper: others | state, "args": argparse.Namespace(lr=0.1)} if wrapper else others | state
    torch.save(whole, tmp_path / "file.pth")
    model = torchvision.models.resnet18(num_classes=7).eval()
    head = model.fc.weight.clone()
    load_encoder(model, encoder_state(checkpoint.load(tmp_path / "file.pth", "--pretrained"), "file"), "file")
    source.fc = model.fc
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(source(x), model(x))
    assert torch.equal(model.fc.weight, head)


def test_other_architecture_is_refused():
    """One line must name the file and what does not match."""
    state = encoder_state({"state_dict": resnet("resnet18").state_dict()}, "file")
    for model, other, message in (
            (resnet("resnet50"), {}, r'Missing key.*"layer1\.0\.conv3\.weight"'),
            (resnet("resnet18", "cifar"), {}, r"size mismatch for conv1\.weight: .*\[64, 3, 7, 7\]"),
            (resnet("resnet18"), {"prototypes": torch.zeros(1)}, r'Unexpected key.*"prototypes"')):
        with pytest.raises(InputError, match=f"^file: does not match this encoder, pass its --arch: .*{message}"):
            load_encoder(model, state | other, "file")


@pytest.mark.parametrize("names", [
    "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "backbone._orig_mod.{}", "model._orig_mod.{}",
    "_orig_mod.module.base_encoder.{}", "module.encoder_q.module.{}", "_fsdp_wrapped_module.base_encoder.{}",
    "layers"])
def test_wrapped_modules_are_the_same(names):
    """Files of torch.compile and other wrappers must give the plain file's tensors, wherever the wrapper's name is."""
    plain = {key: value for key, value in resnet("resnet18").state_dict().items() if not key.startswith("fc.")}
    if names == "layers":       # each compiled on its own
        wrapped = {key.replace("layer2.", "layer2._orig_mod.").replace("conv1.weight", "conv1._orig_mod.weight"): value
                   for key, value in plain.items()}
    else:
        wrapped = {names.format(key): value for key, value in plain.items()}
    state = encoder_state({"state_dict": wrapped}, "file")
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[key], plain[key]) for key in plain)


CONV = torch.zeros(64, 3, 7, 7)


@pytest.mark.parametrize(("content", "found"), [
    ({"state_dict": {"0.weight": torch.zeros(1), "0.bias": torch.zeros(1)}},
     r"found state_dict, with the tensors 0\.weight, 0\.bias"),
    ({"epoch": 3}, "found epoch"), ({}, "found nothing"),
    ({"student": {"module.backbone.conv1.weight": CONV}, "teacher": {"backbone.conv1.weight": CONV},
      "epoch": 3}, r"found student, teacher, epoch; to use 'student', .*\['student'\], NEW\); to use 'teacher', "),
    ({"model_ema": {"conv1.weight": CONV}, "optimizer": {}}, "found model_ema, optimizer; to use 'model_"),
    ({"conv1.weight": torch.tensor(1.0)}, r"found conv1\.weight")])
def test_file_without_an_encoder(content, found):
    """One line must say what is in it, and how to use an encoder that is deeper inside."""
    with pytest.raises(InputError, match=f"^file: contains no ResNet encoder, .* {found}"):
        encoder_state(content, "file")


@pytest.mark.parametrize(("change", "message"), [
    ({"layer1.0.conv1.weight": torch.full((64, 64, 3, 3), float("nan"))}, r"layer1\.0\.conv1\.weight is not finite"),
    ({"conv1.weight": torch.zeros(64, 3, 7, 7, dtype=torch.int8)}, r"conv1\.weight is not .* floating-.*\(int8\)"),
    ({"module.conv1.weight": CONV}, "has tensors whose names differ only in a wrapper's part")])
def test_weights_that_cannot_be_meant(change, message):
    """Not finite, integers, or two of one name: one line, instead of an accuracy that means nothing."""
    with pytest.raises(InputError, match=f"^file: .*{message}"):
        encoder_state({"model": {"state_dict": resnet("resnet18").state_dict() | change}}, "file")
