"""Which views are seen, in which order, and on what they depend."""

import gc
import math
import multiprocessing
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image

from sogclr import InputError, loader
from sogclr.augment import Augment, pil_recipe
from sogclr.datasets import open_data_set
from sogclr.files import ImageFiles
from sogclr.loader import EpochSampler, LabeledBatches, Loader, TwoViewBatches, center_view, crop_box, random_crop

CPU = torch.device("cpu")


def make_loader(data, seed, batch_size=6, workers=0, bad_images="stop"):
    """The loader of train.py."""
    return Loader(TwoViewBatches(data, seed, 0.08, 11, bad_images), batch_size, workers, CPU, keep_workers=True,
                  seed=seed, shuffle=True, drop_last=True)


def epoch_of(data, seed, epoch, workers=0):
    return list(make_loader(data, seed, workers=workers).epoch(epoch))


def by_image(batches):
    """{image: (crop a, uniforms a, crop b, uniforms b)}"""
    return {int(i): (crops[0, k], uniforms[0, k], crops[1, k], uniforms[1, k])
            for crops, uniforms, index in batches for k, i in enumerate(index)}


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
        local = by_image(epoch_of(data, seed=1, epoch=2))
        assert len(local) == 8
        assert all(torch.equal(a, b) for i in local for a, b in zip(local[i], expected[i], strict=True))
    monkeypatch.undo()
    for other in (by_image(epoch_of(data, seed=2, epoch=2)), by_image(epoch_of(data, seed=1, epoch=3))):
        assert not any(torch.equal(other[i][1], expected[i][1]) for i in expected)


def test_little_shared_memory_is_enough(data, monkeypatch, capsys):
    """If /dev/shm cannot hold the workers' batches, as in many containers, they must arrive anyway."""
    expected = by_image(epoch_of(data, seed=1, epoch=2))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(torch.Tensor, "share_memory_", None)
    again = by_image(epoch_of(data, seed=1, epoch=2, workers=2))
    assert all(torch.equal(a, b) for i in expected for a, b in zip(again[i], expected[i], strict=True))
    assert "=> /dev/shm has only 0 of the" in capsys.readouterr().out


def test_workers_outlive_the_signals_that_stop_a_run(data):
    """They are sent to all processes, but the current step, and its save, still need the workers. Only their own rank
    may end them, and must be able to.
    """
    batches = make_loader(data, 1, batch_size=2, workers=1)
    seen = []
    for *_, index in batches.epoch(0):
        worker, = batches.loader._iterator._workers
        for name in ("TERM", "USR1", "INT"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        seen += index.tolist()
    assert sorted(seen) == list(range(24))
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_workers_of_a_spawned_rank_are_forked(data, monkeypatch):
    """A rank started by `--multiprocessing-distributed` would by default spawn its workers: each would import torch and
    get a copy of the list of files, which a fork shares.
    """
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)       # as in such a rank
    monkeypatch.setattr(type(data.images), "__reduce__", None)  # what cannot be pickled cannot be sent
    try:
        assert len(epoch_of(data, seed=1, epoch=0, workers=1)) == 4
    finally:
        multiprocessing.set_start_method(default, force=True)


def test_workers_leave_the_ranks_objects_alone(data, monkeypatch):
    """A garbage collection writes to all objects that it sees, so a forked worker must not see those it shares."""
    def make(*_):
        return loader.Batch((torch.zeros(1), torch.tensor(len(gc.get_objects()))), {})

    monkeypatch.setattr(TwoViewBatches, "make", make)
    for _, seen in make_loader(data, seed=1, workers=1).epoch(0):
        assert seen < len(gc.get_objects()) / 10


def test_batches_ahead(data):
    """What workers prepare before one is asked for, which a measurement must not count."""
    assert make_loader(data, seed=1, workers=1).ahead == 2
    assert make_loader(data, seed=1, workers=0).ahead == 0


def test_no_random_number_is_shared(data):
    """Two images, two views, two epochs, two seeds: no random number may appear twice."""
    uniforms = [torch.cat([d for values in by_image(epoch_of(data, seed, epoch)).values() for d in values[1::2]])
             for seed in (0, 1) for epoch in (0, 1)]
    uniforms = torch.cat(uniforms)
    assert len(uniforms) == 2 * 2 * 24 * 2 * 11
    assert len(uniforms.unique()) > len(uniforms) - 5     # float32 has 2^24 values in [0, 1): a few collide by chance


@pytest.mark.parametrize(("images", "batch", "world"), [(103, 10, 1), (103, 10, 5), (40, 8, 4)])
def test_epoch_is_split_without_overlap(images, batch, world, monkeypatch):
    """Over all ranks each global batch must be that of one rank, each image at most once, only the last incomplete
    batch missing, and another order (and other missing images) in the next epoch.
    """
    def epochs(world, epoch):
        local = []
        for rank in range(world):
            monkeypatch.setattr(loader, "world_size", lambda: world)
            monkeypatch.setattr(loader, "rank", lambda rank=rank: rank)
            sampler = EpochSampler(images, batch, seed=3, shuffle=True, drop_last=True)
            sampler.epoch = epoch
            local.append([indices for _, indices, _ in sampler])
        return [[index for rank in local for index in rank[step]] for step in range(len(local[0]))]

    alone, together = epochs(1, 0), epochs(world, 0)
    assert alone == together
    seen = [index for step in together for index in step]
    assert len(seen) == len(set(seen)) == images // batch * batch
    following = [index for step in epochs(world, 1) for index in step]
    assert following != seen
    assert images % batch == 0 or set(following) != set(seen)


def test_batch_that_ranks_cannot_split_is_refused(monkeypatch):
    """As BatchNorm needs equally many images, and more than one, on each."""
    monkeypatch.setattr(loader, "world_size", lambda: 2)
    loader.check_batch_size(4, 24)
    for batch in (2, 9):
        with pytest.raises(InputError, match=f"--batch-size {batch}: cannot be split equally over 2 processes"):
            loader.check_batch_size(batch, 24)


def test_evaluation_sees_each_image_once(monkeypatch):
    """Without drop_last, every image must be on exactly one rank, even if they cannot be split equally."""
    seen = []
    for rank in range(4):
        monkeypatch.setattr(loader, "world_size", lambda: 4)
        monkeypatch.setattr(loader, "rank", lambda rank=rank: rank)
        seen += [index for _, indices, _ in EpochSampler(103, 10) for index in indices]
    assert sorted(seen) == list(range(103))


def test_crop_box_has_torchvisions_distribution():
    """Area, ratio and position of boxes must be distributed as RandomResizedCrop's, even if ten tries can fail."""
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


def test_validation_view_equals_torchvisions():
    """Resize 256 and center crop 224 must be pixel-equal to torchvision's; at 32 pixels the whole image is used."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (300, 411, 3), dtype=np.uint8))
    theirs = T.Compose([T.Resize(256), T.CenterCrop(224), T.PILToTensor()])(image)
    assert torch.equal(center_view(image, 224), theirs)
    cifar = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert torch.equal(center_view(cifar, 32), T.functional.pil_to_tensor(cifar))


def test_labels_are_the_class_folders(imagenet):
    """Training and validation labels must follow the sorted folder names."""
    data = open_data_set("imagenet1000", imagenet, "val", image_size=24)
    labels = torch.cat([labels for _, labels in Loader(LabeledBatches(data), 4, 0, CPU).epoch(0)])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_folder_takes_any_tree(imagenet, tmp_path):
    """`folder` must find images with and without class folders and with and without `train`, in sorted order."""
    assert len(open_data_set("folder", imagenet, "train", labels=False).images) == 24
    flat = imagenet / "train" / "n01440764"
    assert len(open_data_set("folder", flat, "train", labels=False).images) == 8
    assert len(open_data_set("folder", imagenet / "val", "train", labels=False).images) == 9


def test_epoch_restarts_at_any_step(data, monkeypatch):
    """From step k on the batches must be those of the whole epoch, and earlier ones must not be read."""
    whole = epoch_of(data, 1, 0)
    read = []
    original = ImageFiles.__getitem__
    monkeypatch.setattr(ImageFiles, "__getitem__", lambda self, i: read.append(i) or original(self, i))
    rest = list(make_loader(data, 1).epoch(0, first_step=3))
    assert len(rest) == 1
    assert torch.equal(rest[0][2], whole[3][2])
    assert torch.equal(rest[0][0][0], whole[3][0][0])
    assert sorted(read) == sorted(whole[3][2].tolist())


@pytest.mark.parametrize("split", ["train", "val"])
def test_shapes_are_the_same_everywhere(split):
    """The built-in set must be reproducible, balanced, and differ between train and val."""
    one, again = (open_data_set("shapes", None, split).images for _ in range(2))
    assert all(one[i][0].tobytes() == again[i][0].tobytes() for i in range(0, len(one), 97))
    assert np.bincount(one.targets).tolist() == [len(one) // 10] * 10
    other = open_data_set("shapes", None, "val" if split == "train" else "train").images
    assert one[0][0].tobytes() != other[0][0].tobytes()


@pytest.fixture
def mostly_good(imagenet, tmp_path):
    """A data set of 300 images, of which numbers 7 and 8 are broken."""
    content = (imagenet / "train" / "n01440764" / "n01440764_0.JPEG").read_bytes()
    for i in range(300):
        (tmp_path / f"{i:03d}.jpg").write_bytes(b"broken" if i in (7, 8) else content)
    return open_data_set("folder", tmp_path, "train", image_size=24, labels=False)


def read_epoch(data, workers, bad_images, epoch=0):
    return list(make_loader(data, 0, 30, workers, bad_images).epoch(epoch))


def test_unreadable_image_stops_the_run(mostly_good):
    """By default one line must name the file; `test_ranks` has worker processes."""
    with pytest.raises(InputError, match=r"00[78]\.jpg: not a readable image") as caught:
        read_epoch(mostly_good, 0, "stop")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_replaced_under_the_others_own_index(mostly_good, workers, capfd):
    """With skip each batch must stay full and free of duplicates, each index with its own image's views, and each bad
    file reported once.
    """
    batches = read_epoch(mostly_good, workers, "skip")
    assert [len(index) for _, _, index in batches] == [30] * 10
    for _, _, index in batches:
        assert len(index.unique()) == 30
        assert not {7, 8} & set(index.tolist())
    views = by_image(batches)
    alone = TwoViewBatches(mostly_good, 0, 0.08, 11).make(0, [12], []).content
    assert torch.equal(views[12][0], alone[0][0, 0])
    error = capfd.readouterr().err
    assert error.count("007.jpg: not a readable image") == error.count("008.jpg: not a readable image") == 1


@pytest.mark.parametrize("collate", [loader._as_made, loader._as_arrays])
def test_every_part_is_pinned(collate, data, monkeypatch):
    """By torch's thread, whether workers send tensors or arrays: a copy from other memory would make the host wait."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda part, *_: pinned.append(part) or part)
    batch = TwoViewBatches(data, 1, 0.08, 11).make(0, [3, 4], [])
    content = torch.utils.data._utils.pin_memory.pin_memory(collate(batch)).content
    assert len(pinned) == len(content) == 3
    for ours, made in zip(pinned, batch.content, strict=True):
        assert torch.equal(ours, made)
        assert ours.stride() == made.stride()


def test_more_than_a_percent_of_bad_images_always_stops(mostly_good, imagenet, tmp_path):
    """Four of 300 are too many: the run must stop even with skip."""
    for i in (100, 200):
        (tmp_path / f"{i:03d}.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="more than 1% of the data set"):
        read_epoch(mostly_good, 0, "skip")


def test_bad_validation_image_is_left_out(mostly_good):
    """With skip, evaluation must see each good image exactly once."""
    batches = list(Loader(LabeledBatches(mostly_good, bad_images="skip"), 30, 0, CPU).epoch(0))
    assert sum(len(images) for images, _ in batches) == 298


def test_pil_recipe_has_statistically_equal_views(imagenet):
    """`--augment pil` must give finished views, reproducible, with the pixel statistics of the batched recipe."""
    data = open_data_set("imagenet1000", imagenet, "train", image_size=40)
    stage = Augment(data.mean, data.std, blur=True)
    recipe = pil_recipe(data, 0.08)
    moments = []
    for kind in (None, recipe):
        views = TwoViewBatches(data, 0, 0.08, Augment.num_uniforms, recipe=kind)
        epochs = [stage(*views.make(epoch, list(range(24)), []).content[:2]) for epoch in range(20)]
        pixels = torch.cat(epochs).flatten(0, 1)
        moments.append(torch.stack([pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)), pixels.diff(dim=3).std((0, 2, 3))]))
        assert torch.equal(stage(*views.make(0, list(range(24)), []).content[:2]), epochs[0])
    assert (moments[0] - moments[1]).abs().max() < 0.08


@pytest.mark.parametrize("workers", [0, 2])
def test_warnings_name_the_file_once(imagenet, workers, tmp_path, monkeypatch, capfd):
    """What Pillow warns about must be said once, with the file's name, not by every worker in every epoch; and no more
    than some such lines.
    """
    for i in range(12):
        image = Image.open(imagenet / "val" / "n01440764" / "n01440764_0.JPEG")
        exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0" * (i % 6 < 2)      # cut off in its first entry
        image.save(tmp_path / f"{i:02d}.jpg", exif=exif)
    data = open_data_set("folder", tmp_path, "train", 24, labels=False)
    for most in (20, 3):
        monkeypatch.setattr(Loader, "MOST_WARNINGS", most)
        batches = make_loader(data, 0, 6, workers)
        for epoch in range(3):
            assert len(list(batches.epoch(epoch))) == 2
        lines = capfd.readouterr().err.splitlines()
        names = [line.removeprefix(f"=> warning: {tmp_path}/").split(": Corrupt EXIF data.")[0] for line in lines]
        assert len(names) == min(most, 4)
        assert set(names) <= {f"{i:02d}.jpg" for i in (0, 1, 6, 7)}
        assert len(set(names)) == len(names)
    assert lines[-1].endswith(" (further warnings are not printed)")


@pytest.mark.parametrize("size", [(8, 301), (301, 8), (12, 30_000), (30_000, 11)])
def test_long_images_are_cropped_before_they_are_resized(size, monkeypatch):
    """The center of an image more than 16 times as long as wide must be that of the whole image resized, without ever
    resizing all of it.
    """
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    resized = []
    original = loader.resize
    monkeypatch.setattr(loader, "resize", lambda *args: resized.append(original(*args)) or resized[-1])
    ours = center_view(image, 56)
    assert max(resized[0].size) <= 64 * 17
    if max(size) < 1000:
        theirs = T.functional.pil_to_tensor(T.functional.center_crop(T.functional.resize(image, 64), [56, 56]))
        assert (ours.int() - theirs.int()).abs().max() <= 1
