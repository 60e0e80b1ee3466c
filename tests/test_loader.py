"""What is seen, in which order, and on what it depends."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image

from sogclr import InputError, loader
from sogclr.loader import EpochSampler, Labelled, Loader, TwoViews, center_view, crop_box, open_data_set, random_crop

CPU = torch.device("cpu")


def epoch_of(data, seed, epoch, workers=0, batch_size=6):
    sampler = EpochSampler(len(data.images), batch_size, seed, shuffle=True, drop_last=True)
    return list(Loader(TwoViews(data, seed, 0.08, 11), sampler, workers, CPU).epoch(epoch))


def by_image(batches):
    """{image: (crop a, draws a, crop b, draws b)}"""
    return {int(i): (view1[0][k], view1[1][k], view2[0][k], view2[1][k])
            for view1, view2, index in batches for k, i in enumerate(index)}


@pytest.fixture
def data(imagenet):
    return open_data_set("imagenet1000", imagenet, "train", image_size=24)


def test_views_depend_on_seed_epoch_and_image_alone(data, monkeypatch):
    """The same with 0, 1 or 2 workers and on 1 or 3 ranks; different for another seed or epoch."""
    monkeypatch.setattr(loader.os, "sched_getaffinity", lambda _: range(8))
    expected = by_image(epoch_of(data, seed=1, epoch=2))
    assert len(expected) == 24
    for workers in (1, 2):
        again = by_image(epoch_of(data, seed=1, epoch=2, workers=workers))
        assert again.keys() == expected.keys()
        assert all(torch.equal(a, b) for i in expected for a, b in zip(again[i], expected[i], strict=True))
    for rank in range(3):
        monkeypatch.setattr(loader, "world_size", lambda: 3)
        monkeypatch.setattr(loader, "rank", lambda rank=rank: rank)
        share = by_image(epoch_of(data, seed=1, epoch=2))
        assert len(share) == 8
        assert all(torch.equal(a, b) for i in share for a, b in zip(share[i], expected[i], strict=True))
    monkeypatch.undo()
    for other in (by_image(epoch_of(data, seed=2, epoch=2)), by_image(epoch_of(data, seed=1, epoch=3))):
        assert not any(torch.equal(other[i][1], expected[i][1]) for i in expected)


def test_no_draw_is_shared(data):
    """Two images, two views, two epochs, two seeds: no random number may appear twice."""
    draws = [torch.cat([d for values in by_image(epoch_of(data, seed, epoch)).values() for d in values[1::2]])
             for seed in (0, 1) for epoch in (0, 1)]
    draws = torch.cat(draws)
    assert len(draws) == 2 * 2 * 24 * 2 * 11
    assert len(draws.unique()) > len(draws) - 5     # float32 has 2^24 values in [0, 1): a few meet by chance


@pytest.mark.parametrize(("images", "batch", "world"), [(103, 10, 1), (103, 10, 5), (40, 8, 4)])
def test_epoch_is_split_without_overlap(images, batch, world, monkeypatch):
    """Over all ranks each global batch must be that of one rank, each image at most once, only the last incomplete
    batch missing, and another order (and other missing images) in the next epoch.
    """
    def epochs(world, epoch):
        shares = []
        for rank in range(world):
            monkeypatch.setattr(loader, "world_size", lambda: world)
            monkeypatch.setattr(loader, "rank", lambda rank=rank: rank)
            sampler = EpochSampler(images, batch, seed=3, shuffle=True, drop_last=True)
            sampler.epoch = epoch
            shares.append(list(sampler))
        return [[key for share in shares for key in share[step]] for step in range(len(shares[0]))]

    alone, together = epochs(1, 0), epochs(world, 0)
    assert alone == together
    seen = [index for step in together for _, index in step]
    assert len(seen) == len(set(seen)) == images // batch * batch
    following = [index for step in epochs(world, 1) for _, index in step]
    assert following != seen
    assert images % batch == 0 or set(following) != set(seen)


def test_evaluation_sees_each_image_once(monkeypatch):
    """Without drop_last, every image must be on exactly one rank, also where they cannot be shared equally."""
    seen = []
    for rank in range(4):
        monkeypatch.setattr(loader, "world_size", lambda: 4)
        monkeypatch.setattr(loader, "rank", lambda rank=rank: rank)
        seen += [index for share in EpochSampler(103, 10) for _, index in share]
    assert sorted(seen) == list(range(103))


def test_crop_box_has_torchvisions_distribution():
    """Area, ratio and place of the boxes must be distributed as RandomResizedCrop's, also where ten tries can fail."""
    n = 3000
    for width, height in ((60, 40), (8, 100)):
        image = torch.zeros(3, height, width)
        torch.manual_seed(0)
        theirs = np.array([T.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
        theirs = theirs[:, [1, 0, 3, 2]]        # to left, top, width, height
        ours = np.array([crop_box(np.random.default_rng(i), width, height, (0.08, 1.0)) for i in range(n)])
        for column in range(4):
            grid = np.arange(max(width, height) + 1)
            cdfs = [np.searchsorted(np.sort(boxes[:, column]), grid, side="right") / n for boxes in (ours, theirs)]
            distance = np.abs(cdfs[0] - cdfs[1]).max()
            assert distance < math.sqrt(math.log(2 / 1e-6) / n)      # two-sample Kolmogorov-Smirnov


def test_random_crop_is_torchvisions_resized_crop():
    """The pixels must be PIL's antialiased resize of the box, up to rounding, and half of the crops mirrored."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
    image = small.resize((200, 150), Image.Resampling.BICUBIC)
    tensor = T.functional.pil_to_tensor(image)
    mirrored = 0
    for i in range(100):
        left, top, width, height = crop_box(np.random.default_rng(i), 200, 150, (0.08, 1.0))
        theirs = T.functional.pil_to_tensor(
            T.functional.resized_crop(image, top, left, height, width, [64, 64])).int()
        ours = random_crop(tensor, np.random.default_rng(i), 64, (0.08, 1.0)).int()
        errors = [(ours - theirs).abs().max(), (ours.flip(2) - theirs).abs().max()]
        mirrored += bool(errors[1] < errors[0])
        assert min(errors) <= 1
    assert 30 < mirrored < 70


def test_validation_view_is_torchvisions():
    """Resize 256 and centre crop 224 must be pixel-equal to torchvision's; at 32 pixels the whole image is taken."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (300, 411, 3), dtype=np.uint8))
    theirs = T.Compose([T.Resize(256), T.CenterCrop(224), T.PILToTensor()])(image)
    assert torch.equal(center_view(image, 224), theirs)
    cifar = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert torch.equal(center_view(cifar, 32), T.functional.pil_to_tensor(cifar))


def test_labels_are_the_class_folders(imagenet):
    """Training and validation labels must follow the sorted folder names."""
    data = open_data_set("imagenet1000", imagenet, "val", image_size=24)
    sampler = EpochSampler(len(data.images), 4)
    labels = torch.cat([labels for _, labels in Loader(Labelled(data), sampler, 0, CPU).epoch(0)])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_folder_takes_any_tree(imagenet, tmp_path):
    """`folder` must find images with and without class folders and with and without `train`, in sorted order."""
    assert len(open_data_set("folder", imagenet, "train", labels=False).images) == 24
    flat = imagenet / "train" / "n01440764"
    assert len(open_data_set("folder", flat, "train", labels=False).images) == 8
    assert len(open_data_set("folder", imagenet / "val", "train", labels=False).images) == 9
    names = [path for path, _ in open_data_set("folder", imagenet, "train", labels=False).images.samples]
    assert names == sorted(names)


@pytest.mark.parametrize("split", ["train", "val"])
def test_shapes_are_the_same_everywhere(split):
    """The embedded set must be reproducible, balanced, and differ between train and val."""
    one, again = (open_data_set("shapes", None, split).images for _ in range(2))
    assert all(one[i][0].tobytes() == again[i][0].tobytes() for i in range(0, len(one), 97))
    assert np.bincount(one.targets).tolist() == [len(one) // 10] * 10
    other = open_data_set("shapes", None, "val" if split == "train" else "train").images
    assert one[0][0].tobytes() != other[0][0].tobytes()


def test_unreadable_image_is_named(imagenet, tmp_path):
    """A broken file must end the epoch with one line that names it, from worker processes too."""
    broken = tmp_path / "train" / "class" / "b.jpg"
    broken.parent.mkdir(parents=True)
    good = imagenet / "train" / "n01440764" / "n01440764_0.JPEG"
    for name in "acdef":
        (broken.parent / f"{name}.jpg").write_bytes(good.read_bytes())
    broken.write_text("not an image")
    data = open_data_set("folder", tmp_path, "train", image_size=24, labels=False)
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"b\.jpg: not a readable image") as caught:
            epoch_of(data, 0, 0, workers=workers)
        assert "\n" not in str(caught.value)
