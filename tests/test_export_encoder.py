"""The exported encoder, as people without this repository use it."""

import pickle

import numpy as np
import pytest
import torch
import torchvision

from scripts.tools import export_encoder
from sogclr import checkpoint
from sogclr.builder import SimCLR, resnet


@pytest.fixture
def export(tmp_path, monkeypatch):
    """A function from an architecture, its stem, and flags: exports an encoder to tmp_path/out, and returns it."""
    def run(arch, stem, *flags):
        torch.manual_seed(0)
        model = SimCLR(resnet(arch, stem), dim=8, mlp_dim=16).to(memory_format=torch.channels_last)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2)
        saved = {"arch": arch, "state_dict": checkpoint.add_ddp_prefix(model.state_dict())}
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
