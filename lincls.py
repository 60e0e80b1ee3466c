#!/usr/bin/env python3
"""Evaluation of an encoder: of its frozen features, by linear classifiers or nearest neighbours, or after fine-tuning.

The encoder of a run of train.py, on ImageNet-1K with the usual protocol (the defaults):
    python lincls.py --data DIR --pretrained saved_models/RUN/checkpoint_0799.pth.tar

A randomly initialised encoder, to compare with: leave out --pretrained.

Eight learning rates in one pass, the quick protocol, no training at all, and all layers on a tenth of the images:
    python lincls.py --data DIR --pretrained ... --lr 0.03 0.1 0.3 1 3 10 30 100
    python lincls.py --data DIR --pretrained ... --features cached
    python lincls.py --data DIR --pretrained ... --knn
    python lincls.py --data DIR --pretrained ... --train-percent 10 --finetune
"""

import contextlib
import dataclasses
import itertools
import json
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from sogclr import InputError, Stopped, checkpoint, report
from sogclr.augment import Normalize
from sogclr.builder import choose_stem, encoder_state, load_encoder, memory_format, resnet
from sogclr.classifiers import Classifiers
from sogclr.distributed import (
    all_reduce_sum,
    broadcast,
    data_parallel,
    device_names,
    launch,
    log,
    rank,
    set_seed,
    stop_requested,
    world_size,
)
from sogclr.features import CachedFeatures, Encoder, FreshFeatures, extract
from sogclr.flags import Parser, add_shared_flags, data_label, non_defaults, number, resolve_precision
from sogclr.knn import knn_accuracy
from sogclr.loader import EpochSampler, Labelled, Loader, fingerprint, open_data_set
from sogclr.meters import AverageMeter, Progress, correct_in_top
from sogclr.optimizer import lr_at
from sogclr.subset import Subset, balanced_indices

BEST = "model_best.pth.tar"
CHECKPOINT_KEYS = ("epoch", "arch", "state_dict", "optimizer", "best_acc1", "best_epoch")
# What a resumed run must share with its checkpoint: all that decides the numbers.
PROTOCOL_FLAGS = ("features", "cached_epochs", "train_percent", "finetune", "encoder_lr")
METHOD_FLAGS = ("image_size", "batch_size", "epochs", "lr", "momentum", "weight_decay", "precision", "seed",
                *PROTOCOL_FLAGS)
EMBEDDED = 1000     # validation images in TensorBoard's projector


def build_parser():
    parser = Parser("Evaluation of a pretrained encoder: linear (the default), by nearest neighbours, or fine-tuned")
    groups = add_shared_flags(
        parser, batch_size=1024, epochs=90, lr=0.1, weight_decay=0.0, momentum_of="SGD", several=True,
        lr_help="base learning rate, times B / 256")
    groups["model"].add_argument("--pretrained", default="", metavar="PATH",
                       help="checkpoint of train.py, of the authors' release, MoCo, SimSiam, Lightning or torchvision "
                            "(default: none, a random encoder)")
    protocol = parser.add_argument_group("protocol", "Without any of these: the linear evaluation of MoCo v3.")
    protocol.add_argument("--features", default="augmented", choices=("augmented", "cached"),
                          help="of the frozen encoder: augmented are those of new random crops in each epoch, the "
                               "classic protocol; cached are computed once, of centre crops, and kept in memory, the "
                               "quick protocol")
    protocol.add_argument("--cached-epochs", default=0, type=number(int, "[0, inf)"), metavar="K",
                          help="with --features cached: also keep those of the first K epochs of random crops; epochs "
                               "take turns in them")
    protocol.add_argument("--knn", action="store_true",
                          help="no training: a validation image's class is that of its 20 or 200 nearest training "
                               "images (weighted, temperature 0.07)")
    protocol.add_argument("--train-percent", default=100.0, type=number(float, "(0, 100]"), metavar="P",
                          help="share of the training images to use, the same number of each class, drawn by the seed "
                               "and listed in train_subset.txt")
    protocol.add_argument("--finetune", action="store_true", help="train the encoder too, all layers")
    protocol.add_argument("--encoder-lr", type=number(float, "(0, inf)"), metavar="LR",
                          help="with --finetune: the encoder's base learning rate, times B / 256 as --lr is (default: "
                               "a tenth of --lr)")
    groups["run"].add_argument("-e", "--evaluate", action="store_true",
                               help="only evaluate the classifier given by --resume on the validation set")
    return parser


def check(args):
    """Refuse flags that contradict each other."""
    several = len(grid(args)) > 1
    contradictions = [
        (args.evaluate and not args.resume,
         "-e/--evaluate: needs the classifier to evaluate, give its checkpoint with --resume"),
        (args.start_epoch is not None and args.start_epoch >= args.epochs,
         f"--start-epoch {args.start_epoch}: must be below --epochs {args.epochs}"),
        (len(set(grid(args))) < len(grid(args)), "--lr, --wd: a value is given twice"),
        (args.finetune and args.features == "cached",
         "--finetune: changes the encoder, so its features cannot be kept, leave out --features cached"),
        (args.finetune and several, "--finetune: trains one network, give one --lr and one --wd"),
        (args.knn and (args.finetune or several or args.features == "cached"),
         "--knn: trains nothing, leave out --finetune, --features cached and several values of --lr and --wd"),
        (args.knn and (args.evaluate or args.resume not in ("", "auto")),
         "--knn: has nothing to resume or evaluate, leave out -e and --resume (--pretrained takes any checkpoint)"),
        (args.encoder_lr and not args.finetune, "--encoder-lr: belongs to --finetune, give that too"),
        (args.cached_epochs and args.features != "cached",
         "--cached-epochs: belongs to --features cached, give that too")]
    for contradicts, line in contradictions:
        if contradicts:
            raise InputError(line)


def grid(args):
    """[(learning rate, weight decay)] of each classifier: every value of --lr with every value of --wd."""
    return list(itertools.product(*(value if isinstance(value, list) else [value]
                                    for value in (args.lr, args.weight_decay))))


def protocol(args):
    """What is done, for people."""
    name = "kNN evaluation" if args.knn else "fine-tuning" if args.finetune else "linear evaluation"
    return (name + " with cached features" * (args.features == "cached")
            + (f" on {args.train_percent:g} % of the training images" if args.train_percent < 100 else ""))


def run_folder(args):
    """Where this run lives: made of the encoder and the settings, so that the same command finds its own run again."""
    if args.pretrained:
        source = Path(args.pretrained).resolve()
        encoder, part = source.parent.name, source.name.split(".")[0]
    else:
        encoder, part = f"{data_label(args)}_{args.arch}_random", "init"
    lrs, decays = (",".join(f"{value:g}" for value in dict.fromkeys(values))
                   for values in zip(*grid(args), strict=True))
    how = f"bz_{args.batch_size}_E{args.epochs}_lr_{lrs}_wd_{decays}_m_{args.momentum:g}" if not args.knn else "knn"
    return (Path(args.save_dir) / f"linear_eval_{encoder}"
            / (f"{part}_{how}_data_{data_label(args)}"
               + non_defaults(PARSER, args, ("stem", "image_size", "precision", "seed", *PROTOCOL_FLAGS))))


def main_worker(args, device):
    check(args)
    run = Run(args, device)
    if args.knn:
        evaluate_knn(run)
    elif args.evaluate:
        evaluate_saved(run)
    else:
        train(run)


class Run:
    """What every protocol starts from: the data, the encoder, its classifiers, and the folder for what comes out."""

    def __init__(self, args, device):
        self.args, self.device, self.started = args, device, time.perf_counter()
        self.train_data, self.val_data = (open_data_set(args.data_name, args.data, split, args.image_size)
                                          for split in ("train", "val"))
        self.classes = self.train_data.images.classes
        if self.classes != self.val_data.images.classes:
            raise InputError(f"--data {args.data or 'data/' + args.data_name}: train and val hold different classes "
                             f"({len(self.classes)} and {len(self.val_data.images.classes)}), make them the same "
                             "folders")

        # The run's folder, and the checkpoint to continue from, whose seed goes on unless another is given.
        self.folder = run_folder(args)
        pretrained, self.pretraining, source, self.resume, self.saved = open_checkpoints(args, self.folder)
        self.seed = set_seed(args, self.saved)
        images = f"{fingerprint(self.train_data.images)}, and for validation {fingerprint(self.val_data.images)}"
        if args.train_percent < 100:
            all_images = self.train_data.images
            few = Subset(all_images, balanced_indices(all_images.targets, args.train_percent, self.seed))
            self.train_data = dataclasses.replace(self.train_data, images=few)
            if rank() == 0 and not args.evaluate:
                few.write_list(self.folder / "train_subset.txt")
        num_images, image_size = len(self.train_data.images), self.train_data.image_size

        # The encoder gives features [b, C]; where it is frozen, the classifiers alone are trained.
        stem = choose_stem(args.stem, image_size)
        if pretrained:
            stem = "cifar" if pretrained["conv1.weight"].shape[-1] == 3 else "imagenet"
            if args.stem not in ("auto", stem):
                raise InputError(f"--stem {args.stem}: {source} has the {stem} stem, leave the flag out")
        precision, dtype = resolve_precision(args.precision, device)
        network = resnet(args.arch, stem)
        self.num_features, network.fc = network.fc.in_features, nn.Identity()
        pairs = grid(args)
        if args.evaluate:       # all that the file holds
            pairs = [(row["lr"], row["weight_decay"]) for row in self.saved.get("classifiers", ())] or pairs
        self.classifiers = Classifiers(self.num_features, len(self.classes), pairs).to(device)
        if pretrained:
            load_encoder(network, pretrained, source)
        # The crops are channels_last already, and gradients should lie as their weights.
        network.to(memory_format=torch.channels_last if args.finetune else memory_format(device, dtype))
        if args.finetune and device.type == "cuda" and world_size() > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.encoder = Encoder(network, Normalize(self.train_data.mean, self.train_data.std), dtype).to(device)
        self.encoder.requires_grad_(args.finetune).eval()   # frozen BatchNorm too: its statistics are the encoder's

        self.settings = vars(args) | {"seed": self.seed, "precision": precision, "stem": stem, "image_size": image_size,
                                      "images": images,
                                      "encoder_lr": (args.encoder_lr or args.lr / 10) if args.finetune else None}
        log(f"=> {protocol(args)} of {args.pretrained or self.resume or 'a random encoder'} "
            f"({args.arch}, {stem} stem, {precision}), on {device_names(device)}")
        log(f"=> {args.data_name}: {num_images} training and {len(self.val_data.images)} validation images of "
            f"{image_size} pixels, {len(self.classes)} classes, seed {self.seed}"
            + ("" if args.evaluate else f", run folder {self.folder}"))
        trained_at = (self.pretraining["encoder"] or {}).get("image_size", image_size)
        if trained_at != image_size:
            log(f"=> note: the encoder was pretrained at {trained_at} pixels, "
                f"--image-size {trained_at} evaluates it there")

    @torch.inference_mode()
    def encode(self, images):
        """uint8 [b, 3, H, W] -> float32 [b, C], by the encoder as it is now."""
        return self.encoder(images)

    def loader(self, data, sampler=None, **how):
        """Batches (images, labels) of a data set, by default of centre crops in its own order."""
        sampler = sampler or EpochSampler(len(data.images), self.args.batch_size)
        return Loader(Labelled(data, self.seed, bad_images=self.args.bad_images, **how), sampler, self.args.workers,
                      self.device)

    def write_results(self, path, **measured):
        """The run's record for machines; `encoder` holds the settings of its pretraining where --pretrained names a
        checkpoint of train.py, else None.
        """
        log(f"=> {path}" + ": replaces that of an earlier run" * path.exists())
        report.write_json(path, {
            "protocol": protocol(self.args), "pretrained": self.args.pretrained or None, **self.pretraining,
            **measured, "classes": len(self.classes), "train_images": len(self.train_data.images),
            "val_images": len(self.val_data.images), "seconds": round(time.perf_counter() - self.started, 1),
            "settings": self.settings, **report.surroundings(self.device)})


def evaluate_knn(run):
    """The class of a validation image by its nearest training images."""
    file = run.folder / "results.json"
    if file.exists():
        checkpoint.require_same_images(json.loads(file.read_text())["settings"], run.settings, f"--save_dir: {file}")
    bank, queries = (extract(run.encode, run.loader(data), torch.float16) for data in (run.train_data, run.val_data))
    accuracies = knn_accuracy(*bank, *queries, len(run.classes))
    run.write_results(file, knn_acc1=accuracies)
    log("=> kNN: " + ", ".join(f"k = {k} Acc@1 {acc1:.3f}" for k, acc1 in accuracies.items()))


def evaluate_saved(run):
    """The accuracy of the classifiers in a checkpoint."""
    restore(run)
    classifiers, batches = run.classifiers, FreshFeatures(run.encode, run.loader(run.val_data))
    for score, (acc1, acc5) in zip(classifiers.scores, validate(classifiers, batches, classifiers, run.device),
                                   strict=True):
        score.update(acc1=acc1, acc5=acc5)
    file = Path(run.resume)
    run.write_results(file.with_name(f"results_{file.name.split('.')[0]}.json"), evaluated=str(file),
                      classifiers=classifiers.scores, chosen=classifiers.chosen)
    if len(classifiers) > 1:
        log(classifiers.table())
    log(" * Acc@1 {acc1:.3f} Acc@5 {acc5:.3f}".format(**classifiers.best))


def train(run):
    """Train the classifiers, and with --finetune the encoder, and validate after every epoch."""
    args, device, classifiers, encoder = run.args, run.device, run.classifiers, run.encoder
    order = EpochSampler(len(run.train_data.images), args.batch_size, run.seed, shuffle=True, drop_last=args.finetune)
    if args.finetune:
        check_batch(args, order.num_images)

    # SGD, for each classifier with its own learning rate and weight decay.
    groups = [{"params": classifier.parameters(), "lr": score["lr"], "weight_decay": score["weight_decay"]}
              for classifier, score in zip(classifiers, classifiers.scores, strict=True)]
    if args.finetune:
        groups.append({"params": encoder.parameters(), "lr": run.settings["encoder_lr"],
                       "weight_decay": args.weight_decay})
    peak_lrs = [group["lr"] * args.batch_size / 256 for group in groups]
    optimizer = torch.optim.SGD(groups, momentum=args.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=args.finetune and run.settings["precision"] == "fp16")
    start_epoch, start_step = restore(run, optimizer, scaler)

    # What the model is given: images where the encoder learns too, else its features.
    model = nn.Sequential(encoder, classifiers) if args.finetune else classifiers
    if args.features == "cached":
        batches, val_batches = cache_features(run, order)
    else:
        batches, val_batches = run.loader(run.train_data, order, augment=True), run.loader(run.val_data)
        if not args.finetune:
            batches, val_batches = FreshFeatures(run.encode, batches), FreshFeatures(run.encode, val_batches)
    frozen = {} if args.finetune else {name: tensor.clone() for name, tensor in encoder.resnet.state_dict().items()}

    several = len(classifiers) > 1
    results = run.folder / "results.json"
    recorded = start_epoch >= args.epochs and results.exists()

    def state(epoch, step):
        """All that the rest of the run depends on, after `step` steps of `epoch`."""
        head = {f"fc.{name}": tensor for name, tensor in classifiers[classifiers.chosen].state_dict().items()}
        return {"epoch": epoch, "step": step, "arch": args.arch,
                "state_dict": checkpoint.with_module(encoder.resnet.state_dict() | head),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), **classifiers.saved(),
                "seed": run.seed, "settings": run.settings}

    net = data_parallel(model, device)
    with contextlib.ExitStack() as stack:
        # In TensorBoard, each of several classifiers is a run of its own in the folder.
        curves = [stack.enter_context(report.Events(run.folder / (name if several else "."), start_epoch or None))
                  for name in classifiers.names]
        writer = stack.enter_context(checkpoint.Writer(run.folder, args.save_minutes))
        for epoch in range(start_epoch, args.epochs):
            net.train()
            lrs = [lr_at(epoch, peak, args.epochs) for peak in peak_lrs]
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
            shown = classifiers.chosen      # of several, in the progress lines
            of_which = f"  (the best so far of {len(classifiers)}: {classifiers.names[shown]})"
            meters = [(AverageMeter("Loss", ".4f"), AverageMeter("Acc@1", ".2f")) for _ in classifiers]
            steps, first_step = len(order), start_step if epoch == start_epoch else 0
            progress = Progress(epoch, steps, args.batch_size, (args.epochs - epoch) * steps - first_step)
            for step, (inputs, target) in enumerate(batches.epoch(epoch, first_step), first_step):
                progress.loaded()
                target = target.to(device, non_blocking=True)
                batch = min(args.batch_size, order.num_images - step * args.batch_size)     # over all ranks

                # The mean of the ranks' losses, and so of their gradients, is that of the global batch.
                outputs = net(inputs)                                       # [b, K] of each classifier
                losses = [F.cross_entropy(output, target, reduction="sum") * world_size() / batch for output in outputs]
                optimizer.zero_grad()
                scaler.scale(sum(losses)).backward()
                scaler.step(optimizer)
                scaler.update()

                for (average, top1), output, loss in zip(meters, outputs, losses, strict=True):
                    average.update(loss.detach())
                    top1.update(100 * correct_in_top(output, target, (1,))[0] / max(len(target), 1), len(target))
                progress.stepped()
                if step % args.print_freq == 0:
                    log(progress.line(step, [*meters[shown], f"LR {lrs[shown]:.4g}" + of_which * several]),
                        live=progress.live)
                stop = stop_requested()         # the same on all ranks
                if step + 1 < steps and (stop or writer.is_due()):      # after the last step the epoch's own save comes
                    check_finite(run, epoch)
                    writer.save(state(epoch, step + 1))
                    if stop:
                        raise Stopped(f"after epoch {epoch}, step {step}")

            check_finite(run, epoch)
            classifiers.record(epoch, validate(model, val_batches, classifiers, device))
            best = classifiers.best
            log(" * Epoch {} Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} (best Acc@1 {best_acc1:.3f} in epoch {best_epoch})"
                .format(epoch, **best) + f" {classifiers.names[classifiers.chosen]}" * several)
            for curve, score, (average, top1), lr in zip(curves, classifiers.scores, meters, lrs, strict=False):
                curve.scalars({"val/Acc@1": score["acc1"], "val/Acc@5": score["acc5"], "train/Acc@1": top1.average,
                               "train/loss": average.average, "train/learning rate": lr}, epoch)
                curve.flush()
            writer.save(state(epoch + 1, 0), *[BEST] * (best["best_epoch"] == epoch))
            if stop and epoch + 1 < args.epochs:
                raise Stopped(f"after epoch {epoch}")
        if not recorded:
            for curve, score in zip(curves, classifiers.scores, strict=True):
                curve.hparams(run.settings, score)

    now = encoder.resnet.state_dict()
    changed = [name for name in frozen if not torch.equal(now[name], frozen[name])]
    if changed:
        raise RuntimeError(f"the frozen encoder changed while its classifier was trained: {', '.join(changed)}")
    if frozen:
        log(f"=> the frozen encoder is unchanged ({len(frozen)} tensors compared)")
    if not recorded:
        run.write_results(results, classifiers=classifiers.scores, chosen=classifiers.chosen,
                          chosen_by="best Acc@1 on the validation set", first_epoch=start_epoch)
        embed(run)
    if several:
        log(classifiers.table())
    log("=> last epoch: Acc@1 {acc1:.3f} Acc@5 {acc5:.3f}; best Acc@1 {best_acc1:.3f} in epoch {best_epoch}".format(
        **classifiers.best))


def check_finite(run, epoch):
    """Before a save: raise InputError where no classifier, or with --finetune the encoder, has finite weights left."""
    finite = [all(bool(parameter.isfinite().all()) for parameter in classifier.parameters())
              for classifier in run.classifiers]
    if run.args.finetune:
        finite.append(all(bool(parameter.isfinite().all()) for parameter in run.encoder.parameters()))
    if not any(finite) or (run.args.finetune and not all(finite)):
        rates = ", ".join(f"--{name.replace('_', '-')} {run.settings[name]}" for name in ("lr", "encoder_lr")
                          if run.settings[name])
        raise InputError(f"a weight is not finite in epoch {epoch}: take a smaller learning rate than {rates}; the "
                         "checkpoints are from before")


@torch.no_grad()
def validate(model, batches, classifiers, device):
    """(Acc@1, Acc@5) of each classifier in percent, over each validation image exactly once, on all ranks."""
    model.eval()
    for buffer in model.buffers():      # on CPUs BatchNorm is each rank's own; rank 0's is what is saved
        broadcast(buffer)
    counts = torch.zeros(len(classifiers), 3, dtype=torch.int64, device=device)     # right in top 1, in top 5, seen
    for inputs, target in batches.epoch(0):
        if len(inputs):
            target = target.to(device)
            counts[:, :2] += torch.stack([correct_in_top(output, target, (1, 5)) for output in model(inputs)])
            counts[:, 2] += len(inputs)
    return [(100 * top1 / seen, 100 * top5 / seen) for top1, top5, seen in all_reduce_sum(counts).tolist()]


def cache_features(run, order):
    """Training and validation batches out of memory. order: the sampler of the training batches."""
    begin, epochs = time.perf_counter(), run.args.cached_epochs
    crops = run.loader(run.train_data, augment=True, replace=False)
    passes = [(crops, epoch) for epoch in range(epochs)] + [(run.loader(run.train_data), 0)]
    train = CachedFeatures(run.encode, run.num_features, passes, order)
    val = CachedFeatures(run.encode, run.num_features, [(run.loader(run.val_data), 0)],
                         EpochSampler(len(run.val_data.images), run.args.batch_size))
    log(f"=> the quick protocol, not the classic one: {train.features.nbytes / 1e9:.3g} GB of features in half "
        "precision, of centre crops" + f" and {epochs} epochs of random ones" * (epochs > 0)
        + f", computed once in {time.perf_counter() - begin:.1f} s")
    return train, val


def embed(run):
    """Validation images for TensorBoard's projector, the same number of each class."""
    images = run.val_data.images
    some = Subset(images, balanced_indices(images.targets, min(100 * EMBEDDED / len(images), 100), seed=0))
    loader = run.loader(dataclasses.replace(run.val_data, images=some))
    report.add_embedding(run.folder, run.encode, loader, run.classes, run.args.epochs)


def open_checkpoints(args, folder):
    """The encoder's tensors (None for a random one), what the results say of its pretraining, the flag and file that
    they are from, the path of the checkpoint to continue from or to evaluate, and what is in it ("" and {} where there
    is none).
    """
    source, pretrained, loaded = f"--pretrained {args.pretrained}", None, {}
    if args.pretrained:
        loaded = checkpoint.load(args.pretrained, "--pretrained")
        pretrained = read_encoder(loaded, source, args)
    settings, pretraining = loaded.get("settings"), {"encoder": None, "pretraining_seconds": None}
    if isinstance(settings, dict) and "loss_type" in settings:      # train.py's, not a classifier's or somebody else's
        pretraining = {"encoder": settings, "pretraining_seconds": loaded.get("seconds")}
    if args.evaluate and args.resume != "auto":
        resume, saved = args.resume, checkpoint.load(args.resume, "--resume", CHECKPOINT_KEYS)
    else:
        resume, saved = checkpoint.open_run(folder, "" if args.knn else args.resume, CHECKPOINT_KEYS)
    if args.evaluate and not resume:
        raise InputError(f"-e/--evaluate: {folder} holds no run yet, give a checkpoint with --resume PATH")
    if saved:
        source = f"--resume {resume}"
        pretrained = same_encoder(read_encoder(saved, source, args), pretrained, saved, source, args)
    return pretrained, pretraining, source, resume, saved


def read_encoder(saved, source, args):
    """The encoder's tensors in a checkpoint. source: the flag and the file that it was read from, for the message."""
    if saved.get("arch", args.arch) != args.arch:
        raise InputError(f"{source}: was made with --arch {saved['arch']}, not {args.arch}")
    return encoder_state(saved, source)


def same_encoder(resumed, pretrained, saved, source, args):
    """The encoder of a resumed checkpoint, which, if it was frozen, must be that of --pretrained (None where that was
    not given).
    """
    settings = saved.get("settings", {})
    made_with = settings.get("pretrained")
    if pretrained is None and made_with and not args.evaluate:
        raise InputError(f"{source}: was made with --pretrained {made_with}, give that too")
    if pretrained is not None and not settings.get("finetune") and (
            resumed.keys() != pretrained.keys() or not all(torch.equal(resumed[key], pretrained[key])
                                                           for key in resumed)):
        raise InputError(f"{source}: evaluates another encoder than --pretrained {args.pretrained}")
    return resumed


def check_batch(args, num_images):
    """Refuse a batch that BatchNorm cannot be trained on."""
    ranks = world_size()
    if args.batch_size % ranks or args.batch_size < 2 * ranks:
        raise InputError(f"--finetune: --batch-size {args.batch_size} cannot be shared equally by {ranks} "
                         f"process{'es' * (ranks > 1)} with at least 2 images each, take a multiple of {ranks} from "
                         f"{2 * ranks} on")
    if args.batch_size > num_images:
        raise InputError(f"--finetune: --batch-size {args.batch_size} is more than the {num_images} training images, "
                         "take a smaller one")


def restore(run, optimizer=None, scaler=None):
    """Put a checkpoint's classifiers, and the optimizer's and scaler's states, back where there is one. Returns the
    epoch and step to start with.
    """
    args, saved, source = run.args, run.saved, f"--resume {run.resume}"
    start = args.start_epoch or 0, 0
    if not saved:
        return start
    state = checkpoint.without_module(saved["state_dict"])
    head = {name: state[f"fc.{name}"] for name in ("weight", "bias") if f"fc.{name}" in state}
    if optimizer:
        made_with = saved.get("settings", {})
        if made_with:       # files from before these flags were made with their defaults
            made_with = {name: PARSER.get_default(name) for name in PROTOCOL_FLAGS} | made_with
        PARSER.require_same(made_with, {name: run.settings[name] for name in METHOD_FLAGS}, source)
        checkpoint.require_same_images(made_with, run.settings, source)
    run.classifiers.restore(saved, head, source)
    if optimizer:
        try:
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved.get("scaler", {}))
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{source}: was made by another protocol: {str(error).splitlines()[0]}") from error
    step = saved.get("step", 0)
    log(f"=> resumed {run.resume} after {saved['epoch']} epochs" + f" and {step} steps" * (step > 0))
    return (saved["epoch"], step) if args.start_epoch is None else start


PARSER = build_parser()

if __name__ == "__main__":
    launch(main_worker, PARSER.parse_args())
