"""What all tests share: real image files in ImageNet's layout, a checkpoint, and an end for every process."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import CLASSES, TINY, call, write_image

import train

# Kills all that the tests have started once pytest has ended, in whatever way: that closes this process's input.
CLEAN_UP = """
import os, signal, sys
sys.stdin.read()
found = True
while found:        # until there are none, since they may start others meanwhile
    found = False
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if sys.argv[1].encode() in file.read().split(b"\\0") and int(pid) != os.getpid():
                    os.kill(int(pid), signal.SIGKILL)
                    found = True
        except OSError:
            pass
"""


def pytest_configure(config):
    if "SOGCLR_TESTS" not in os.environ:        # not in a worker of pytest-xdist
        os.environ["SOGCLR_TESTS"] = str(os.getpid())
        config.clean_up = subprocess.Popen([sys.executable, "-I", "-c", CLEAN_UP, f"SOGCLR_TESTS={os.getpid()}"],
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
