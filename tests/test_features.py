"""Features of a data set: each image once, whatever the number of ranks."""

import types

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from sogclr import InputError
from sogclr.distributed import gather
from sogclr.features import extract
from sogclr.loader import EpochSampler, Labelled, Loader

N, SIZE = 13, 8
UNREADABLE = 5
# batch size, drop_last, dtype: two ranks share these batches unequally; with the last one, rank 1 gets nothing at all
CASES = ((4, False, torch.float32), (5, True, torch.float16), (1, False, torch.float32))


class Numbered:
    """Image i is of colour i and has label i, but for one that cannot be read."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        if i == UNREADABLE:
            raise InputError("unreadable")
        return Image.new("RGB", (SIZE, SIZE), (i, 2 * i, 3 * i)), i


def collect(case):
    """All ranks' features and labels, and this rank's own number of images."""
    batch_size, drop_last, dtype = case
    images = types.SimpleNamespace(images=Numbered(), image_size=SIZE)
    sampler = EpochSampler(N, batch_size, shuffle=True, drop_last=drop_last)
    loader = Loader(Labelled(images, bad_images="skip"), sampler, 0, torch.device("cpu"))
    loader.MOST_BAD = 1.0
    encode = torch.inference_mode()(lambda images: images.float().mean((2, 3)))
    features, labels = extract(encode, loader, dtype, epoch=3)
    assert (features.dtype, labels.dtype, len(labels)) == (dtype, torch.int64, len(features))
    assert not features.is_inference()      # a classifier can be trained on them
    return gather(features), gather(labels), len(features)


def worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save([collect(case) for case in CASES], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes collect."""
    folder = tmp_path_factory.mktemp("features")
    mp.spawn(worker, nprocs=2, args=(str(folder),))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("k", range(len(CASES)), ids=["unequal", "drop_last", "empty"])
def test_each_image_stands_once_with_its_own_features(ranks, k):
    """One and two ranks must collect the same images, each once and beside its own label; both ranks alike."""
    batch_size, drop_last, _ = CASES[k]
    features, labels, n = collect(CASES[k])
    assert n == len(labels) == len(set(labels.tolist()))
    assert n >= (N // batch_size * batch_size if drop_last else N) - 1      # but for the unreadable one
    assert torch.equal(features.float(), labels[:, None] * torch.tensor([1.0, 2.0, 3.0]))
    shares = [record[k][2] for record in ranks]
    assert sum(shares) == n
    assert (shares[1] == 0) == (batch_size == 1)
    for theirs, their_labels, _ in (record[k] for record in ranks):
        assert torch.equal(their_labels, ranks[0][k][1])
        assert sorted(their_labels.tolist()) == sorted(labels.tolist())
        assert torch.equal(theirs.float(), their_labels[:, None] * torch.tensor([1.0, 2.0, 3.0]))
