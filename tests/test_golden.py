"""The numbers of two tiny runs and the structure of both scripts' checkpoints, as stored in `tests/golden`.

    python -m tests.test_golden     rewrites them: only for a change that is meant to change them, and says so
"""

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lincls
import train
from sogclr import shapes

GOLDEN = Path(__file__).parent / "golden"
COMMON = shlex.split("--data_name shapes --arch resnet18 --stem imagenet --workers 0 --epochs 3 --seed 1 "
                     "--precision fp32 --print-freq 1 --save_dir saved")
PRETRAIN = shlex.split("--batch-size 10 --warmup-epochs 1 --lr 0.003 --gamma 0.5 --t 0.5 --mlp-dim 64 --dim 16")
LINEAR = shlex.split("--batch-size 25 --lr 0.3")
# The sums in convolutions and matrix products depend on a CPU's vector length (AVX2 or AVX-512) and on oneDNN's kernels
# for it, and so do the last bits of every loss. 30 steps at this small learning rate let them grow to 5e-6, no more.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def few_images(tmp_path, monkeypatch):
    """100 images, so that 30 steps visit each three times, and the moving averages matter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(shapes.LENGTHS, "train", 100)
    monkeypatch.setitem(shapes.LENGTHS, "val", 50)


def launch(module, *flags):
    """Run a script in this process; return the folder of its run."""
    sys.argv = [module.__name__]
    module.launch(module.main_worker, module.PARSER.parse_args([*COMMON, *flags]))
    return max(Path("saved").rglob("checkpoint_last.pth.tar"), key=os.path.getmtime).parent


def curves(folder):
    """{name: [30 values]} of the loss and the GCL at each step, from the TensorBoard log."""
    log = EventAccumulator(str(folder)).Reload()
    return {name: [event.value for event in log.Scalars(f"loss/{name}")] for name in ("loss", "gcl")}


def structure(value):
    """A checkpoint's structure as JSON: `float32 [64, 3, 7, 7]` for a tensor."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict):
        return {str(key): structure(part) for key, part in value.items()}
    return [structure(part) for part in value] if isinstance(value, (list, tuple)) else value


def names(value):
    """A structure without the values of non-tensors."""
    if isinstance(value, dict):
        return {key: names(part) for key, part in value.items()}
    if isinstance(value, list):
        return [names(part) for part in value]
    return value if str(value).endswith("]") else None


def built(value, generator):
    """A checkpoint with a given structure, with positive numbers in its tensors."""
    if isinstance(value, dict):
        return {int(key) if key.isdigit() else key: built(part, generator) for key, part in value.items()}
    if isinstance(value, list):
        return [built(part, generator) for part in value]
    dtype, _, shape = str(value).partition(" ")
    if not shape.startswith("["):
        return value
    tensor = torch.rand(json.loads(shape), generator=generator) / 10 + 0.01
    return tensor.to(getattr(torch, dtype))


@pytest.mark.parametrize("loss_type", ["dcl", "cl"])
def test_losses_are_unchanged(loss_type):
    """A change that is not meant to change numbers must give the same loss and GCL at each of 30 steps."""
    ours = curves(launch(train, *PRETRAIN, "--loss_type", loss_type))
    for name, values in json.loads((GOLDEN / f"{loss_type}.json").read_text()).items():
        assert len(values) == 30
        assert ours[name] == pytest.approx(values, rel=0, abs=TOLERANCE)


@pytest.mark.parametrize(("module", "flags"), [(train, PRETRAIN), (lincls, LINEAR)])
def test_earlier_checkpoints_are_resumed_and_evaluated(module, flags):
    """A file with the stored structure must be resumed and evaluated, and what is then written must have it too."""
    kept = json.loads((GOLDEN / f"{module.__name__}_checkpoint.json").read_text())
    torch.save(built(kept, torch.Generator().manual_seed(0)), "kept.pth.tar")
    folder = launch(module, *flags, "--resume", "kept.pth.tar")
    saved = torch.load(folder / "checkpoint_last.pth.tar", weights_only=True)
    assert (kept["epoch"], saved["epoch"]) == (2, 3)
    assert names(structure(saved)) == names(kept)
    how = ["--pretrained"] if module is train else ["-e", "--resume"]
    launch(lincls, *LINEAR, *how, "kept.pth.tar")
    assert list(Path("saved").rglob("results*.json"))


def renew():
    for loss_type in ("dcl", "cl"):
        folder = launch(train, *PRETRAIN, "--loss_type", loss_type)
        (GOLDEN / f"{loss_type}.json").write_text(json.dumps(curves(folder), indent=1) + "\n")
        if loss_type == "dcl":
            checkpoint = torch.load(folder / "checkpoint_0001.pth.tar", weights_only=True)
            (GOLDEN / "train_checkpoint.json").write_text(json.dumps(structure(checkpoint), indent=1) + "\n")
    checkpoint = torch.load(launch(lincls, *LINEAR) / "checkpoint_previous.pth.tar", weights_only=True)
    (GOLDEN / "lincls_checkpoint.json").write_text(json.dumps(structure(checkpoint), indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        few_images.__wrapped__(Path(folder), patch)
        renew()
