#!/usr/bin/env python3
"""Linear evaluation: trains a linear classifier on the frozen features of an encoder and prints its accuracy.

The encoder of a run of train.py, on ImageNet-1K with the usual protocol (the defaults):
    python lincls.py --data DIR --pretrained saved_models/RUN/checkpoint_0799.pth.tar

A randomly initialised encoder, to compare with: leave out --pretrained.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from sogclr import InputError, Stopped, checkpoint
from sogclr.augment import Normalize
from sogclr.builder import choose_stem, encoder_state, load_encoder, resnet
from sogclr.distributed import all_reduce_sum, device_names, launch, log, rank, set_seed, stop_requested, world_size
from sogclr.flags import Parser, add_shared_flags, non_defaults, resolve_precision
from sogclr.loader import EpochSampler, Labelled, Loader, open_data_set
from sogclr.meters import AverageMeter, Progress, correct_in_top
from sogclr.optimizer import lr_at, set_lr

BEST = "model_best.pth.tar"
CHECKPOINT_KEYS = ("epoch", "arch", "state_dict", "optimizer", "best_acc1", "best_epoch")
# What a resumed run must share with its checkpoint: all that decides the numbers.
METHOD_FLAGS = ("image_size", "batch_size", "epochs", "lr", "momentum", "weight_decay", "precision", "seed")


def build_parser():
    parser = Parser("Linear evaluation of a pretrained encoder")
    groups = add_shared_flags(parser, batch_size=1024, epochs=90, lr=0.1, weight_decay=0.0)
    groups["model"].add_argument("--pretrained", default="", metavar="PATH",
                       help="checkpoint of train.py, or the authors' (default: none, a random encoder)")
    groups["run"].add_argument("-e", "--evaluate", action="store_true",
                               help="only evaluate the classifier given by --resume on the validation set")
    return parser


def run_folder(args):
    """Where this run lives: made of the encoder and the settings, so that the same command finds its own run again."""
    if args.pretrained:
        source = Path(args.pretrained).resolve()
        encoder, part = source.parent.name, source.name.split(".")[0]
    else:
        encoder, part = f"{args.data_name}_{args.arch}_random", "init"
    name = f"{part}_bz_{args.batch_size}_E{args.epochs}_lr_{args.lr:g}_wd_{args.weight_decay:g}_m_{args.momentum:g}"
    return (Path(args.save_dir) / f"linear_eval_{encoder}"
            / (name + non_defaults(PARSER, args, ("data_name", "stem", "image_size", "precision", "seed"))))


def main_worker(args, device):
    if args.evaluate and not args.resume:
        raise InputError("-e/--evaluate: needs the classifier to evaluate, give its checkpoint with --resume")
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        raise InputError(f"--start-epoch {args.start_epoch}: must be below --epochs {args.epochs}")
    train_data = open_data_set(args.data_name, args.data, "train", args.image_size)
    val_data = open_data_set(args.data_name, args.data, "val", args.image_size)
    classes = train_data.images.classes
    if classes != val_data.images.classes:
        raise InputError(f"--data {args.data or 'data/' + args.data_name}: train and val hold different classes "
                         f"({len(classes)} and {len(val_data.images.classes)}), make them the same folders")

    source, pretrained = f"--pretrained {args.pretrained}", None
    if args.pretrained:
        pretrained = read_encoder(checkpoint.load(args.pretrained, "--pretrained"), source, args)

    # The run's folder, and the checkpoint to continue from, whose seed goes on unless another is given.
    folder = run_folder(args)
    if args.evaluate and args.resume != "auto":
        resume, saved = args.resume, checkpoint.load(args.resume, "--resume", CHECKPOINT_KEYS)
    else:
        resume, saved = checkpoint.open_run(folder, args.resume, CHECKPOINT_KEYS)
    if args.evaluate and not resume:
        raise InputError(f"-e/--evaluate: {folder} holds no run yet, give a checkpoint with --resume PATH")
    if saved:
        source = f"--resume {resume}"
        pretrained = same_encoder(read_encoder(saved, source, args), pretrained, saved, source, args)
    seed = set_seed(args, saved)
    train_sampler = EpochSampler(len(train_data.images), args.batch_size, seed, shuffle=True)
    train_crops = Labelled(train_data, seed, augment=True, bad_images=args.bad_images)
    train_loader = Loader(train_crops, train_sampler, args.workers, device)
    val_sampler = EpochSampler(len(val_data.images), args.batch_size)
    val_loader = Loader(Labelled(val_data, bad_images=args.bad_images), val_sampler, args.workers, device)
    normalize = Normalize(train_data.mean, train_data.std).to(device)

    # The frozen encoder gives features [b, C]; the classifier alone is trained.
    stem = choose_stem(args.stem, train_data.image_size)
    if pretrained:
        stem = "cifar" if pretrained["conv1.weight"].shape[-1] == 3 else "imagenet"
        if args.stem not in ("auto", stem):
            raise InputError(f"--stem {args.stem}: {source} has the {stem} stem, leave the flag out")
    encoder = resnet(args.arch, stem)
    classifier = nn.Linear(encoder.fc.in_features, len(classes))
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    encoder.fc = nn.Identity()
    if pretrained:
        load_encoder(encoder, pretrained, source)
    encoder.requires_grad_(False).eval().to(device)     # BatchNorm too: its running statistics belong to the encoder
    classifier.to(device)
    if device.type == "cuda":
        encoder.to(memory_format=torch.channels_last)
    frozen = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    optimizer = torch.optim.SGD(classifier.parameters(), args.lr, momentum=args.momentum,
                                weight_decay=args.weight_decay)
    peak_lr = args.lr * args.batch_size / 256
    precision, dtype = resolve_precision(args.precision, device)

    settings = vars(args) | {"seed": seed, "precision": precision, "stem": stem, "image_size": train_data.image_size}
    start_epoch, start_step, best = 0, 0, (0.0, -1)
    if resume:
        if not args.evaluate:
            PARSER.require_same(saved.get("settings", {}), {name: settings[name] for name in METHOD_FLAGS},
                                f"--resume {resume}")
        start_epoch, start_step, best = restore(saved, resume, classifier, optimizer)
    if args.start_epoch is not None:
        start_epoch, start_step = args.start_epoch, 0
    log(f"=> linear evaluation of {args.pretrained or resume or 'a random encoder'} "
        f"({args.arch}, {stem} stem, {precision}), on {device_names(device)}")
    log(f"=> {args.data_name}: {len(train_data.images)} training and {len(val_data.images)} validation images of "
        f"{train_data.image_size} pixels, {len(classes)} classes, seed {seed}"
        + ("" if args.evaluate else f", run folder {folder}"))

    @torch.inference_mode()
    def features(images):
        """uint8 [b, 3, H, W] -> float32 [b, C]"""
        with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
            return encoder(normalize(images)).float()

    def validate():
        """Acc@1 and Acc@5 in percent, over each validation image exactly once, on all ranks."""
        counts = torch.zeros(3, dtype=torch.int64, device=device)       # right in top 1, in top 5, seen
        for images, target in val_loader.epoch(0):
            if len(images):
                counts[:2] += correct_in_top(classifier(features(images)), target.to(device), (1, 5))
                counts[2] += len(images)
        *hits, seen = all_reduce_sum(counts).tolist()
        return [100 * count / seen for count in hits]

    if args.evaluate:
        with torch.no_grad():
            acc1, acc5 = validate()
        log(f" * Acc@1 {acc1:.3f} Acc@5 {acc5:.3f}")
        return

    events = SummaryWriter(folder, purge_step=start_epoch or None) if rank() == 0 else None
    writer = checkpoint.Writer(folder, args.save_minutes)
    acc1, acc5 = saved.get("acc1", float("nan")), saved.get("acc5", float("nan"))

    def state(epoch, step):
        """All that the rest of the run depends on, after `step` steps of `epoch`."""
        weights = encoder.state_dict() | {f"fc.{name}": tensor for name, tensor in classifier.state_dict().items()}
        return {"epoch": epoch, "step": step, "arch": args.arch, "state_dict": checkpoint.with_module(weights),
                "optimizer": optimizer.state_dict(), "best_acc1": best[0], "best_epoch": best[1],
                "acc1": acc1, "acc5": acc5, "seed": seed, "settings": settings}

    for epoch in range(start_epoch, args.epochs):
        lr = lr_at(epoch, peak_lr, args.epochs)
        set_lr(optimizer, lr)
        losses, top1 = AverageMeter("Loss", ".4f"), AverageMeter("Acc@1", ".2f")
        steps, first_step = len(train_loader), start_step if epoch == start_epoch else 0
        progress = Progress(epoch, steps, args.batch_size, (args.epochs - epoch) * steps - first_step)
        for step, (images, target) in enumerate(train_loader.epoch(epoch, first_step), first_step):
            progress.loaded()
            target = target.to(device, non_blocking=True)
            batch = min(args.batch_size, len(train_data.images) - step * args.batch_size)   # over all ranks

            # Every rank sums over its images; the sum over the ranks, divided by the global batch, is the mean.
            output = classifier(features(images).clone())       # inference tensors cannot be saved for backward
            loss = F.cross_entropy(output, target, reduction="sum") / batch
            optimizer.zero_grad()
            loss.backward()
            for parameter in classifier.parameters():
                all_reduce_sum(parameter.grad)
            optimizer.step()

            losses.update(loss.detach() * world_size())
            top1.update(100 * correct_in_top(output, target, (1,))[0] / max(len(target), 1), len(target))
            progress.stepped()
            if step % args.print_freq == 0:
                log(progress.line(step, [losses, top1, f"LR {lr:.4g}"]), live=progress.live)
            stop = stop_requested()         # the same on all ranks
            if stop or writer.is_due():
                writer.save(state(epoch, step + 1))
            if stop:
                writer.close()
                raise Stopped(f"after epoch {epoch}, step {step}")

        with torch.no_grad():
            acc1, acc5 = validate()
        best = max(best, (acc1, epoch))
        log(f" * Epoch {epoch} Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} (best Acc@1 {best[0]:.3f} in epoch {best[1]})")
        if rank() == 0:
            for name, value in {"val Acc@1": acc1, "val Acc@5": acc5, "train Acc@1": top1.average,
                                "train loss": losses.average, "learning rate": lr}.items():
                events.add_scalar(name, value, epoch)
        writer.save(state(epoch + 1, 0), *[BEST] * (best[1] == epoch))

    writer.close()

    changed = [name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, frozen[name])]
    if changed:
        raise RuntimeError(f"the frozen encoder changed while its classifier was trained: {', '.join(changed)}")
    log(f"=> the frozen encoder is unchanged ({len(frozen)} tensors compared)")
    log(f"=> last epoch: Acc@1 {acc1:.3f} Acc@5 {acc5:.3f}; best Acc@1 {best[0]:.3f} in epoch {best[1]}")
    if events:
        events.close()


def read_encoder(saved, source, args):
    """The encoder's tensors in a checkpoint. source: the flag and the file that it was read from, for the message."""
    if saved.get("arch", args.arch) != args.arch:
        raise InputError(f"{source}: was made with --arch {saved['arch']}, not {args.arch}")
    return encoder_state(saved, source)


def same_encoder(resumed, pretrained, saved, source, args):
    """The encoder of a resumed checkpoint, which must be that of --pretrained (None where that was not given)."""
    made_with = saved.get("settings", {}).get("pretrained")
    if pretrained is None and made_with and not args.evaluate:
        raise InputError(f"{source}: was made with --pretrained {made_with}, give that too")
    if pretrained is not None and (resumed.keys() != pretrained.keys() or not all(
            torch.equal(resumed[key], pretrained[key]) for key in resumed)):
        raise InputError(f"{source}: evaluates another encoder than --pretrained {args.pretrained}")
    return resumed


def restore(saved, path, classifier, optimizer):
    """Put the classifier's state back, and return the epoch and step to start with, and (best Acc@1, its epoch)."""
    state = checkpoint.without_module(saved["state_dict"])
    head = {name: state.get(f"fc.{name}", torch.empty(0)) for name in ("weight", "bias")}
    if head["weight"].shape != classifier.weight.shape:
        raise InputError(f"--resume {path}: has {len(head['bias'])} classes, "
                         f"but this data set has {classifier.out_features}")
    classifier.load_state_dict(head)
    optimizer.load_state_dict(saved["optimizer"])
    step = saved.get("step", 0)
    log(f"=> resumed {path} after {saved['epoch']} epochs" + f" and {step} steps" * (step > 0))
    return saved["epoch"], step, (saved["best_acc1"], saved["best_epoch"])


PARSER = build_parser()

if __name__ == "__main__":
    launch(main_worker, PARSER.parse_args())
