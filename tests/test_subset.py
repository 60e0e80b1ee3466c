"""Which images a class-balanced subset takes."""

from types import SimpleNamespace

import numpy as np
import pytest

from sogclr.subset import Subset, balanced_indices, held_out, shot_indices

SIZES = (40, 7, 100, 1, 52)
TARGETS = np.random.default_rng(0).permutation(np.repeat(np.arange(len(SIZES)), SIZES))


@pytest.mark.parametrize("percent", [0.1, 1, 10, 33.3, 99, 100])
def test_classes_are_as_balanced_as_possible(percent):
    """As many as requested, each once; a class has fewer than another only due to the last round, or if it has no more.
    """
    indices = balanced_indices(TARGETS, percent, seed=1)
    assert len(indices) == max(round(2 * percent), len(SIZES))
    assert (np.diff(indices) > 0).all()
    counts = np.bincount(TARGETS[indices], minlength=len(SIZES))
    assert all(count == size or count >= counts.max() - 1 for count, size in zip(counts, SIZES, strict=True))


def test_seed_decides_and_smaller_subsets_are_nested():
    """The same seed gives the same images, another seed others; the 1 % are among the 10 %."""
    some, more = (set(balanced_indices(TARGETS.tolist(), percent, seed=1).tolist()) for percent in (10, 40))
    assert some < more
    assert some == set(balanced_indices(TARGETS, 10, seed=1).tolist())
    assert some != set(balanced_indices(TARGETS, 10, seed=2).tolist())


def test_shots_and_held_out_images_per_class():
    """As many of each class as it has, more shots including fewer; and a fifth of each class, or one of two to four."""
    for shots in (1, 5, 50):
        chosen = shot_indices(TARGETS, shots, seed=1)
        assert np.bincount(TARGETS[chosen]).tolist() == [min(shots, size) for size in SIZES]
        assert set(chosen) <= set(shot_indices(TARGETS, shots + 1, seed=1))
    assert set(chosen) != set(shot_indices(TARGETS, shots, seed=2))
    assert np.bincount(TARGETS[held_out(TARGETS, seed=1)], minlength=5).tolist() == [8, 1, 20, 0, 10]
    few = np.array([0, 0, 1, 1, 1, 1, 2])
    assert few[held_out(few, seed=1)].tolist() == [0, 1]


def test_subset_lists_its_images(tmp_path):
    """Image i is the data set's image indices[i]; files are listed by path, other images by number."""
    files = SimpleNamespace(classes=["a"], root=b"/data/train", path=lambda i: b"/data/train/a/%d.png" % i)
    Subset(files, [3, 5]).write_list(tmp_path / "files.txt")
    assert (tmp_path / "files.txt").read_text() == "a/3.png\na/5.png\n"

    class Numbers(list):
        classes = ("a",)

    subset = Subset(Numbers("abcdef"), [3, 5])
    assert (len(subset), subset[1], subset.classes) == (2, "f", ("a",))
    subset.write_list(tmp_path / "numbers.txt")
    assert (tmp_path / "numbers.txt").read_text() == "3\n5\n"
