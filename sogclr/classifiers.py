"""Linear classifiers on an encoder's features, several at a time."""

import copy

import torch
import torch.nn as nn

from sogclr import InputError
from sogclr.checkpoint import plain_names


class Classifiers(nn.ModuleList):
    """R linear classifiers on the same features, initialized identically but trained with different settings.

    num_features: C; classes: the K names; grid: [(learning rate, weight decay)] of each.
    `names`: of each; `scores`: for each a dict with `lr`, `weight_decay`, `acc1` and `acc5` of the last validation in
    percent (nan before it), `best_acc1` and its `best_epoch`.

    Each has its own matrix product and loss rather than a part of one large product, whose blocks would depend on R: so
    each classifier is bit-identical to one trained alone.
    """

    def __init__(self, num_features, classes, grid):
        first = nn.Linear(num_features, len(classes))
        nn.init.normal_(first.weight, std=0.01)
        nn.init.zeros_(first.bias)
        super().__init__(copy.deepcopy(first) for _ in grid)
        self.classes = list(classes)
        self.names = [f"lr_{lr:g}_wd_{decay:g}" for lr, decay in grid]
        self.scores = [{"lr": lr, "weight_decay": decay, "acc1": float("nan"), "acc5": float("nan"),
                        "best_acc1": 0.0, "best_epoch": -1} for lr, decay in grid]

    def forward(self, features):
        """[b, C] -> logits [b, K] of each of the R classifiers"""
        return [classifier(features) for classifier in self]

    @property
    def chosen(self):
        """Index of the classifier with the best validation Acc@1 over all epochs so far."""
        return max(range(len(self)), key=lambda r: (self.scores[r]["best_acc1"], self.scores[r]["best_epoch"]))

    @property
    def best(self):
        """The chosen classifier's scores."""
        return self.scores[self.chosen]

    def record(self, accuracies, epoch=None):
        """Record a validation, [(Acc@1, Acc@5)] of each in percent; with an epoch, also update the best so far."""
        for score, (acc1, acc5) in zip(self.scores, accuracies, strict=True):
            score.update(acc1=acc1, acc5=acc5)
            if epoch is not None and (acc1, epoch) > (score["best_acc1"], score["best_epoch"]):
                score.update(best_acc1=acc1, best_epoch=epoch)

    def saved(self):
        """Checkpoint entries besides the chosen classifier's tensors in `state_dict`: its accuracies, the names of the
        classes and, if there are several classifiers, the tensors and accuracies of all.
        """
        saved = {key: self.best[key] for key in ("acc1", "acc5", "best_acc1", "best_epoch")} | {"classes": self.classes}
        if len(self) > 1:
            saved["classifiers"] = [score | classifier.state_dict()
                                    for score, classifier in zip(self.scores, self, strict=True)]
        return saved

    def restore(self, saved, source):
        """Load the classifiers from a checkpoint, classes by name if it has the names (older files have none). Raises
        InputError, starting with `source`, the flag and file, if they do not match these.
        """
        state = plain_names(saved["state_dict"])
        head = {name: state.get(f"fc.{name}", torch.empty(0, 0)) for name in ("weight", "bias")}
        rows = saved.get("classifiers", [{key: value for key, value in saved.items() if key in self.scores[0]} | head])
        if len(rows) != len(self):
            raise InputError(f"{source}: has {len(rows)} classifiers, but --lr and --wd ask for {len(self)}")
        order = self.order_of(saved.get("classes", self.classes), source)
        for classifier, score, row in zip(self, self.scores, rows, strict=True):
            K, C = row["weight"].shape
            if classifier.weight.shape != (K, C):
                raise InputError(f"{source}: has {K} classes and {C} features, but this data set and encoder have "
                                 f"{classifier.out_features} and {classifier.in_features}")
            classifier.load_state_dict({"weight": row["weight"][order], "bias": row["bias"][order]})
            score.update((key, row[key]) for key in score.keys() & row.keys())

    def order_of(self, classes, source):
        """The position of each class among the same classes in another order. Raises InputError if others differ."""
        if different := set(classes) ^ set(self.classes):
            first = min(different)
            raise InputError(f"{source}: has other classes than --data, the first that differs is {first!r}, only in "
                             + ("the checkpoint" if first in classes else "--data")
                             + ": use a folder with the checkpoint's class names")
        position = {name: k for k, name in enumerate(classes)}
        return [position[name] for name in self.classes]

    def table(self):
        """A table for people: a header, a row per classifier, and which one is marked."""
        lines = ["          lr          wd    Acc@1    Acc@5  best Acc@1  in epoch"]
        for r, score in enumerate(self.scores):
            lines.append("{} {lr:10g}  {weight_decay:10g}  {acc1:7.3f}  {acc5:7.3f}  {best_acc1:10.3f}  {best_epoch:8d}"
                         .format("*" if r == self.chosen else " ", **score))
        return "\n".join([*lines, f"=> * is the best of {len(self)}, chosen by its best Acc@1 on the validation set"])
