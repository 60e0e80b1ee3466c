#!/usr/bin/env python3
"""Self-supervised pretraining of a ResNet with SogCLR (arXiv 2202.12387), iSogCLR (2305.11965), or SimCLR.

One machine, all its GPUs, the paper's ImageNet-1K recipe (the defaults):
    python train.py --data DIR

One GPU, or none, on generated images:
    python train.py --data_name shapes --arch resnet18 --stem imagenet --epochs 40

Two machines of 8 GPUs:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py --data DIR
"""

import itertools
import math
import os
import resource
import sys
import time
from pathlib import Path

import torch

from sogclr import InputError, checkpoint, report
from sogclr.augment import Augment, pil_recipe
from sogclr.builder import SimCLR, choose_stem, memory_format, resnet
from sogclr.datasets import open_data_set, open_train_and_val
from sogclr.distributed import broadcast_int, log, world_size
from sogclr.flags import Parser, add_shared_flags, data_label, non_defaults, number, refuse, resolve_precision
from sogclr.isogclr import RobustGlobalContrastiveLoss
from sogclr.launch import launch, nothing_to_save
from sogclr.loader import Loader, TwoViewBatches, check_batch_size
from sogclr.loss import ContrastiveLoss, GlobalContrastiveLoss, gamma_at
from sogclr.meters import AverageMeter, NanGuard, Progress
from sogclr.monitor import FeatureMonitor, show_extremes, show_histograms, side_by_side, watched
from sogclr.optimizer import LARS, lr_at, scaled_lr, set_lr
from sogclr.parallel import data_parallel
from sogclr.run import Run, file_name

DRY_STEPS, DRY_SECONDS = 12, 60     # what --dry-run measures at least, unless its time is up; it does two steps anyway
METHODS = {"dcl": "sogclr", "cl": "simclr", "isogclr": "isogclr"}      # --loss_type: name of the method
GAMMA_FLAGS = ("gamma", "gamma_schedule", "gamma_decay_epochs")        # of dcl and isogclr
ISOGCLR_FLAGS = ("rho", "t_min", "t_max", "t_lr", "t_beta")
CHECKPOINT_KEYS = ("epoch", "arch", "state_dict", "optimizer", "scaler")     # and u, except with cl
# Settings that a resumed run must share with its checkpoint, since they change the results.
RESUME_FLAGS = ("data_name", "arch", "stem", "dim", "mlp_dim", "num_proj_layers", "loss_type", "t",
                *GAMMA_FLAGS, "image_size", "crop_min", "augment", "optimizer", "batch_size", "loss_batch_size",
                "epochs", "lr", "learning_rate_scaling", "momentum", "weight_decay", "warmup_epochs", "precision",
                "seed", *ISOGCLR_FLAGS)


def build_parser():
    parser = Parser("SogCLR pretraining")
    groups = add_shared_flags(
        parser, batch_size=256, epochs=800, lr=0.075, weight_decay=1e-6, momentum_of="LARS",
        lr_help="base learning rate, multiplied by sqrt(batch size) or as set by --learning-rate-scaling")
    optim, model, run = groups["optimization"], groups["model"], groups["run"]
    optim.add_argument("--learning-rate-scaling", default="sqrt", choices=("sqrt", "linear"),
                       help="peak learning rate: sqrt is lr * sqrt(B), linear is lr * B / 256")
    optim.add_argument("--warmup-epochs", default=10, type=number(int, "[0, inf)"), metavar="N",
                       help="epochs of linear learning rate warm-up from 0")
    optim.add_argument("--optimizer", default="lars", choices=("lars", "adamw"),
                       help="optimizer; the default --lr is for lars, adamw needs a much smaller one")
    model.add_argument("--dim", default=128, type=number(int, "[1, inf)"), help="dimension of the projections")
    model.add_argument("--mlp-dim", default=2048, type=number(int, "[1, inf)"),
                       help="width of the projection head's hidden layers")
    model.add_argument("--num_proj_layers", default=2, type=number(int, "[1, inf)"), metavar="N",
                       help="linear layers in the projection head")

    method = parser.add_argument_group("method")
    method.add_argument("--loss_type", default="dcl", choices=tuple(METHODS),
                        help="dcl is SogCLR's global (dynamic) contrastive loss, isogclr the robust one of iSogCLR, "
                             "which learns a temperature for each image, cl is SimCLR's")
    method.add_argument("--t", default=0.1, type=number(float, "(0, inf)"), metavar="T",
                        help="temperature; with isogclr, the one that all images start from")
    method.add_argument("--loss-batch-size", type=number(int, "[2, inf)"), metavar="N",
                        help="cut each batch into groups of N images for the loss, which takes negatives only from an "
                             "image's own group, while BatchNorm, steps and learning rate are those of --batch-size, "
                             "which N must divide (default: --batch-size)")
    method.add_argument("--gamma", default=0.9, type=number(float, "(0, 1]"),
                        help="weight of the new value in the moving averages u of dcl and isogclr")
    method.add_argument("--gamma-schedule", default="constant", choices=("constant", "cosine"),
                        help="cosine decays gamma from 1 to --gamma over --gamma-decay-epochs, then holds it")
    method.add_argument("--gamma-decay-epochs", type=number(int, "[1, inf)"), metavar="N",
                        help="length of --gamma-schedule cosine (default: half of --epochs)")
    method.add_argument("--rho", default=0.3, type=number(float, "[0, inf)"),
                        help="isogclr: an image's temperature rises while the softmax over its negatives is more than "
                             "this from uniform, in nats (KL divergence), and falls while it is less")
    method.add_argument("--t-min", default=0.05, type=number(float, "[0.001, 1000]"), metavar="T",
                        help="isogclr: the lowest temperature")
    method.add_argument("--t-max", default=0.7, type=number(float, "[0.001, 1000]"), metavar="T",
                        help="isogclr: the highest temperature")
    method.add_argument("--t-lr", default=0.01, type=number(float, "[0, inf)"), metavar="LR",
                        help="isogclr: learning rate of the temperatures")
    method.add_argument("--t-beta", default=0.9, type=number(float, "(0, 1]"), metavar="BETA",
                        help="isogclr: weight of the new value in the moving averages of the temperatures' gradients")
    method.add_argument("--crop-min", default=0.08, type=number(float, "(0, 1]"), metavar="FRACTION",
                        help="minimum crop area as a fraction of the image")
    method.add_argument("--augment", default="batched", choices=("batched", "pil"),
                        help="where color augmentation runs: in batches on the device, or per image in the workers, "
                             "as in the authors' code (slower on a GPU, for comparison)")
    run.add_argument("--save-freq", default=10, type=number(int, "[1, inf)"), metavar="N",
                     help="keep the checkpoint of every N-th epoch and of the last three")
    run.add_argument("--dry-run", action="store_true",
                     help="run a few steps on the data, report the full run's time, memory and disk usage, and stop; "
                          "starts from fresh weights and writes nothing")
    run.add_argument("--knn-freq", default=0, type=number(int, "[0, inf)"), metavar="N",
                     help="report the encoder's kNN accuracy every N epochs, which needs labeled images in DIR/train "
                          "and DIR/val and does not affect the run; 0 is never")
    run.add_argument("--rank-freq", default=0, type=number(int, "[0, inf)"), metavar="N",
                     help="report the effective rank of the encoder's features every N epochs, which needs no labels "
                          "and does not affect the run; 0 is only with --knn-freq and at the end")
    return parser


def run_name(args):
    """The run folder's name, built from the settings, so that the same command finds its run again."""
    name = (f"{data_label(args)}_{args.arch}_{METHODS[args.loss_type]}-{args.dim}-{args.mlp_dim}_bz_{args.batch_size}"
            f"_E{args.epochs}_WR{args.warmup_epochs}_lr_{args.lr:g}_{args.learning_rate_scaling}"
            f"_wd_{args.weight_decay:g}_t_{args.t:g}_g_{args.gamma:g}_m_{args.momentum:g}_{args.optimizer}")
    name += non_defaults(PARSER, args, ("num_proj_layers", "crop_min", "stem", "image_size", "precision", "augment",
                                        *["loss_batch_size"] * (args.loss_batch_size != args.batch_size),
                                        "gamma_schedule", "gamma_decay_epochs", *ISOGCLR_FLAGS, "seed"))
    return file_name(name, 255 - len("linear_eval_"))       # which lincls.py puts before it


def main_worker(args, device):
    check_flags(args)
    if args.dry_run:
        nothing_to_save()
    # Data: the workers make two uint8 crops per image, and color augmentation runs on the device.
    data = open_data_set(args.data_name, args.data, "train", args.image_size, labels=args.data_name != "folder")
    check_batch_size(args.batch_size, len(data.images))
    run = Run(args, Path(args.save_dir) / run_name(args), CHECKPOINT_KEYS, "" if args.dry_run else args.resume,
              write=not args.dry_run)
    precision, dtype = resolve_precision(args.precision, device)
    layout = memory_format(device, dtype)
    augment = Augment(data.mean, data.std, data.blur, dtype, layout).to(device)
    recipe = pil_recipe(data, args.crop_min) if args.augment == "pil" else None     # augment leaves its views unchanged
    views = TwoViewBatches(data, run.seed, args.crop_min, Augment.num_uniforms, args.bad_images, recipe)
    loader = Loader(views, args.batch_size, args.workers, device, keep_workers=True,
                    seed=run.seed, shuffle=True, drop_last=True)
    monitor = FeatureMonitor(data, labeled_sets(args, data), args, device, dtype)

    # Model, loss, optimizer
    stem = choose_stem(args.stem, data.image_size)
    encoder = resnet(args.arch, stem, zero_init_residual=True)
    model = SimCLR(encoder, args.dim, args.mlp_dim, args.num_proj_layers).to(device, memory_format=layout)
    criterion = make_criterion(args, len(data.images)).to(device)
    peak_lr = scaled_lr(args.lr, args.batch_size, args.learning_rate_scaling)
    optimizer = make_optimizer(args, model)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")     # bf16 and fp32 need none

    # The run: it resumes from its checkpoint, if any, and keeps a record.
    settings = vars(args) | {"seed": run.seed, "precision": precision, "stem": stem, "image_size": data.image_size,
                             "loss_batch_size": args.loss_batch_size or args.batch_size,
                             "gamma_decay_epochs": args.gamma_decay_epochs or max(args.epochs // 2, 1),
                             "images": data.fingerprint}
    if args.loss_type != "isogclr":
        settings |= dict.fromkeys(ISOGCLR_FLAGS)
    if run.made_with:       # by an earlier version, whose loss always saw the whole batch
        run.made_with.setdefault("loss_batch_size", run.made_with.get("batch_size"))
    guard = NanGuard(device, f"--lr {args.lr:g}: try a smaller one, a longer --warmup-epochs or --precision fp32")
    state = TrainingState(model, criterion, optimizer, scaler, guard)
    run.restore(state, settings, PARSER, RESUME_FLAGS)
    if run.start_epoch >= args.epochs:
        log(f"=> nothing to do: {run.resume} already has all {args.epochs} epochs")
        return
    describe(run, data, model, len(loader), peak_lr, device)
    record = {"command": sys.argv, "settings": settings, **report.environment_info(device)}
    steps, print_freq, skip, measured = len(loader), args.print_freq, 1, {}
    if args.dry_run:
        skip, print_freq = loader.ahead + 1, steps + 1      # printing would make the host wait for a GPU
        loader = FirstBatches(loader, skip + max(DRY_STEPS, loader.ahead))      # workers may deliver in bursts
    else:
        report.write_json(run.folder / "settings.json", record)

    net = data_parallel(model, device)
    with run:       # writes its checkpoints in the background until it exits
        events = run.events(run.start_epoch * steps + run.start_step)
        for epoch in range(run.start_epoch, args.epochs):
            net.train()
            if args.loss_type != "cl" and args.gamma_schedule == "cosine":
                criterion.gamma = gamma_at(epoch, args.gamma, settings["gamma_decay_epochs"])
            losses, gcl = AverageMeter("Loss", ".4f"), AverageMeter("GCL", ".4f")
            progress = Progress(loader, epoch, run.first_step(epoch), args.epochs, args.batch_size, skip)
            for step, (crops, uniforms, index) in progress:     # [2, b, 3, H, W] uint8, [2, b, U], [b]
                lr = lr_at(epoch + step / steps, peak_lr, args.epochs, args.warmup_epochs)
                set_lr(optimizer, lr)

                images1, images2 = augment(crops, uniforms)                     # [b, 3, H, W] each
                with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
                    z1, z2 = net(images1, images2)                              # [b, D] each
                loss = criterion(z1, z2, index)
                guard.check(loss, criterion.keys, f"epoch {epoch}, step {step}")
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

                losses.update(loss.detach())
                gcl.update(criterion.gcl())
                progress.step_done()
                if step % print_freq == 0:
                    log(progress.line(losses, gcl, f"LR {lr:.4g}"), live=progress.live)
                    events.scalars(watched(criterion, losses, gcl, lr, progress), epoch * steps + step)
                if (epoch, step) == (run.start_epoch, run.start_step):
                    events.write("add_image", "views", side_by_side(augment, images1, images2), epoch * steps + step)
                run.after_step(epoch, step, steps)      # saves if due; after a signal, saves and stops
            if args.dry_run:
                break

            log(progress.summary(losses, gcl))
            run.after_epoch(epoch, f"checkpoint_{epoch:04d}.pth.tar" if checkpoint_is_kept(args, epoch) else None)
            show_histograms(events, criterion, steps, (epoch + 1) * steps)
            if measured := monitor(model.base_encoder, epoch):                  # {"effective_rank": number, ...}
                log(f" * Epoch {epoch} " + " ".join(f"{name} {value:.1f}" for name, value in measured.items()))
                events.scalars({f"features/{name}": value for name, value in measured.items()}, (epoch + 1) * steps)
            run.stop_if_asked(epoch)
        show_extremes(events, criterion, data, args.epochs * steps)
    if args.dry_run:
        log(dry_run_report(args, progress, state, device))
        return
    report.write_json(run.folder / "results.json", {
        "loss": losses.average, "gcl": gcl.average, **measured, "first_epoch": run.start_epoch,
        "seconds": state.seconds(), **record})
    log(f"=> done: {run.folder / f'checkpoint_{args.epochs - 1:04d}.pth.tar'}")


def check_flags(args):
    """Raise InputError if the flags of the loss contradict each other, or if those of one are given for another."""
    given = [name for name in ISOGCLR_FLAGS if getattr(args, name) != PARSER.get_default(name)]
    isogclr = args.loss_type == "isogclr"
    refuse((args.batch_size % (args.loss_batch_size or 1),
            f"--loss-batch-size {args.loss_batch_size}: must divide --batch-size {args.batch_size}"),
           (not isogclr and given, f"{', '.join(map(PARSER.flag, given))}: needs --loss_type isogclr, pass that too"),
           (args.t_min > args.t_max, f"--t-min {args.t_min:g}: must not be above --t-max {args.t_max:g}"),
           (isogclr and not args.t_min <= args.t <= args.t_max,
            f"--t {args.t:g}: must be in --t-min to --t-max, {args.t_min:g} to {args.t_max:g}"))


def make_criterion(args, num_images):
    """Create the loss of --loss_type."""
    if args.loss_type == "cl":
        criterion = ContrastiveLoss(args.t)
    elif args.loss_type == "dcl":
        criterion = GlobalContrastiveLoss(num_images, args.t, args.gamma)
    else:
        criterion = RobustGlobalContrastiveLoss(num_images, args.t, args.gamma, args.rho, args.t_min, args.t_max,
                                                args.t_lr, args.t_beta)
    criterion.group_size = args.loss_batch_size
    return criterion


def make_optimizer(args, model):
    """Create LARS or AdamW; the learning rate is set at each step."""
    if args.optimizer == "lars":
        return LARS(model.parameters(), args.lr, weight_decay=args.weight_decay, momentum=args.momentum)
    return torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)


class TrainingState:
    """The state of training, which `Run` saves, restores, and checks before saving."""

    def __init__(self, model, criterion, optimizer, scaler, guard):
        self.model, self.criterion, self.optimizer, self.scaler, self.guard = model, criterion, optimizer, scaler, guard
        self.started, self.seconds_before = time.perf_counter(), 0.0

    def seconds(self):
        """The run's duration over all its starts, excluding work lost between a save and a kill; None if its checkpoint
        does not record it.
        """
        before = self.seconds_before
        return None if before is None else round(before + time.perf_counter() - self.started, 1)

    def saved(self):
        saved = {"state_dict": checkpoint.add_ddp_prefix(self.model.state_dict()),
                 "optimizer": self.optimizer.state_dict(),
                 # The authors' code always resumes a scaler: if ours is off, it gets the state of a fresh one.
                 "scaler": self.scaler.state_dict() or torch.amp.GradScaler("cpu").state_dict(),
                 "seconds": self.seconds()}
        if isinstance(self.criterion, GlobalContrastiveLoss):       # u for the authors' code, the rest for ours
            saved |= {"u": self.criterion.u[:, None].float(), **self.criterion.state_dict()}
        return saved

    def restore(self, saved, source):
        """Raises InputError if the checkpoint has a different architecture, data set or loss."""
        if isinstance(self.criterion, GlobalContrastiveLoss):
            checkpoint.require(saved, source, ("u",))
            rows, images = saved["u"].numel(), len(self.criterion.log_u)
            # The authors keep an extra last row, which no image uses.
            if rows not in ((images,) if "log_u" in saved else (images, images + 1)):
                raise InputError(f"{source}: was trained on {rows} images, but this data set has {images}, use the "
                                 "same folder, or start a new run")
            self.criterion.u = saved["u"].flatten()[:images]        # for the authors' files, without the rest
        estimators = {name: saved.get(name, tensor) for name, tensor in self.criterion.state_dict().items()}
        checkpoint.restore_parts(
            saved | {"state_dict": checkpoint.plain_names(saved["state_dict"]), "criterion": estimators}, source,
            state_dict=self.model, criterion=self.criterion, optimizer=self.optimizer, scaler=self.scaler)
        self.seconds_before = saved.get("seconds")

    def check_finite(self, place):
        self.guard.check_weights(self.model, place)


def describe(run, data, model, steps, peak_lr, device):
    """Log what the run is about to do."""
    args, settings, ranks = run.args, run.settings, world_size()
    where = args.data_name + (f" in {os.fsdecode(data.images.root)}" if hasattr(data.images, "root") else "")
    log(f"=> {METHODS[args.loss_type]} on {len(data.images)} images of {data.image_size} pixels ({where}), {steps} "
        f"steps per epoch, epochs {run.start_epoch} to {args.epochs - 1}")
    log(f"=> {args.arch} with {settings['stem']} stem, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M "
        f"parameters, {settings['precision']}, seed {run.seed}, on {report.device_names(device)}")
    log(f"=> global batch {args.batch_size} ({args.batch_size // ranks} per rank), "
        f"peak learning rate {peak_lr:g}, run folder {run.folder}")
    log("=> config: " + ", ".join(f"{name} {settings[name]}" for name in RESUME_FLAGS if settings[name] is not None))
    if args.warmup_epochs >= args.epochs:
        log(f"=> --warmup-epochs {args.warmup_epochs}: not below --epochs, so the peak is not reached")
    most = math.log(2 * (settings["loss_batch_size"] - 1))
    if args.loss_type == "isogclr" and args.rho >= most:
        log(f"=> --rho {args.rho:g}: not below log(2 (B - 1)) = {most:.2f}, so all temperatures fall towards --t-min")
    if args.dry_run:
        log(f"=> dry run: measures some steps, in about {DRY_SECONDS} seconds at most, and writes nothing")


def checkpoint_is_kept(args, epoch):
    """Whether the checkpoint after an epoch is kept: every --save-freq-th, and the last three."""
    return epoch % args.save_freq == 0 or epoch >= args.epochs - 3


def labeled_sets(args, data):
    """For --knn-freq, the training and validation images with labels. Raises InputError if they have none."""
    if not args.knn_freq:
        return None
    try:
        # A folder's images were listed without classes, in an order that must not change.
        train = data if args.data_name != "folder" else None
        return open_train_and_val(args.data_name, args.data, args.image_size, train)
    except InputError as error:
        raise InputError(f"--knn-freq {args.knn_freq}: needs labeled images, leave the flag out if there are none; "
                         f"{error}") from error


class FirstBatches:
    """For --dry-run: the first `most` batches of a loader, fewer if time is up; the very first one twice."""

    def __init__(self, loader, most):
        self.loader, self.most = loader, most

    def __len__(self):
        return len(self.loader)

    def epoch(self, epoch, first_step):
        start = time.perf_counter()
        # The first step takes longer, and workers that get ahead meanwhile would seem faster than they are: start anew.
        first = itertools.islice(self.loader.epoch(epoch, first_step), 1)
        for steps, batch in enumerate(itertools.chain(first, self.loader.epoch(epoch, first_step)), 1):
            yield batch
            if broadcast_int(steps == self.most or (steps > 1 and time.perf_counter() - start > DRY_SECONDS)):
                return


def dry_run_report(args, progress, state, device):
    """One line that estimates the full run's time, memory and disk usage from its first steps and checkpoint size."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        memory = (f"{torch.cuda.max_memory_reserved() / 2**30:.1f} of "
                  f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB per GPU")
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB excluding workers"
    hours = args.epochs * progress.steps * progress.seconds_per_step / 3600
    duration = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    kept = 2 + sum(checkpoint_is_kept(args, epoch) for epoch in range(args.epochs))      # 2: _last and _previous
    disk = kept * checkpoint.size(state.saved()) / 2**30
    return (f"=> {args.epochs} epoch{'s' * (args.epochs > 1)} will take about {duration} "
            f"({progress.images_per_second:.0f} images/s, {progress.waiting}), memory {memory}, and {disk:.1f} GiB in "
            f"{args.save_dir} for {kept} checkpoints; dry run: nothing was written")


PARSER = build_parser()

if __name__ == "__main__":
    launch(main_worker, PARSER.parse_args())
