#!/usr/bin/env python3
"""Evaluate an encoder: its frozen features, by linear classifiers or nearest neighbors, or after fine-tuning.

An encoder from train.py, on ImageNet-1K with the usual protocol (the defaults):
    python lincls.py --data DIR --pretrained saved_models/RUN/checkpoint_0799.pth.tar

A randomly initialized encoder, for comparison: leave out --pretrained.

Eight learning rates in one pass, the quick protocol, nearest neighbors, logistic regression, which has no learning
rate, and fine-tuning on 10 % of the images:
    python lincls.py --data DIR --pretrained ... --lr 0.001 0.003 0.01 0.03 0.1 0.3 1 3
    python lincls.py --data DIR --pretrained ... --features cached
    python lincls.py --data DIR --pretrained ... --knn
    python lincls.py --data DIR --pretrained ... --logistic
    python lincls.py --data DIR --pretrained ... --train-percent 10 --finetune
"""

import dataclasses
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from sogclr import InputError, checkpoint, report
from sogclr.augment import Normalize
from sogclr.builder import choose_stem, encoder_state, load_encoder, memory_format, resnet, stem_of
from sogclr.classifiers import Classifiers
from sogclr.datasets import open_train_and_val
from sogclr.distributed import all_reduce_sum, log, rank, world_size
from sogclr.features import CachedFeatures, Encoder, FreshFeatures, Numbered, effective_rank, extract, sample
from sogclr.flags import Parser, add_shared_flags, data_label, non_defaults, number, refuse, resolve_precision
from sogclr.knn import evaluate_knn
from sogclr.launch import launch, nothing_to_save
from sogclr.loader import LabeledBatches, Loader, check_batch_size
from sogclr.logistic import LogisticEvaluation
from sogclr.meters import AverageMeter, Progress, correct_in_top
from sogclr.optimizer import lr_at
from sogclr.parallel import data_parallel
from sogclr.run import Run, file_name
from sogclr.subset import Subset, balanced_indices

CHECKPOINT_KEYS = ("epoch", "arch", "state_dict", "optimizer", "best_acc1", "best_epoch")
PROTOCOL_FLAGS = ("features", "train_percent", "finetune", "encoder_lr")
# Settings without effect, and recorded as none, where SGD has nothing to train: with --knn and --logistic.
SGD_FLAGS = ("features", "lr", "momentum", "weight_decay", "epochs")
# Settings that a resumed run must share with its checkpoint, since they change the results.
RESUME_FLAGS = ("arch", "image_size", "batch_size", "epochs", "lr", "momentum", "weight_decay", "precision", "seed",
                *PROTOCOL_FLAGS)


def build_parser():
    parser = Parser("Evaluation of a pretrained encoder: linear (default), logistic regression, nearest neighbors, or "
                    "fine-tuning")
    groups = add_shared_flags(
        parser, batch_size=1024, epochs=90, lr=0.1, weight_decay=0.0, momentum_of="SGD", several=True,
        lr_help="base learning rate, multiplied by B / 256")
    groups["model"].add_argument("--pretrained", default="", metavar="PATH",
                               help="checkpoint from train.py, the authors' release, MoCo, SimSiam, Lightning or "
                                    "torchvision (default: none, a random encoder)")
    protocol = parser.add_argument_group("protocol", "Without any of these flags: linear evaluation as in MoCo v3.")
    protocol.add_argument("--features", default="augmented", choices=("augmented", "cached"),
                          help="frozen features: augmented recomputes them from new random crops in each epoch, the "
                               "classic protocol; cached computes them once from center crops and keeps them in "
                               "memory, the quick protocol")
    protocol.add_argument("--knn", action="store_true",
                          help="no training: classify validation images by their 20 or 200 nearest training images "
                               "(weighted, temperature 0.07)")
    protocol.add_argument("--logistic", action="store_true",
                          help="no learning rate: multinomial logistic regression on features of center crops, solved "
                               "to its optimum, its L2 penalty chosen on a held-out fifth of the training images")
    protocol.add_argument("--shots", nargs="+", type=number(int, "[1, inf)"), metavar="K",
                          help="with --logistic: use K training images per class, such as 1 5 10, and a fixed L2 "
                               "penalty; several values are several evaluations (default: all images)")
    protocol.add_argument("--draws", default=5, type=number(int, "[1, inf)"), metavar="N",
                          help="with --shots: draws of the images, for mean and standard deviation, the first by "
                               "--seed, the next by --seed + 1, ...")
    protocol.add_argument("--train-percent", default=100.0, type=number(float, "(0, 100]"), metavar="P",
                          help="percentage of the training images to use, the same number per class and at least one, "
                               "chosen by the seed and listed in train_subset.txt")
    protocol.add_argument("--finetune", action="store_true", help="also train the encoder, all layers")
    protocol.add_argument("--encoder-lr", type=number(float, "(0, inf)"), metavar="LR",
                          help="with --finetune: the encoder's base learning rate, scaled like --lr (default: a tenth "
                               "of --lr)")
    groups["run"].add_argument("-e", "--evaluate", action="store_true",
                               help="only evaluate the classifier given by --resume on the validation set")
    return parser


def check(args):
    """Raise InputError if flags contradict each other."""
    several = len(grid(args)) > 1
    one_pass = "--knn" if args.knn else "--logistic" if args.logistic else ""      # without epochs, and thus saves
    refuse(
        (args.evaluate and not args.resume,
         "-e/--evaluate: needs a classifier to evaluate, pass its checkpoint with --resume"),
        (len(set(grid(args))) < len(grid(args)), "--lr, --wd: a value is given twice"),
        (args.finetune and args.features == "cached",
         "--finetune: changes the encoder, so its features cannot be cached, leave out --features cached"),
        (args.finetune and several, "--finetune: trains one network, pass one --lr and one --wd"),
        (args.knn and args.logistic, "--knn, --logistic: two protocols, pass one at a time"),
        (one_pass and (args.finetune or several or args.features == "cached"),
         f"{one_pass}: has no use for --finetune, --features cached and several values of --lr and --wd, leave them "
         "out"),
        (one_pass and (args.evaluate or args.resume not in ("", "auto")),
         f"{one_pass}: has nothing to resume or evaluate, leave out -e and --resume (--pretrained accepts any "
         "checkpoint)"),
        (args.shots and not args.logistic, "--shots: needs --logistic, pass that too"),
        (args.draws != PARSER.get_default("draws") and not args.shots, "--draws: needs --shots, pass that too"),
        (args.shots and args.train_percent < 100, "--shots, --train-percent: two ways to choose images, pass one"),
        (args.encoder_lr and not args.finetune, "--encoder-lr: needs --finetune, pass that too"))


def grid(args):
    """[(learning rate, weight decay)] of each classifier: every combination of --lr and --wd."""
    return list(itertools.product(*(value if isinstance(value, list) else [value]
                                    for value in (args.lr, args.weight_decay))))


def protocol(args, percent):
    """The protocol's name, for people. percent: of the training images that are used."""
    name = ("kNN evaluation" if args.knn else "logistic regression" if args.logistic else
            "fine-tuning" if args.finetune else "linear evaluation")
    return (name + " with cached features" * (args.features == "cached")
            + (f" on {percent:.3g} % of the training images" if percent < 100 else "")
            + (f" with {', '.join(map(str, args.shots))} training images per class" if args.shots else ""))


def run_folder(args):
    """The run's folder, named after the encoder and the settings, so that the same command finds its run again."""
    if args.pretrained:
        source = Path(args.pretrained).resolve()
        encoder, part = source.parent.name, source.name.split(".")[0]
    else:
        encoder, part = f"{data_label(args)}_{args.arch}_random", "init"
    lrs, decays = (",".join(f"{value:g}" for value in dict.fromkeys(values))
                   for values in zip(*grid(args), strict=True))
    how = f"bz_{args.batch_size}_E{args.epochs}_lr_{lrs}_wd_{decays}_m_{args.momentum:g}"
    if args.knn:
        how = "knn"
    elif args.logistic:
        how = "logistic" + (f"_shots_{','.join(map(str, args.shots))}_draws_{args.draws}" if args.shots else "")
    settings = non_defaults(PARSER, args, ("stem", "image_size", "precision", "seed", *PROTOCOL_FLAGS))
    return (Path(args.save_dir) / file_name(f"linear_eval_{encoder}")
            / file_name(f"{part}_{how}_data_{data_label(args)}{settings}"))


def main_worker(args, device):
    check(args)
    if args.knn or args.logistic or args.evaluate:
        nothing_to_save()
    evaluation = Evaluation(args, device)
    if args.knn:
        evaluate_neighbors(evaluation)
    elif args.logistic:
        evaluate_logistic(evaluation)
    elif args.evaluate:
        evaluate_saved(evaluation)
    else:
        train(evaluation)


class Evaluation:
    """What every protocol needs: the data, the run, the encoder and its classifiers."""

    def __init__(self, args, device):
        self.args, self.device, self.started = args, device, time.perf_counter()
        self.train_data, self.val_data = open_train_and_val(args.data_name, args.data, args.image_size)
        self.classes, image_size = self.train_data.images.classes, self.train_data.image_size
        fingerprint = f"{self.train_data.fingerprint}, and for validation {self.val_data.fingerprint}"

        # The run's folder, the checkpoint to resume from, and the encoder.
        self.run = run = Run(args, run_folder(args), CHECKPOINT_KEYS, "" if args.knn or args.logistic else args.resume,
                             write=not args.evaluate)
        if args.evaluate and not run.saved:
            raise InputError(f"-e/--evaluate: {run.folder} has no run yet, pass a checkpoint with --resume PATH")
        pretrained, self.pretraining = read_encoder(args, run)
        self.rank_data = sample(self.train_data)
        images = self.train_data.images
        if args.train_percent < 100:
            few = Subset(images, balanced_indices(images.targets, args.train_percent, run.seed))
            self.train_data = dataclasses.replace(self.train_data, images=few)
            if rank() == 0 and not args.evaluate:
                few.write_list(run.folder / "train_subset.txt")
        # More than --train-percent if that is less than an image per class.
        self.protocol = protocol(args, 100 * len(self.train_data.images) / len(images))
        stem = choose_stem(args.stem, image_size)
        if pretrained:
            stem = stem_of(pretrained)
            if args.stem not in ("auto", stem):
                raise InputError(f"--stem {args.stem}: the pretrained encoder has the {stem} stem, leave the flag out")
        precision, dtype = resolve_precision(args.precision, device)
        network = resnet(args.arch, stem)
        num_features, network.fc = network.fc.in_features, nn.Identity()
        rows = run.saved.get("classifiers", ()) if args.evaluate else ()        # all that are in the file
        pairs = [(row["lr"], row["weight_decay"]) for row in rows] or grid(args)
        self.classifiers = Classifiers(num_features, self.classes, pairs).to(device)
        if pretrained:
            load_encoder(network, pretrained, run.source if run.saved else f"--pretrained {args.pretrained}")
        # The crops are already channels_last, and gradients should have the layout of their weights.
        network.to(memory_format=torch.channels_last if args.finetune else memory_format(device, dtype))
        self.encoder = Encoder(network, Normalize(self.train_data.mean, self.train_data.std), dtype).to(device)
        self.encoder.requires_grad_(args.finetune).eval()   # BatchNorm too uses the encoder's statistics

        self.settings = vars(args) | {"seed": run.seed, "precision": precision, "stem": stem, "image_size": image_size,
                                      "images": fingerprint,
                                      "encoder_lr": (args.encoder_lr or args.lr / 10) if args.finetune else None}
        if args.knn or args.logistic:
            self.settings.update(dict.fromkeys(SGD_FLAGS))
        log(f"=> {self.protocol}, encoder {args.pretrained or run.resume or 'random'} "
            f"({args.arch}, {stem} stem, {precision}), on {report.device_names(device)}")
        log(f"=> {args.data_name}: {len(self.train_data.images)} training and {len(self.val_data.images)} validation "
            f"images of {image_size} pixels, {len(self.classes)} classes, seed {run.seed}"
            + f", run folder {run.folder}" * (not args.evaluate))
        made_with = run.made_with or self.pretraining["encoder"] or {}
        trained_at = made_with.get("image_size", image_size)
        if trained_at != image_size:
            log(f"=> note: it was trained at {trained_at} pixels; to match, pass --image-size {trained_at}")

    @torch.inference_mode()
    def encode(self, images):
        """uint8 [b, 3, H, W] -> float32 [b, C], by the encoder's current weights."""
        return self.encoder(images)

    def loader(self, data, augment=False, **kwargs):
        """Batches (images, labels) of a data set, by default center crops in its order. kwargs: `Loader`'s."""
        batches = LabeledBatches(data, self.run.seed, augment, self.args.bad_images)
        return Loader(batches, self.args.batch_size, self.args.workers, self.device, **kwargs)

    def write_results(self, path, **measured):
        """Write the run's results as JSON. `encoder`: its pretraining settings, if pretrained by train.py."""
        replaced = path.exists()
        report.write_json(path, {
            "protocol": self.protocol, "pretrained": self.args.pretrained or None, **self.pretraining,
            **measured, "effective_rank": effective_rank(self.encode, self.loader(self.rank_data)),
            "classes": len(self.classes), "train_images": len(self.train_data.images),
            "val_images": len(self.val_data.images), "seconds": round(time.perf_counter() - self.started, 1),
            "settings": self.settings, **report.environment_info(self.device)})
        log(f"=> {path}" + ": replaces that of an earlier run" * replaced)


def read_encoder(args, run):
    """Load the encoder's tensors (None for a random one) from --resume or else --pretrained, and what the results
    record of its pretraining. Raises InputError if --resume has a different encoder than --pretrained.
    """
    pretrained, pretraining = None, {"encoder": None, "pretraining_seconds": None}
    if args.pretrained:
        loaded = checkpoint.load(args.pretrained, "--pretrained")
        pretrained = encoder_state(loaded, f"--pretrained {args.pretrained}", args.arch)
        settings = loaded.get("settings")
        if isinstance(settings, dict) and "loss_type" in settings:      # from train.py, not other code
            pretraining = {"encoder": settings, "pretraining_seconds": loaded.get("seconds")}
    if not run.saved:
        return pretrained, pretraining
    resumed, settings = encoder_state(run.saved, run.source, args.arch), run.made_with
    if pretrained is None and settings.get("pretrained") and not args.evaluate:
        raise InputError(f"{run.source}: was made with --pretrained {settings['pretrained']}, pass that too")
    if pretrained is not None and not settings.get("finetune") and not (
            resumed.keys() == pretrained.keys() and all(torch.equal(resumed[key], pretrained[key]) for key in resumed)):
        raise InputError(f"{run.source}: evaluates a different encoder than --pretrained {args.pretrained}")
    return resumed, pretraining


def results_file(evaluation):
    """Where --knn and --logistic write. Raises InputError if results of other images are there."""
    file = evaluation.run.folder / "results.json"
    if file.exists():
        before = json.loads(file.read_text())["settings"]
        checkpoint.require_same_images(before, evaluation.settings, f"--save_dir: {file}")
    return file


def evaluate_neighbors(evaluation):
    """Classify validation images by their nearest training images."""
    file = results_file(evaluation)
    accuracies = evaluate_knn(evaluation.encode, evaluation.loader(evaluation.train_data),
                              evaluation.loader(evaluation.val_data), len(evaluation.classes))
    evaluation.write_results(file, knn_acc1=accuracies)
    log("=> kNN: " + ", ".join(f"k = {k} Acc@1 {acc1:.3f}" for k, acc1 in accuracies.items()))


def evaluate_logistic(evaluation):
    """Classify validation images by logistic regression on the features of the training images, or of a few of them."""
    args, file, seed = evaluation.args, results_file(evaluation), evaluation.run.seed
    images, classes = evaluation.train_data.images, evaluation.classes
    targets = np.asarray(images.targets)
    counts = np.bincount(targets)
    if args.shots and max(args.shots) > counts.min():
        raise InputError(f"--shots {max(args.shots)}: class {classes[counts.argmin()]!r} has only {counts.min()} "
                         "training images")
    if not args.shots and counts.max() < 2:
        raise InputError("--logistic: no class has a second training image to hold out, use more images, or --shots 1")

    numbered = dataclasses.replace(evaluation.train_data, images=Numbered(images))
    train, val = (extract(evaluation.encode, evaluation.loader(data), torch.float32)
                  for data in (numbered, evaluation.val_data))
    logistic = LogisticEvaluation(*train, targets, *val, len(classes))
    if not args.shots:
        results = logistic.search(seed)
        evaluation.write_results(file, logistic=results)
        log("=> logistic regression: Acc@1 {acc1:.3f} Acc@5 {acc5:.3f}, L2 {l2:.3g}, chosen on {held_out} held-out "
            "training images".format(**results))
        fits = [results, *results["curve"]]
    else:
        results = {shots: logistic.few_shots(shots, args.draws, seed) for shots in args.shots}
        evaluation.write_results(file, shots=results)
        for shots, values in results.items():
            log(f"=> {shots} images per class: " + "Acc@1 {acc1:.3f} ± {acc1_deviation:.3f} Acc@5 {acc5:.3f} ± "
                "{acc5_deviation:.3f}".format(**values) + f", {args.draws} draws")
        fits = [fit for values in results.values() for fit in values["draws"]]
    unfinished = [fit["gradient_norm"] for fit in fits if not fit["converged"]]
    if unfinished:
        log(f"=> note: {len(unfinished)} of {len(fits)} fits ended before they converged, with gradient norms up to "
            f"{max(unfinished):.1g}")


def evaluate_saved(evaluation):
    """Report the accuracy of a checkpoint's classifiers."""
    classifiers, run = evaluation.classifiers, evaluation.run
    classifiers.restore(run.saved, run.source)
    batches = FreshFeatures(evaluation.encode, evaluation.loader(evaluation.val_data))
    classifiers.record(validate(classifiers, batches, classifiers, evaluation.device))
    file = Path(run.resume)
    results = file_name(f"results_{file.name.split('.')[0]}", 255 - len(".json.part"))
    evaluation.write_results(file.with_name(f"{results}.json"), evaluated=str(file), classifiers=classifiers.scores,
                             chosen=classifiers.chosen)
    if len(classifiers) > 1:
        log(classifiers.table())
    log(" * Acc@1 {acc1:.3f} Acc@5 {acc5:.3f}".format(**classifiers.best))


def train(evaluation):
    """Train the classifiers, and with --finetune the encoder, and validate after every epoch."""
    args, run, device = evaluation.args, evaluation.run, evaluation.device
    classifiers, encoder, settings = evaluation.classifiers, evaluation.encoder, evaluation.settings

    # SGD, with a separate learning rate and weight decay for each classifier.
    groups = [{"params": classifier.parameters(), "lr": score["lr"], "weight_decay": score["weight_decay"]}
              for classifier, score in zip(classifiers, classifiers.scores, strict=True)]
    if args.finetune:
        check_batch_size(args.batch_size, len(evaluation.train_data.images), "--finetune: --batch-size")
        groups.append({"params": encoder.parameters(), "lr": settings["encoder_lr"], "weight_decay": args.weight_decay})
    peak_lrs = [group["lr"] * args.batch_size / 256 for group in groups]
    optimizer = torch.optim.SGD(groups, momentum=args.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=args.finetune and settings["precision"] == "fp16")
    run.restore(TrainingState(classifiers, encoder, optimizer, scaler, settings), settings, PARSER, RESUME_FLAGS)

    # The model's input: images if the encoder is trained too, else its features.
    model = nn.Sequential(encoder, classifiers) if args.finetune else classifiers
    batches, val_batches = make_batches(evaluation)
    several, results = len(classifiers) > 1, run.folder / "results.json"
    recorded = run.start_epoch >= args.epochs and results.exists()

    net = data_parallel(model, device)
    with run:
        # In TensorBoard, each of several classifiers is a separate run in the folder.
        curves = [run.events(run.start_epoch, name if several else ".") for name in classifiers.names]
        for epoch in range(run.start_epoch, args.epochs):
            net.train()
            lrs = [lr_at(epoch, peak, args.epochs) for peak in peak_lrs]
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
            shown = classifiers.chosen      # shown in the progress lines if there are several
            which = f"  (best so far of {len(classifiers)}: {classifiers.names[shown]})" * several
            meters = [(AverageMeter("Loss", ".4f"), AverageMeter("Acc@1", ".2f")) for _ in classifiers]
            progress = Progress(batches, epoch, run.first_step(epoch), args.epochs, args.batch_size)
            for step, (inputs, target) in progress:
                target = target.to(device, non_blocking=True)
                batch = min(args.batch_size, batches.num_images - step * args.batch_size)       # over all ranks

                # The mean over ranks of the losses, and thus of their gradients, is that of the global batch.
                outputs = net(inputs)                                       # [b, K] per classifier
                losses = [F.cross_entropy(output, target, reduction="sum") * world_size() / batch for output in outputs]
                optimizer.zero_grad()
                scaler.scale(sum(losses)).backward()
                scaler.step(optimizer)
                scaler.update()

                hits = torch.stack([correct_in_top(output, target, (1,))[0] for output in outputs])
                totals = torch.stack([torch.stack(losses).detach() / world_size(), 100 * hits / batch])
                for (average, top1), loss, acc1 in zip(meters, *all_reduce_sum(totals), strict=True):
                    average.update(loss)
                    top1.update(acc1, batch)
                progress.step_done()
                if step % args.print_freq == 0:
                    log(progress.line(*meters[shown], f"LR {lrs[shown]:.4g}" + which), live=progress.live)
                run.after_step(epoch, step, len(batches))

            classifiers.record(validate(model, val_batches, classifiers, device), epoch)
            best = classifiers.best
            log(" * Epoch {} Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} (best Acc@1 {best_acc1:.3f} in epoch {best_epoch})"
                .format(epoch, **best) + f" {classifiers.names[classifiers.chosen]}" * several)
            for curve, score, (average, top1), lr in zip(curves, classifiers.scores, meters, lrs, strict=False):
                curve.scalars({"val/Acc@1": score["acc1"], "val/Acc@5": score["acc5"], "train/Acc@1": top1.average,
                               "train/loss": average.average, "train/learning rate": lr}, epoch)
            run.after_epoch(epoch, "model_best.pth.tar" if best["best_epoch"] == epoch else None)
            run.stop_if_asked(epoch)
        if not recorded:
            for curve, score in zip(curves, classifiers.scores, strict=True):
                curve.hparams(settings, score)

    if not recorded:
        evaluation.write_results(results, classifiers=classifiers.scores, chosen=classifiers.chosen,
                                 chosen_by="best Acc@1 on the validation set", first_epoch=run.start_epoch)
        embed(evaluation)
    if several:
        log(classifiers.table())
    log("=> last epoch: Acc@1 {acc1:.3f} Acc@5 {acc5:.3f}; best Acc@1 {best_acc1:.3f} in epoch {best_epoch}".format(
        **classifiers.best))


class TrainingState:
    """The state of training, which `Run` saves, restores (except the encoder), and checks before saving."""

    def __init__(self, classifiers, encoder, optimizer, scaler, settings):
        self.classifiers, self.encoder, self.settings = classifiers, encoder, settings
        self.optimizer, self.scaler = optimizer, scaler

    def saved(self):
        chosen = self.classifiers[self.classifiers.chosen].state_dict()
        head = {f"fc.{name}": tensor for name, tensor in chosen.items()}
        return {"state_dict": checkpoint.add_ddp_prefix(self.encoder.resnet.state_dict() | head),
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                **self.classifiers.saved()}

    def restore(self, saved, source):
        self.classifiers.restore(saved, source)
        checkpoint.restore_parts(saved, source, optimizer=self.optimizer, scaler=self.scaler)

    def check_finite(self, place):
        """Raise InputError if no classifier has finite weights left, or, with --finetune, if any weight is not."""
        finetune = self.settings["finetune"]
        finite = [all(bool(parameter.isfinite().all()) for parameter in module.parameters())
                  for module in [*self.classifiers, *([self.encoder] if finetune else [])]]
        if not (all(finite) if finetune else any(finite)):
            raise InputError(f"a weight is not finite in {place}: use a smaller learning rate than --lr "
                             f"{self.settings['lr']}" + f", --encoder-lr {self.settings['encoder_lr']}" * finetune
                             + "; saved checkpoints are unaffected")


def make_batches(evaluation):
    """The training and validation batches: images with --finetune, else features."""
    args, encode = evaluation.args, evaluation.encode
    order = {"seed": evaluation.run.seed, "shuffle": True, "drop_last": args.finetune}
    if args.features == "cached":
        begin = time.perf_counter()
        batches = CachedFeatures(encode, evaluation.loader(evaluation.train_data), **order)
        val_batches = CachedFeatures(encode, evaluation.loader(evaluation.val_data))
        log(f"=> the quick protocol, not the classic one: {batches.features.nbytes / 1e9:.3g} GB of half-precision "
            f"features of center crops, computed once in {time.perf_counter() - begin:.1f} s")
        return batches, val_batches
    loaders = (evaluation.loader(evaluation.train_data, augment=True, keep_workers=True, **order),
               evaluation.loader(evaluation.val_data, keep_workers=True))
    return loaders if args.finetune else [FreshFeatures(encode, loader) for loader in loaders]


@torch.no_grad()
def validate(model, batches, classifiers, device):
    """(Acc@1, Acc@5) of each classifier in percent, counting each validation image once, on all ranks."""
    model.eval()
    counts = torch.zeros(len(classifiers), 3, dtype=torch.int64, device=device)     # top-1 correct, top-5 correct, seen
    for inputs, target in batches.epoch(0):
        if len(inputs):
            target = target.to(device, non_blocking=True)
            counts[:, :2] += torch.stack([correct_in_top(output, target, (1, 5)) for output in model(inputs)])
            counts[:, 2] += len(inputs)
    return [(100 * top1 / seen, 100 * top5 / seen) for top1, top5, seen in all_reduce_sum(counts).tolist()]


def embed(evaluation):
    """Log 1000 validation images to TensorBoard's projector, the same number per class."""
    images = evaluation.val_data.images
    some = Subset(images, balanced_indices(images.targets, min(100 * 1000 / len(images), 100), seed=0))
    loader = evaluation.loader(dataclasses.replace(evaluation.val_data, images=some))
    report.add_embedding(evaluation.run.folder, evaluation.encode, loader, evaluation.classes, evaluation.args.epochs)


PARSER = build_parser()

if __name__ == "__main__":
    launch(main_worker, PARSER.parse_args())
