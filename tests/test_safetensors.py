"""Files in the safetensors format, against its specification and, where it is there, its own package."""

import json
import math
import struct

import numpy as np
import pytest
import torch

from sogclr import InputError, checkpoint, safetensors

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool]


@pytest.fixture
def tensors():
    """A tensor of each type, one of them without dimensions, one without numbers."""
    generator = torch.Generator().manual_seed(0)
    some = {f"w{k}": (100 * torch.rand(3, k + 1, generator=generator)).to(dtype) for k, dtype in enumerate(DTYPES)}
    return some | {"count": torch.tensor(7), "none": torch.empty(0, 4), "transposed": torch.rand(2, 3).T}


def same(a, b):
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def test_tensors_come_back(tensors, tmp_path):
    """Names, types, shapes and bits must be those that were written, also when it is read as a checkpoint."""
    safetensors.write(tensors, tmp_path / "file")
    assert same(safetensors.read(tmp_path / "file"), tensors)
    assert same(checkpoint.load(tmp_path / "file", "--pretrained"), tensors)


def test_layout_is_the_specified_one(tensors, tmp_path):
    """Read by the specification alone: a header of whole 8 bytes, and bytes without gaps, each tensor aligned."""
    safetensors.write(tensors, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    length, = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + length])
    assert length % 8 == 0
    assert content[8:9] == b"{"
    assert header.pop("__metadata__") == {"format": "pt"}
    assert header.keys() == tensors.keys()
    end = 0
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        assert begin == end
        assert begin % tensors[name].itemsize == 0
        assert stop - begin == math.prod(entry["shape"]) * tensors[name].itemsize
        end = stop
    assert 8 + length + end == len(content)
    begin, stop = header["w1"]["data_offsets"]
    floats = np.frombuffer(content[8 + length + begin:8 + length + stop], dtype="<f4").reshape(header["w1"]["shape"])
    assert np.array_equal(floats, tensors["w1"].numpy())


def test_the_format_s_own_package_agrees(tensors, tmp_path):
    """What it writes must be read alike, and what is written here must be read by it."""
    theirs = pytest.importorskip("safetensors.torch")
    tensors["transposed"] = tensors["transposed"].contiguous()      # as it requires
    theirs.save_file(tensors, tmp_path / "theirs")
    safetensors.write(tensors, tmp_path / "ours")
    assert same(safetensors.read(tmp_path / "theirs"), tensors)
    assert same(theirs.load_file(tmp_path / "ours"), tensors)


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(("header", "size"), [
    ({"a": entry()}, 7), ({"a": entry()}, 9),                                   # too few bytes, too many
    ({"a": entry(begin=1, end=9)}, 9),                                          # a gap
    ({"a": entry(), "b": entry()}, 8), ({"a": entry(), "b": entry(begin=4, end=12)}, 12),       # overlapping
    ({"a": entry(), "b": entry(begin=4, end=12)}, 16),
    ({"a": entry(shape=[3])}, 8), ({"a": entry(dtype="U8", shape=[-1])}, 8),
    ({"a": entry(shape=[-1], begin=0, end=-4)}, 0), ({"a": entry(shape=[2**62])}, 8), ({"a": entry(shape=["2"])}, 8),
    ({"a": {"dtype": "F32"}}, 8), ({"a": 3}, 8)])
def test_a_damaged_file_is_refused(header, size, tmp_path):
    """A header that does not describe the file must give one line that says what it is."""
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(InputError, match=r"--pretrained .*/file: .* it is a damaged safetensors file, [^\n]*$"):
        checkpoint.load(tmp_path / "file", "--pretrained")


def test_an_unusual_type_is_named(tmp_path):
    """The message must say which tensor is of which type, rather than that the file is damaged."""
    text = json.dumps({"a": entry(dtype="F8_E4M3", end=2)}).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(2))
    with pytest.raises(InputError, match="safetensors file in which a is of type F8_E4M3, convert it to F32"):
        checkpoint.load(tmp_path / "file", "--pretrained")


def test_a_cut_file_is_refused(tmp_path):
    """Wherever it is cut: never some of its tensors."""
    safetensors.write({"a": torch.arange(3), "b": torch.zeros(0)}, tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "file").write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a checkpoint that can be read safely"):
            checkpoint.load(tmp_path / "file", "--pretrained")
