"""Files of tensors in the safetensors format (https://huggingface.co/docs/safetensors): the length of a header (8
bytes, little-endian), the header in JSON, and the tensors' bytes without gaps.
"""

import json
import math
import os
import struct

import torch

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool}


def read(path):
    """Read a file's tensors, {name: tensor} on the CPU. Raises ValueError or another exception if the header does not
    describe the file, NotImplementedError if a type of numbers is not supported.
    """
    tensors, end = {}, 0
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(length, os.path.getsize(path))))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _DTYPES:
                raise NotImplementedError(f"{name} is of type {entry['dtype']}, convert it to F32")
            dtype, shape, (begin, stop) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            content = bytearray(file.read(math.prod(shape) * dtype.itemsize))
            if begin != end or stop - begin != len(content) or min(shape, default=0) < 0:
                raise ValueError(f"{name} is not complete")
            flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            tensors[name], end = flat.reshape(shape), stop
        if file.read(1):
            raise ValueError("there is more than the tensors")
    return tensors


def write(tensors, path):
    """Write tensors, {name: tensor on the CPU}, to a file."""
    names, header, end = {dtype: name for name, dtype in _DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    # The largest numbers first: so all are aligned in memory for readers that map the file to it.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            file.write(tensor.flatten().view(torch.uint8).numpy())
