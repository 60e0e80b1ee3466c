#!/usr/bin/env python3
"""Export the encoder from a checkpoint, for use without this repository.

    python scripts/tools/export_encoder.py CHECKPOINT OUT [--format torchvision|detectron2]

CHECKPOINT is from train.py or lincls.py, or any other that lincls.py accepts as --pretrained. OUT is a state dict of
torchvision's ResNet without the classifier, to be loaded with `torch.load(OUT, weights_only=True)`; or, for
detectron2's MODEL.WEIGHTS, a pickle of arrays under its names, as written by MoCo's conversion.
"""

import contextlib
import os
import pickle
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sogclr import InputError, checkpoint
from sogclr.builder import encoder_state, resnet
from sogclr.flags import ARCHITECTURES, Parser


def architecture(state, source):
    """The name and stem of the ResNet that has these tensors. Raises InputError if there is none."""
    stem = "cifar" if state["conv1.weight"].shape[-1] == 3 else "imagenet"
    shapes = {key: value.shape for key, value in state.items()}
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            model = resnet(arch, stem)
        if shapes == {key: value.shape for key, value in model.state_dict().items() if not key.startswith("fc.")}:
            return arch, stem
    raise InputError(f"{source}: its {len(state)} tensors match none of torchvision's ResNets "
                     f"({', '.join(ARCHITECTURES)})")


def detectron2_name(name):
    """torchvision's name -> detectron2's: `layer1.0.bn2.bias` -> `res2.0.conv2.norm.bias`, `bn1.bias` ->
    `stem.conv1.norm.bias`.
    """
    name = re.sub(r"^layer(\d)", lambda layer: f"res{int(layer[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return name if name.startswith("res") else "stem." + name


def write(path, save):
    """Write a new file with `save(file)`, completely or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # torch.save turns an OSError into a RuntimeError
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"OUT {path}: cannot be written: "
                         f"{getattr(error, 'strerror', None) or str(error).splitlines()[0]}") from error


def export(args):
    if os.path.exists(args.out):
        raise InputError(f"OUT {args.out}: already exists, choose a new name or remove it")
    source = f"CHECKPOINT {args.checkpoint}"
    state = encoder_state(checkpoint.load(args.checkpoint, "CHECKPOINT"), source)
    arch, stem = architecture(state, source)
    # In the usual dtype and layout, whatever the checkpoint's: a GPU trains in channels_last. Counters stay integers.
    state = {key: value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True,
                           memory_format=torch.contiguous_format) for key, value in state.items()}
    if args.format == "torchvision":
        write(args.out, lambda file: torch.save(state, file))
    elif stem == "cifar":
        raise InputError(f"--format detectron2: {args.checkpoint} has the cifar stem, unlike detectron2's ResNet")
    else:
        arrays = {detectron2_name(key): value.numpy() for key, value in state.items()}
        whole = {"model": arrays, "__author__": "SogCLR", "matching_heuristics": True}
        write(args.out, lambda file: pickle.dump(whole, file))
    print(f"{args.out}: {arch} with {stem} stem, {len(state)} tensors, for {args.format}")


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file from train.py, or any that lincls.py accepts")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to create")
    parser.add_argument("--format", default="torchvision", choices=("torchvision", "detectron2"), help="target ResNet")
    args = parser.parse_args()
    try:
        export(args)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
