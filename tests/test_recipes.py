"""What the recipes ask of train.py and lincls.py, recorded by a stand-in for python."""

import os
import subprocess

import pytest
from helpers import PYTHON, ROOT, TIMEOUT_SECONDS, TINY, run

import lincls
import train

SCRIPTS = ROOT / "scripts"


@pytest.fixture
def calls(tmp_path):
    """A function that runs a script with flags and environment variables, and returns its calls of python."""
    python, file = tmp_path / "python", tmp_path / "calls"
    python.write_text("""#!/bin/sh\nprintf '%s\\n' "$*" >> "$CALLS"\n""")
    python.chmod(0o755)

    def run(script, *flags, **variables):
        file.write_text("")
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        subprocess.run(["bash", SCRIPTS / script, *map(str, flags)], check=True, timeout=TIMEOUT_SECONDS,
                       env=kept | {"PYTHON": str(python), "CALLS": str(file)} | variables)
        return [line.split() for line in file.read_text().splitlines()]

    return run


def settings(module, call):
    """What the real parser makes of a call of train.py or lincls.py."""
    return vars(module.PARSER.parse_args(call[call.index(module.__name__ + ".py") + 1:]))


IMAGENET = {"data_name": "imagenet1000", "arch": "resnet50", "batch_size": 256, "epochs": 800, "loss_type": "dcl"}
CIFAR = {"arch": "resnet50", "batch_size": 64, "epochs": 400, "lr": 1.0, "t": 0.3, "weight_decay": 1e-4}
PRETRAIN = {"imagenet1k": IMAGENET,
            "imagenet1k_1gpu": IMAGENET,
            "imagenet1k_100epochs": IMAGENET | {"epochs": 100},
            "imagenet1k_torchrun": IMAGENET | {"batch_size": 1024},
            "imagenet100": IMAGENET | {"data_name": "imagenet100", "epochs": 400},
            "cifar10": CIFAR | {"data_name": "cifar10"},
            "cifar100": CIFAR | {"data_name": "cifar100"},
            "folder": {"data_name": "folder", "arch": "resnet50", "bad_images": "skip"}}


def test_every_recipe_is_told_here():
    assert {path.stem.removeprefix("pretrain_") for path in SCRIPTS.glob("pretrain_*.sh")} == PRETRAIN.keys()


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_recipe_is_what_its_head_says(name, calls, tmp_path):
    """With its own data set and schedule, to be continued by the same command, and overruled by flags behind it."""
    (call,) = calls(f"pretrain_{name}.sh", "--lr", 0.5, DATA="D", SAVE_DIR=str(tmp_path / "S"))
    asked = settings(train, call)
    expected = PRETRAIN[name] | {"lr": 0.5, "data": "D", "save_dir": str(tmp_path / "S"), "resume": "auto"}
    assert {key: asked[key] for key in expected} == expected


@pytest.mark.parametrize(("name", "data_name"), [("imagenet1k", "imagenet1000"), ("imagenet100", "imagenet100"),
                                                 ("cifar10", "cifar10"), ("cifar100", "cifar100")])
def test_evaluation_recipe_is_what_its_head_says(name, data_name, calls, tmp_path):
    (call,) = calls(f"lincls_{name}.sh", tmp_path / "c.pth.tar", "--epochs", 3, DATA="D")
    asked = settings(lincls, call)
    assert [asked[key] for key in ("data_name", "data", "pretrained", "epochs", "lr", "batch_size", "resume")] == [
        data_name, "D", str(tmp_path / "c.pth.tar"), 3, 0.1, 1024, "auto"]


@pytest.mark.slow
def test_recipe_runs(imagenet, tmp_path):
    """One for real, on few small images; `test_faults` runs that of torchrun."""
    output, _ = run("bash", SCRIPTS / "pretrain_imagenet100.sh", *TINY, "--dry-run", PYTHON=PYTHON,
                    DATA=str(imagenet), SAVE_DIR=str(tmp_path / "saved"))
    assert "dry run: nothing was written" in output


def test_torchrun_on_several_machines(calls):
    """With MEET they must meet there; without it, whatever else is set, one machine is on its own."""
    (alone,), (together,) = (calls("pretrain_imagenet1k_torchrun.sh", HOST="elsewhere", **more)
                             for more in ({}, {"MEET": "node1", "NODES": "2", "GPUS": "4"}))
    assert "--standalone" in alone
    assert " --nnodes 2 --rdzv-backend c10d --rdzv-endpoint node1:29500 " in " ".join(together)
    assert together[together.index("--nproc-per-node") + 1] == "4"
