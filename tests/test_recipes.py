"""What the shell scripts ask of train.py and lincls.py, told by a stand-in for python; `test_scripts` runs them."""

import os
import subprocess
from pathlib import Path

import pytest

import lincls
import train

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
# Writes down its arguments; in the place of train.py it also leaves a checkpoint, under a name as train.py's: where
# BESIDE is a folder, after it has met a second one there; where FAILS is its seed, it ends with code 75 instead.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$CALLS"
if [ "$1" = train.py ]; then
    while [ $# -gt 0 ]; do
        case $1 in --save_dir) save_dir=$2 ;; --batch-size) batch=$2 ;; --lr) lr=$2 ;; --seed) seed=$2 ;; esac
        shift
    done
    if [ -d "$BESIDE" ]; then
        touch "$BESIDE/$$"
        for _ in {1..100}; do
            here=("$BESIDE"/*)
            [ ${#here[@]} -lt 2 ] || break
            sleep 0.1
        done
        [ ${#here[@]} -ge 2 ] || exit 3
    fi
    [ "$seed" != "${FAILS:-none}" ] || exit 75
    mkdir -p "$save_dir/some_bz_${batch}_lr_$lr" && touch "$save_dir/some_bz_${batch}_lr_$lr/checkpoint_last.pth.tar"
fi
"""


@pytest.fixture
def calls(tmp_path):
    """A function that runs a script with flags and variables of the environment, and returns its calls of python."""
    python, file = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(script, *flags, code=0, **variables):
        file.write_text("")
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        done = subprocess.run(["bash", SCRIPTS / script, *map(str, flags)], text=True, capture_output=True, timeout=60,
                              env=kept | {"PYTHON": str(python), "CALLS": str(file)} | variables)
        assert done.returncode == code, done.stdout + done.stderr
        return [line.split() for line in file.read_text().splitlines()] if code == 0 else done.stderr

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


def test_torchrun_on_several_machines(calls):
    """With MEET they must meet there; without it, whatever else is set, one machine is on its own."""
    (alone,), (together,) = (calls("pretrain_imagenet1k_torchrun.sh", HOST="elsewhere", **more)
                             for more in ({}, {"MEET": "node1", "NODES": "2", "GPUS": "4"}))
    assert "--standalone" in alone
    assert " --nnodes 2 --rdzv-backend c10d --rdzv-endpoint node1:29500 " in " ".join(together)
    assert together[together.index("--nproc-per-node") + 1] == "4"


def test_batch_size_experiment(calls, tmp_path):
    """Each loss, batch size and seed must be trained once, and evaluated thrice from its own checkpoint."""
    variables = {"OUT": str(tmp_path / "out"), "DATA_NAME": "folder", "DATA": str(tmp_path)}
    subset, *done, collect = calls("cifar10_batch_size_cpu.sh", BATCHES="8 16", SEEDS="1 2", **variables)
    assert subset[0] == "scripts/make_subset.py"
    assert collect[:2] == ["scripts/collect_results.py", str(tmp_path / "out")]
    trained, runs = [], len(done) // 4
    for k in range(runs):
        asked = settings(train, done[4 * k])
        trained.append((asked["loss_type"], asked["batch_size"], asked["seed"]))
        for call, protocol in zip(done[4 * k + 1:4 * k + 4], ({}, {"features": "cached"}, {"knn": True}), strict=True):
            evaluated = settings(lincls, call)
            assert Path(evaluated["pretrained"]).is_relative_to(asked["save_dir"])
            assert f"_bz_{asked['batch_size']}_" in evaluated["pretrained"]
            assert {key: evaluated[key] for key in ("features", "knn", "seed", "precision")} == {
                "features": "augmented", "knn": False, "seed": asked["seed"], "precision": "bf16"} | protocol
    assert sorted(trained) == [(loss, batch, seed) for loss in ("cl", "dcl") for batch in (8, 16) for seed in (1, 2)]


def test_batch_size_experiment_side_by_side(calls, tmp_path):
    """With JOBS=2 two runs must go on at a time, each with its log, and the table come when all have ended; when one is
    stopped, those beside it are waited for, no more begin, and its code is the script's.
    """
    beside = tmp_path / "beside"
    beside.mkdir()
    variables = {"OUT": str(tmp_path / "out"), "JOBS": "2", "BATCHES": "8", "LOSSES": "dcl", "PROTOCOLS": "knn",
                 "BESIDE": str(beside)}
    *done, collect = calls("cifar10_batch_size.sh", SEEDS="1 2 3", **variables)
    assert sorted(call[0] for call in done) == 3 * ["lincls.py"] + 3 * ["train.py"]
    assert collect[0] == "scripts/collect_results.py"
    assert {settings(train, call)["workers"] for call in done if call[0] == "train.py"} == {8}
    assert sorted(file.stem for file in (tmp_path / "out").glob("*.log")) == ["dcl_8_1", "dcl_8_2", "dcl_8_3"]

    message = calls("cifar10_batch_size.sh", SEEDS="1 2 3 4", FAILS="1", code=75, **variables)
    assert "stops with code 75 when" in message
    made = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[0] for call in made if "collect" in call[0]] == []
    assert {settings(train, call)["seed"] for call in made if call[0] == "train.py"} in ({1, 2}, {1, 2, 3})
    assert "JOBS=two: must be" in calls("cifar10_batch_size.sh", JOBS="two", code=2)


def test_what_of_sogclr_helps(calls, tmp_path):
    """Each gamma must be tried at each temperature, SimCLR once at each, and all be told apart in one table."""
    subset, *done, collect = calls("cifar10_gamma_cpu.sh", OUT=str(tmp_path / "out"), SEEDS="1", PROTOCOLS="knn")
    assert (subset[0], collect) == ("scripts/make_subset.py", ["scripts/collect_results.py", str(tmp_path / "out")])
    asked = [settings(train, call) for call in done if call[0] == "train.py"]
    assert sorted((one["loss_type"], one["t"], one["gamma"], one["batch_size"]) for one in asked) == sorted(
        [("cl", t, 0.9, 16) for t in (0.1, 0.05)]
        + [("dcl", t, gamma, 16) for t in (0.1, 0.05) for gamma in (1, 0.9, 0.2)])
    assert len({one["save_dir"] for one in asked}) == len(asked)


def test_batch_size_experiment_refuses_what_it_would_mix_up(calls, tmp_path):
    """A flag that it sets itself, and a folder with runs of other settings, must end it with one line."""
    assert "--arch: is the script's own" in calls("cifar10_batch_size.sh", "--arch", "resnet50", code=2)
    one = {"OUT": str(tmp_path / "out"), "SEEDS": "1", "BATCHES": "8", "LOSSES": "cl", "PROTOCOLS": "knn"}
    assert "--seed: is the script's own" in calls("cifar10_batch_size.sh", code=2, VARIANTS="--t 0.5\n--seed 3")
    calls("cifar10_batch_size.sh", "--lr", 0.5, **one)
    assert "holds runs with other settings too" in calls("cifar10_batch_size.sh", "--lr", 0.7, code=2, **one)


def test_search_never_sees_validation_images(calls, tmp_path):
    """Its images must be held out of the training split, and each change be tried once for each loss that knows it."""
    subset, *done, collect = calls("cifar10_search.sh", OUT=str(tmp_path / "out"))
    assert "--held-out" in subset
    assert collect == ["scripts/collect_results.py", str(tmp_path / "out")]
    asked = [settings(train, call) for call in done if call[0] == "train.py"]
    assert {one["data"] for one in asked} == {subset[1]}
    names = "loss_type", "t", "lr", "crop_min", "weight_decay", "gamma"
    changes = [tuple(one[name] for name in names) for one in asked]
    assert len(set(changes)) == len(changes) == 9 + 11
    assert {change[-1] for change in changes if change[0] == "cl"} == {0.9}
