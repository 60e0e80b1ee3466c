"""train.py on real image files: what it prints, writes and resumes, and that each flag has an effect."""

import io
import itertools
import json
import math
import os
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
import torchvision
from helpers import CLASSES, PRETRAIN, PYTHON, ROOT, TINY, call, load, losses, newest, refused, run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lincls
import train
from sogclr import checkpoint, meters, shapes
from sogclr.datasets import open_data_set
from sogclr.launch import free_port
from sogclr.loader import center_view
from sogclr.meters import Progress

pytestmark = [pytest.mark.usefixtures("no_gpu"), pytest.mark.slow]


def test_the_authors_command_writes_what_others_read(pretrained, imagenet, tmp_path):
    """At a size for a CPU: checkpoint names, keys, prefixes and shapes as in the authors' release; plus command line
    and TensorBoard. The process that it starts must train as one started without its flags.
    """
    command = shlex.split(PRETRAIN.replace("DIR2", str(tmp_path)).replace("DIR", str(imagenet)))
    url = f"tcp://localhost:{free_port()}"      # theirs may be taken
    output, _ = run(PYTHON, ROOT / "train.py", *command, *TINY, "--dist-url", url, "--epochs", 2, "--seed", 5)
    lines = output.splitlines()
    assert losses(lines) == losses(pretrained[0])
    run_folder = newest(tmp_path).parent
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
    assert f"{results['loss']:.4f}" in lines[-3]
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


def test_temperatures_are_saved_resumed_and_shown(imagenet, tmp_path, capsys):
    """A resumed run of isogclr must end with the weights, temperatures and v of an uninterrupted one, and not start
    with another rho; the images with the largest and the smallest temperatures must be in the log, in that order, with
    a histogram after each epoch.
    """
    command = ["--data", imagenet, *TINY, "--seed", 5, "--loss_type", "isogclr", "--epochs", 3, "--t-lr", 0.1]
    straight = call(train, *command, "--save_dir", tmp_path / "straight")
    first = newest(tmp_path / "straight", "checkpoint_0000.pth.tar")
    resumed = call(train, *command, "--save_dir", tmp_path / "resumed", "--resume", first)
    assert losses(resumed) == losses(straight)[3:]
    one, two = load(tmp_path / "straight"), load(tmp_path / "resumed")
    for name in ("log_u", "tau", "v"):
        assert one[name].shape == (24,)
        assert torch.equal(one[name], two[name])
    assert all(torch.equal(value, two["state_dict"][key]) for key, value in one["state_dict"].items())
    assert len(set(one["tau"].tolist())) > 20
    with pytest.raises(SystemExit, match="2"):
        call(train, *command, "--save_dir", tmp_path / "other", "--resume", first, "--rho", 1)
    assert "made with --rho 0.3, not 1.0; leave --rho out" in capsys.readouterr().err
    other = {name: value for name, value in one.items() if name not in ("settings", "step")}
    torch.save(other | {"epoch": 1, "tau": one["tau"][:, None]}, tmp_path / "other.pth.tar")
    with pytest.raises(SystemExit, match="2"):
        call(train, *command, "--save_dir", tmp_path / "other", "--resume", tmp_path / "other.pth.tar")
    assert "other.pth.tar: was made with another model" in capsys.readouterr().err

    log = EventAccumulator(str(newest(tmp_path / "straight").parent), size_guidance={"histograms": 0}).Reload()
    assert [event.step for event in log.Histograms("tau/tau")] == [3, 6, 9]
    means = [event.value for event in log.Scalars("tau/mean")]
    assert means[0] == pytest.approx(0.1)
    after_first = torch.load(first, weights_only=True)["tau"]
    assert np.mean(means[3:6]) == pytest.approx(after_first.mean().item())      # the three batches of the second epoch
    smallest_first = one["tau"].argsort(stable=True).tolist()
    assert shown(log, "tau/smallest", imagenet) == smallest_first[:12]
    assert shown(log, "tau/largest", imagenet) == smallest_first[:11:-1]


def shown(log, name, folder):
    """The images in a row of pictures, by their indices in a folder of the same files."""
    row = np.asarray(Image.open(io.BytesIO(log.Images(name)[0].encoded_image_string)))
    pictures = [row[2:34, 2 + column:][:, :32] for column in range(0, row.shape[1] - 2, 34)]
    views = [np.moveaxis(center_view(image, 32).numpy(), 0, 2) for image, _ in
             open_data_set("imagenet1000", folder, "train", 32).images]
    return [next(i for i, view in enumerate(views) if (picture == view).all()) for picture in pictures]


def test_only_images_that_were_seen_have_temperatures(imagenet, tmp_path):
    """One that cannot be read, or was left over in the only epoch, must be in no histogram or row of pictures."""
    shutil.copytree(imagenet, tmp_path / "data")
    (tmp_path / "data" / "train" / CLASSES[0] / f"{CLASSES[0]}_3.JPEG").write_bytes(b"broken")
    call(train, "--data", tmp_path / "data", *TINY, "--save_dir", tmp_path, "--epochs", 1, "--batch-size", 10,
         "--bad-images", "skip", "--loss_type", "isogclr", "--seed", 1)
    visited = (load(tmp_path)["last_visit"] > 0).nonzero().flatten().tolist()
    assert 10 < len(visited) <= 20
    assert 3 not in visited
    log = EventAccumulator(str(newest(tmp_path).parent)).Reload()
    assert log.Histograms("tau/tau")[0].histogram_value.num == len(visited)
    pictures = {*shown(log, "tau/largest", imagenet), *shown(log, "tau/smallest", imagenet)}
    assert pictures <= set(visited)
    assert len(pictures) == len(visited) // 2 * 2


def test_a_rho_that_no_batch_can_reach_is_pointed_out(imagenet, tmp_path):
    """From log(2 (B - 1)) nats on, as far from uniform as 2 (B - 1) weights can be."""
    command = ["--data", imagenet, *TINY, "--save_dir", tmp_path, "--loss_type", "isogclr", "--dry-run"]
    notes = [sum("all temperatures fall" in line for line in call(train, *command, "--rho", rho))
             for rho in (math.log(14) - 0.01, math.log(14) + 0.01)]
    assert notes == [0, 1]


def test_the_monitor_changes_nothing(pretrained, imagenet, tmp_path, monkeypatch):
    """With --knn-freq a run must end with the same weights, u and optimizer, bit for bit, and the same random state."""
    def without_trace(self, encoder, epoch, evaluate=train.FeatureMonitor.__call__):
        before, training = torch.get_rng_state(), [module.training for module in encoder.modules()]
        measured = evaluate(self, encoder, epoch)
        assert torch.equal(torch.get_rng_state(), before)
        assert [module.training for module in encoder.modules()] == training
        return measured

    monkeypatch.setattr(train.FeatureMonitor, "__call__", without_trace)
    again = call(train, "--data", imagenet, *TINY, "--epochs", 2, "--seed", 5, "--save_dir", tmp_path, "--knn-freq", 1)
    assert losses(again) == losses(pretrained[0])
    ours, plain = load(tmp_path), load(pretrained[1])
    assert torch.equal(ours["log_u"], plain["log_u"])
    assert all(torch.equal(value, ours["state_dict"][key]) for key, value in plain["state_dict"].items())
    assert all(torch.equal(state["mu"], ours["optimizer"]["state"][k]["mu"])
               for k, state in plain["optimizer"]["state"].items())
    scalars = EventAccumulator(str(newest(tmp_path).parent)).Reload()
    assert [event.step for event in scalars.Scalars("features/kNN-20")] == [3, 6]
    ranks = [event.value for event in scalars.Scalars("features/effective_rank")]
    assert [line.split(" kNN-20 ")[0] for line in again if "kNN-20" in line] == [
        f" * Epoch {epoch} effective_rank {value:.1f}" for epoch, value in enumerate(ranks)]


def test_effective_rank_needs_no_labels(imagenet, tmp_path):
    """It must be reported every --rank-freq epochs and after the last one, and be the one that lincls.py measures."""
    command = ["--data", imagenet / "train", *TINY, "--seed", 1, "--save_dir", tmp_path]
    lines = call(train, *command, "--data_name", "folder", "--epochs", 5, "--rank-freq", 2)
    assert [line.split(" effective_rank ")[0] for line in lines if " effective_rank " in line] == [
        f" * Epoch {epoch}" for epoch in (1, 3, 4)]
    ours = json.loads(newest(tmp_path, "results.json").read_text())
    assert "kNN-20" not in ours
    call(lincls, *command, "--data", imagenet, "--pretrained", newest(tmp_path), "--knn")
    theirs = json.loads(newest(tmp_path, "results.json").read_text())
    assert theirs["effective_rank"] == pytest.approx(ours["effective_rank"], rel=1e-6)


def test_same_command_finds_its_run(imagenet, tmp_path, monkeypatch, capsys):
    """--resume auto starts, then finds a finished run; without it the run is not overwritten."""
    command = ["--data", imagenet, *TINY, "--batch-size", 24, "--epochs", 1, "--save_dir", tmp_path, "--seed", 3]
    assert len(losses(call(train, *command, "--resume", "auto"))) == 1
    assert losses(call(train, *command, "--resume", "auto")) == []
    other = call(train, *command, "--resume", "auto", "--t", 0.2, "--dry-run")
    assert not any("starting a new one" in line for line in other)
    other = call(train, *command, "--resume", "auto", "--t", 0.2)
    assert any(line.endswith(f"starting a new one ({tmp_path} has 1 with other settings)") for line in other)
    names = {train.run_name(train.PARSER.parse_args(["--data_name", "shapes", *flags]))
             for flags in ([], ["--image-size", "32"], ["--image-size", "224"])}
    assert len(names) == 2          # 32 is what shapes has anyway
    refused(train, command, "--resume auto", monkeypatch, capsys)


# Of one step an epoch, so that all take effect in the second.
EFFECTIVE = ["--lr 0.3", "--learning-rate-scaling linear", "--momentum 0.1", "--wd 0.5", "--warmup-epochs 1",
             "--crop-min 0.9", "--t 0.3", "--gamma 0.2", "--gamma-schedule cosine --gamma-decay-epochs 4",
             "--gamma-schedule cosine --gamma-decay-epochs 9", "--batch-size 12", "--loss-batch-size 12",
             "--start-epoch 1", "--seed 2", "--precision bf16", "--image-size 40", "--epochs 4", "--optimizer adamw",
             "--loss_type cl", "--augment pil", *(f"--loss_type isogclr {flags}" for flags in (
                 "", "--rho 1", "--t-lr 1", "--t-lr 1 --t-max 0.2", "--t-beta 0.1", "--rho 9", "--rho 9 --t-min 0.07",
                 "--gamma-schedule cosine --gamma-decay-epochs 4"))]


def test_every_flag_has_an_effect(imagenet, tmp_path, monkeypatch):
    """Another value of any flag of the method must lead to weights that no other case has."""
    found = {}
    for flags in ("", *EFFECTIVE):
        saved = {}
        monkeypatch.setattr(checkpoint.Writer, "save", lambda self, state, *_, to=saved: to.update(state["state_dict"]))
        call(train, "--data", imagenet, *TINY, "--workers", 0, "--batch-size", 24, "--epochs", 2, "--seed", 1,
             "--save_dir", tmp_path / flags, *flags.split())
        found[flags] = saved["module.base_encoder.conv1.weight"]
    equal = [(a, b) for a, b in itertools.combinations(found, 2) if torch.equal(found[a], found[b])]
    assert not equal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_lines(imagenet, tmp_path, monkeypatch):
    """On a terminal each progress line must replace the one before, and the epoch's summary the last one; elsewhere
    there is one for step 0 and for every N-th step after it.
    """
    lines = call(train, "--data", imagenet, *TINY, "--print-freq", 2, "--epochs", 1, "--save_dir", tmp_path / "file")
    assert re.findall(r"\[0\]\[(\d)/3\]", "\n".join(lines)) == ["0", "2"]
    monkeypatch.setattr(io, "StringIO", Terminal)
    monkeypatch.setenv("COLUMNS", "60")
    output = call(train, "--data", imagenet, *TINY, "--epochs", 2, "--save_dir", tmp_path / "terminal")
    *lines, last = [line.removesuffix("\x1b[K") for line in output if re.match(r"Epoch| \* Epoch", line)]
    assert last.startswith(" * Epoch 1 effective_rank ")
    assert len(lines) == 2 * 4
    for epoch in (0, 1):
        *live, summary = lines[4 * epoch:4 * epoch + 4]
        for step, line in enumerate(live):
            bar = ("###", "######", "##########")[step]
            assert line.startswith(f"Epoch {epoch} [{bar:-<10}] {step}/3  ")
            assert len(line) < 60
        assert re.match(rf" \* Epoch {epoch}  Loss \S+  GCL \S+  in [\d:]+, \d+ images/s, data wait \d+%", summary)
        assert ("the run ends about" in summary) == (epoch == 0)


def test_dry_run_writes_nothing(imagenet, tmp_path, monkeypatch):
    """It must run real steps, report what all epochs will take, and leave no file."""
    monkeypatch.setattr(Progress, "seconds_per_step", 0.5)
    *_, report = lines = call(train, "--data", imagenet, *TINY, "--epochs", 800, "--save_dir", tmp_path, "--dry-run",
                              "--start-epoch", 5)
    assert len(losses(lines)) == 1      # printing makes the host wait
    found = re.match(r"=> 800 epochs will take about 20.0 minutes \(16 images/s, .* and (\S+) GiB in .* for 85 "
                     "checkpoints", report)
    parameters = sum(tensor.nbytes for tensor in torchvision.models.resnet18().parameters())
    assert 85 * 2 * parameters < float(found[1]) * 2**30 < 85 * 3 * parameters
    assert not any(tmp_path.iterdir())


def test_dry_run_starts_anew_after_the_first_step(monkeypatch):
    """In which workers would get ahead of it; it must end after a number of steps, or when its time is up."""
    class Batches:
        def epoch(self, epoch, first_step):
            yield from range(10)

    assert list(train.FirstBatches(Batches(), 4).epoch(0, 0)) == [0, 0, 1, 2]
    monkeypatch.setattr(train, "DRY_SECONDS", 0)
    assert list(train.FirstBatches(Batches(), 4).epoch(0, 0)) == [0, 0]


def test_speed_excludes_what_workers_had_ready(monkeypatch):
    """Of a loader that prepares 5 batches ahead and then takes 2 seconds for each, with steps of a second."""
    now = 0.0
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now)

    class Batches:
        def __len__(self):
            return 20

        def epoch(self, epoch, first_step):
            nonlocal now
            for step in range(20):
                now += 2 * (step > 5)
                yield step

    progress = Progress(Batches(), 0, 0, 1, 30, skip=6)
    for step, _ in progress:
        now += 1
        progress.step_done()
        if step <= 5:
            assert progress.images_per_second == 30
    assert progress.images_per_second == 10
    assert progress.waiting == "data wait 67%"


@pytest.mark.parametrize(("flags", "error"), [
    ("--wd 0.5", "made with --wd 1e-06, not 0.5; leave --wd out"),
    ("--lr 0.5", "made with --lr 0.075, not 0.5"),
    ("--batch-size 6", "made with --batch-size 8, not 6; pass --batch-size 8"),
    ("--loss-batch-size 4", "made with --loss-batch-size 8, not 4"),
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


def test_checkpoints_from_before_loss_batch_size(pretrained, imagenet, tmp_path, capsys):
    """They do not record it: their loss saw the whole batch, so only such a one may continue them."""
    earlier = torch.load(newest(pretrained[1], "checkpoint_0000.pth.tar"), weights_only=True)
    del earlier["settings"]["loss_batch_size"]
    torch.save(earlier, tmp_path / "kept.pth.tar")
    command = ["--data", imagenet, *TINY, "--epochs", 2, "--save_dir", tmp_path, "--resume", tmp_path / "kept.pth.tar"]
    with pytest.raises(SystemExit, match="2"):
        call(train, *command, "--loss-batch-size", 4)
    assert "made with --loss-batch-size 8, not 4" in capsys.readouterr().err
    assert len(losses(call(train, *command))) == 3      # of epoch 1


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


@pytest.mark.parametrize(("flags", "changes"), [
    (["--loss_type", "cl", "--optimizer", "adamw", "--lr", "1e-3"], ()),
    (["--num_proj_layers", "3", "--dim", "16", "--mlp-dim", "32"], ("16", "32")),
    (["--stem", "cifar", "--precision", "bf16"], ()),
])
def test_flags_reach_the_model(imagenet, tmp_path, flags, changes):
    """Every choice must train and be visible in the checkpoint."""
    call(train, "--data", imagenet, *TINY, "--image-size", 8, "--batch-size", 24, "--epochs", 1, "--save_dir", tmp_path,
         *flags)
    saved = load(tmp_path)
    state = saved["state_dict"]
    assert ("u" in saved) == ("cl" not in flags)
    assert ("mu" in saved["optimizer"]["state"][0]) == ("adamw" not in flags)
    assert state["module.base_encoder.conv1.weight"].shape[-1] == (3 if "cifar" in flags else 7)
    if changes:
        assert [tuple(state[f"module.base_encoder.fc.{i}.weight"].shape) for i in (0, 3, 6)] == [
            (32, 512), (32, 32), (16, 32)]


def test_shapes_and_unlabeled_folders(imagenet, tmp_path, monkeypatch):
    """`shapes` needs no data; `folder` needs no classes."""
    monkeypatch.setitem(shapes.LENGTHS, "train", 20)
    tiny = [*TINY, "--epochs", 1, "--save_dir", tmp_path]
    assert len(losses(call(train, "--data_name", "shapes", *tiny))) == 2
    flat = imagenet / "train" / "n01440764"
    assert len(losses(call(train, "--data_name", "folder", "--data", flat, *tiny))) == 1


def test_names_that_the_terminal_cannot_show(imagenet, tmp_path):
    """Latin-1 bytes in --data and --save_dir, and a terminal with ASCII only: names in files keep their bytes, and on
    the terminal they are escaped; TensorBoard, which needs UTF-8, is the only loss.
    """
    data, saved = (tmp_path / os.fsdecode(name) for name in (b"caf\xe9", "ä".encode() + b"\xe4"))
    data.mkdir()
    for split in ("train", "val"):
        (data / split).symlink_to(imagenet / split)
    command = ["--data_name", "folder", "--data", data, *TINY, "--save_dir", saved, "--seed", 1, "--epochs", 1]
    output, error = run(PYTHON, ROOT / "train.py", *command, "--warmup-epochs", 0, PYTHONIOENCODING="ascii")
    folder = newest(saved).parent
    assert folder.name.startswith("folder-caf\\xe9_")
    assert f"done: {tmp_path}/\\xe4\\udce4/folder-caf\\xe9_" in output
    assert os.fsencode(data) in (folder / "command.txt").read_bytes()
    assert error.startswith(f"=> TensorBoard logging disabled: {tmp_path}/\\xe4\\udce4/folder-caf\\xe9_")
    assert error.endswith(": its name is not UTF-8\n")
    assert json.loads((folder / "results.json").read_text())["settings"]["data"] == str(data)
    assert load(saved)["settings"]["data"] == str(data)
    call(lincls, *command, "--pretrained", newest(saved))
    assert len(list(saved.rglob("linear_eval_folder-caf*/*_data_folder-caf*/results.json"))) == 1
