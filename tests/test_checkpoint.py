"""Checkpoint files: surviving failures, and refusing untrusted ones."""

import os
import pickle
import resource
import shutil
import threading
import warnings
import zipfile

import numpy as np
import pytest
import torch

from sogclr import InputError, checkpoint


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.fixture
def small_files_only():
    """A disk that accepts at most 10 kB per file, like one that is almost full."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_failed_save_is_reported_and_leaves_the_old_file(tmp_path, small_files_only, capfd):
    """Training must continue after a save for which there is no space; the next one may succeed."""
    writer = checkpoint.Writer(tmp_path)
    writer.save({"epoch": 1})
    writer.save({"epoch": 2, "large": torch.zeros(10_000)})
    writer.wait()
    assert f"=> NOT saved: {tmp_path}: File too large" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.LAST]
    assert checkpoint.load(tmp_path / checkpoint.LAST, "--resume") == {"epoch": 1}
    with pytest.raises(InputError, match=f"--save_dir {tmp_path.parent}: the last save failed: File too large"):
        writer.close()
    writer.save({"epoch": 3}, "checkpoint_0002.pth.tar")
    writer.close()
    for name, epoch in ((checkpoint.LAST, 3), (checkpoint.PREVIOUS, 1), ("checkpoint_0002.pth.tar", 3)):
        assert checkpoint.load(tmp_path / name, "--resume") == {"epoch": epoch}


@pytest.mark.parametrize("call", ["torch.save", "os.fsync", "os.link", "os.replace", "os.replace 2", "os.replace 3"])
def test_an_interrupted_save_corrupts_nothing(call, tmp_path, monkeypatch):
    """Wherever a save is interrupted, neither it nor later saves may change a kept checkpoint."""
    checkpoint.save({"epoch": 1}, tmp_path, ["checkpoint_0000.pth.tar"])
    checkpoint.save({"epoch": 2}, tmp_path)
    name, _, count = call.partition(" ")
    module, name = {"torch": torch, "os": os}[name.split(".")[0]], name.split(".")[1]
    original, left = getattr(module, name), [int(count or 1)]

    class Killed(BaseException):
        pass

    def cut(*args):
        left[0] -= 1
        if not left[0]:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, cut)
        with pytest.raises(Killed):
            checkpoint.save({"epoch": 3}, tmp_path, ["checkpoint_0002.pth.tar"])
    newest = [load_epoch(tmp_path / name) for name in (checkpoint.LAST, checkpoint.PREVIOUS)]
    assert newest in ([2, 1], [None, 2])
    checkpoint.save({"epoch": 3, "step": 5}, tmp_path)
    assert load_epoch(tmp_path / "checkpoint_0000.pth.tar") == 1
    assert load_epoch(tmp_path / "checkpoint_0002.pth.tar") in (None, 3)
    assert "step" not in (checkpoint.load(tmp_path / "checkpoint_0002.pth.tar", "")
                          if (tmp_path / "checkpoint_0002.pth.tar").exists() else {})


def load_epoch(path):
    return checkpoint.load(path, "--resume")["epoch"] if path.exists() else None


def test_save_takes_the_values_of_its_moment(tmp_path, monkeypatch):
    """What training changes after `save` has returned must not reach the file, which is written in the background."""
    go, original = threading.Event(), torch.save

    def late(*args):
        go.wait(10)
        original(*args)

    monkeypatch.setattr(torch, "save", late)
    writer, weights = checkpoint.Writer(tmp_path), torch.zeros(3)
    writer.save({"weights": weights, "nested": [{"momentum": weights}]})
    weights += 1
    go.set()
    writer.close()
    saved = checkpoint.load(tmp_path / checkpoint.LAST, "--resume")
    assert not saved["weights"].any()
    assert not saved["nested"][0]["momentum"].any()


def test_a_vanished_folder_is_made_again(tmp_path):
    """The folder may be deleted during a run."""
    writer = checkpoint.Writer(tmp_path / "run")
    writer.save({"epoch": 1})
    writer.wait()
    shutil.rmtree(tmp_path / "run")
    writer.save({"epoch": 2})
    writer.close()
    assert checkpoint.load(tmp_path / "run" / checkpoint.LAST, "--resume") == {"epoch": 2}


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_files_are_never_read_as_something_else(tmp_path, damage):
    """Truncated anywhere: refused. A bit flipped anywhere: refused, or (between the records) without any effect."""
    state = {"epoch": 3, "arch": "resnet18", "state_dict": {f"w{k}": torch.randn(40) for k in range(10)}}
    checkpoint.save(state, tmp_path)
    whole = (tmp_path / checkpoint.LAST).read_bytes()
    directory = whole.rindex(b"PK\x01\x02")     # the last entry, which says what is a folder and must be left out
    rng = np.random.default_rng(0)
    places = [*rng.integers(len(whole), size=20 if damage == "truncated" else 200), *range(directory, directory + 46)]
    refused = 0
    for place in places:
        torn = bytearray(whole)
        if damage == "truncated":
            del torn[place:]
        else:
            torn[place] ^= 1 << int(rng.integers(8)) if place < directory else 0x10
        (tmp_path / "torn").write_bytes(torn)
        try:
            assert same(checkpoint.load(tmp_path / "torn", "--resume"), state)
        except InputError as error:
            assert f"--resume {tmp_path / 'torn'}: not a checkpoint that can be read" in str(error)     # noqa: PT017
            refused += 1
    assert refused == len(places) if damage == "truncated" else refused > len(places) / 2


def test_code_is_not_unpickled(tmp_path, monkeypatch):
    """A pickle that would run code must be refused with one line, and must not run it."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, "evil.pth")
    with open("pickled.pth", "wb") as file:
        pickle.dump({"state_dict": Evil()}, file, protocol=4)
    for name in ("evil.pth", "pickled.pth"):
        what = r"more than data, it refers to \w+.mkdir" if name == "evil.pth" else r"damaged .*\(UnpicklingError\)"
        with pytest.raises(InputError, match=f"--pretrained {name}: not a checkpoint that .* {what}; ") as caught:
            checkpoint.load(name, "--pretrained")
        assert "\n" not in str(caught.value)
        assert not os.path.exists("evil")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 torn zip", bytes(1000)])
def test_other_files_are_refused(tmp_path, content):
    """An empty, foreign or torn file, a folder and a missing file: an InputError that names flag and file."""
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    for name in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=f"--resume {name}: "):
            checkpoint.load(str(name), "--resume")


@pytest.mark.parametrize(("content", "what"), [
    (b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a pointer of Git LFS"),
    (b"\n<!DOCTYPE html><html>", "a web page"), (b"<html>", "a web page"),
    (b'\x40\0\0\0\0\0\0\0{"conv1.weight":{"dtype":"F32"}}', "a damaged safetensors file"),
    (b"\x1f\x8b\x08", "compressed with gzip"), (bytes(257) + b"ustar", "a tar archive"),
    (b"PK\x03\x04", "damaged or of another kind")])
def test_what_a_file_is_instead(tmp_path, content, what):
    """The reason must be what the file is, not that it is damaged."""
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(InputError, match=f"--pretrained {tmp_path}/file.pth: not a checkpoint that .*, it is {what}"):
        checkpoint.load(tmp_path / "file.pth", "--pretrained")


@pytest.mark.parametrize("call", ["builtins.open", "os.listdir"])
def test_a_file_without_permission_is_one_line(tmp_path, monkeypatch, call):
    """Also a folder, where what is in it would say what it is."""
    def denied(path, *_):
        raise PermissionError(13, "Permission denied", path)

    path = tmp_path / "file.pth" if call == "builtins.open" else tmp_path
    (tmp_path / "file.pth").write_bytes(b"")
    monkeypatch.setattr(call, denied)
    with pytest.raises(InputError, match=f"^--resume {path}: cannot be read: Permission denied$"):
        checkpoint.load(path, "--resume")


class Settings(dict):
    """As omegaconf's."""


def test_objects_in_a_file_are_named(tmp_path):
    """A whole model, or settings of some class: the class, and how to save the weights alone."""
    model = torch.nn.Linear(2, 2)
    for content, name in ((model, "torch.nn.modules.linear.Linear"),
                          ({"state_dict": model.state_dict(), "cfg": Settings()}, f"{__name__}.Settings")):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(InputError, match=f"more than data, it refers to {name}; .* save the weights alone"):
            checkpoint.load(tmp_path / "file.pth", "--pretrained")
    torch.save([model.state_dict()], tmp_path / "file.pth")
    with pytest.raises(InputError, match="contains a list, not a checkpoint; where it was made, save the weights"):
        checkpoint.load(tmp_path / "file.pth", "--pretrained")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # it is deprecated
        torch.jit.script(model).save(tmp_path / "file.pth")
    with pytest.raises(InputError, match="a TorchScript model; "):
        checkpoint.load(tmp_path / "file.pth", "--pretrained")


def test_unzipped_and_distributed_checkpoints(tmp_path):
    """A folder that was a file, or that holds one in parts, must be recognized; and zipped again it must load."""
    torch.save({"epoch": 3}, tmp_path / "file.pth")
    shutil.unpack_archive(tmp_path / "file.pth", tmp_path / "outer", "zip")
    inner, = (tmp_path / "outer").iterdir()
    for folder in (tmp_path / "outer", inner):
        with pytest.raises(InputError, match=f"--resume {folder}: is an unzipped checkpoint"):
            checkpoint.load(folder, "--resume")
    with zipfile.ZipFile(tmp_path / "again.pth", "w") as file:      # as zip -0rD does
        for path in filter(os.path.isfile, inner.rglob("*")):
            file.write(path, path.relative_to(tmp_path / "outer"))
    assert checkpoint.load(tmp_path / "again.pth", "--resume") == {"epoch": 3}
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(InputError, match=f"--resume {tmp_path}: is a distributed checkpoint, convert it: "):
        checkpoint.load(tmp_path, "--resume")


def test_numpy_numbers_load(tmp_path):
    """The authors' files hold numpy scalars, of numpy 1 or 2; they must load."""
    path = tmp_path / "authors.pth.tar"
    values = {"lr": np.float64(1.2), "epoch": np.int64(3), "best": np.float32(0.5)}
    torch.save(values, path)
    assert checkpoint.load(path, "--resume") == values


def test_only_a_scaler_may_have_no_state():
    """An empty model or optimizer must be refused, and an empty scaler, as bf16 leaves it, be taken."""
    model = torch.nn.Linear(2, 2)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
    for name, part in (("state_dict", model), ("optimizer", optimizer)):
        with pytest.raises(InputError, match="--resume file: was made with another model, optimizer or protocol: "):
            checkpoint.restore_parts({name: {}}, "--resume file", **{name: part})
    checkpoint.restore_parts({"scaler": {}}, "--resume file", scaler=scaler)
