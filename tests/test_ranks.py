"""Several processes: they must be one run, and end together."""

import json
import shutil

import pytest
import torch
from helpers import PYTHON, ROOT, TINY, call, load, losses, newest, run, two_ranks

import lincls
import train

pytestmark = [pytest.mark.usefixtures("no_gpu"), pytest.mark.slow]


@pytest.mark.parametrize("features", ["augmented", "cached"])
def test_two_ranks_train_the_classifiers_of_one(features, pretrained, imagenet, tmp_path):
    """On unequal local batches, and a last batch of one image, with the same accuracies."""
    command = ["--data", imagenet, *TINY, "--pretrained", newest(pretrained[1], "checkpoint_0001.pth.tar"),
               "--epochs", 3, "--seed", 1, "--lr", 0.1, 0.5, "--batch-size", 7, "--train-percent", 62.5,
               "--features", features]
    one = losses(call(lincls, *command, "--save_dir", tmp_path / "one"))
    with two_ranks(lincls, *command, "--save_dir", tmp_path / "two") as (first, second):
        two = losses(first.end()[0].splitlines())
        assert second.end() == ("", "")         # one log
    assert len(one) == 9
    assert [float(loss) for loss in two] == pytest.approx([float(loss) for loss in one], abs=2e-4)
    assert json.loads(newest(tmp_path / "two", "results.json").read_text())["ranks"] == 2
    subsets = [newest(tmp_path / name, "train_subset.txt").read_text() for name in ("one", "two")]
    assert subsets[0] == subsets[1]
    assert len(subsets[0].split()) == 15
    classifiers = [load(tmp_path / name)["classifiers"] for name in ("one", "two")]
    for a, b in zip(*classifiers, strict=True):
        assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in ("weight", "bias"))
        assert {key: a[key] for key in ("acc1", "acc5", "best_epoch")} == {
            key: b[key] for key in ("acc1", "acc5", "best_epoch")}


@pytest.mark.parametrize(("module", "flags"), [(train, ["--lr", 0.01]), (lincls, ["--finetune", "--lr", 0.01])])
def test_two_ranks_train_the_network_of_one(module, flags, imagenet, tmp_path):
    """Pretraining and fine-tuning must give one process's weights and BatchNorm statistics."""
    command = ["--data", imagenet, *TINY, "--seed", 1, "--epochs", 1, *flags]
    call(module, *command, "--save_dir", tmp_path / "one")
    with two_ranks(module, *command, "--save_dir", tmp_path / "two") as (first, second):
        first.end()
        assert second.end() == ("", "")
    one, two = (load(tmp_path / name)["state_dict"] for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


def test_finetuning_on_two_ranks_saves_what_it_validated(imagenet, tmp_path):
    """The file must have the accuracy that was printed."""
    command = ["--data", imagenet, *TINY, "--seed", 1, "--save_dir", tmp_path]
    with two_ranks(lincls, *command, "--finetune", "--epochs", 2) as (first, second):
        lines = first.end()[0].splitlines()
        second.end()
    evaluated = call(lincls, *command, "-e", "--resume", newest(tmp_path))
    assert evaluated[-1].split("Acc@1")[1] in next(line for line in lines if line.startswith(" * Epoch 1"))


@pytest.mark.parametrize(("flags", "message"), [
    ([], "3.jpg: not a readable image"),
    (["--batch-size", 9], "--batch-size 9: cannot be split equally over 2 processes")])
def test_an_error_ends_every_rank(flags, message, imagenet, tmp_path):
    """At once, and with one line: whether it is one rank's, such as a broken file in its local batch, or all ranks'."""
    for k in range(8):
        source = imagenet / "train" / "n01440764" / f"n01440764_{k}.JPEG"
        (tmp_path / f"{k}.jpg").write_bytes(source.read_bytes() if k != 3 else b"broken")
    command = ["--data_name", "folder", "--data", tmp_path, *TINY, "--save_dir", tmp_path / "saved", *flags]
    with two_ranks(train, *command) as ranks:
        errors = "".join(rank.end(1, 2)[1] for rank in ranks)
    assert errors.count("train.py: error: ") == 1
    assert message in errors


def test_unreadable_image_ends_a_process_with_workers(imagenet, tmp_path):
    """The line, and the process must end although the workers leave signals to their rank."""
    shutil.copytree(imagenet, tmp_path / "data")
    (tmp_path / "data" / "train" / "n01440764" / "n01440764_3.JPEG").write_bytes(b"broken")
    _, error = run(PYTHON, ROOT / "train.py", "--data", tmp_path / "data", *TINY, "--workers", 2, "--save_dir",
                   tmp_path / "saved", code=2)
    assert error.startswith(f"train.py: error: {tmp_path}/data/train/n01440764/n01440764_3.JPEG: not a readable")
    assert error.count("\n") == 1
