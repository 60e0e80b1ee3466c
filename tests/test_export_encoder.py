"""The exported encoder, as people without this repository use it."""

import json
import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from scripts.tools import export_encoder
from sogclr import checkpoint, datasets
from sogclr.augment import Normalize
from sogclr.builder import SimCLR, encoder_state, resnet
from sogclr.loader import center_view


@pytest.fixture
def export(tmp_path, monkeypatch):
    """A function from an architecture, its stem, flags, and the checkpoint's settings: exports an encoder to
    tmp_path/out, and returns it.
    """
    def run(arch, stem, *flags, **settings):
        torch.manual_seed(0)
        model = SimCLR(resnet(arch, stem), dim=8, mlp_dim=16).to(memory_format=torch.channels_last)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2)
        saved = {"arch": arch, "state_dict": checkpoint.add_ddp_prefix(model.state_dict()), "settings": settings}
        torch.save(saved, tmp_path / "saved.pth.tar")
        main(tmp_path / "saved.pth.tar", tmp_path / "out", *flags)
        encoder = model.base_encoder.eval()
        encoder.fc = torch.nn.Identity()
        return encoder

    def main(*args):
        monkeypatch.setattr("sys.argv", ["export_encoder.py", *map(str, args)])
        export_encoder.main()

    run.main = main
    return run


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_torchvision_has_bit_equal_features(stem, export, tmp_path, capsys):
    """Loaded safely, the file must lack only the classifier, and otherwise be exactly a torchvision ResNet."""
    encoder = export("resnet18", stem).to(memory_format=torch.contiguous_format)
    assert f"out: resnet18 with {stem} stem, 120 tensors" in capsys.readouterr().out
    state = torch.load(tmp_path / "out", weights_only=True)
    assert all(value.is_contiguous() for value in state.values())
    model = torchvision.models.resnet18()
    if stem == "cifar":
        model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    keys = model.load_state_dict(state, strict=False)
    assert (sorted(keys.missing_keys), keys.unexpected_keys) == (["fc.bias", "fc.weight"], [])
    model.fc = torch.nn.Identity()
    model.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), encoder(x))


@pytest.mark.parametrize(("settings", "size", "crop", "red"), [
    ({"data_name": "folder", "image_size": 64}, 64, 0.875, 0.485),
    ({"data_name": "cifar10", "image_size": 32}, 32, 1.0, 0.4914),
    ({"data_name": "folder", "image_size": None}, 224, 0.875, 0.485),
    ({}, 224, 0.875, 0.485)])
def test_timm_gets_what_the_checkpoint_records(settings, size, crop, red, export, tmp_path):
    """The two files must name the architecture and the pretraining's images, ImageNet's if it records none, and hold
    the encoder, as lincls.py reads it.
    """
    encoder = export("resnet18", "imagenet", "--format", "timm", **settings)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("resnet18", 0)
    pretrained = config["pretrained_cfg"]
    assert pretrained["input_size"] == [3, size, size]
    assert (pretrained["crop_pct"], pretrained["mean"][0]) == (crop, red)
    loaded = checkpoint.load(tmp_path / "out" / "model.safetensors", "--pretrained")
    state = encoder_state(loaded, "--pretrained")
    expected = encoder.state_dict()
    assert loaded.keys() == state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_timm_has_bit_equal_features(export, tmp_path, imagenet):
    """timm's own model and its own transform, of the image file, must give our features; and it must take a new
    classifier.
    """
    timm = pytest.importorskip("timm")
    encoder = export("resnet18", "imagenet", "--format", "timm", data_name="folder", image_size=64)
    encoder.to(memory_format=torch.contiguous_format)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = [Image.open(path) for path in sorted(imagenet.glob("val/*/*"))]
    ours = Normalize(*datasets.IMAGENET_MEAN_STD)(torch.stack([center_view(image, 64) for image in images]))
    theirs = torch.stack([transform(image) for image in images])
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model(ours), encoder(ours))
    classifier = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=3)
    assert torch.equal(classifier.layer4[1].conv2.weight, encoder.layer4[1].conv2.weight)
    assert classifier(ours).shape == (9, 3)


def test_detectron2_has_every_tensor_under_its_own_name(export, tmp_path):
    """All of detectron2's names for a ResNet-50, listed here independently, must have the encoder's values."""
    encoder = export("resnet50", "imagenet", "--format", "detectron2")
    with open(tmp_path / "out", "rb") as file:
        saved = pickle.load(file)
    assert saved.keys() == {"model", "__author__", "matching_heuristics"}
    assert saved["matching_heuristics"] is True
    expected = {}

    def convolution(name, conv, norm):
        expected[f"{name}.weight"] = conv.weight
        expected.update((f"{name}.norm.{key}", value) for key, value in norm.state_dict().items())

    convolution("stem.conv1", encoder.conv1, encoder.bn1)
    for stage in (1, 2, 3, 4):
        for i, block in enumerate(getattr(encoder, f"layer{stage}")):
            for k in (1, 2, 3):
                convolution(f"res{stage + 1}.{i}.conv{k}", getattr(block, f"conv{k}"), getattr(block, f"bn{k}"))
            if i == 0:
                convolution(f"res{stage + 1}.{i}.shortcut", *block.downsample)
    assert saved["model"].keys() == expected.keys()
    assert len(expected) == len([key for key in encoder.state_dict() if not key.startswith("fc.")])
    for name, value in expected.items():
        assert isinstance(saved["model"][name], np.ndarray)
        assert np.array_equal(saved["model"][name], value.detach().numpy())


@pytest.mark.parametrize(("checkpoint", "out", "flags", "message"), [
    ("missing.pth", "out", [], "CHECKPOINT missing.pth: no such file"),
    ("text", "out", [], "CHECKPOINT text: not a checkpoint"),
    ("head.pth", "out", [], "CHECKPOINT head.pth: contains no ResNet encoder"),
    ("half.pth", "out", [], "CHECKPOINT half.pth: its 1 tensors match none of torchvision's ResNets"),
    ("cifar.pth", "text", [], "OUT text: already exists"),
    ("cifar.pth", "nowhere/out", [], "OUT nowhere/out: cannot be written: No such file or directory"),
    ("cifar.pth", "out", ["--format", "detectron2"], "--format detectron2: cifar.pth has the cifar stem"),
    ("cifar.pth", "out", ["--format", "timm"], "--format timm: cifar.pth has the cifar stem"),
    ("cifar.pth", "out", ["--format", "onnx"], "argument --format: invalid choice: 'onnx'")])
def test_bad_input_is_one_line(checkpoint, out, flags, message, export, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line that names the file or flag, and no file that was not there before."""
    (tmp_path / "text").write_text("text")
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "head.pth")
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "half.pth")
    torch.save(resnet("resnet18", "cifar").state_dict(), tmp_path / "cifar.pth")
    before = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        export.main(checkpoint, out, *flags)
    error = capsys.readouterr().err
    assert error.startswith("export_encoder.py: error: " + message)
    assert error.count("\n") == 1
    assert set(tmp_path.iterdir()) == before
