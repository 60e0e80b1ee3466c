"""Evaluation of the encoder during pretraining, which leaves the run as it is."""

import copy

import torch

from sogclr.augment import Normalize
from sogclr.features import Encoder, effective_rank, sample
from sogclr.knn import evaluate_knn
from sogclr.loader import LabeledBatches, Loader


class FeatureMonitor:
    """The effective rank of an encoder's features, for --rank-freq, and their kNN accuracy, for --knn-freq.

    train: the `ImageSet` in training, whose labels are not used; labeled: those of training and validation images, bank
    and queries of kNN, or None; args: the script's. All views are center crops.
    Evaluates a copy of the encoder and leaves torch's generator unchanged, so that the run stays the same.
    """

    def __init__(self, train, labeled, args, device, dtype):
        self.sample, *self.bank_and_queries = (
            Loader(LabeledBatches(data, bad_images=args.bad_images), args.batch_size, args.workers, device)
            for data in (sample(train), *(labeled or ())))
        self.num_classes = len(labeled[0].images.classes) if labeled else None
        self.normalize, self.dtype = Normalize(train.mean, train.std).to(device), dtype
        self.rank_freq, self.knn_freq, self.epochs = args.rank_freq, args.knn_freq, args.epochs

    @torch.inference_mode()
    def __call__(self, encoder, epoch):
        """What is due after an epoch, {"effective_rank": number, "kNN-20": percent, ...}, the same on every rank.

        The effective rank is part of every kNN report, and of the last epoch's.
        """
        done = epoch + 1
        knn_is_due = self.knn_freq and (done % self.knn_freq == 0 or done == self.epochs)
        if not (knn_is_due or done == self.epochs or (self.rank_freq and done % self.rank_freq == 0)):
            return {}
        frozen = copy.deepcopy(encoder).eval()
        frozen.fc = torch.nn.Identity()
        with torch.random.fork_rng(devices=[]):     # a loader draws its workers' seeds from it
            encode = Encoder(frozen, self.normalize, self.dtype)
            measured = {"effective_rank": effective_rank(encode, self.sample)}
            if knn_is_due:
                accuracies = evaluate_knn(encode, *self.bank_and_queries, self.num_classes)
                measured |= {f"kNN-{k}": acc1 for k, acc1 in accuracies.items()}
        return measured
