#!/usr/bin/env python3
"""Self-supervised pretraining of a ResNet with SogCLR (arXiv 2202.12387), or with SimCLR to compare.

One machine, all its GPUs, the paper's ImageNet-1K recipe (the defaults):
    python train.py --data DIR

One GPU, or none, on images that the program draws:
    python train.py --data_name shapes --arch resnet18 --stem imagenet --epochs 40

Two machines of 8 GPUs:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py --data DIR
"""

import math
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from sogclr import InputError, checkpoint
from sogclr.augment import Augment, pil_recipe
from sogclr.builder import SimCLR, choose_stem, resnet
from sogclr.distributed import data_parallel, device_names, launch, log, rank, require_same, set_seed, world_size
from sogclr.flags import Parser, add_shared_flags, non_defaults, number, resolve_precision
from sogclr.loader import EpochSampler, Loader, TwoViews, open_data_set
from sogclr.loss import ContrastiveLoss, GlobalContrastiveLoss, gamma_at
from sogclr.meters import AverageMeter, Progress
from sogclr.optimizer import LARS, lr_at, scaled_lr, set_lr

METHODS = {"dcl": "sogclr", "cl": "simclr"}
# What may change at a resume, but not without a word.
METHOD_FLAGS = ("batch_size", "epochs", "lr", "learning_rate_scaling", "momentum", "weight_decay", "warmup_epochs", "t",
                "gamma", "gamma_schedule", "gamma_decay_epochs", "crop_min", "augment", "image_size", "precision",
                "seed")


def build_parser():
    parser = Parser("SogCLR pretraining")
    groups = add_shared_flags(parser, batch_size=256, epochs=800, lr=0.075, weight_decay=1e-6)
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
    return parser


def run_name(args):
    """The run folder's name, made of the settings, so that the same command finds its own run again."""
    data = args.data_name if args.data_name != "folder" else f"folder-{Path(args.data or 'data/folder').resolve().name}"
    name = (f"{data}_{args.arch}_{METHODS[args.loss_type]}-{args.dim}-{args.mlp_dim}_bz_{args.batch_size}"
            f"_E{args.epochs}_WR{args.warmup_epochs}_lr_{args.lr:g}_{args.learning_rate_scaling}"
            f"_wd_{args.weight_decay:g}_t_{args.t:g}_g_{args.gamma:g}_m_{args.momentum:g}_{args.optimizer}")
    return name + non_defaults(PARSER, args, ("num_proj_layers", "crop_min", "stem", "image_size", "precision",
                                              "augment", "gamma_schedule", "gamma_decay_epochs", "seed"))


def main_worker(args, device):
    ranks = world_size()
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
    resume = checkpoint.open_run(folder, args.resume)
    saved = checkpoint.load(resume, "--resume") if resume else {}
    seed = set_seed(args, saved)

    # Data: uint8 crops from the workers; their colour is done on the device, on a GPU beside the step before.
    sampler = EpochSampler(num_images, args.batch_size, seed, shuffle=True, drop_last=True)
    recipe = None
    if args.augment == "pil":
        recipe = pil_recipe(data.image_size, args.crop_min, data.mean, data.std, data.blur)
    views = TwoViews(data, seed, args.crop_min, Augment.num_draws, args.bad_images, recipe)
    precision, dtype = resolve_precision(args.precision, device)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    augment = Augment(data.mean, data.std, data.blur, dtype, layout).to(device)
    loader = Loader(views, sampler, args.workers, device, augment)

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

    start_epoch = restore(saved, resume, args, model, criterion, optimizer, scaler) if resume else 0
    if args.start_epoch is not None:
        start_epoch = args.start_epoch
    require_same(start_epoch, "--resume: the first epoch, --save_dir must be one folder for all machines", device)
    writer = SummaryWriter(folder) if rank() == 0 else None

    log(f"=> {METHODS[args.loss_type]} on {args.data_name}: {num_images} images of {data.image_size} pixels, "
        f"{len(loader)} steps an epoch, epochs {start_epoch} to {args.epochs - 1}")
    log(f"=> {args.arch} with {stem} stem, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{precision}, seed {seed}, on {device_names(device)}")
    log(f"=> global batch {args.batch_size} ({args.batch_size // ranks} a rank), "
        f"peak learning rate {peak_lr:g}, run folder {folder}")

    if start_epoch >= args.epochs:
        log(f"=> nothing to do: {resume} has all {args.epochs} epochs")
        return
    if args.warmup_epochs >= args.epochs:
        log(f"=> the warm-up ({args.warmup_epochs} epochs) is as long as the run: the peak is not reached")

    net = data_parallel(model, device)
    for epoch in range(start_epoch, args.epochs):
        net.train()
        if args.gamma_schedule == "cosine":
            criterion.gamma = gamma_at(epoch, args.gamma, args.gamma_decay_epochs or max(args.epochs // 2, 1))
        losses, gcl = AverageMeter("Loss", ".4f"), AverageMeter("GCL", ".4f")
        progress = Progress(f"Epoch: [{epoch}]", len(loader), args.batch_size, (args.epochs - epoch) * len(loader))
        for step, (view1, view2, index) in enumerate(loader.epoch(epoch)):
            progress.loaded()
            lr = lr_at(epoch + step / len(loader), peak_lr, args.epochs, args.warmup_epochs)
            set_lr(optimizer, lr)

            with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
                z1, z2 = net(view1, view2)                              # [b, D] each
            loss = criterion(z1, z2, index)

            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            losses.update(loss.detach())
            progress.stepped()
            if step % args.print_freq == 0:
                diagnostics = criterion.diagnostics()
                gcl.update(diagnostics["gcl"])
                log(progress.line(step, [losses, gcl, f"LR {lr:.4g}"]))
                check_finite(losses, epoch, step, args)
                if writer:
                    scalars = {"loss": losses.value, **diagnostics, "learning rate": lr,
                               "images per second": progress.images_per_second}
                    for name, value in scalars.items():
                        writer.add_scalar(name, float(value), epoch * len(loader) + step)

        check_finite(losses, epoch, len(loader) - 1, args)      # before it can be saved
        if rank() == 0:
            state = {"epoch": epoch + 1, "arch": args.arch, "state_dict": checkpoint.with_module(model.state_dict()),
                     "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                     "seed": seed, "settings": vars(args)}
            if args.loss_type == "dcl":
                state |= {"u": criterion.u[:, None].float(), "log_u": criterion.log_u}
            checkpoint.save(state, folder / checkpoint.LAST)
            if epoch % 10 == 0 or epoch >= args.epochs - 3:
                checkpoint.save(state, folder / f"checkpoint_{epoch:04d}.pth.tar")
    if writer:
        writer.close()
    log(f"=> done: {folder / f'checkpoint_{args.epochs - 1:04d}.pth.tar'}")


def check_finite(losses, epoch, step, args):
    """Raise InputError, on all ranks alike, if a loss of this epoch was infinite or not a number."""
    if not math.isfinite(losses.average):
        raise InputError(f"--lr {args.lr:g}: the loss became {losses.average} in epoch {epoch} by step {step}; try a "
                         "smaller --lr, a longer --warmup-epochs or --precision fp32, and --resume auto to go on from "
                         "the last checkpoint")


def restore(saved, path, args, model, criterion, optimizer, scaler):
    """Put a checkpoint back into everything that training changes, and return the epoch to start with.

    saved: the checkpoint read from `path`. Raises InputError where it is of another architecture, data set or loss.
    """
    checkpoint.require(saved, path, "--resume", ("epoch", "arch", "state_dict", "optimizer", "scaler"))
    if saved["arch"] != args.arch:
        raise InputError(f"--resume {path}: was made with --arch {saved['arch']}, not {args.arch}")
    for name in ("loss_type", "optimizer"):     # the authors' files do not say
        made_with, asked = saved.get("settings", {}).get(name), getattr(args, name)
        if made_with not in (None, asked):
            raise InputError(f"--resume {path}: was made with --{name} {made_with}, not {asked}")
    if args.loss_type == "dcl":
        checkpoint.require(saved, path, "--resume", ("u",))
        if saved["u"].numel() != len(criterion.log_u):
            raise InputError(f"--resume {path}: was made on {saved['u'].numel()} images, "
                             f"but this data set holds {len(criterion.log_u)}")
        if "log_u" in saved:
            criterion.log_u.copy_(saved["log_u"])
        else:
            criterion.u = saved["u"]
    try:
        model.load_state_dict(checkpoint.without_module(saved["state_dict"]))
        optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"--resume {path}: was made with another model or optimizer: "
                         + " ".join(str(error).split())[:200]) from error
    for group in optimizer.param_groups:        # flags given now are followed
        group["weight_decay"] = args.weight_decay
        if "momentum" in group:
            group["momentum"] = args.momentum
    if saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    log(f"=> resumed {path} after {saved['epoch']} epochs")
    for name in METHOD_FLAGS:
        before, now = saved.get("settings", {}).get(name, getattr(args, name)), getattr(args, name)
        if before != now:
            log(f"=> changed since that checkpoint: {name} {before} -> {now}")
    return saved["epoch"]


PARSER = build_parser()

if __name__ == "__main__":
    launch(main_worker, PARSER.parse_args())
