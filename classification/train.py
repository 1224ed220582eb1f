"""Train an image classifier, assembled from timm's parts.

    python classification/train.py DATA --config configs/quickstart/nat.yml
    python classification/train.py DATA --config configs/quickstart/nat.yml --lr 5e-4 --resume

Every random draw follows from the seed and from where it stands (epoch, step, image), so a run that is interrupted and
resumed ends as it would have ended: bit by bit, on a CPU with the same number of threads.
"""

from __future__ import annotations

import os

# Before torch starts its threads: beside loading processes, threads that wait by spinning cost more than they save.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from images import FolderImages, evaluation_loader, seed_all, split_folder, training_loader
from models import create_model, evaluation_transform, preprocessing
from options import parse
from runlog import RunLog
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from validate import autocast_of, check_classes, check_images, evaluate, pick_device

from natzoo import command_line
from natzoo.checkpoints import load_weights, read_checkpoint, write_checkpoint

_MODEL_SEED, _STEP_SEED = 1, 2  # keep the streams of random numbers apart


class Trainer:
    """A run: its model, data and optimizer, and how far it has come.

    Args:
        args: the options of options.py.

    Raises:
        ValueError, FileNotFoundError: saying which option or which file is wrong.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = pick_device(args.device)
        self.autocast = autocast_of(args.amp, self.device)
        self.folder = run_folder(args)
        self.train_images = FolderImages(split_folder(args.data, args.train_split), None, transform=None)
        self.model, self.record = build_model(args, self.train_images.classes, self.device)
        check_classes(self.train_images, self.model)
        self.train_loader, self.val_loader = build_loaders(args, self.train_images, self.record, self.device)
        self.updates_per_epoch = len(self.train_loader) // args.grad_accum
        if self.updates_per_epoch == 0:
            batches = len(self.train_loader)
            raise ValueError(f"an epoch has {batches} batches, fewer than --grad-accum {args.grad_accum}: lower that.")
        self.mixup, self.criterion = build_loss(args, self.record["num_classes"])
        self.optimizer = build_optimizer(args, self.model)
        self.scheduler, self.epochs = build_scheduler(args, self.optimizer, self.updates_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.ema = ModelEmaV3(self.model, decay=args.model_ema_decay) if args.model_ema else None
        self.epoch, self.best, self.best_epoch = 0, -math.inf, -1
        self.resume()
        self.forward = torch.compile(self.model) if args.compile else self.model
        self.log = RunLog(self.folder, self.epoch, self.epoch * self.updates_per_epoch)

    # ----- checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on, and the record by which others build the model."""
        return {
            "model": self.model.state_dict(),
            "model_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "record": self.record,
            "epoch": self.epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
        }

    def resume(self) -> None:
        """Goes on from the checkpoint that --resume means; without it, refuses to overwrite a run."""
        last = self.folder / "last.pth"
        if self.args.resume is None and last.exists():
            raise ValueError(f"{last} is there already: go on with it by --resume, or give the run a new --experiment.")
        if self.args.resume == "auto" and last.exists():
            self.load_state(last)
        elif self.args.resume not in (None, "auto"):
            self.load_state(Path(self.args.resume))

    def load_state(self, path: Path) -> None:
        """Takes over a checkpoint of a run like this one.

        Raises:
            ValueError: if it is of another model or lacks what a run needs.
        """
        state = read_checkpoint(path)
        missing = sorted(self.state().keys() - state.keys())
        if missing:
            raise ValueError(f"{path} cannot be resumed, it lacks {', '.join(missing)}: use --initial-checkpoint.")
        for key in ("model", "model_kwargs", "num_classes"):
            theirs, ours = state["record"][key], self.record[key]
            if theirs != ours:
                raise ValueError(f"{path} cannot be resumed: its {key} is {theirs!r}, but this run's is {ours!r}.")
        if self.ema is not None and state["model_ema"] is None:
            raise ValueError(f"{path} cannot be resumed with --model-ema: it was written without.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["model_ema"])
        self.epoch, self.best, self.best_epoch = state["epoch"], state["best"], state["best_epoch"]

    # ----- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> float:
        """Trains to the last epoch and returns the best top-1 accuracy in percent."""
        print(self.describe())
        total, done = self.epochs * self.updates_per_epoch, self.epoch * self.updates_per_epoch
        self.bar = tqdm(total=total, initial=done, unit="update", disable=None, dynamic_ncols=True)
        started, first = time.perf_counter(), self.epoch
        while self.epoch < self.epochs:
            figures = self.train_epoch()
            result = self.evaluate()
            self.finish_epoch(figures, result)
            left = (time.perf_counter() - started) / (self.epoch - first) * (self.epochs - self.epoch)
            tqdm.write(
                f"epoch {self.epoch}/{self.epochs}  loss {figures['train_loss']:.4f}  val loss {result['loss']:.4f}  "
                f"top-1 {result['top1']:.2f}%  lr {figures['lr']:.2e}  {figures['images_per_s']:.0f} images/s  "
                f"{left / 60:.1f} min left"
            )
        self.bar.close()
        self.log.close()
        bad = self.train_images.bad_images()
        if bad:
            print(f"{len(bad)} training images could not be read and were left out:", *bad, sep="\n  ")
        print(f"best top-1 {self.best:.2f}% after epoch {self.best_epoch}: {self.folder / 'best.pth'}")
        return self.best

    def train_epoch(self) -> dict[str, float]:
        """Sees every training image once and returns the epoch's figures."""
        self.model.train()
        self.train_loader.sampler.epoch = self.epoch
        self.bar.set_description(f"epoch {self.epoch + 1}/{self.epochs}")
        losses, norms, start = [], [], time.perf_counter()
        batches = iter(self.train_loader)
        for index in range(self.updates_per_epoch):
            update = self.epoch * self.updates_per_epoch + index
            if self.scheduler is not None:
                self.scheduler.step_update(update)
            for part in range(self.args.grad_accum):
                losses.append(self.backward(*next(batches), step=index * self.args.grad_accum + part))
            norms.append(self.update_weights())
            if self.ema is not None:
                self.ema.update(self.model, step=update)
            self.bar.update()
            if update % self.args.log_interval == 0:  # reading a loss makes a GPU wait
                self.show(update, losses, norms[-1], (index + 1) / (time.perf_counter() - start))
        seconds = time.perf_counter() - start
        return {
            "train_loss": torch.stack(losses).mean().item(),
            "grad_norm": torch.stack(norms).mean().item(),
            "lr": self.learning_rate(),
            "images_per_s": self.updates_per_epoch * self.images_per_update() / seconds,
            "seconds": seconds,
        }

    def backward(self, x_BCHW: Tensor, target_B: Tensor, step: int) -> Tensor:
        """Adds a batch's gradient; returns its loss."""
        check_images(self.train_images, self.args.skip_bad_images)
        seed_all(self.args.seed, self.epoch, step, _STEP_SEED)
        memory_format = torch.channels_last if self.args.channels_last else torch.contiguous_format
        x_BCHW = x_BCHW.to(self.device, non_blocking=True, memory_format=memory_format)
        target_B = target_B.to(self.device, non_blocking=True)
        if self.mixup is not None:
            x_BCHW, target_B = self.mixup(x_BCHW, target_B)
        with self.autocast():
            loss = self.criterion(self.forward(x_BCHW), target_B)
        self.scaler.scale(loss / self.args.grad_accum).backward()
        return loss.detach()

    def update_weights(self) -> Tensor:
        """One step of the optimizer on the gradients gathered; returns their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def show(self, update: int, losses: list[Tensor], norm: Tensor, updates_per_s: float) -> None:
        """Figures of the last update on the progress bar and in TensorBoard."""
        loss, lr, rate = losses[-1].item(), self.learning_rate(), updates_per_s * self.images_per_update()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} in epoch {self.epoch + 1}, update {update}: lower --lr or raise --warmup-epochs, "
                "and go on from the last epoch with --resume."
            )
        self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.2e}", images_per_s=f"{rate:.0f}")
        self.log.step(update, loss=loss, lr=lr, grad_norm=norm.item(), images_per_s=rate)

    def evaluate(self) -> dict[str, float]:
        """Accuracy of the averaged weights if there are any, else of the weights, on the validation images."""
        model = self.model if self.ema is None else self.ema.module
        return evaluate(model, self.val_loader, self.device, self.autocast, self.args.skip_bad_images)

    def finish_epoch(self, figures: dict[str, float], result: dict[str, float]) -> None:
        """Counts the epoch as done: first in the log, then in last.pth, from which a resumed run goes on."""
        is_best = result["top1"] > self.best
        if is_best:
            self.best, self.best_epoch = result["top1"], self.epoch + 1
        self.log.epoch(
            (self.epoch + 1) * self.updates_per_epoch,
            epoch=self.epoch,
            val_loss=result["loss"],
            top1=result["top1"],
            top5=result["top5"],
            bad_images=len(self.train_images.bad_images()),
            **figures,
        )
        self.epoch += 1
        state = self.state()
        if is_best:
            write_checkpoint(self.folder / "best.pth", state)
        write_checkpoint(self.folder / "last.pth", state)

    def learning_rate(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def images_per_update(self) -> int:
        return self.args.batch_size * self.args.grad_accum

    def describe(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        return (
            f"{self.args.model}: {parameters / 1e6:.2f}M parameters; {len(self.train_images)} images of "
            f"{len(self.train_images.classes)} classes; {self.images_per_update()} images an update, "
            f"{self.updates_per_epoch} updates an epoch, {self.epochs} epochs; writes to {self.folder}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def run_folder(args: argparse.Namespace) -> Path:
    """The run's folder, made if it is not there."""
    name = args.experiment or (Path(args.config).stem if args.config else args.model)
    folder = Path(args.output) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build_model(args: argparse.Namespace, classes: list[str], device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """The model on its device, and the record by which validate.py and predict.py build it again."""
    seed_all(args.seed, _MODEL_SEED)
    num_classes = args.num_classes or len(classes)
    extra = {"drop_path_rate": args.drop_path, "pretrained": args.pretrained or None}
    model = create_model(args.model, num_classes, **args.model_kwargs, **extra)
    if args.initial_checkpoint:
        load_weights(model, args.initial_checkpoint)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    record = {
        "model": args.model,
        "model_kwargs": args.model_kwargs,
        "num_classes": num_classes,
        "classes": classes,
        "preprocessing": preprocessing(args, model),
    }
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    return model.to(device, memory_format=memory_format), record


def build_loaders(
    args: argparse.Namespace, train: FolderImages, record: dict[str, Any], device: torch.device
) -> tuple[DataLoader, DataLoader]:
    """The loaders of training and of validation batches."""
    config = record["preprocessing"]
    train.transform = create_transform(
        config["input_size"],
        is_training=True,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=None if args.aa == "none" else args.aa,
        interpolation=args.train_interpolation,
        mean=config["mean"],
        std=config["std"],
        re_prob=args.reprob,
        re_mode=args.remode,
    )
    val_folder = split_folder(args.data, args.val_split)
    val = FolderImages(val_folder, train.classes, evaluation_transform(config), replace=False)
    pin_memory = device.type == "cuda"
    return (
        training_loader(train, args.batch_size, args.workers, args.seed, pin_memory),
        evaluation_loader(val, args.val_batch_size or args.batch_size, args.workers, pin_memory),
    )


def build_loss(args: argparse.Namespace, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """Mixup, if any of it is on, and the loss that goes with it."""
    if args.mixup <= 0 and args.cutmix <= 0:
        return None, nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    if args.batch_size % 2:
        raise ValueError(f"--batch-size is {args.batch_size}, but mixup pairs images: make it even.")
    mixup = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
    return mixup, SoftTargetCrossEntropy()


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Any of timm's optimizers; parameters of one axis and those in model.no_weight_decay() are not decayed."""
    extra = {"eps": args.opt_eps, "betas": args.opt_betas, "layer_decay": args.layer_decay}
    extra = {key: value for key, value in extra.items() if value is not None}
    try:
        return create_optimizer_v2(model, args.opt, args.lr, args.weight_decay, args.momentum, **extra)
    except (AssertionError, TypeError) as error:
        raise ValueError(f"the optimizer {args.opt!r} cannot be made with these options: {error}.") from error


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int):
    """The scheduler of each update's learning rate, or None, and the number of epochs with the cooldown."""
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        cooldown_epochs=args.cooldown_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler, epochs


def main(argv: list[str] | None = None) -> float:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    return Trainer(args).run()


if __name__ == "__main__":
    command_line.run(main)
