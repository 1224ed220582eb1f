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
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification.devices import autocast_of, pick_device
from classification.images import STEP_SEED, FolderImages, check_images, seed_all, split_folder
from classification.options import parse
from classification.parts import build_loaders, build_loss, build_model, build_optimizer, build_scheduler
from classification.runlog import RunLog
from classification.validate import check_classes, evaluate
from natzoo import command_line
from natzoo.checkpoints import read_checkpoint, write_checkpoint

# Where things are and how they are shown does not matter to a run.
_PLACES = (
    "data",
    "config",
    "output",
    "experiment",
    "resume",
    "device",
    "threads",
    "workers",
    "log_interval",
    "compile",
)
# A run that goes on with another of these would not be the same run.
_KEPT_OPTIONS = ("seed", "opt", "batch_size", "grad_accum", "model_ema", "amp")
# What a resumed run takes from its options, not from the optimizer's state.
_HYPERPARAMETERS = ("lr", "initial_lr", "lr_scale", "weight_decay", "momentum", "betas", "eps")


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
        self.last = checkpoint_to_resume(args, self.folder)
        self.train_images = FolderImages(split_folder(args.data, args.train_split), None, transform=None)
        self.model, self.record = build_model(args, self.train_images.classes, self.device)
        check_classes(self.train_images, self.model, are_named=True)
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
        self.epoch, self.best, self.best_epoch = 0, -math.inf, 0
        if self.last is not None:
            self.load_state(self.last)
        self.forward = torch.compile(self.model) if args.compile else self.model
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = RunLog(self.folder, self.epoch, self.epoch * self.updates_per_epoch)

    # ----- checkpoints ------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Any]:
        """What best.pth holds: weights, and the record by which others build the model."""
        return {
            "model": self.model.state_dict(),
            "model_ema": None if self.ema is None else self.ema.module.state_dict(),
            "record": self.record,
            "epoch": self.epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
        }

    def state(self) -> dict[str, Any]:
        """What last.pth holds: all that a run needs to go on."""
        rest = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "options": vars(self.args),
        }
        return {**self.weights(), **rest}

    def load_state(self, path: Path) -> None:
        """Takes over a checkpoint of this run, made with the same options where they matter.

        Raises:
            ValueError: if it is of another model or other data, was made with other options, or lacks something.
        """
        state = read_checkpoint(path)
        missing = sorted(self.state().keys() - state.keys())
        if missing:
            raise ValueError(f"{path} cannot be resumed, it lacks {', '.join(missing)}: use --initial-checkpoint.")
        kept = {key: (state["record"].get(key), value) for key, value in self.record.items()}
        kept |= {key: (state["options"].get(key), getattr(self.args, key)) for key in _KEPT_OPTIONS}
        for key, (theirs, ours) in kept.items():
            if theirs != ours:
                raise ValueError(f"{path} cannot be resumed: its {key} is {theirs!r}, but this run's is {ours!r}.")
        for key, ours in vars(self.args).items():
            theirs = state["options"].get(key)
            if theirs != ours and key not in _PLACES:
                print(f"resumed with another {key}: {ours!r} instead of {theirs!r}")
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["model_ema"])
        ours = [{key: group[key] for key in _HYPERPARAMETERS if key in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, hyperparameters in zip(self.optimizer.param_groups, ours, strict=True):
            group.update(hyperparameters)
        self.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]
        if path.resolve().parent == self.folder.resolve():  # elsewhere the best weights are not this run's
            self.best, self.best_epoch = state["best"], state["best_epoch"]

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
            self.check_finite(figures["train_loss"], result["loss"])
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
            print(f"{len(bad)} training images could not be read; others stood in:", *bad, sep="\n  ")
        print(f"best top-1 {self.best:.2f}% after epoch {self.best_epoch}: {self.folder / 'best.pth'}")
        return self.best

    def train_epoch(self) -> dict[str, float]:
        """Sees every training image once, but for what is left of the last update, and returns the epoch's figures."""
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
        seed_all(self.args.seed, self.epoch, step, STEP_SEED)
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
        self.check_finite(loss)
        self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.2e}", images_per_s=f"{rate:.0f}")
        self.log.step(update, loss=loss, lr=lr, grad_norm=norm.item(), images_per_s=rate)

    def check_finite(self, *losses: float) -> None:
        """Raises ValueError if the run has diverged; what it saved is of the epoch before."""
        for loss in losses:
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} in epoch {self.epoch + 1}, and the epoch is not saved: lower --lr, and go on "
                    "with --resume or start again."
                )

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
            (self.epoch + 1) * self.updates_per_epoch - 1,
            epoch=self.epoch,
            val_loss=result["loss"],
            top1=result["top1"],
            top5=result["top5"],
            bad_images=len(self.train_images.bad_images()),
            **figures,
        )
        self.epoch += 1
        if is_best:
            write_checkpoint(self.folder / "best.pth", self.weights())
        write_checkpoint(self.folder / "last.pth", self.state())

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
# Starting
# ---------------------------------------------------------------------------------------------------------------------


def run_folder(args: argparse.Namespace) -> Path:
    """The run's folder."""
    return Path(args.output) / (args.experiment or (Path(args.config).stem if args.config else args.model))


def checkpoint_to_resume(args: argparse.Namespace, folder: Path) -> Path | None:
    """The checkpoint that --resume means, if any.

    Raises:
        ValueError: if the run's folder holds a run that --resume does not mean, which would be overwritten.
    """
    last = folder / "last.pth"
    if args.resume == "auto":
        return last if last.exists() else None
    chosen = None if args.resume is None else Path(args.resume)
    if last.exists() and (chosen is None or chosen.resolve().parent != folder.resolve()):
        raise ValueError(f"{last} is there already: go on with it by --resume, or give the run a new --experiment.")
    return chosen


def main(argv: list[str] | None = None) -> float:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    return Trainer(args).run()


if __name__ == "__main__":
    command_line.run(main)
