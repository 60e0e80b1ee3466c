"""The real scripts on real image files: what a user types, and what they print.

`run` starts a script as a user does; `call` runs its main in this process, which saves importing torch.
"""

import contextlib
import functools
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lincls
import train
from scripts.experiments import gradient_bias
from sogclr import datasets, loader
from sogclr.launch import free_port

ROOT = Path(__file__).resolve().parents[1]
TINY = shlex.split("--arch resnet18 --image-size 32 --stem imagenet --batch-size 8 --workers 1 --print-freq 1")

PRETRAIN = """--lr=.075 --epochs=800 --batch-size=256 --learning-rate-scaling=sqrt --loss_type dcl --gamma 0.9
 --multiprocessing-distributed --world-size 1 --rank 0 --workers 32 --crop-min=.08 --wd=1e-6
 --dist-url 'tcp://localhost:10001' --data_name imagenet1000 --data DIR --save_dir DIR2 --print-freq 1000"""
LINEAR = """--dist-url 'tcp://localhost:10001' --multiprocessing-distributed --world-size 1 --rank 0 --workers 32
 --pretrained DIR2/RUN/checkpoint_0799.pth.tar --data_name imagenet1000 --save_dir DIR2"""
SCHEDULE = {"epochs", "batch_size", "lr", "weight_decay", "momentum", "arch", "data_name", "workers"}


@pytest.fixture(autouse=True, scope="module")
def no_gpu():
    """The same tests on every machine; those that need a GPU are in test_gpu.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield


def run(script, *args, ok=True, launcher=(sys.executable,), cwd=ROOT):
    """The script's output, line by line. Warnings in it are errors here too."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launcher, str(ROOT / script), *map(str, args)], cwd=cwd, env=env, text=True,
                          capture_output=True, timeout=300)
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()
    return done


def call(module, *args):
    """The output of `train` or `lincls`, line by line."""
    args = module.PARSER.parse_args(list(map(str, args)))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", [module.__name__])
        patch.setattr(os, "fsync", lambda _: None)      # the disk is not under test
        module.launch(module.main_worker, args)
    return output.getvalue().splitlines()


def losses(lines):
    return re.findall(r"Epoch: \[\d+\]\[ *\d+/\d+\].*  Loss (\S+) ", "\n".join(lines))


def newest(folder, name="checkpoint_last.pth.tar"):
    return max(Path(folder).rglob(name), key=lambda path: path.stat().st_mtime)


def load(folder):
    return torch.load(newest(folder), weights_only=True)


@pytest.fixture(scope="module")
def pretrained(imagenet, tmp_path_factory):
    """The output and the save folder of two epochs of the authors' command, at a size for a CPU."""
    folder = tmp_path_factory.mktemp("saved")
    command = shlex.split(PRETRAIN.replace("DIR2", str(folder)).replace("DIR", str(imagenet)))
    url = f"tcp://localhost:{free_port()}"      # theirs may be taken
    return run("train.py", *command, *TINY, "--dist-url", url, "--epochs", 2, "--seed", 5), folder


def test_the_authors_commands_are_the_defaults():
    """Word for word, the authors' commands must parse and request what the scripts do without any flag."""
    method = {"t", "gamma", "crop_min", "warmup_epochs", "optimizer", "dim", "mlp_dim", "num_proj_layers", "loss_type",
              "learning_rate_scaling"}
    for parser, command, keys in ((train.PARSER, PRETRAIN, SCHEDULE | method), (lincls.PARSER, LINEAR, SCHEDULE)):
        asked, default = (vars(parser.parse_args(args)) for args in (shlex.split(command), []))
        assert {key: asked[key] for key in keys} == {key: default[key] for key in keys}


@pytest.mark.parametrize("script", ["train.py", "lincls.py"])
def test_help_states_the_true_defaults(script):
    """Each flag's help must state the parser's default, or describe what happens without the flag."""
    text = "".join("".join(run(script, "--help")).split())
    parser = {"train.py": train, "lincls.py": lincls}[script].PARSER
    for action in parser._actions:
        states = parser._get_formatter()._expand_help(action)
        assert "".join(states.split()) in text
        if action.default is None:
            assert "(default: " in states or action.dest == "gpu", action.dest
        elif action.default is not False and action.default not in ("", "==SUPPRESS=="):
            assert states.endswith(f"(default: {action.default})") or f"; {action.default} is" in states, action.dest


def test_pretraining_writes_what_others_read(pretrained):
    """Checkpoint names, keys, prefixes and shapes as in the authors' release; plus command line and TensorBoard."""
    lines, folder = pretrained
    run_folder = newest(folder).parent
    assert {path.name for path in run_folder.glob("*.tar")} == {
        "checkpoint_0000.pth.tar", "checkpoint_0001.pth.tar", "checkpoint_last.pth.tar", "checkpoint_previous.pth.tar"}
    saved = torch.load(run_folder / "checkpoint_0001.pth.tar", weights_only=True)
    assert {"epoch", "arch", "state_dict", "optimizer", "scaler", "u"} <= saved.keys()
    assert (saved["epoch"], saved["arch"]) == (2, "resnet18")
    assert saved["u"].shape == (24, 1)
    assert saved["u"].dtype == torch.float32
    assert (saved["u"] > 0).all()
    assert {key.split("fc.")[0] for key in saved["state_dict"] if "fc." in key} == {"module.base_encoder."}
    names = {key.removeprefix("module.base_encoder.") for key in saved["state_dict"] if ".fc." not in key}
    assert names == {key for key in torchvision.models.resnet18().state_dict() if not key.startswith("fc.")}
    assert set(saved["optimizer"]["state"][0]) == {"mu"}
    torch.amp.GradScaler("cpu").load_state_dict(saved["scaler"])     # theirs is on, and refuses an empty one
    assert len(saved["optimizer"]["param_groups"]) == 1
    assert "--gamma 0.9" in (run_folder / "command.txt").read_text()
    results, at_start = (json.loads((run_folder / name).read_text()) for name in ("results.json", "settings.json"))
    assert results["settings"] == at_start["settings"] == saved["settings"]
    assert results["versions"]["torch"] == torch.__version__
    assert f"{results['loss']:.4f}" in lines[-2]
    scalars = EventAccumulator(str(run_folder)).Reload()
    assert {"loss/loss", "loss/gcl", "run/learning rate"} <= set(scalars.Tags()["scalars"])
    assert f"{scalars.Scalars('loss/loss')[-1].value:.4f}" == losses(lines)[-1]
    assert (scalars.Images("views")[0].height, scalars.Images("views")[0].width) == (2 + 2 * 34, 2 + 8 * 34)
    assert scalars.Histograms("u/log u")[-1].histogram_value.num == 24
    assert (scalars.Histograms("u/age in epochs")[-1].histogram_value.min,
            scalars.Histograms("u/age in epochs")[-1].histogram_value.max) == (0, pytest.approx(2 / 3))
    assert any("CPU" in line for line in lines[:4])


def test_seed_decides_everything(imagenet, tmp_path):
    """The same seed must give the same losses, different seeds different ones, whatever the number of workers."""
    common = ["--data", imagenet, *TINY, "--epochs", 1]
    one = losses(call(train, *common, "--seed", 1, "--save_dir", tmp_path / "a"))
    again = losses(call(train, *common, "--seed", 1, "--save_dir", tmp_path / "b", "--workers", 0))
    other = losses(call(train, *common, "--seed", 2, "--save_dir", tmp_path / "c"))
    assert len(one) == 3
    assert one == again
    assert set(one).isdisjoint(other)


def test_resumed_run_equals_uninterrupted(pretrained, imagenet, tmp_path):
    """--resume after the first epoch must print the second epoch's losses and end with the same weights, u and ages,
    and the seconds must be the total of both starts.
    """
    lines, folder = pretrained
    first = newest(folder, "checkpoint_0000.pth.tar")
    again = call(train, "--data", imagenet, *TINY, "--epochs", 2, "--save_dir", tmp_path, "--resume", first)
    assert losses(again) == losses(lines)[3:]
    straight, resumed = load(folder), load(tmp_path)
    for name in ("log_u", "last_visit", "batches"):
        assert torch.equal(straight[name], resumed[name])
    assert resumed["seconds"] > torch.load(first, weights_only=True)["seconds"] > 0
    assert all(torch.equal(value, resumed["state_dict"][key]) for key, value in straight["state_dict"].items())
    for k, state in straight["optimizer"]["state"].items():
        assert torch.equal(state["mu"], resumed["optimizer"]["state"][k]["mu"])


def test_knn_during_pretraining_changes_nothing(pretrained, imagenet, tmp_path, monkeypatch):
    """With --knn-freq a run must end with the same weights, u and optimizer, bit for bit, and the same random state."""
    def watched(*args, original=train.knn_monitor):
        evaluate = original(*args)

        def without_trace(encoder):
            before, training = torch.get_rng_state(), [module.training for module in encoder.modules()]
            accuracies = evaluate(encoder)
            assert torch.equal(torch.get_rng_state(), before)
            assert [module.training for module in encoder.modules()] == training
            return accuracies
        return without_trace

    monkeypatch.setattr(train, "knn_monitor", watched)
    again = call(train, "--data", imagenet, *TINY, "--epochs", 2, "--seed", 5, "--save_dir", tmp_path, "--knn-freq", 1)
    assert losses(again) == losses(pretrained[0])
    ours, plain = load(tmp_path), load(pretrained[1])
    assert torch.equal(ours["log_u"], plain["log_u"])
    assert all(torch.equal(value, ours["state_dict"][key]) for key, value in plain["state_dict"].items())
    assert all(torch.equal(state["mu"], ours["optimizer"]["state"][k]["mu"])
               for k, state in plain["optimizer"]["state"].items())
    scalars = EventAccumulator(str(newest(tmp_path).parent)).Reload()
    assert [event.step for event in scalars.Scalars("features/kNN-20")] == [3, 6]
    assert [line.split(" kNN-20 ")[0] for line in again if "kNN-20" in line] == [" * Epoch 0", " * Epoch 1"]


def brute_force_knn(path, imagenet):
    """kNN-20 of a checkpoint of TINY in percent, with none of our code but the center crop."""
    encoder = torchvision.models.resnet18()
    encoder.fc = torch.nn.Identity()
    state = torch.load(path, weights_only=True)["state_dict"]
    encoder.load_state_dict({key.removeprefix("module.base_encoder."): value for key, value in state.items()
                             if ".fc." not in key})
    sets = [torchvision.datasets.ImageFolder(imagenet / split) for split in ("train", "val")]
    images = torch.stack([loader.center_view(image, 32) for data in sets for image, _ in data])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in datasets.IMAGENET_MEAN_STD)
    with torch.no_grad():
        features = torch.nn.functional.normalize(encoder.eval()((images / 255 - mean) / std).double())
    bank, queries = features.split([len(data) for data in sets])
    similarity, nearest = (queries @ bank.T).topk(20)
    votes = torch.zeros(len(queries), 3, dtype=torch.float64)
    votes.scatter_add_(1, torch.tensor(sets[0].targets)[nearest], (similarity / 0.07).exp())
    return 100 * float((votes.argmax(1) == torch.tensor(sets[1].targets)).double().mean())


def test_same_command_finds_its_run(imagenet, tmp_path):
    """--resume auto starts, then finds a finished run; without it the run is not overwritten."""
    command = ["--data", imagenet, *TINY, "--epochs", 1, "--save_dir", tmp_path, "--seed", 3]
    assert len(losses(call(train, *command, "--resume", "auto"))) == 3
    assert losses(call(train, *command, "--resume", "auto")) == []
    other = call(train, *command, "--resume", "auto", "--t", 0.2, "--dry-run")
    assert not any("starting a new one" in line for line in other)
    other = call(train, *command, "--resume", "auto", "--t", 0.2)
    assert any(line.endswith(f"starting a new one ({tmp_path} has 1 with other settings)") for line in other)
    names = {train.run_name(train.PARSER.parse_args(["--data_name", "shapes", *flags]))
             for flags in ([], ["--image-size", "32"], ["--image-size", "224"])}
    assert len(names) == 2          # 32 is what shapes has anyway
    refused = run("train.py", *command, ok=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--resume auto" in refused.stderr


EFFECTIVE = ["--lr 0.3", "--learning-rate-scaling linear", "--momentum 0.1", "--wd 0.5", "--warmup-epochs 1",
             "--crop-min 0.9", "--t 0.3", "--gamma 0.2", "--gamma-schedule cosine --gamma-decay-epochs 4",
             "--gamma-schedule cosine --gamma-decay-epochs 9", "--batch-size 6", "--start-epoch 1", "--seed 2",
             "--precision bf16", "--image-size 40", "--epochs 4", "--optimizer adamw", "--loss_type cl",
             "--augment pil"]


@pytest.fixture(scope="module")
def weights(imagenet):
    """A function from flags to some of the encoder's weights after two epochs with them."""
    @functools.cache
    def train_with(flags):
        with tempfile.TemporaryDirectory() as folder:
            call(train, "--data", imagenet, *TINY, "--workers", 0, "--epochs", 2, "--seed", 1, "--save_dir", folder,
                 *flags.split())
            return load(folder)["state_dict"]["module.base_encoder.layer4.0.conv1.weight"]
    return train_with


@pytest.mark.parametrize("flags", EFFECTIVE)
def test_every_flag_has_an_effect(flags, weights):
    """Another value of any flag of the method must lead to weights that no other case has."""
    assert not any(torch.equal(weights(flags), weights(other)) for other in ("", *EFFECTIVE) if other != flags)


def test_print_freq(imagenet, tmp_path):
    """A line for step 0 and for every N-th step after it."""
    lines = call(train, "--data", imagenet, *TINY, "--print-freq", 2, "--epochs", 1, "--save_dir", tmp_path)
    assert re.findall(r"\[0\]\[(\d)/3\]", "\n".join(lines)) == ["0", "2"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_live_line_per_epoch_on_a_terminal(imagenet, tmp_path, monkeypatch):
    """On a terminal each progress line must replace the one before, and the epoch's summary the last one."""
    monkeypatch.setattr(io, "StringIO", Terminal)
    monkeypatch.setenv("COLUMNS", "60")
    output = call(train, "--data", imagenet, *TINY, "--epochs", 2, "--save_dir", tmp_path)
    lines = [line.removesuffix("\x1b[K") for line in output if re.match(r"Epoch| \* Epoch", line)]
    assert len(lines) == 2 * 4
    for epoch in (0, 1):
        *live, summary = lines[4 * epoch:4 * epoch + 4]
        for step, line in enumerate(live):
            bar = ("###", "######", "##########")[step]
            assert line.startswith(f"Epoch {epoch} [{bar:-<10}] {step}/3  ")
            assert len(line) < 60
        assert re.match(rf" \* Epoch {epoch}  Loss \S+  GCL \S+  in 0:00:\d\d, \d+ images/s, data wait \d+%", summary)
        assert ("the run ends about" in summary) == (epoch == 0)


def test_dry_run_writes_nothing(imagenet, tmp_path):
    """It must run real steps, report what all epochs will take, and leave no file."""
    *_, report = lines = call(train, "--data", imagenet, *TINY, "--epochs", 800, "--save_dir", tmp_path, "--dry-run",
                              "--start-epoch", 5)
    assert len(losses(lines)) == 3
    found = re.match(r"=> 800 epochs will take about (\S+) minutes \((\d+) images/s, .* and (\S+) GiB in .* for 85 "
                     "checkpoints", report)
    minutes, speed, disk = map(float, found.groups())
    assert minutes == pytest.approx(800 * 24 / speed / 60, rel=0.6, abs=1)
    parameters = sum(tensor.nbytes for tensor in torchvision.models.resnet18().parameters())
    assert 85 * 2 * parameters < disk * 2**30 < 85 * 3 * parameters
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("flags", "error"), [
    ("--wd 0.5", "made with --wd 1e-06, not 0.5; leave --wd out"),
    ("--lr 0.5", "made with --lr 0.075, not 0.5"),
    ("--batch-size 6", "made with --batch-size 8, not 6; pass --batch-size 8"),
    ("--epochs 3", "made with --epochs 2, not 3"),
    ("--seed 6", "made with --seed 5, not 6"),
    ("--image-size 40", "made with --image-size 32, not 40"),
    ("--precision bf16", "made with --precision fp32, not bf16"),
    ("--gamma-schedule cosine", "made with --gamma-schedule constant, not cosine"),
    ("--dim 64", "made with --dim 128, not 64"),
    ("--loss_type cl", "made with --loss_type dcl, not cl"),
    ("--optimizer adamw", "made with --optimizer lars, not adamw")])
def test_conflicting_flags_at_a_resume(flags, error, pretrained, imagenet, tmp_path, capsys):
    """A setting that affects results must be the checkpoint's; the error names both values."""
    first = newest(pretrained[1], "checkpoint_0000.pth.tar")
    with pytest.raises(SystemExit, match="2"):
        call(train, "--data", imagenet, *TINY, "--epochs", 2, "--save_dir", tmp_path, "--resume", first, *flags.split())
    assert error in capsys.readouterr().err


def test_the_authors_checkpoints_resume(pretrained, imagenet, tmp_path):
    """A file with their keys only, numpy numbers, and an estimator with an extra row must resume like our own."""
    lines, folder = pretrained
    ours = torch.load(newest(folder, "checkpoint_0000.pth.tar"), weights_only=True)
    theirs = {key: ours[key] for key in ("epoch", "arch", "state_dict", "optimizer", "scaler")}
    theirs["u"] = torch.cat([ours["u"], torch.zeros(1, 1)])
    theirs["optimizer"]["param_groups"][0]["lr"] = np.float64(0.1)
    torch.save(theirs, tmp_path / "theirs.pth.tar")
    again = call(train, "--data", imagenet, *TINY, "--epochs", 2, "--seed", 5, "--save_dir", tmp_path,
                 "--resume", tmp_path / "theirs.pth.tar")
    assert losses(again)[0] == losses(lines)[3]


def test_a_loss_that_is_not_finite_ends_the_run(imagenet, tmp_path, monkeypatch, capsys):
    """Before that step's gradient, with the step and the rank; checkpoints and weights stay finite."""
    class Spoiling(train.GlobalContrastiveLoss):
        def forward(self, z1, z2, index):
            return super().forward(z1 * float("nan") if spoil() else z1, z2, index)

    steps, stepped = iter(range(100)), []
    spoil = lambda: next(steps) == 4        # noqa: E731
    monkeypatch.setattr(train, "GlobalContrastiveLoss", Spoiling)
    monkeypatch.setattr(train.LARS, "step", lambda self, original=train.LARS.step: stepped.append(original(self)))
    with pytest.raises(SystemExit, match="2"):
        call(train, "--data", imagenet, *TINY, "--print-freq", 1000, "--epochs", 3, "--save_dir", tmp_path)
    assert "the loss is nan in epoch 1, step 1 (ranks with non-finite projections: 0)" in \
        capsys.readouterr().err
    assert len(stepped) == 4
    assert load(tmp_path)["epoch"] == 1
    assert all(value.isfinite().all() for value in load(tmp_path)["state_dict"].values())


def test_spoiled_weights_are_not_saved(imagenet, tmp_path, monkeypatch, capsys):
    """Weights corrupted by the last step of a finite loss must not be written."""
    monkeypatch.setattr(train, "lr_at", lambda epoch, *_: float("nan") if epoch > 1.5 else 0.1)
    with pytest.raises(SystemExit, match="2"):
        call(train, "--data", imagenet, *TINY, "--epochs", 2, "--save_dir", tmp_path)
    assert "a weight is not finite in epoch 1" in capsys.readouterr().err
    assert load(tmp_path)["epoch"] == 1


@pytest.mark.parametrize("flags", ["--lr 0.5", "--momentum 0.1", "--wd 0.5", "--batch-size 6", "--seed 2",
                                   "--start-epoch 1", "--epochs 4", "--precision bf16", "--image-size 40",
                                   "--features cached", "--train-percent 50", "--finetune"])
def test_every_flag_of_lincls_has_an_effect(flags, imagenet, tmp_path):
    """Another value of any flag of the protocol must lead to another classifier."""
    common = ["--data", imagenet, *TINY, "--workers", 0, "--epochs", 3, "--seed", 1]
    call(lincls, *common, "--save_dir", tmp_path / "plain")
    call(lincls, *common, "--save_dir", tmp_path / "other", *flags.split())
    plain, other = (load(tmp_path / name)["state_dict"]["module.fc.weight"] for name in ("plain", "other"))
    assert not torch.equal(plain, other)


@pytest.mark.parametrize(("flags", "changes"), [
    (["--loss_type", "cl", "--optimizer", "adamw", "--lr", "1e-3"], ()),
    (["--num_proj_layers", "3", "--dim", "16", "--mlp-dim", "32"], ("16", "32")),
    (["--stem", "cifar", "--precision", "bf16"], ()),
])
def test_flags_reach_the_model(imagenet, tmp_path, flags, changes):
    """Every choice must train and be visible in the checkpoint."""
    call(train, "--data", imagenet, *TINY, "--epochs", 1, "--save_dir", tmp_path, *flags)
    saved = load(tmp_path)
    state = saved["state_dict"]
    assert ("u" in saved) == ("cl" not in flags)
    assert ("mu" in saved["optimizer"]["state"][0]) == ("adamw" not in flags)
    assert state["module.base_encoder.conv1.weight"].shape[-1] == (3 if "cifar" in flags else 7)
    if changes:
        assert [tuple(state[f"module.base_encoder.fc.{i}.weight"].shape) for i in (0, 3, 6)] == [
            (32, 512), (32, 32), (16, 32)]


def test_two_processes_started_by_hand(imagenet, tmp_path):
    """--world-size, --rank and --dist-url must join two processes in one run, without torchrun."""
    url = f"tcp://localhost:{free_port()}"
    command = [sys.executable, ROOT / "train.py", "--data", imagenet, *TINY, "--epochs", 1, "--save_dir", tmp_path,
               "--world-size", 2, "--dist-url", url, "--dist-backend", "gloo", "--rank"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    both = [subprocess.Popen([str(part) for part in (*command, rank)], env=env, text=True, stdout=subprocess.PIPE)
            for rank in (0, 1)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(losses(outputs[0].splitlines())) == 3
    assert outputs[1] == ""


@pytest.mark.parametrize("script", ["train.py", "lincls.py"])
def test_torchrun_with_two_processes(script, pretrained, imagenet, tmp_path):
    """Two processes must split the batch and print one log; train.py must resume bit-identical and report the kNN
    accuracy of the saved encoder; lincls.py, whose features do not depend on the batch, must give one process's
    classifier.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if script == "train.py":
        lines = run(script, "--data", imagenet, *TINY, "--epochs", 2, "--seed", 5, "--save_dir", tmp_path,
                    "--knn-freq", 2, launcher=torchrun)
        assert len(losses(lines)) == 6
        expected = brute_force_knn(newest(tmp_path, "checkpoint_0001.pth.tar"), imagenet)
        assert any(line.startswith(f" * Epoch 1 kNN-20 {expected:.1f} kNN-200 ") for line in lines)
        assert any("(4 per rank)" in line for line in lines)
        assert (load(tmp_path)["u"] > 0).all()
        resumed = run(script, "--data", imagenet, *TINY, "--epochs", 2, "--save_dir", tmp_path / "again", "--resume",
                      newest(tmp_path, "checkpoint_0000.pth.tar"), launcher=torchrun)
        assert losses(resumed) == losses(lines)[3:]
    else:
        command = ["--data", imagenet, *TINY, "--epochs", 2, "--seed", 1,
                   "--pretrained", newest(pretrained[1], "checkpoint_0001.pth.tar")]
        call(lincls, *command, "--save_dir", tmp_path / "one")
        two = run(script, *command, "--save_dir", tmp_path / "two", launcher=torchrun)
        a, b = load(tmp_path / "one"), load(tmp_path / "two")
        assert a["acc1"] == b["acc1"]
        for name in ("module.fc.weight", "module.fc.bias"):
            assert torch.allclose(a["state_dict"][name], b["state_dict"][name], atol=1e-5)
        assert len([line for line in two if line.startswith(" * ")]) == 2


def test_linear_evaluation(pretrained, imagenet, tmp_path, monkeypatch, capsys):
    """lincls must train, save, and evaluate what it saved, from a bare file name too."""
    source = newest(pretrained[1], "checkpoint_0001.pth.tar")
    os.symlink(source, tmp_path / "checkpoint_0001.pth.tar")
    command = ["--pretrained", "checkpoint_0001.pth.tar", "--data", imagenet, *TINY, "--seed", 1]
    lines = run("lincls.py", *command, "--epochs", 3, "--save_dir", tmp_path / "a", cwd=tmp_path)
    scores = [line for line in lines if line.startswith(" * Epoch")]
    assert len(scores) == 3
    last = newest(tmp_path / "a")
    saved = torch.load(last, weights_only=True)
    frozen = torch.load(source, weights_only=True)["state_dict"]
    for name, value in saved["state_dict"].items():
        if ".fc." not in name:
            assert torch.equal(value, frozen[name.replace("module.", "module.base_encoder.")])
    assert saved["state_dict"]["module.fc.weight"].shape == (3, 512)
    # -e prints the accuracy of the last epoch
    monkeypatch.chdir(tmp_path)
    evaluated = call(lincls, *command, "--epochs", 3, "-e", "--resume", last)[-1]
    assert evaluated.split("Acc@1")[1] in scores[-1]
    # the checkpoint alone suffices, and another encoder is refused
    assert call(lincls, "--data", imagenet, *TINY[:4], "-e", "--resume", last)[-1] == evaluated
    other = newest(pretrained[1], "checkpoint_0000.pth.tar")
    with pytest.raises(SystemExit):
        call(lincls, *command, "--pretrained", other, "--resume", last)
    assert "evaluates a different encoder" in capsys.readouterr().err


def test_evaluation_knows_how_the_encoder_was_made(pretrained, imagenet, tmp_path):
    """The results must record the pretraining's settings and seconds, and another image size must be reported."""
    source = newest(pretrained[1], "checkpoint_0001.pth.tar")
    command = ["--pretrained", source, "--data", imagenet, *TINY, "--knn", "--save_dir", tmp_path]
    assert not any("pretrained at" in line for line in call(lincls, *command))
    made, (results,) = (json.loads((source.parent / "results.json").read_text()), tmp_path.rglob("results.json"))
    results = json.loads(results.read_text())
    assert results["encoder"] == made["settings"]
    assert 0 < results["pretraining_seconds"] <= made["seconds"] + 0.1
    assert "=> note: the encoder was pretrained at 32 pixels; to match, pass --image-size 32" in \
        call(lincls, *command, "--image-size", 40)


def test_gradient_bias_of_a_checkpoint(pretrained, imagenet, tmp_path, monkeypatch, capsys):
    """It must show each loss at each batch size; with one batch of all images neither SogCLR's gradient nor the score
    with BatchNorm's batch statistics is off. Invalid input gives one line.
    """
    def bias(*args):
        monkeypatch.setattr(sys, "argv", ["gradient_bias.py", *map(str, args)])
        gradient_bias.main()
        return [re.split(r" *\| *", line) for line in capsys.readouterr().out.splitlines()]

    path = newest(pretrained[1])
    few = "--visits", 3, "--passes", 3, "-j", 1
    _, head, _, *rows, _, remark = bias(path, "--batch-sizes", 5, 20, "--gamma", 1, 0.2, "--images", 20, *few)
    assert head == ["", "loss", "`--t`", "`--gamma`", "batch 5", "batch 20", ""]
    assert [row[1:4] for row in rows] == [["SimCLR", "0.1", ""], ["SogCLR", "0.1", "1"], ["SogCLR", "0.1", "0.2"],
                                          ["g within a batch / among all", "0.1", ""]]
    assert all(re.fullmatch(r"\d+\.\d°, \d+\.\d\d", cell) for row in rows[:3] for cell in row[4:6])
    assert rows[1][5] == "0.0°, 0.00"
    assert rows[2][5] != rows[1][5]         # u has seen other views
    assert float(rows[3][4]) < float(rows[3][5]) == 1
    assert remark[0].startswith("20 images, 3 visits, 3 passes; ")

    foreign, other = tmp_path / "foreign.pth.tar", tmp_path / "other.pth.tar"
    torch.save({"epoch": 1, "state_dict": {}}, foreign)
    torch.save({"epoch": 1, "state_dict": {}, "settings": {"lr": 0.1}}, other)
    for args, message in (((path, "--batch-sizes", 25), "--batch-sizes 25: only 24 images are used"),
                          ((path, "--data", imagenet / "val"), "has no folder 'train'"),
                          ((foreign,), "lacks settings"), ((other,), "does not record how it was trained")):
        with pytest.raises(SystemExit, match="2"):
            bias(*args)
        assert message in capsys.readouterr().err


def test_shapes_and_unlabeled_folders(imagenet, tmp_path):
    """`shapes` needs no data; `folder` needs no classes."""
    tiny = [*TINY, "--batch-size", 500, "--epochs", 1, "--save_dir", tmp_path]
    assert len(losses(call(train, "--data_name", "shapes", *tiny))) == 5
    flat = imagenet / "train" / "n01440764"
    assert len(losses(call(train, "--data_name", "folder", "--data", flat, *tiny, "--batch-size", 4))) == 2


BAD = [
    ("train.py", ["--data", "nowhere"], "--data nowhere: no such folder"),
    ("train.py", ["--data", "EMPTY"], "EMPTY: has no folder 'train'"),
    ("train.py", ["--data", "EMPTY", "--data_name", "folder"], "contains no images"),
    ("lincls.py", ["--pretrained", "missing.pth"], "--pretrained missing.pth: no such file"),
    ("lincls.py", ["--pretrained", "TEXT"], "TEXT: not a checkpoint"),
    ("lincls.py", ["-e"], "--evaluate: needs"),
    ("lincls.py", ["-e", "--resume", "auto"], "--evaluate: "),
    ("lincls.py", ["--finetune", "--features", "cached"], "--finetune: changes the encoder"),
    ("lincls.py", ["--finetune", "--lr", "0.1", "0.2"], "--finetune: trains one network, pass one --lr"),
    ("lincls.py", ["--finetune", "--batch-size", "25"], "--finetune: --batch-size 25: the data set has only 24"),
    ("lincls.py", ["--knn", "--finetune"], "--knn: trains nothing"),
    ("lincls.py", ["--knn", "--resume", "OTHER"], "--knn: has nothing to resume"),
    ("lincls.py", ["--lr", "0.1", "0.10"], "--lr, --wd: a value is given twice"),
    ("lincls.py", ["--encoder-lr", "0.1"], "--encoder-lr: needs --finetune"),
    ("lincls.py", ["--train-percent", "0"], "--train-percent: must be a number in (0, 100]"),
    ("lincls.py", ["--start-epoch", "90"], "--start-epoch 90: must be below --epochs 1"),
    ("train.py", ["--start-epoch", "900"], "--start-epoch 900: must be below --epochs 1"),
    ("train.py", ["--world-size", "0"], "--world-size 0: must be at least 1"),
    ("train.py", ["--arch", "resnet19"], "--arch: invalid choice"),
    ("train.py", ["--batch-size", "25"], "--batch-size 25: the data set has only 24"),
    ("train.py", ["--batch-size", "1"], "--batch-size 1: "),
    ("train.py", ["--gamma", "0"], "--gamma: must be a number in (0, 1]"),
    ("train.py", ["--gamma", "1.5"], "--gamma: must be a number in (0, 1]"),
    ("train.py", ["--t", "0"], "--t: must be a number in (0, infinity)"),
    ("train.py", ["--t", "nan"], "--t: must be a number in (0, infinity)"),
    ("train.py", ["--epochs", "-3"], "--epochs: must be an integer in [1, infinity)"),
    ("train.py", ["--resume", "missing.pth"], "--resume missing.pth: no such file"),
    ("train.py", ["--resume", "OTHER", "--epochs", "2", "--data_name", "folder"],
     "made with --data_name imagenet1000, not folder"),
    ("train.py", ["--resume", "OTHER", "--epochs", "2", "--data", "ONE_CLASS"],
     "was trained on 24 images, but this data set has 8"),
    ("train.py", ["--resume", "OTHER", "--arch", "resnet34"], "was made with --arch resnet18, not resnet34"),
    ("lincls.py", ["--pretrained", "OTHER", "--arch", "resnet50"], "was made with --arch resnet18, not resnet50"),
    ("train.py", ["--gpu", "7"], "--gpu 7: this machine has"),
    ("train.py", ["--gpu", "0", "--multiprocessing-distributed"], "--gpu 0: this machine has 0 visible GPUs"),
    ("train.py", ["--dist-backend", "nccl"], "--dist-backend nccl: needs GPUs"),
    ("train.py", ["--resume", "EMPTY"], "--resume EMPTY: is a folder, pass a file in it"),
    ("train.py", ["--resume", "TEXT"], "--resume TEXT: not a checkpoint"),
    ("lincls.py", ["--resume", "OTHER"], "is not a checkpoint from this script"),
    ("train.py", ["--multiprocessing-distributed", "--dist-url", "USED"], "cannot be used (Address already in use)"),
    ("train.py", ["--world-size", "2", "--rank", "0", "--dist-url", "USED"], "cannot be used (Address already in use)"),
    ("train.py", ["--multiprocessing-distributed", "--dist-url", "localhost"], "--dist-url localhost: must be"),
    ("train.py", ["--multiprocessing-distributed", "--dist-url", "tcp://localhost:99999"], "a number below 65536"),
    ("train.py", ["--multiprocessing-distributed", "--dist-url", "tcp://localhost:x"], "a number below 65536"),
    ("train.py", ["--world-size", "2", "--rank", "0"], "--world-size 2: needs"),
    ("train.py", ["--world-size", "2", "--rank", "0", "--dist-url", "env://"], "variable MASTER_ADDR expected"),
    ("train.py", ["--world-size", "2", "--rank", "2", "--dist-url", "tcp://localhost:1"], "--rank 2: must be below"),
    ("train.py", ["--knn-freq", "1", "--data_name", "folder", "--data", "SUBSET"],
     "--knn-freq 1: needs labeled images, leave the flag out if there are none; --data"),
    ("train.py", ["--unknown"], "unrecognized arguments: --unknown"),
    ("train.py", ["EMPTY"], "EMPTY (pass the data set's folder as --data "),
    ("train.py", ["--save_dir", "TEXT/below"], "--save_dir"),
]


@pytest.fixture(scope="module")
def used():
    """A URL whose port is taken."""
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield f"tcp://localhost:{server.getsockname()[1]}"


@pytest.mark.parametrize(("script", "flags", "message"), BAD, ids=[" ".join(case[1]) for case in BAD])
def test_bad_input_is_one_line(script, flags, message, pretrained, imagenet, used, tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line that names the flag or file; no traceback."""
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "TEXT").write_text("text")
    (tmp_path / "ONE_CLASS" / "train").mkdir(parents=True)
    (tmp_path / "ONE_CLASS" / "train" / "n01440764").symlink_to(imagenet / "train" / "n01440764")
    names = {"OTHER": newest(pretrained[1], "checkpoint_0000.pth.tar"), "SUBSET": imagenet / "train" / "n01440764",
             "USED": used}
    flags = [str(names.get(flag, flag)) for flag in flags]
    monkeypatch.chdir(tmp_path)
    refused(script, ["--data", imagenet, *TINY, "--epochs", "1", *flags], message, monkeypatch, capsys)


def refused(script, flags, message, monkeypatch, capsys):
    """Run a script in this process; it must exit with code 2 and one line that contains the message."""
    module = {"train.py": train, "lincls.py": lincls}[script]
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.setattr(module.PARSER, "prog", script)

    with pytest.raises(SystemExit) as caught:
        module.launch(module.main_worker, module.PARSER.parse_args(list(map(str, flags))))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error
    assert error.startswith(f"{script}: error: ")
    assert error.count("\n") == 1


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
    refused("train.py", flags, message, monkeypatch, capsys)


def test_more_gpus_than_there_are(monkeypatch, capsys):
    """--gpu 7 of 4 must report which there are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    message = "--gpu 7: this machine has 4 visible GPUs, numbered 0 to 3"
    refused("train.py", ["--gpu", "7"], message, monkeypatch, capsys)


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


def test_batch_that_ranks_cannot_split_is_refused(imagenet, tmp_path):
    """Under two processes an odd batch must end all of them with one line."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run("train.py", "--data", imagenet, *TINY, "--batch-size", 9, "--save_dir", tmp_path, ok=False,
               launcher=torchrun)
    assert done.returncode != 0
    assert done.stderr.count("--batch-size 9: cannot be split equally over 2 processes") == 1


def test_unreadable_image_ends_every_rank(imagenet, tmp_path):
    """A broken file in one rank's local batch must end both ranks at once, with the line that names it."""
    for k in range(8):
        source = imagenet / "train" / "n01440764" / f"n01440764_{k}.JPEG"
        (tmp_path / f"{k}.jpg").write_bytes(source.read_bytes() if k != 3 else b"broken")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run("train.py", "--data_name", "folder", "--data", tmp_path, *TINY, "--save_dir", tmp_path / "saved",
               ok=False, launcher=torchrun)
    assert done.returncode != 0
    assert f"train.py: error: {tmp_path}/3.jpg: not a readable image" in done.stderr


@pytest.mark.parametrize("script", ["train.py", "lincls.py"])
def test_unreadable_image_ends_a_process_with_workers(script, imagenet, tmp_path):
    """The line, and the process must end although the workers leave signals to their rank."""
    shutil.copytree(imagenet, tmp_path / "data")
    (tmp_path / "data" / "train" / "n01440764" / "n01440764_3.JPEG").write_bytes(b"broken")
    done = run(script, "--data", tmp_path / "data", *TINY, "--workers", 2, "--save_dir", tmp_path / "saved", ok=False)
    assert done.returncode == 2
    assert f"{script}: error: {tmp_path}/data/train/n01440764/n01440764_3.JPEG: not a readable" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "scripts").glob("pretrain_*.sh")))
def test_recipes_take_overrides(recipe, imagenet, tmp_path):
    """Each recipe must run unchanged, with flags appended: here on few small images, as a dry run."""
    env = os.environ | {"PYTHON": sys.executable, "DATA": str(imagenet), "SAVE_DIR": str(tmp_path), "GPUS": "2",
                        "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", ROOT / "scripts" / recipe, *TINY, "--data_name", "imagenet1000", "--dry-run"]
    done = subprocess.run(list(map(str, command)), env=env, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dry run: nothing was written" in done.stdout


def test_imagenet100_is_linked(tmp_path):
    """The subset must contain the authors' 100 classes in both splits; an incomplete tree must be refused."""
    classes = (ROOT / "scripts" / "tools" / "imagenet100_classes.txt").read_text().split()
    assert len(set(classes)) == 100
    for split in ("train", "val"):
        for wnid in [*classes, "n99999999"]:
            (tmp_path / "full" / split / wnid).mkdir(parents=True)
    for _ in range(2):      # also over an earlier one
        run("scripts/tools/make_imagenet100.py", tmp_path / "full", tmp_path / "subset")
    assert sorted(path.name for path in (tmp_path / "subset" / "val").iterdir()) == sorted(classes)
    (tmp_path / "full" / "val" / classes[0]).rmdir()
    done = run("scripts/tools/make_imagenet100.py", tmp_path / "full", tmp_path / "subset", ok=False)
    assert done.returncode == 2
    assert f"val/{classes[0]}" in done.stderr
