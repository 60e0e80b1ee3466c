"""What all tests share: real image files in ImageNet's layout, a checkpoint, and an end for every process."""

import os
import subprocess

import pytest
import torch
from helpers import CLASSES, CLEAN_UP, PYTHON, TINY, call, write_image

import train


def pytest_configure(config):
    """See that all that the tests have started is killed once pytest has ended, in whatever way."""
    if "SOGCLR_TESTS" not in os.environ:        # not in a worker of pytest-xdist
        os.environ["SOGCLR_TESTS"] = str(os.getpid())
        config.clean_up = subprocess.Popen([PYTHON, "-I", "-c", CLEAN_UP, f"SOGCLR_TESTS={os.getpid()}"],
                                           stdin=subprocess.PIPE, start_new_session=True)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Results are compared bit for bit across processes, and sums depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def no_gpu():
    """The same tests on every machine; those that need a GPU are in test_gpu.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    """DIR/train/<wnid>/*.JPEG and DIR/val/<wnid>/*.JPEG: 3 classes, 8 training and 3 validation images each."""
    folder = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(CLASSES):
            for k in range(count):
                write_image(folder / split / name / f"{name}_{k}.JPEG", seed=100 * label + k + 50 * (split == "val"))
    return folder


@pytest.fixture(scope="module")
def pretrained(imagenet, no_gpu, tmp_path_factory):
    """The output and the save folder of two epochs of train.py."""
    folder = tmp_path_factory.mktemp("saved")
    return call(train, "--data", imagenet, *TINY, "--epochs", 2, "--seed", 5, "--save_dir", folder), folder
