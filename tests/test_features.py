"""Features of a data set and their kNN accuracies: the same on any number of ranks."""

import types

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from sogclr import InputError
from sogclr.distributed import gather
from sogclr.features import effective_rank, extract
from sogclr.knn import knn_accuracy
from sogclr.loader import LabeledBatches, Loader

N, SIZE = 13, 8
UNREADABLE = 5
# batch size, drop_last, dtype: two ranks split these batches unequally; with the last one, rank 1 gets nothing at all
CASES = ((4, False, torch.float32), (5, True, torch.float16), (1, False, torch.float32))


class Numbered:
    """Image i has color i and label i, except for one that is unreadable."""

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
    loader = Loader(LabeledBatches(images, bad_images="skip"), batch_size, 0, torch.device("cpu"), shuffle=True,
                    drop_last=drop_last)
    loader.MOST_BAD = 1.0
    encode = torch.inference_mode()(lambda images: images.float().mean((2, 3)))
    features, labels = extract(encode, loader, dtype)
    assert (features.dtype, labels.dtype, len(labels)) == (dtype, torch.int64, len(features))
    assert not features.is_inference()      # a classifier can be trained on them
    return gather(features), gather(labels), len(features)


CLASSES, KS, TEMPERATURE = 10, (1, 5, 20, 200), 0.07


def neighborhood():
    """Bank and queries, each with labels: overlapping classes, and rows that occur twice, with two labels. The bank has
    fewer than 200 rows.
    """
    rng = np.random.default_rng(2)
    centers = rng.normal(size=(CLASSES, 8))
    bank_labels, query_labels = rng.integers(CLASSES, size=120), rng.integers(CLASSES, size=300)
    bank = centers[bank_labels] + 1.5 * rng.normal(size=(120, 8))
    queries = centers[query_labels] + 1.5 * rng.normal(size=(300, 8))
    bank = np.concatenate([bank, 4 * bank[:40], np.zeros((1, 8))])
    bank_labels = np.concatenate([bank_labels, (bank_labels[:40] + rng.integers(1, CLASSES, size=40)) % CLASSES, [3]])
    order = rng.permutation(len(bank))
    return bank[order].astype(np.float16), bank_labels[order], queries.astype(np.float32), query_labels


def brute_force(bank, bank_labels, queries, query_labels):
    """{k: percent} by loops in float64, from InstDisc's formula."""
    bank, hits = bank.astype(np.float64), dict.fromkeys(KS, 0)
    for query, target in zip(queries.astype(np.float64), query_labels, strict=True):
        similarity = [row @ query / max(np.linalg.norm(row) * np.linalg.norm(query), 1e-9) for row in bank]
        nearest = sorted(range(len(bank)), key=lambda j: (-round(similarity[j], 9), bank_labels[j]))
        for k in KS:
            votes = np.zeros(CLASSES)
            for j in nearest[:k]:
                votes[bank_labels[j]] += np.exp(similarity[j] / TEMPERATURE)
            hits[k] += votes.argmax() == target
    return {k: 100 * count / len(queries) for k, count in hits.items()}


def neighbors(rank, world, chunk, uneven):
    """`knn_accuracy` with bank and queries interleaved over ranks, or with no bank on the last rank."""
    bank, bank_labels, queries, query_labels = map(torch.from_numpy, neighborhood())
    mine = slice(rank, None, world)
    bank_share = mine if not uneven else slice(0, None) if rank == 0 else slice(0, 0)
    return knn_accuracy(bank[bank_share], bank_labels[bank_share], queries[mine], query_labels[mine], CLASSES, KS,
                        TEMPERATURE, chunk)


SPECTRUM = np.array([8.0, 4.0, 2.0, 1.0, 1.0, 0.0])


def rank_of(features, rank=0, world=1):
    """`effective_rank` of features [N, C], interleaved over ranks and split into unequal batches."""
    batches = torch.from_numpy(features)[rank::world].split(7)
    loader = types.SimpleNamespace(epoch=lambda _: ((batch, None) for batch in batches))
    return effective_rank(lambda batch: batch, loader)


def with_spectrum(values):
    """Features [40, C] that have these C singular values, in random directions."""
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.normal(size=(rows, len(values))))[0] for rows in (40, len(values)))
    return left * values @ right.T


def worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save([collect(case) for case in CASES], f"{folder}/{rank}.pt")
    torch.save([neighbors(rank, 2, 32, uneven) for uneven in (False, True)], f"{folder}/knn{rank}.pt")
    torch.save(rank_of(with_spectrum(SPECTRUM), rank, 2), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with the results of two processes."""
    folder = tmp_path_factory.mktemp("features")
    mp.start_processes(worker, nprocs=2, args=(str(folder),), start_method="forkserver")
    return folder


@pytest.mark.parametrize("k", range(len(CASES)), ids=["unequal", "drop_last", "empty"])
def test_each_image_occurs_once_with_its_own_features(folder, k):
    """One and two ranks must collect the same images, each once and with its own label; both ranks alike."""
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    batch_size, drop_last, _ = CASES[k]
    features, labels, n = collect(CASES[k])
    assert n == len(labels) == len(set(labels.tolist()))
    assert n >= (N // batch_size * batch_size if drop_last else N) - 1      # except the unreadable one
    assert torch.equal(features.float(), labels[:, None] * torch.tensor([1.0, 2.0, 3.0]))
    counts = [record[k][2] for record in ranks]
    assert sum(counts) == n
    assert (counts[1] == 0) == (batch_size == 1)
    for theirs, their_labels, _ in (record[k] for record in ranks):
        assert torch.equal(their_labels, ranks[0][k][1])
        assert sorted(their_labels.tolist()) == sorted(labels.tolist())
        assert torch.equal(theirs.float(), their_labels[:, None] * torch.tensor([1.0, 2.0, 3.0]))


def test_neighbors_vote_as_in_the_paper(folder, capsys):
    """On one and two ranks, in chunks of any size: exactly the brute-force accuracies, also with ties, and if k is
    limited to the bank.
    """
    expected = brute_force(*neighborhood())
    assert len(set(expected.values())) == len(KS)       # each k matters
    for chunk in (7, 4096):
        assert neighbors(0, 1, chunk, False) == expected
    assert "the bank has only 161 images, so k = 200 uses them all" in capsys.readouterr().out
    for rank in range(2):
        assert torch.load(folder / f"knn{rank}.pt") == [expected] * 2


def test_effective_rank_is_that_of_the_spectrum(folder):
    """A known spectrum must give exp of its entropy, on one and two ranks; collapse must give 1, equal singular values
    their number.
    """
    p = SPECTRUM[:-1] / SPECTRUM.sum()
    expected = np.exp(-(p * np.log(p)).sum())
    assert rank_of(with_spectrum(SPECTRUM)) == pytest.approx(expected, rel=1e-7)
    for rank in range(2):
        assert torch.load(folder / f"rank{rank}.pt") == pytest.approx(expected, rel=1e-7)
    assert rank_of(np.outer(np.arange(1.0, 41), np.ones(300)).astype(np.float32)) == pytest.approx(1, rel=1e-9)
    assert rank_of(with_spectrum(np.ones(6))) == pytest.approx(6, rel=1e-9)
    small = np.array([1, *[2e-4] * 5])      # squares below float32's rounding
    expected = np.exp(-(small / small.sum() * np.log(small / small.sum())).sum())
    assert rank_of(with_spectrum(small).astype(np.float32)) == pytest.approx(expected, rel=1e-4)
    assert np.isnan(rank_of(np.full((3, 2), np.nan)))


def test_features_that_are_not_finite_have_no_accuracy():
    """A monitor must not stop a run, nor show a meaningless number."""
    bank, bank_labels, queries, query_labels = map(torch.from_numpy, neighborhood())
    queries[5, 0] = float("inf")
    assert np.isnan(list(knn_accuracy(bank, bank_labels, queries, query_labels, CLASSES).values())).all()
