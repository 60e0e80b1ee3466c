"""The weighted k-nearest-neighbor classifier of InstDisc (Wu et al., arXiv 1805.01978), which needs no training."""

import torch
import torch.nn.functional as F

from sogclr.distributed import all_reduce_sum, gather, log
from sogclr.features import extract


def evaluate_knn(encode, bank, queries, num_classes):
    """kNN accuracy of an encoder, {k: percent}, the same on every rank.

    encode: uint8 [b, 3, H, W] -> float [b, C]; bank, queries: `Loader`s of the training and the validation images.
    """
    def unit(images):       # so that they fit half precision
        return F.normalize(encode(images))

    return knn_accuracy(*extract(unit, bank, torch.float16), *extract(unit, queries, torch.float16), num_classes)


@torch.no_grad()
def knn_accuracy(bank, bank_labels, queries, query_labels, num_classes, ks=(20, 200), temperature=0.07, chunk=4096):
    """kNN accuracy: each query's k nearest rows of the bank, by cosine similarity s, vote for their classes with
    weights exp(s / temperature). Returns {k: percent of queries whose class wins}, the same on every rank.

    bank: [n, C] float, the training set's features, of any norm; bank_labels: [n] int64 in 0 to num_classes - 1;
    queries: [m, C] the validation set's; query_labels: [m]. All are this rank's part, as returned by
    `features.extract`, on one device. A k above the bank's size (over all ranks) uses the whole bank, and is logged.
    Returns nan if a feature is not finite.

    Among rows of equal similarity, lower classes are nearer; among classes with equal votes, the lowest wins. Neighbors
    are exact, and do not depend on how rows are split into ranks and chunks: unit rows are rounded to fixed point with
    as many bits (21 for 1000 classes; half precision has 11) as let float64 hold every sum without rounding, together
    with the class, in one number that `topk` sorts.

    Each rank keeps its part of the bank and processes all queries, one chunk of them with one chunk of its bank at a
    time. Memory: the queries of all ranks, and about 8 chunk (2 chunk + 4 C) bytes: 0.5 GB for C = 2048.
    """
    features = (bank, queries)
    broken = sum(not block.isfinite().all() for tensor in features for block in tensor.split(chunk))
    rows, broken = all_reduce_sum(torch.tensor([len(bank), broken], device=bank.device)).tolist()
    if broken:
        return dict.fromkeys(ks, float("nan"))
    if rows < max(ks):
        log(f"=> kNN: the bank has only {rows} images, so k = {max(ks)} uses them all")
    k = min(max(ks), rows)
    bits = (52 - num_classes.bit_length()) // 2     # so that |key| < 2**53

    queries, query_labels = gather(queries), gather(query_labels)
    hits = torch.zeros(len(ks), dtype=torch.int64, device=queries.device)
    for some, target in zip(queries.split(chunk), query_labels.split(chunk), strict=True):
        some = _fixed_point(some, bits)                                         # [q, C]
        best = some.new_empty(len(some), 0)
        for block, labels in zip(bank.split(chunk), bank_labels.split(chunk), strict=True):
            keys = (some @ _fixed_point(block, bits).T).mul_(num_classes).add_(num_classes - 1 - labels)
            best = torch.cat([best, keys.topk(min(k, len(block))).values], dim=1)
            best = best.topk(min(k, best.shape[1])).values
        best = gather(best.T).T.topk(k).values.long()                           # [q, k] over all ranks

        similarity = (best // num_classes).double() / 4**bits
        labels = num_classes - 1 - best % num_classes
        weights = ((similarity - similarity[:, :1]) / temperature).exp()        # 1 for the nearest
        for i, count in enumerate(ks):
            votes = weights.new_zeros(len(some), num_classes).scatter_add_(1, labels[:, :count], weights[:, :count])
            hits[i] += (votes.argmax(1) == target).sum()
    return {k: 100 * count / len(queries) for k, count in zip(ks, hits.tolist(), strict=True)}


def _fixed_point(rows, bits):
    """[n, C] -> unit rows times 2**bits, rounded, float64. Zero rows stay zero."""
    rows = rows.double()
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (rows * (2**bits / norm.clamp_min_(1e-300))).round_()
