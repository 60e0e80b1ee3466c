"""What the shell scripts ask of train.py and lincls.py, told by a stand-in for python; `test_scripts` runs them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import lincls
import train

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
# Writes down its arguments; in the place of make_subset.py it also makes the folder, and in that of train.py it leaves
# a checkpoint, under a name as train.py's. It also tells such names where a script asks for some; the python REAL tells
# the true ones. Where BESIDE is a folder, it first meets a second one there, and notes how many are there half a second
# later; where FAILS is its seed, it does not wait so long and ends with code 75; where LONG is set, it goes on until
# Ctrl-C. Where FAILS is `collect`, it ends with code 2 in the place of collect_results.py.
STAND_IN = """#!/usr/bin/env bash
read_flags() {
    while [ $# -gt 0 ]; do
        case $1 in --save_dir) save_dir=$2 ;; --batch-size) batch=$2 ;; --lr) lr=$2 ;; --seed) seed=$2 ;;
            --loss_type) loss=$2 ;; --t) t=$2 ;; --gamma) gamma=$2 ;; --crop-min) crop=$2 ;; --wd) wd=$2 ;;
            --data_name) data=$2 ;; --data) [ "$data" != folder ] || data=folder-${2##*/} ;; esac
        shift
    done
    name=${data}_${loss}_bz_${batch}_lr_${lr}_wd_${wd}_t_${t}_g_${gamma}${crop:+_crop_min_$crop}_seed_$seed
}
if [ "$1" = -c ]; then
    [ -z "$REAL" ] || exec "$REAL" "$@"
    call=()
    while IFS= read -r -d '' item; do
        call+=("$item")
        [ "$item" != $'\\n' ] || { read_flags "${call[@]}"; echo "$name"; call=(); }
    done
    exit
fi
printf '%s\\n' "$*" >> "$CALLS"
[ "$1" != scripts/tools/make_subset.py ] || mkdir "$2"
[ "$1" != scripts/experiments/collect_results.py ] || [ "$FAILS" != collect ] || exit 2
if [ "$1" = train.py ]; then
    read_flags "$@"
    if [ -d "$BESIDE" ]; then
        touch "$BESIDE/$seed"
        for _ in {1..200}; do
            here=("$BESIDE"/*)
            [ ${#here[@]} -lt 2 ] || break
            sleep 0.1
        done
        [ "$seed" != "$FAILS" ] || exit 75
        trap 'echo "stopped --seed $seed" >> "$CALLS"; exit 75' INT
        [ -z "$LONG" ] || echo hears >> "$CALLS"
        for _ in {1..300}; do
            [ -n "$LONG" ] || break
            sleep 0.1
        done
        sleep 0.5
        here=("$BESIDE"/*)
        echo "together ${#here[@]}" >> "$CALLS"
        rm "$BESIDE/$seed"
    fi
    mkdir -p "$save_dir/$name" && touch "$save_dir/$name/checkpoint_last.pth.tar"
fi
"""


def hear_ctrl_c():
    """What the tests were started by may have closed its ears."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def calls(tmp_path):
    """A function that runs a script with flags and variables of the environment, and returns its calls of python, or
    what it says of its end where its code is not 0. It gets Ctrl-C when `interrupt` has returned.
    """
    python, file = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(script, *flags, code=0, interrupt=None, **variables):
        file.write_text("")
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        process = subprocess.Popen(["bash", SCRIPTS / script, *map(str, flags)], text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, start_new_session=True, preexec_fn=hear_ctrl_c,
                                   env=kept | {"PYTHON": str(python), "CALLS": str(file),
                                               "OUT": str(tmp_path / "out")} | variables)
        if interrupt:
            interrupt()
            os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == code, output + errors
        return [line.split() for line in file.read_text().splitlines()] if code == 0 else errors

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
    whole = tmp_path / "cats & Größe"
    variables = {"OUT": str(tmp_path / "öut"), "DATA_NAME": "folder", "DATA": str(whole), "REAL": sys.executable}
    subset, *done, collect = calls("cifar10_batch_size_cpu.sh", BATCHES="8 16", SEEDS="1 2", **variables)
    assert subset[0] == "scripts/tools/make_subset.py"
    assert Path(subset[1], "made_from").read_text() == f"{whole}\n"
    assert collect == ["scripts/experiments/collect_results.py", str(tmp_path / "öut"), "--png",
                       str(tmp_path / "öut/results.png")]
    trained, runs = [], len(done) // 4
    for k in range(runs):
        asked = settings(train, done[4 * k])
        checkpoint = f"{asked['save_dir']}/{train.run_name(SimpleNamespace(**asked))}/checkpoint_last.pth.tar"
        trained.append((asked["loss_type"], asked["batch_size"], asked["seed"]))
        for call, protocol in zip(done[4 * k + 1:4 * k + 4], ({}, {"features": "cached"}, {"knn": True}), strict=True):
            evaluated = settings(lincls, call)
            assert evaluated["pretrained"] == checkpoint
            assert {key: evaluated[key] for key in ("features", "knn", "seed", "precision")} == {
                "features": "augmented", "knn": False, "seed": asked["seed"], "precision": "bf16"} | protocol
        assert asked["data"] == evaluated["data"] == subset[1]
    assert sorted(trained) == [(loss, batch, seed) for loss in ("cl", "dcl") for batch in (8, 16) for seed in (1, 2)]


@pytest.fixture
def side_by_side(tmp_path):
    """Variables of the environment for runs at the same time, see STAND_IN."""
    (tmp_path / "beside").mkdir()
    return {"OUT": str(tmp_path / "out"), "JOBS": "2", "BATCHES": "8", "LOSSES": "dcl", "PROTOCOLS": "knn",
            "BESIDE": str(tmp_path / "beside")}


def test_batch_size_experiment_side_by_side(calls, side_by_side, tmp_path):
    """With JOBS=2 there must always be two runs, each with its log, and the table when all have ended."""
    *done, collect = calls("cifar10_batch_size.sh", SEEDS="1 2 3 4", **side_by_side)
    assert collect[0] == "scripts/experiments/collect_results.py"
    assert sorted(call[0] for call in done) == 4 * ["lincls.py"] + 4 * ["together"] + 4 * ["train.py"]
    assert max(int(call[1]) for call in done if call[0] == "together") == 2
    assert {settings(train, call)["workers"] for call in done if call[0] == "train.py"} == {8}
    assert len(list((tmp_path / "out").glob("dcl_8_[1-4].log"))) == 4
    again, = calls("cifar10_batch_size.sh", SEEDS="1 2 3 4", **side_by_side)        # nothing is done twice
    assert again[0] == "scripts/experiments/collect_results.py"
    assert len(calls("cifar10_batch_size.sh", SEEDS="1", **side_by_side | {"PROTOCOLS": "cached", "BESIDE": ""})) == 3
    others = side_by_side | {"DATA": "elsewhere", "BESIDE": ""}
    assert len(calls("cifar10_batch_size.sh", SEEDS="2", **others)) == 3
    assert "not foo" in calls("cifar10_batch_size.sh", PROTOCOLS="knn foo", code=2)
    assert "JOBS=two: must be" in calls("cifar10_batch_size.sh", JOBS="two", code=2)


def test_a_run_that_stops_ends_the_experiment(calls, side_by_side, tmp_path):
    """Those beside it must be waited for, no more begin, and its code be the script's."""
    errors = calls("cifar10_batch_size.sh", SEEDS="1 2 3", FAILS="1", code=75, **side_by_side)
    assert "stops with code 75" in errors
    assert re.findall(r"=> code 75, (\S+):", errors) == [str(tmp_path / "out" / "dcl_8_1.log")]
    made = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert sorted(call[0] for call in made) == ["lincls.py", "together", "train.py", "train.py"]


def test_ctrl_c_stops_all_runs(calls, side_by_side, tmp_path):
    """Ctrl-C goes to all processes; each run must hear it, and the script wait for their ends."""
    def press():
        deadline = time.monotonic() + 30
        while (tmp_path / "calls").read_text().count("hears") < 2 and time.monotonic() < deadline:
            time.sleep(0.1)

    calls("cifar10_batch_size.sh", SEEDS="1 2 3", LONG="yes", code=75, interrupt=press, **side_by_side)
    made = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert sorted(call[0] for call in made) == 2 * ["hears"] + 2 * ["stopped"] + 2 * ["train.py"]


def test_what_of_sogclr_helps(calls, tmp_path):
    """Each gamma must be tried at each temperature, SimCLR once at each, and all be told apart in one table."""
    out = tmp_path / "out[1]"
    subset, *done, collect = calls("cifar10_gamma_cpu.sh", OUT=str(out), SEEDS="1", PROTOCOLS="knn")
    assert subset[0] == "scripts/tools/make_subset.py"
    assert collect == ["scripts/experiments/collect_results.py", str(out)]
    asked = [settings(train, call) for call in done if call[0] == "train.py"]
    assert sorted((one["loss_type"], one["t"], one["gamma"], one["batch_size"]) for one in asked) == sorted(
        [("cl", t, 0.9, 16) for t in (0.1, 0.05)]
        + [("dcl", t, gamma, 16) for t in (0.1, 0.05) for gamma in (1, 0.9, 0.2)])
    assert len({one["save_dir"] for one in asked}) == len(asked)
    (out / "results.png").touch()
    alone = calls("cifar10_batch_size_cpu.sh", OUT=str(out), SEEDS="1", BATCHES="16", PROTOCOLS="knn")
    assert "--png" not in alone[-1]     # what is there does not fit one plot, whoever made it
    assert not (out / "results.png").exists()


def test_batch_size_experiment_refuses_what_it_would_mix_up(calls, tmp_path):
    """A flag that it sets itself, one that is not known, and a folder with a run of other settings or other images must
    end it with one line, before anything is trained.
    """
    assert "--arch: is the script's own" in calls("cifar10_batch_size.sh", "--arch", "resnet50", code=2)
    one = {"OUT": str(tmp_path / "out"), "SEEDS": "1", "BATCHES": "8", "LOSSES": "cl", "PROTOCOLS": "knn"}
    assert "--seed: is the script's own" in calls("cifar10_batch_size.sh", code=2, VARIANTS="--t 0.5\n--seed 3")
    for script, unknown in (("train.py", {"VARIANTS": "--t 0.5\n--gama 1"}), ("lincls.py", {"CLASSIC": "--gama 1"})):
        assert calls("cifar10_batch_size.sh", code=2, **one | unknown, PYTHON=sys.executable) == \
            f"{script}: error: unrecognized arguments: --gama 1\n"
    for flag in ("--arch=resnet50", "-aresnet50", "-b8"):
        assert f"{flag}: is the script's own" in calls("cifar10_batch_size.sh", flag, code=2)
    assert not (tmp_path / "out").exists()
    one |= {"SUBSET": "--train 20 --val 20"}
    calls("cifar10_batch_size.sh", "--lr", 0.5, **one)
    for lr, other, message in ((0.7, {}, "cl_8_1: holds a run with other settings, name another OUT"),
                               (0.5, {"SUBSET": "--train 30 --val 20"}, "cl_8_1: holds a run with other settings"),
                               (0.5, {"DATA_NAME": "cifar100"}, "was made from cifar10, not from cifar100"),
                               (0.5, {"LINCLS": "--help", "REAL": sys.executable}, "is --help in LINCLS")):
        assert message in calls("cifar10_batch_size.sh", "--lr", lr, code=2, **one | other)
        assert (tmp_path / "calls").read_text() == ""


@pytest.mark.parametrize("script", ["cifar10_batch_size.sh", "cifar10_batch_size_cpu.sh", "cifar10_search.sh",
                                    "cifar10_gamma_cpu.sh"])
def test_help_shows_the_heads_and_makes_nothing(script, calls, tmp_path):
    """The head of the script that was called must come first, then that of the one with all variables."""
    assert calls(script, "--help", OUT=str(tmp_path / "out")) == []
    assert not (tmp_path / "out").exists()
    told = subprocess.run(["bash", SCRIPTS / script, "--help"], cwd=tmp_path, text=True, capture_output=True).stdout
    heads = re.split(r"^scripts/(\S+)\n", told, flags=re.MULTILINE)
    assert (heads[1], heads[-2]) == (script, "cifar10_batch_size.sh")
    for name, head in zip(heads[1::2], heads[2::2], strict=True):
        lines = (SCRIPTS / name).read_text().splitlines()[1:]
        assert [line.strip() for line in head.splitlines()] == [
            line[1:].strip() for line in lines[:lines.index("set -euo pipefail")]]


@pytest.mark.parametrize("size", ["", "--train 40000 --val 10000"])
def test_search_never_sees_validation_images(size, calls, tmp_path):
    """Its images must be held out of the training split, and each change be tried once for each loss that knows it."""
    subset, *done, collect = calls("cifar10_search.sh", "--epochs", 7, OUT=str(tmp_path / "out"), SUBSET=size)
    assert "--held-out" in subset
    assert subset[subset.index("--train") + 1] == ("40000" if size else "5000")
    assert collect == ["scripts/experiments/collect_results.py", str(tmp_path / "out")]
    asked = [settings(train, call) for call in done if call[0] == "train.py"]
    assert {(one["data_name"], one["data"], one["epochs"]) for one in asked} == {("folder", subset[1], 7)}
    names = "loss_type", "t", "lr", "crop_min", "weight_decay", "gamma"
    changes = [tuple(one[name] for name in names) for one in asked]
    assert len(set(changes)) == len(changes) == 11 + 13
    assert {change[-1] for change in changes if change[0] == "cl"} == {0.9}


def test_nothing_is_trained_twice(calls, tmp_path):
    """Where a seed or a variant is given twice, or differently a second time; and a results.md must not be lost."""
    one = {"OUT": str(tmp_path / "out"), "BATCHES": "8", "LOSSES": "dcl", "PROTOCOLS": "knn"}
    *done, _ = calls("cifar10_batch_size.sh", SEEDS="1 1", VARIANTS="--t 0.5 --wd 0\n\n--t 0.5  --wd 0", **one)
    assert [call[0] for call in done] == 2 * ["train.py", "lincls.py"]
    (tmp_path / "out" / "results.md").write_text("a table")
    calls("cifar10_batch_size.sh", SEEDS="1", VARIANTS="--wd 0 --t 0.5", FAILS="collect", code=2, **one)
    assert (tmp_path / "calls").read_text().startswith("scripts/experiments/collect_results.py")
    assert (tmp_path / "out" / "results.md").read_text() == "a table"


def test_search_from_where_the_last_one_ended(calls, tmp_path):
    """A starting point with what a variant changes must not be trained twice."""
    _, *done, _ = calls("cifar10_search.sh", "--t", 0.1, OUT=str(tmp_path / "out"))
    asked = [settings(train, call) for call in done if call[0] == "train.py"]
    both = [[(one["t"], one["lr"]) for one in asked if one["loss_type"] == loss] for loss in ("cl", "dcl")]
    assert [pairs.count((0.1, 0.15)) for pairs in both] == [1 + 2, 1 + 4]      # it, crop and wd, and gamma twice
    assert [pairs.count((0.1, 0.075)) for pairs in both] == [1, 1]
