#!/usr/bin/env python3
"""Self-supervised pretraining of a ResNet with SogCLR (arXiv 2202.12387), or with SimCLR to compare.

One machine, all its GPUs, the paper's ImageNet-1K recipe (the defaults):
    python train.py --data DIR

One GPU, or none, on images that the program draws:
    python train.py --data_name shapes --arch resnet18 --stem imagenet --epochs 40

Two machines of 8 GPUs:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py --data DIR
"""

import copy
import os
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

from sogclr import InputError, Stopped, checkpoint, distributed, report
from sogclr.augment import Augment, Normalize, pil_recipe
from sogclr.builder import SimCLR, choose_stem, memory_format, resnet
from sogclr.distributed import (
    broadcast_int,
    data_parallel,
    device_names,
    launch,
    log,
    set_seed,
    stop_requested,
    world_size,
)
from sogclr.features import Encoder, extract
from sogclr.flags import Parser, add_shared_flags, data_label, non_defaults, number, resolve_precision
from sogclr.knn import knn_accuracy
from sogclr.loader import EpochSampler, Labelled, Loader, TwoViews, fingerprint, open_data_set
from sogclr.loss import ContrastiveLoss, GlobalContrastiveLoss, alignment_and_uniformity, gamma_at
from sogclr.meters import AverageMeter, LossWatch, Progress
from sogclr.optimizer import LARS, lr_at, scaled_lr, set_lr

DRY_STEPS, DRY_SECONDS = 12, 60     # of --dry-run, but two steps at least
METHODS = {"dcl": "sogclr", "cl": "simclr"}
CHECKPOINT_KEYS = ("epoch", "arch", "state_dict", "optimizer", "scaler")
# What a resumed run must share with its checkpoint: all that decides the numbers.
METHOD_FLAGS = ("data_name", "arch", "stem", "dim", "mlp_dim", "num_proj_layers", "loss_type", "t", "gamma",
                "gamma_schedule", "gamma_decay_epochs", "image_size", "crop_min", "augment", "optimizer", "batch_size",
                "epochs", "lr", "learning_rate_scaling", "momentum", "weight_decay", "warmup_epochs", "precision",
                "seed")


def build_parser():
    parser = Parser("SogCLR pretraining")
    groups = add_shared_flags(
        parser, batch_size=256, epochs=800, lr=0.075, weight_decay=1e-6, momentum_of="LARS",
        lr_help="base learning rate: times the square root of the batch size, or as --learning-rate-scaling says")
    optim, model = groups["optimization"], groups["model"]
    optim.add_argument("--learning-rate-scaling", default="sqrt", choices=("sqrt", "linear"),
                       help="peak learning rate: sqrt is lr * sqrt(B), linear is lr * B / 256")
    optim.add_argument("--warmup-epochs", default=10, type=number(int, "[0, inf)"), metavar="N",
                       help="epochs in which the learning rate rises from 0")
    optim.add_argument("--optimizer", default="lars", choices=("lars", "adamw"),
                       help="optimizer; the default --lr is meant for lars, adamw wants a far smaller one")
    model.add_argument("--dim", default=128, type=number(int, "[1, inf)"), help="size of a projection")
    model.add_argument("--mlp-dim", default=2048, type=number(int, "[1, inf)"),
                       help="width of the projection head's hidden layers")
    model.add_argument("--num_proj_layers", default=2, type=number(int, "[1, inf)"), metavar="N",
                       help="linear layers of the projection head")

    method = parser.add_argument_group("method")
    method.add_argument("--loss_type", default="dcl", choices=tuple(METHODS),
                        help="dcl is SogCLR's global (dynamic) contrastive loss, cl is SimCLR's")
    method.add_argument("--t", default=0.1, type=number(float, "(0, inf)"), metavar="T", help="temperature")
    method.add_argument("--gamma", default=0.9, type=number(float, "(0, 1]"),
                        help="weight of the new value in the moving averages u of dcl")
    method.add_argument("--gamma-schedule", default="constant", choices=("constant", "cosine"),
                        help="cosine lowers gamma from 1 to --gamma over --gamma-decay-epochs, then keeps it")
    method.add_argument("--gamma-decay-epochs", type=number(int, "[1, inf)"), metavar="N",
                        help="length of --gamma-schedule cosine (default: half of --epochs)")
    method.add_argument("--crop-min", default=0.08, type=number(float, "(0, 1]"), metavar="SHARE",
                        help="smallest share of an image's area that a crop takes")
    method.add_argument("--augment", default="batched", choices=("batched", "pil"),
                        help="where colour is changed: in batches on the device, or image by image in the workers, as "
                             "the authors do (slower, to compare with)")
    groups["run"].add_argument("--save-freq", default=10, type=number(int, "[1, inf)"), metavar="N",
                               help="epochs between two checkpoints that are kept, apart from the last three epochs'")
    groups["run"].add_argument("--dry-run", action="store_true",
                               help="do a few steps on the data, say what the whole run would take in time, memory and "
                                    "disk, and stop; starts from fresh weights and writes nothing")
    groups["run"].add_argument("--knn-freq", default=0, type=number(int, "[0, inf)"), metavar="N",
                               help="epochs between two reports of the encoder's kNN accuracy, which needs labelled "
                                    "images in DIR/train and DIR/val and does not change the run; 0 is never")
    return parser


def run_name(args):
    """The run folder's name, made of the settings, so that the same command finds its own run again."""
    name = (f"{data_label(args)}_{args.arch}_{METHODS[args.loss_type]}-{args.dim}-{args.mlp_dim}_bz_{args.batch_size}"
            f"_E{args.epochs}_WR{args.warmup_epochs}_lr_{args.lr:g}_{args.learning_rate_scaling}"
            f"_wd_{args.weight_decay:g}_t_{args.t:g}_g_{args.gamma:g}_m_{args.momentum:g}_{args.optimizer}")
    return name + non_defaults(PARSER, args, ("num_proj_layers", "crop_min", "stem", "image_size", "precision",
                                              "augment", "gamma_schedule", "gamma_decay_epochs", "seed"))


def main_worker(args, device):
    ranks, started = world_size(), time.perf_counter()
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        raise InputError(f"--start-epoch {args.start_epoch}: must be below --epochs {args.epochs}")
    if args.batch_size % ranks or args.batch_size < 2 * ranks:
        raise InputError(f"--batch-size {args.batch_size}: {ranks} process{'es' * (ranks > 1)} cannot share it equally "
                         f"with at least 2 images each, take a multiple of {ranks} from {2 * ranks} on")

    data = open_data_set(args.data_name, args.data, "train", args.image_size, labels=args.data_name != "folder")
    num_images = len(data.images)
    if args.batch_size > num_images:
        raise InputError(f"--batch-size {args.batch_size}: the data set holds only {num_images} images, "
                         "take a smaller batch")

    # The run's folder, and the checkpoint to continue from, whose seed goes on unless another is given.
    folder = Path(args.save_dir) / run_name(args)
    resume, saved = ("", {}) if args.dry_run else checkpoint.open_run(folder, args.resume, CHECKPOINT_KEYS)
    seed = set_seed(args, saved)

    # Data: uint8 crops from the workers; their colour is done on the device, on a GPU beside the step before.
    sampler = EpochSampler(num_images, args.batch_size, seed, shuffle=True, drop_last=True)
    recipe = None
    if args.augment == "pil":
        recipe = pil_recipe(data.image_size, args.crop_min, data.mean, data.std, data.blur)
    views = TwoViews(data, seed, args.crop_min, Augment.num_draws, args.bad_images, recipe)
    precision, dtype = resolve_precision(args.precision, device)
    layout = memory_format(device, dtype)
    augment = Augment(data.mean, data.std, data.blur, dtype, layout).to(device)
    loader = Loader(views, sampler, args.workers, device, augment)
    knn = knn_evaluation(args, data, device, dtype) if args.knn_freq else None

    # Model, loss, optimizer.
    stem = choose_stem(args.stem, data.image_size)
    encoder = resnet(args.arch, stem, zero_init_residual=True)
    model = SimCLR(encoder, args.dim, args.mlp_dim, args.num_proj_layers).to(device, memory_format=layout)
    if device.type == "cuda" and ranks > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.loss_type == "dcl":
        criterion = GlobalContrastiveLoss(num_images, args.t, args.gamma).to(device)
    else:
        criterion = ContrastiveLoss(args.t)
    peak_lr = scaled_lr(args.lr, args.batch_size, args.learning_rate_scaling)
    if args.optimizer == "lars":
        optimizer = LARS(model.parameters(), peak_lr, weight_decay=args.weight_decay, momentum=args.momentum)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), peak_lr, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    settings = vars(args) | {"seed": seed, "precision": precision, "stem": stem, "image_size": data.image_size,
                             "gamma_decay_epochs": args.gamma_decay_epochs or max(args.epochs // 2, 1),
                             "images": fingerprint(data.images)}
    start_epoch, start_step = 0, 0
    if resume:
        made_with, source = saved.get("settings", {}), f"--resume {resume}"
        PARSER.require_same(made_with, {name: settings[name] for name in METHOD_FLAGS}, source)
        start_epoch, start_step = restore(saved, resume, args, model, criterion, optimizer, scaler)
        checkpoint.require_same_images(made_with, settings, source)
    if args.start_epoch is not None:
        start_epoch, start_step = args.start_epoch, 0
    steps = len(loader)

    def state(epoch, step):
        """All that the rest of the run depends on, after `step` steps of `epoch`."""
        whole = {"epoch": epoch, "step": step, "arch": args.arch,
                 "state_dict": checkpoint.with_module(model.state_dict()), "optimizer": optimizer.state_dict(),
                 "scaler": scaler.state_dict(), "seed": seed, "settings": settings, "seconds": seconds()}
        if args.loss_type == "dcl":
            whole |= {"u": criterion.u[:, None].float(), **criterion.state_dict()}
        return whole

    def seconds():
        """How long the run has taken, over all its starts, without what was lost between a save and a kill; None where
        its checkpoint does not say.
        """
        before = saved.get("seconds") if saved else 0.0
        return None if before is None else round(before + time.perf_counter() - started, 1)

    if start_epoch >= args.epochs:
        log(f"=> nothing to do: {resume} has all {args.epochs} epochs")
        return
    log(f"=> {METHODS[args.loss_type]} on {num_images} images of {data.image_size} pixels ({args.data_name}"
        + (f" in {os.fsdecode(data.images.root)}" if hasattr(data.images, "root") else "")
        + f"), {steps} steps an epoch, epochs {start_epoch} to {args.epochs - 1}")
    log(f"=> {args.arch} with {stem} stem, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{precision}, seed {seed}, on {device_names(device)}")
    log(f"=> global batch {args.batch_size} ({args.batch_size // ranks} a rank), "
        f"peak learning rate {peak_lr:g}, run folder {folder}")
    log("=> what decides the numbers: " + ", ".join(f"{name} {settings[name]}" for name in METHOD_FLAGS))

    if args.warmup_epochs >= args.epochs:
        log(f"=> --warmup-epochs {args.warmup_epochs}: no shorter than the run, so the peak is not reached")

    # What stays of the run, beside its checkpoints, and what ends it.
    record = {"command": sys.argv, "settings": settings, **report.surroundings(device)}
    if not args.dry_run:
        report.write_json(folder / "settings.json", record)
    else:
        log(f"=> dry run: at most {DRY_STEPS} steps or {DRY_SECONDS} seconds of them, and nothing is written")
    watch = LossWatch(device, f"--lr {args.lr:g}: try a smaller one, a longer --warmup-epochs or --precision fp32")
    print_freq, knn_acc1 = 1 if args.dry_run else args.print_freq, {}

    net = data_parallel(model, device)
    with (report.Events(None if args.dry_run else folder, start_epoch * steps + start_step or None) as events,
          checkpoint.Writer(folder, args.save_minutes) as writer):
        for epoch in range(start_epoch, args.epochs):
            net.train()
            if args.gamma_schedule == "cosine":
                criterion.gamma = gamma_at(epoch, args.gamma, settings["gamma_decay_epochs"])
            losses, gcl = AverageMeter("Loss", ".4f"), AverageMeter("GCL", ".4f")
            first_step = start_step if epoch == start_epoch else 0
            progress = Progress(epoch, steps, args.batch_size, (args.epochs - epoch) * steps - first_step)
            for step, (view1, view2, index) in enumerate(loader.epoch(epoch, first_step), first_step):
                progress.loaded()
                lr = lr_at(epoch + step / steps, peak_lr, args.epochs, args.warmup_epochs)
                set_lr(optimizer, lr)

                with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
                    z1, z2 = net(view1, view2)                          # [b, D] each
                loss = criterion(z1, z2, index)
                watch.add(loss, criterion.keys, ranks, f"epoch {epoch}, step {step}")

                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

                losses.update(loss.detach())
                gcl.update(criterion.gcl())
                progress.stepped()
                if step % print_freq == 0:
                    log(progress.line(step, [losses, gcl, f"LR {lr:.4g}"]), live=progress.live)
                    alignment, uniformity = alignment_and_uniformity(criterion.keys)
                    events.scalars({"loss/loss": losses.value, "loss/gcl": gcl.value,
                                    "features/alignment": alignment, "features/uniformity": uniformity,
                                    "run/learning rate": lr, "run/images per second": progress.images_per_second,
                                    **({"run/gamma": criterion.gamma} if args.loss_type == "dcl" else {}),
                                    **({"run/GPU memory, GiB": torch.cuda.max_memory_allocated() / 2**30}
                                       if device.type == "cuda" else {})}, epoch * steps + step)
                if events and (epoch, step) == (start_epoch, start_step):
                    pairs = torch.stack([view1[:32], view2[:32]], 1).flatten(0, 1)      # an image's views side by side
                    events.image("views", make_grid(augment.normalize.undo(pairs)), epoch * steps + step)

                stop = stop_requested()         # the same on all ranks
                if args.dry_run and broadcast_int(
                        stop or step + 1 == min(steps, DRY_STEPS)
                        or (progress.done > 1 and progress.now - progress.start > DRY_SECONDS)):
                    log(estimate(args, progress, steps, state(epoch, step), device))
                    return
                if step + 1 < steps and (stop or writer.is_due()):      # after the last step the epoch's own save comes
                    watch.check_weights(model, f"epoch {epoch}, step {step}")
                    writer.save(state(epoch, step + 1))
                    if stop:
                        raise Stopped(f"after epoch {epoch}, step {step}")

            watch.check_weights(model, f"epoch {epoch}")
            kept = checkpoint_is_kept(args, epoch)
            writer.save(state(epoch + 1, 0), *[f"checkpoint_{epoch:04d}.pth.tar"] * kept)
            events.flush()
            log(progress.summary([losses, gcl]))
            if stop and epoch + 1 < args.epochs:
                raise Stopped(f"after epoch {epoch}")
            if events and args.loss_type == "dcl":
                events.histogram("u/log u", criterion.log_u[criterion.log_u.isfinite()], (epoch + 1) * steps)
                events.histogram("u/age in epochs", criterion.age / steps, (epoch + 1) * steps)
            if knn and ((epoch + 1) % args.knn_freq == 0 or epoch == args.epochs - 1):
                knn_acc1 = {f"kNN-{k}": acc1 for k, acc1 in knn(model.base_encoder).items()}
                log(f" * Epoch {epoch} " + " ".join(f"{name} {acc1:.1f}" for name, acc1 in knn_acc1.items()))
                events.scalars({f"features/{name}": acc1 for name, acc1 in knn_acc1.items()}, (epoch + 1) * steps)
    report.write_json(folder / "results.json", {
        "loss": losses.average, "gcl": gcl.average, **knn_acc1, "first_epoch": start_epoch,
        "seconds": seconds(), **record})
    log(f"=> done: {folder / f'checkpoint_{args.epochs - 1:04d}.pth.tar'}")


def estimate(args, progress, steps, state, device):
    """What the whole run will take, by its first steps and what a checkpoint holds, in one line."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        memory = (f"{torch.cuda.max_memory_reserved() / 2**30:.1f} of "
                  f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB on each GPU")
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB, and the workers'"
    hours = args.epochs * steps * progress.seconds_per_step / 3600
    duration = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
    kept = 2 + sum(checkpoint_is_kept(args, epoch) for epoch in range(args.epochs))      # and the last and the previous
    disk = kept * checkpoint.size(state) / 2**30
    return (f"=> {args.epochs} epochs will take about {duration} ({progress.images_per_second:.0f} images/s, "
            f"{progress.waiting}), memory {memory}, and {disk:.1f} GiB in {args.save_dir} for {kept} checkpoints; "
            "dry run: nothing was written")


def checkpoint_is_kept(args, epoch):
    """Whether the checkpoint after an epoch stays: each --save-freq-th, and those of the last three."""
    return epoch % args.save_freq == 0 or epoch >= args.epochs - 3


def restore(saved, path, args, model, criterion, optimizer, scaler):
    """Put a checkpoint back into everything that training changes, and return the epoch and step to start with.

    saved: the checkpoint read from `path`. Raises InputError where it is of another architecture, data set or loss.
    """
    if saved["arch"] != args.arch:      # the authors' files have no settings
        raise InputError(f"--resume {path}: was made with --arch {saved['arch']}, not {args.arch}")
    if args.loss_type == "dcl":
        checkpoint.require(saved, path, "--resume", ("u",))
        rows, images = saved["u"].numel(), len(criterion.log_u)
        if rows not in (images, images + 1):        # the authors keep one row more
            raise InputError(f"--resume {path}: was made on {rows} images, but this data set holds {images}")
        criterion.u = saved["u"].flatten()[:images]     # all that the authors' files have
        criterion.load_state_dict({name: saved.get(name, tensor) for name, tensor in criterion.state_dict().items()})
    try:
        model.load_state_dict(checkpoint.without_module(saved["state_dict"]))
        optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"--resume {path}: was made with another model or optimizer: "
                         + " ".join(str(error).split())[:200]) from error
    if saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    step = saved.get("step", 0)
    log(f"=> resumed {path} after {saved['epoch']} epochs" + f" and {step} steps" * (step > 0))
    return saved["epoch"], step


def knn_evaluation(args, data, device, dtype):
    """For --knn-freq: a function from the encoder to {k: its kNN accuracy in percent}, the same on every rank.

    data: the training images, whose centre crops are the bank; those of the validation images are the queries. It
    evaluates a copy of the encoder, with the BatchNorm statistics that rank 0 would save, and leaves torch's generator
    as it was, so that the run stays the same. Raises InputError where images have no labels.
    """
    try:
        if args.data_name == "folder":      # was listed without classes, in an order that must not change
            data = open_data_set(args.data_name, args.data, "train", args.image_size)
        val_data = open_data_set(args.data_name, args.data, "val", args.image_size)
    except InputError as error:
        raise InputError(f"--knn-freq {args.knn_freq}: needs images with labels, leave the flag out where there are "
                         f"none; {error}") from error
    classes = data.images.classes
    if classes != val_data.images.classes:
        raise InputError(f"--knn-freq {args.knn_freq}: train and val hold different classes ({len(classes)} and "
                         f"{len(val_data.images.classes)}), make them the same folders of --data")
    bank, queries = (Loader(Labelled(images, bad_images=args.bad_images),
                            EpochSampler(len(images.images), args.batch_size), args.workers, device)
                     for images in (data, val_data))

    def evaluate(encoder):
        frozen = copy.deepcopy(encoder).eval()
        frozen.fc = torch.nn.Identity()
        for buffer in frozen.buffers():
            distributed.broadcast(buffer)

        encode = Encoder(frozen, Normalize(data.mean, data.std).to(device), dtype)

        @torch.inference_mode()
        def features(images):
            """uint8 [b, 3, H, W] -> float32 [b, C], of length 1: so half precision holds them."""
            return F.normalize(encode(images))

        with torch.random.fork_rng(devices=[]):     # a loader takes its workers' seeds from there
            return knn_accuracy(*extract(features, bank, torch.float16), *extract(features, queries, torch.float16),
                                len(classes))

    return evaluate


PARSER = build_parser()

if __name__ == "__main__":
    launch(main_worker, PARSER.parse_args())
