"""The protocols of lincls.py: several classifiers at once, cached features, kNN, few labels, fine-tuning."""

import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import PYTHON, ROOT, TINY, call, load, newest, run, two_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms.functional import to_pil_image as to_pil

import lincls
from sogclr.augment import Normalize
from sogclr.builder import resnet
from sogclr.classifiers import Classifiers
from sogclr.datasets import open_data_set
from sogclr.loader import LabeledBatches, Loader, center_view
from sogclr.logistic import L2, OVERFITTED
from sogclr.run import file_name

HEAD = ("module.fc.weight", "module.fc.bias")
pytestmark = [pytest.mark.usefixtures("no_gpu"), pytest.mark.slow]


@pytest.fixture
def linear(imagenet, tmp_path):
    """Run lincls.py in this process on a random encoder, in a separate folder; returns the folder and the output."""
    def go(*flags):
        folder = tmp_path / file_name("_".join(map(str, flags)).replace("/", ""))
        lines = call(lincls, "--data", imagenet, *TINY, "--workers", 0, "--epochs", 3, "--seed", 1, "--save_dir",
                     folder, *flags)
        return folder, lines
    return go


def results(folder, name="results.json"):
    return json.loads(newest(folder, name).read_text())


def test_several_classifiers_are_as_many_runs(linear):
    """Each must have exactly the bits and accuracies of a run with only its learning rate and weight decay; the chosen
    one's are stored under the names of a single one.
    """
    folder, lines = linear("--lr", 0.1, 0.5, "--wd", 0.1, 0)
    several = load(folder)
    assert [(row["lr"], row["weight_decay"]) for row in several["classifiers"]] == [(0.1, 0.1), (0.1, 0), (0.5, 0.1),
                                                                                    (0.5, 0)]
    for row in (several["classifiers"][1], several["classifiers"][2]):
        alone = load(linear("--lr", row["lr"], "--wd", row["weight_decay"])[0])
        assert all(torch.equal(row[name.split(".")[2]], alone["state_dict"][name]) for name in HEAD)
        assert all(row[key] == alone[key] for key in ("acc1", "acc5", "best_acc1", "best_epoch"))
    assert "classifiers" not in alone

    chosen = several["classifiers"][results(folder)["chosen"]]
    assert chosen["best_acc1"] == max(row["best_acc1"] for row in several["classifiers"]) == several["best_acc1"]
    assert all(torch.equal(chosen[name.split(".")[2]], several["state_dict"][name]) for name in HEAD)
    table = [line for line in lines if re.match(r"[* ] +0\.[15] ", line)]
    assert len(table) == 4
    assert [line.split()[:3] for line in table if line[0] == "*"] == [
        ["*", f"{chosen['lr']:g}", f"{chosen['weight_decay']:g}"]]
    # the file alone, without their --lr and --wd, is evaluated to the same
    evaluated = linear("-e", "--resume", newest(folder))[1]
    assert [line.split()[-4:-2] for line in evaluated if line in table] == [line.split()[-4:-2] for line in table]
    assert results(folder, "results_checkpoint_last.json")["chosen"] == results(folder)["chosen"]


def test_workers_start_once(linear, monkeypatch):
    """Those of training and validation, not anew in each of the three epochs; once for the embedding and the rank."""
    starts, start = [], torch.utils.data.DataLoader._get_iterator
    monkeypatch.setattr(torch.utils.data.DataLoader, "_get_iterator", lambda data: starts.append(data) or start(data))
    linear("--workers", 1)
    assert len(starts) == len(set(starts)) == 4


def test_the_authors_read_the_checkpoint_of_one(linear):
    """A single classifier's file must contain what theirs does, key for key."""
    saved = load(linear()[0])
    assert {"epoch", "arch", "state_dict", "best_acc1", "optimizer"} <= saved.keys()
    assert [name.removeprefix("module.") for name in saved["state_dict"]] == list(
        torchvision.models.resnet18(num_classes=3).state_dict())
    assert len(saved["optimizer"]["param_groups"]) == 1


def test_cached_features_are_those_of_center_crops(linear, monkeypatch):
    """Up to half precision the quick protocol must equal the classic one on center crops, and report that it is not the
    one on random crops.
    """
    folder, lines = linear("--features", "cached")
    assert sum("the quick protocol, not the classic one" in line for line in lines) == 1
    cached, classic = load(folder)["state_dict"], load(linear()[0])["state_dict"]
    assert not torch.allclose(classic[HEAD[0]], cached[HEAD[0]], atol=2e-3)
    monkeypatch.setattr("sogclr.loader.random_crop", lambda image, rng, size, scale: center_view(to_pil(image), size))
    centered = load(linear("--features", "augmented")[0])["state_dict"]
    assert all(torch.allclose(centered[name], cached[name], atol=2e-3) for name in HEAD)


def test_features_that_do_not_fit_half_precision_are_refused(imagenet, tmp_path, capsys, monkeypatch):
    """Before a classifier is trained on them."""
    monkeypatch.setattr(lincls.Encoder, "forward", lambda self, images: torch.full((len(images), 512), 1e6))
    with pytest.raises(SystemExit, match="2"):
        call(lincls, "--data", imagenet, *TINY, "--workers", 0, "--save_dir", tmp_path, "--features", "cached")
    assert "--features cached: a feature is not finite or above 65504" in capsys.readouterr().err


def test_finetuning_is_sgd_on_all_layers(linear, imagenet):
    """A step must be that of a plain loop over a torchvision model, with the encoder at its own learning rate."""
    saved = load(linear("--finetune", "--epochs", 1, "--batch-size", 24, "--lr", 0.3, "--wd", 0.01)[0])["state_dict"]

    data = open_data_set("imagenet1000", imagenet, "train", image_size=32)
    loader = Loader(LabeledBatches(data, seed=1, augment=True), 24, 0, torch.device("cpu"), seed=1, shuffle=True)
    images, labels = next(iter(loader.epoch(0)))
    torch.manual_seed(1)
    model = resnet("resnet18")
    model.fc = torch.nn.Linear(512, 3)
    torch.nn.init.normal_(model.fc.weight, std=0.01)
    torch.nn.init.zeros_(model.fc.bias)
    F.cross_entropy(model(Normalize(data.mean, data.std)(images)), labels).backward()
    for name, parameter in model.named_parameters():
        lr = (0.3 if name.startswith("fc.") else 0.03) * 24 / 256
        parameter.data -= lr * (parameter.grad + 0.01 * parameter.data)
    for name, value in model.state_dict().items():
        assert torch.allclose(saved[f"module.{name}"], value, rtol=1e-4, atol=1e-6), name


def test_knn_needs_no_training(linear):
    """It prints and records two accuracies, leaves no checkpoint, and finds a training image that is its own query."""
    folder, lines = linear("--knn", "--resume", "auto")
    record = results(folder)
    assert record["protocol"] == "kNN evaluation"
    assert lines[-1] == "=> kNN: " + ", ".join(f"k = {k} Acc@1 {record['knn_acc1'][k]:.3f}" for k in ("20", "200"))
    assert not list(folder.rglob("*.tar"))


def test_logistic_regression_is_recorded(linear, imagenet, tmp_path, capsys):
    """Its search over all images, the mean and deviation of few of them, and the same accuracies on two ranks."""
    folder, lines = linear("--logistic", "--resume", "auto")
    found, settings = results(folder)["logistic"], results(folder)["settings"]
    assert {settings[name] for name in ("features", "lr", "weight_decay", "epochs")} == {None}      # had no effect
    assert lines[-1] == ("=> logistic regression: Acc@1 {acc1:.3f} Acc@5 100.000, L2 {l2:.3g}, chosen on 3 held-out "
                         "training images".format(**found))
    assert (found["held_out"], found["converged"]) == (3, True)         # of 3 classes with 8 images, one each
    command = ["--data", imagenet, *TINY, "--seed", 1, "--save_dir", tmp_path / "two", "--logistic"]
    with two_ranks(lincls, *command) as ranks:
        for process in ranks:
            process.end()
    two = results(tmp_path / "two")["logistic"]
    for one, other in zip(two["curve"], found["curve"], strict=False):      # rounding may decide how long they are
        assert (one["l2"], one["held_out_acc1"]) == (other["l2"], other["held_out_acc1"])
        exact = one["l2"] >= found["l2"]        # below, the optimum of these few images is flat
        assert one["held_out_loss"] == pytest.approx(other["held_out_loss"], rel=1e-3 if exact else 0.05)
    for each in (two, found):       # up to the first that is overfitted
        held_out = [point["held_out_loss"] for point in each["curve"]]
        overfitted = [loss > min(held_out[:k + 1]) + OVERFITTED for k, loss in enumerate(held_out)]
        assert not any(overfitted[:-1])
        assert overfitted[-1] or len(held_out) == len(L2)
    assert (two["l2"], two["loss"]) == (found["l2"], pytest.approx(found["loss"], rel=1e-3))

    few, _ = linear("--logistic", "--shots", 1, 4, "--draws", 3)
    for values in results(few)["shots"].values():
        accuracies = [draw["acc1"] for draw in values["draws"]]
        assert len(accuracies) == 3
        assert values["acc1"] == pytest.approx(np.mean(accuracies))
        assert values["acc1_deviation"] == pytest.approx(np.std(accuracies, ddof=1))
    for flags, message in ((["--shots", 9], "--shots 9: class 'n01440764' has only 8 training images"),
                           (["--train-percent", 1], "--logistic: no class has a second training image to hold out")):
        with pytest.raises(SystemExit, match="2"):
            linear("--logistic", *flags)
        assert message in capsys.readouterr().err


def test_record_and_tensorboard(linear):
    """results.json has the printed accuracies, settings and versions; TensorBoard has a run per classifier with its
    curves and its row of settings, and validation features with thumbnails.
    """
    folder, lines = linear("--lr", 0.1, 0.5)
    record, run_folder = results(folder), newest(folder).parent
    best = record["classifiers"][record["chosen"]]
    assert lines[-1] == (f"=> last epoch: Acc@1 {best['acc1']:.3f} Acc@5 {best['acc5']:.3f}; "
                         f"best Acc@1 {best['best_acc1']:.3f} in epoch {best['best_epoch']}")
    assert record["versions"]["torch"] == torch.__version__
    assert (record["train_images"], record["val_images"], record["settings"]["lr"]) == (24, 9, [0.1, 0.5])
    assert record["seconds"] > 0
    for row in record["classifiers"]:
        curves = EventAccumulator(str(run_folder / f"lr_{row['lr']:g}_wd_0")).Reload()
        assert [event.step for event in curves.Scalars("val/Acc@1")] == [0, 1, 2]
        assert curves.Scalars("val/Acc@1")[-1].value == pytest.approx(row["acc1"])
        assert curves.Scalars("hparam/best_acc1")[0].value == pytest.approx(row["best_acc1"])
        assert "_hparams_/session_start_info" in curves.summary_metadata
    embedding = run_folder / "00003" / "default"
    assert "00003/default/sprite.png" in (run_folder / "projector_config.pbtxt").read_text()
    assert (embedding / "metadata.tsv").read_text().split() == [
        name for name in ("n01440764", "n01443537", "n01484850") for _ in range(3)]
    assert len((embedding / "tensors.tsv").read_text().splitlines()) == 9


@pytest.mark.parametrize("flags", [["--lr", 0.5, 0.1], ["--finetune"], ["--features", "cached"],
                                   ["--train-percent", 50]])
def test_a_resumed_run_keeps_its_protocol(flags, imagenet, tmp_path, capsys):
    """A checkpoint from another protocol must be refused with one line that names the flag."""
    command = ["--data", imagenet, *TINY, "--workers", 0, "--epochs", 1, "--seed", 1]
    call(lincls, *command, "--save_dir", tmp_path / "a")
    with pytest.raises(SystemExit, match="2"):
        call(lincls, *command, "--save_dir", tmp_path / "b", "--resume", newest(tmp_path / "a"), *flags)
    error = capsys.readouterr().err
    assert f"was made with {flags[0]}" in error
    assert error.count("\n") == 1


def test_other_images_are_another_run(imagenet, tmp_path, capsys):
    """Another data folder must get its own run folder, and a checkpoint of other images must not be resumed."""
    command = ["--data_name", "folder", *TINY, "--workers", 0, "--epochs", 1, "--seed", 1, "--save_dir", tmp_path]
    for name, images in (("a", "0"), ("b", "12")):
        for split, wnid in itertools.product(("train", "val"), ("n01440764", "n01443537")):
            (tmp_path / name / split / wnid).mkdir(parents=True)
            for k in images:
                (tmp_path / name / split / wnid / f"{k}.JPEG").symlink_to(imagenet / "val" / wnid / f"{wnid}_{k}.JPEG")
    for name in "ab":
        call(lincls, *command, "--resume", "auto", "--data", tmp_path / name)
    first, second = (path.parent for path in sorted(tmp_path.rglob("results.json")))
    assert ("_data_folder-a_" in first.name, "_data_folder-b_" in second.name) == (True, True)
    with pytest.raises(SystemExit, match="2"):
        call(lincls, *command, "--resume", first / "checkpoint_last.pth.tar", "--data", tmp_path / "b")
    assert "was made with other images (2 images, digest " in capsys.readouterr().err
    call(lincls, *command, "--knn", "--data", tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "b").rename(tmp_path / "elsewhere" / "a")
    with pytest.raises(SystemExit, match="2"):
        call(lincls, *command, "--knn", "--data", tmp_path / "elsewhere" / "a")
    assert "results.json: was made with other images (2 images, digest " in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--finetune", "--encoder-lr", 1e40]])
def test_spoiled_weights_are_not_saved(flags, imagenet, tmp_path, capsys):
    """Non-finite weights must end the run before they are saved; one such classifier of several must not."""
    common = ["--data", imagenet, *TINY, "--epochs", 2, "--save-minutes", 1e-9, "--save_dir", tmp_path]
    with pytest.raises(SystemExit, match="2"):
        call(lincls, *common, "--lr", 1e40, *flags)
    error = capsys.readouterr().err
    assert "a weight is not finite in epoch 0, step " in error
    assert ": use a smaller learning rate than --lr 1e+40" in error
    for file in tmp_path.rglob("*.tar"):
        saved = torch.load(file, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in saved.values())
    if not flags:
        call(lincls, *common, "--lr", 0.1, 1e40)
        assert any(tmp_path.rglob("checkpoint_last.pth.tar"))


def test_linear_evaluation(pretrained, imagenet, tmp_path, monkeypatch, capsys):
    """lincls must train, save, and evaluate what it saved, from a bare file name too."""
    source = newest(pretrained[1], "checkpoint_0001.pth.tar")
    os.symlink(source, tmp_path / "checkpoint_0001.pth.tar")
    command = ["--pretrained", "checkpoint_0001.pth.tar", "--data", imagenet, *TINY, "--seed", 1]
    output, _ = run(PYTHON, ROOT / "lincls.py", *command, "--epochs", 3, "--save_dir", tmp_path / "a", cwd=tmp_path)
    scores = [line for line in output.splitlines() if line.startswith(" * Epoch")]
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
    # at another size this is said; the checkpoint alone suffices; and another encoder is refused
    assert any("note: it was trained at 32 pixels" in line for line in
               call(lincls, *command, "--image-size", 40, "-e", "--resume", last))
    assert call(lincls, "--data", imagenet, *TINY[:4], "-e", "--resume", last)[-1] == evaluated
    other = newest(pretrained[1], "checkpoint_0000.pth.tar")
    with pytest.raises(SystemExit):
        call(lincls, *command, "--pretrained", other, "--resume", last)
    assert "evaluates a different encoder" in capsys.readouterr().err


def test_evaluation_knows_how_the_encoder_was_made(pretrained, imagenet, tmp_path):
    """The results must record the pretraining's settings and seconds, and another image size must be reported."""
    source = newest(pretrained[1], "checkpoint_0001.pth.tar")
    command = ["--pretrained", source, "--data", imagenet, *TINY, "--knn", "--save_dir", tmp_path]
    assert not any("trained at" in line for line in call(lincls, *command))
    made, (results,) = (json.loads((source.parent / "results.json").read_text()), tmp_path.rglob("results.json"))
    results = json.loads(results.read_text())
    assert results["encoder"] == made["settings"]
    assert 0 < results["pretraining_seconds"] <= made["seconds"] + 0.1
    assert "=> note: it was trained at 32 pixels; to match, pass --image-size 32" in \
        call(lincls, *command, "--image-size", 40)


EFFECTIVE = ["--lr 0.5", "--momentum 0.1", "--wd 0.5", "--batch-size 6", "--seed 2", "--start-epoch 1", "--epochs 4",
             "--precision bf16", "--image-size 40", "--features cached", "--train-percent 50", "--finetune"]


def test_few_labels_are_recorded_as_what_they_are(linear):
    """If a percentage is less than an image per class, one of each is used, and the protocol says how many percent."""
    folder, lines = linear("--train-percent", 1)
    assert results(folder)["protocol"] == "linear evaluation on 12.5 % of the training images"
    assert results(folder)["train_images"] == 3
    assert any(line.startswith("=> linear evaluation on 12.5 % of the training images, ") for line in lines)


def test_other_class_names_are_refused(linear, imagenet, tmp_path, capsys):
    """A classifier must not be evaluated on as many classes of other names, nor resumed; a file without names, from an
    earlier release, is evaluated as before.
    """
    folder, lines = linear()
    saved = newest(folder)
    shutil.copytree(imagenet, tmp_path / "renamed")
    for split in ("train", "val"):
        (tmp_path / "renamed" / split / "n01440764").rename(tmp_path / "renamed" / split / "tench")
    for how in (["-e"], []):
        with pytest.raises(SystemExit, match="2"):
            linear("--data", tmp_path / "renamed", "--resume", saved, *how)
        assert capsys.readouterr().err.endswith(
            f"--resume {saved}: has other classes than --data, the first that differs is 'n01440764', only in the "
            "checkpoint: use a folder with the checkpoint's class names\n")
    whole = torch.load(saved, weights_only=True)
    del whole["classes"]
    torch.save(whole, tmp_path / "old.pth.tar")
    assert linear("-e", "--resume", tmp_path / "old.pth.tar")[1][-1].split("Acc@1")[1] in lines[-3]
    (tmp_path / "renamed" / "val" / "tench").rename(tmp_path / "renamed" / "val" / "n01440764")
    with pytest.raises(SystemExit, match="2"):
        linear("--data", tmp_path / "renamed")
    assert "train and val have different classes (3 and 3), 'n01440764' is only in val" in capsys.readouterr().err


def test_classes_are_matched_by_name():
    """In another order, each classifier's rows must follow their classes."""
    one, other = (Classifiers(4, names, [(0.1, 0.0), (0.2, 0.0)]) for names in ("abc", "cab"))
    other.restore({"state_dict": {}, **one.saved()}, "file")
    features = torch.randn(5, 4)
    for ours, theirs in zip(other(features), one(features), strict=True):
        assert torch.equal(ours, theirs[:, [2, 0, 1]])


def test_every_flag_has_an_effect(linear):
    """Another value of any flag of the protocol must lead to another classifier."""
    plain, *others = (load(linear(*flags.split())[0])["state_dict"][HEAD[0]] for flags in ("", *EFFECTIVE))
    without = [flags for flags, other in zip(EFFECTIVE, others, strict=True) if torch.equal(plain, other)]
    assert not without
