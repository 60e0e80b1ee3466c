#!/usr/bin/env python3
"""Export the encoder from a checkpoint, for use without this repository.

    python scripts/tools/export_encoder.py CHECKPOINT OUT [--format torchvision|timm|detectron2]

CHECKPOINT is from train.py or lincls.py, or any other that lincls.py accepts as --pretrained. OUT is
  torchvision: a state dict of its ResNet without the classifier, for `torch.load(OUT, weights_only=True)`
  timm: a folder, for `timm.create_model("local-dir:OUT", pretrained=True)`
  detectron2: for MODEL.WEIGHTS, a pickle of arrays under its names, as written by MoCo's conversion
"""

import io
import json
import pickle
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sogclr import InputError, checkpoint, safetensors
from sogclr.builder import architecture, encoder_state
from sogclr.datasets import mean_and_std, trained_on
from sogclr.flags import Parser


def write_torchvision(path, state):
    buffer = io.BytesIO()       # torch.save would turn the disk's errors into its own
    torch.save(state, buffer)
    path.write_bytes(buffer.getbuffer())


def write_timm(path, state, arch, data_name, image_size):
    """Write the two files of a timm model. Its evaluation transform then is `sogclr.loader.center_view`.

    data_name, image_size: what the encoder was trained on, see `sogclr.datasets.trained_on`.
    """
    mean, std = mean_and_std(data_name)
    config = {"architecture": arch, "num_classes": 0, "pretrained_cfg": {
        "input_size": [3, image_size, image_size], "mean": mean, "std": std, "interpolation": "bilinear",
        "crop_pct": 1.0 if image_size <= 32 else 0.875, "crop_mode": "center", "num_classes": 0, "first_conv": "conv1",
        "classifier": "fc"}}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    safetensors.write(state, path / "model.safetensors")


def write_detectron2(path, state):
    arrays = {detectron2_name(key): value.numpy() for key, value in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "SogCLR", "matching_heuristics": True}))


def detectron2_name(name):
    """torchvision's name -> detectron2's: `layer1.0.bn2.bias` -> `res2.0.conv2.norm.bias`, `bn1.bias` ->
    `stem.conv1.norm.bias`.
    """
    name = re.sub(r"^layer(\d)", lambda layer: f"res{int(layer[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return name if name.startswith("res") else "stem." + name


def export(args):
    with checkpoint.new_path(args.out, "OUT") as part:
        source = f"CHECKPOINT {args.checkpoint}"
        loaded = checkpoint.load(args.checkpoint, "CHECKPOINT")
        state = encoder_state(loaded, source)
        arch, stem = architecture(state, source)
        if stem == "cifar" and args.format != "torchvision":
            raise InputError(f"--format {args.format}: {args.checkpoint} has the cifar stem, unlike {args.format}'s "
                             "ResNet")
        # In the usual dtype and layout, whatever the checkpoint's (a GPU trains in channels_last); counters stay as is.
        state = {key: value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True,
                               memory_format=torch.contiguous_format) for key, value in state.items()}
        if args.format == "torchvision":
            write_torchvision(part, state)
        elif args.format == "timm":
            write_timm(part, state, arch, *trained_on(loaded))
        else:
            write_detectron2(part, state)
    print(f"{args.out}: {arch} with {stem} stem, {len(state)} tensors, for {args.format}")


def main():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file from train.py, or any that lincls.py accepts")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to create, for timm a folder")
    parser.add_argument("--format", default="torchvision", choices=("torchvision", "timm", "detectron2"),
                        help="whose ResNet it is for")
    args = parser.parse_args()
    try:
        export(args)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
