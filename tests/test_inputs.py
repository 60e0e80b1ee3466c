"""Flags and input: the authors' commands, the help, and one line for whatever is wrong."""

import itertools
import shlex
import shutil
import socket
import sys
import types

import pytest
import torch
from helpers import PRETRAIN, TINY, newest, refused

import lincls
import train
from sogclr import datasets, launch
from sogclr.distributed import log
from sogclr.flags import resolve_precision

pytestmark = pytest.mark.usefixtures("no_gpu")

LINEAR = """--dist-url 'tcp://localhost:10001' --multiprocessing-distributed --world-size 1 --rank 0 --workers 32
 --pretrained DIR2/RUN/checkpoint_0799.pth.tar --data_name imagenet1000 --save_dir DIR2"""
SCHEDULE = {"epochs", "batch_size", "lr", "weight_decay", "momentum", "arch", "data_name", "workers"}


def test_the_authors_commands_are_the_defaults():
    """Word for word, the authors' commands must parse and request what the scripts do without any flag."""
    method = {"t", "gamma", "crop_min", "warmup_epochs", "optimizer", "dim", "mlp_dim", "num_proj_layers", "loss_type",
              "learning_rate_scaling"}
    for parser, command, keys in ((train.PARSER, PRETRAIN, SCHEDULE | method), (lincls.PARSER, LINEAR, SCHEDULE)):
        asked, default = (vars(parser.parse_args(args)) for args in (shlex.split(command), []))
        assert {key: asked[key] for key in keys} == {key: default[key] for key in keys}


@pytest.mark.parametrize("parser", [train.PARSER, lincls.PARSER])
def test_help_states_the_true_defaults(parser, capsys):
    """Each flag's help must state the parser's default, or describe what happens without the flag."""
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help"])
    text = "".join(capsys.readouterr().out.split())
    for action in parser._actions:
        states = parser._get_formatter()._expand_help(action)
        assert "".join(states.split()) in text
        if action.default is None:
            assert "(default: " in states or action.dest == "gpu", action.dest
        elif action.default is not False and action.default not in ("", "==SUPPRESS=="):
            assert states.endswith(f"(default: {action.default})") or f"; {action.default} is" in states, action.dest


@pytest.mark.parametrize(("module", "flags"), [
    (train, ["-b", "64", "--wd=0.5", "--dry-run", "--gpu", "0", "--resume", "auto", "--lr", "0.075"]),
    (lincls, ["--lr", "0.1", "1", "--features", "cached", "--multiprocessing-distributed", "--wd", "0"])])
def test_command_line_of_settings(module, flags):
    """It must give the same settings, and leave out defaults."""
    settings = module.PARSER.parse_args(flags)
    words = module.PARSER.command_line(settings)
    assert module.PARSER.parse_args(words) == settings
    assert "0.075" not in words


BAD = [
    (train, ["--data", "nowhere"], "--data nowhere: no such folder"),
    (train, ["--data", "EMPTY"], "EMPTY: has no folder 'train'"),
    (train, ["--data", "EMPTY", "--data_name", "folder"], "contains no images"),
    (lincls, ["--pretrained", "missing.pth"], "--pretrained missing.pth: no such file"),
    (lincls, ["--pretrained", "TEXT"], "TEXT: not a checkpoint"),
    (train, ["--rho", "1", "--t-lr", "0"], "--rho, --t-lr: needs --loss_type isogclr"),
    (train, ["--loss_type", "isogclr", "--t-min", "0.9"], "--t-min 0.9: must not be above --t-max 0.7"),
    (train, ["--t-max", "1e39"], "--t-max: must be a number in [0.001, 1000]"),
    (train, ["--loss_type", "isogclr", "--t", "0.8"], "--t 0.8: must be in --t-min to --t-max, 0.05 to 0.7"),
    (train, ["--loss-batch-size", "3"], "--loss-batch-size 3: must divide --batch-size"),
    (lincls, ["-e"], "--evaluate: needs"),
    (lincls, ["-e", "--resume", "auto"], "--evaluate: "),
    (lincls, ["--finetune", "--features", "cached"], "--finetune: changes the encoder"),
    (lincls, ["--finetune", "--lr", "0.1", "0.2"], "--finetune: trains one network, pass one --lr"),
    (lincls, ["--finetune", "--batch-size", "25"], "--finetune: --batch-size 25: the data set has only 24"),
    (lincls, ["--knn", "--finetune"], "--knn: has no use for --finetune"),
    (lincls, ["--logistic", "--lr", "1", "2"], "--logistic: has no use for --finetune"),
    (lincls, ["--shots", "5"], "--shots: needs --logistic"),
    (lincls, ["--logistic", "--draws", "3"], "--draws: needs --shots"),
    (lincls, ["--knn", "--resume", "OTHER"], "--knn: has nothing to resume"),
    (lincls, ["--lr", "0.1", "0.10"], "--lr, --wd: a value is given twice"),
    (lincls, ["--encoder-lr", "0.1"], "--encoder-lr: needs --finetune"),
    (lincls, ["--train-percent", "0"], "--train-percent: must be a number in (0, 100]"),
    (lincls, ["--start-epoch", "90"], "--start-epoch 90: must be below --epochs 1"),
    (train, ["--start-epoch", "900"], "--start-epoch 900: must be below --epochs 1"),
    (train, ["--world-size", "0"], "--world-size 0: must be at least 1"),
    (train, ["--arch", "resnet19"], "--arch: invalid choice"),
    (train, ["--batch-size", "25"], "--batch-size 25: the data set has only 24"),
    (train, ["--batch-size", "1"], "--batch-size 1: "),
    (train, ["--gamma", "0"], "--gamma: must be a number in (0, 1]"),
    (train, ["--gamma", "1.5"], "--gamma: must be a number in (0, 1]"),
    (train, ["--t", "0"], "--t: must be a number in (0, infinity)"),
    (train, ["--t", "nan"], "--t: must be a number in (0, infinity)"),
    (train, ["--epochs", "-3"], "--epochs: must be an integer in [1, infinity)"),
    (train, ["--resume", "missing.pth"], "--resume missing.pth: no such file"),
    (train, ["--resume", "OTHER", "--epochs", "2", "--data_name", "folder"],
     "made with --data_name imagenet1000, not folder"),
    (train, ["--resume", "OTHER", "--epochs", "2", "--data", "ONE_CLASS"],
     "was trained on 24 images, but this data set has 8, use the same folder, or start a new run"),
    (train, ["--resume", "OTHER", "--epochs", "2", "--data", "ONE_FEWER"],
     "was trained on 24 images, but this data set has 23, use the same folder, or start a new run"),
    (train, ["--resume", "OTHER", "--arch", "resnet34"], "was made with --arch resnet18, not resnet34"),
    (lincls, ["--pretrained", "OTHER", "--arch", "resnet50"], "was made with --arch resnet18, not resnet50"),
    (train, ["--gpu", "7"], "--gpu 7: this machine has"),
    (train, ["--gpu", "0", "--multiprocessing-distributed"], "--gpu 0: this machine has 0 visible GPUs"),
    (train, ["--dist-backend", "nccl"], "--dist-backend nccl: needs GPUs"),
    (train, ["--resume", "EMPTY"], "EMPTY: is a folder, pass a file in it"),
    (train, ["--resume", "TEXT"], "TEXT: not a checkpoint"),
    (lincls, ["--resume", "OTHER"], "is not a checkpoint from this script"),
    (train, ["--resume", "LINEAR"], "LINEAR: is from lincls.py, pass a checkpoint from train.py"),
    (train, ["--resume", "NO_SETTINGS"], "NO_SETTINGS: was made with another model, optimizer or protocol: "),
    (lincls, ["--pretrained", ""], "argument --pretrained: is empty, as if a variable"),
    (train, ["--data", "DIR", "--save_dir="], "argument --save_dir=: is empty"),
    (train, [""], "argument without a flag: is empty"),
    (train, ["--multiprocessing-distributed", "--dist-url", "USED"], "cannot be used (Address already in use)"),
    (train, ["--world-size", "2", "--rank", "0", "--dist-url", "USED"], "cannot be used (Address already in use)"),
    (train, ["--multiprocessing-distributed", "--dist-url", "localhost"], "--dist-url localhost: must be"),
    (train, ["--multiprocessing-distributed", "--dist-url", "tcp://localhost:99999"], "a number below 65536"),
    (train, ["--multiprocessing-distributed", "--dist-url", "tcp://localhost:x"], "a number below 65536"),
    (train, ["--world-size", "2", "--rank", "1", "--dist-url", "tcp://localhost"], "a number below 65536"),
    (train, ["--world-size", "2", "--rank", "0"], "--world-size 2: needs"),
    (train, ["--world-size", "2", "--rank", "0", "--dist-url", "env://"], "variable MASTER_ADDR expected"),
    (train, ["--world-size", "2", "--rank", "2", "--dist-url", "tcp://localhost:1"], "--rank 2: must be below"),
    (train, ["--knn-freq", "1", "--data_name", "folder", "--data", "SUBSET"],
     "--knn-freq 1: needs labeled images, leave the flag out if there are none; --data"),
    (train, ["--unknown"], "unrecognized arguments: --unknown"),
    (train, ["EMPTY"], "EMPTY (pass the data set's folder as --data /"),
    (train, ["--save_dir", "TEXT/below"], "--save_dir"),
]


@pytest.fixture(scope="module")
def names(pretrained, imagenet, tmp_path_factory):
    """What the names in BAD stand for: files and folders, and a URL whose port is taken."""
    folder, other = tmp_path_factory.mktemp("bad"), newest(pretrained[1], "checkpoint_0000.pth.tar")
    (folder / "EMPTY").mkdir()
    (folder / "TEXT").write_text("text")
    (folder / "ONE_CLASS" / "train").mkdir(parents=True)
    (folder / "ONE_CLASS" / "train" / "n01440764").symlink_to(imagenet / "train" / "n01440764")
    shutil.copytree(imagenet, folder / "ONE_FEWER")
    next((folder / "ONE_FEWER" / "train").glob("*/*")).unlink()
    saved = torch.load(other, weights_only=True)
    torch.save(saved | {"best_acc1": 1.0}, folder / "LINEAR")
    torch.save(saved | {"settings": None, "optimizer": []}, folder / "NO_SETTINGS")
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield {path.name: path for path in folder.iterdir()} | {
            "OTHER": other, "SUBSET": imagenet / "train" / "n01440764", "TEXT/below": folder / "TEXT" / "below",
            "USED": f"tcp://localhost:{server.getsockname()[1]}"}


@pytest.mark.parametrize(("module", "flags", "message"), BAD, ids=[" ".join(case[1]) for case in BAD])
def test_bad_input_is_one_line(module, flags, message, names, imagenet, tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line that names the flag or file; no traceback."""
    flags = [str(names.get(flag, flag)) for flag in flags]
    monkeypatch.chdir(tmp_path)
    refused(module, ["--data", imagenet, *TINY, "--epochs", "1", *flags], message, monkeypatch, capsys)


@pytest.mark.parametrize(("environment", "flags", "message"), [
    ({"TORCHELASTIC_RUN_ID": "1"}, ["--world-size", "2", "--rank", "0"], "torchrun sets these, leave them out"),
    ({"TORCHELASTIC_RUN_ID": "1"}, ["--gpu", "0"], "torchrun sets these, leave them out"),
    ({"WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
     ["--world-size", "2", "--rank", "0", "--dist-url", "env://"],
     "--world-size 2: the environment sets WORLD_SIZE=4, use that"),
])
def test_contradictions_with_the_environment(environment, flags, message, monkeypatch, capsys):
    """What torchrun or the shell has set must not be overridden silently."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    refused(train, flags, message, monkeypatch, capsys)


@pytest.mark.parametrize(("environment", "flags", "message"), [
    ({}, ["--world-size", "2", "--rank", "1", "--dist-url", "tcp://nowhere:1"],
     "--dist-url tcp://nowhere:1: the host name nowhere cannot be looked up ([Errno -2] Name or service not known)"),
    ({"TORCHELASTIC_RUN_ID": "1", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}, [],
     "torchrun: this machine cannot look up the host name nowhere of rank 0")])
def test_unknown_host_name(environment, flags, message, monkeypatch, capsys):
    """After some tries, since another machine's name may come late, one line must tell the way out."""
    tries = []

    def unknown(host, port):
        tries.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    seconds = itertools.count(0, 10)
    clock = types.SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda _: None)
    monkeypatch.setattr(launch, "time", clock)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(train, flags, message, monkeypatch, capsys)
    assert tries == ["nowhere"] * 3


def test_more_gpus_than_there_are(monkeypatch, capsys):
    """--gpu 7 of 4 must report which there are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    message = "--gpu 7: this machine has 4 visible GPUs, numbered 0 to 3"
    refused(train, ["--gpu", "7"], message, monkeypatch, capsys)


def test_closed_standard_output(monkeypatch):
    """As some daemons start programs: nothing is printed, and nothing fails."""
    monkeypatch.setattr("sys.stdout", None)
    train.PARSER.parse_args([])
    log("line")
    sys.stdout.close()


def test_ranks_with_different_images(imagenet, monkeypatch, capsys):
    """Another machine's folder may lack some; u and the order would belong to other images there."""
    monkeypatch.setattr(datasets, "broadcast_int", lambda here: here + 1)
    refused(train, ["--data", imagenet], "rank 0 sees other images (24 images, digest ", monkeypatch, capsys)


@pytest.mark.parametrize(("capability", "precision", "said"), [
    ("AVX2", "bf16", True), ("AVX2", "fp16", True), ("AVX2", "fp32", False), ("AVX512", "bf16", False)])
def test_slow_precision_is_said(capability, precision, said, monkeypatch, capsys):
    """One line with the way out where the CPU has no fast instructions for half precision."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    resolve_precision(precision, torch.device("cpu"))
    assert ("many times slower than fp32; pass --precision fp32" in capsys.readouterr().out) == said


@pytest.mark.parametrize("module", [train, lincls])
def test_numbers_out_of_range_are_refused(module, capsys):
    """Each numeric flag must refuse values outside its range, non-numbers, and nan."""
    numeric = [action for action in module.PARSER._actions if callable(action.type)]
    assert len(numeric) >= 12
    for action in numeric:
        for value in ("-5", "nan", "many"):
            with pytest.raises(SystemExit, match="2"):
                module.PARSER.parse_args([f"{action.option_strings[0]}={value}"])
            error = capsys.readouterr().err
            assert f"{action.option_strings[-1]}: must be a" in error
            assert error.count("\n") == 1
