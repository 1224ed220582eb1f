"""Train an image classifier, assembled from timm's parts.

    python classification/train.py DATA --config configs/quickstart/nat.yml
    python classification/train.py DATA --config configs/quickstart/nat.yml --lr 5e-4 --resume
    bash classification/dist_train.sh 8 configs/classification/nat_mini.yml IMAGENET

Every random draw follows from the seed and from where it stands (epoch, step, image), so a run that is interrupted and
resumed ends as it would have ended: bit by bit, on a CPU with the same number of threads, with one or two processes. Of
more the gradients are summed in an order settled after the first step of each start, so the last bits may differ.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from tqdm import tqdm

from natzoo.classification.checkpoints import CheckpointSaver, check_same_run, load_resume_state, run_folder
from natzoo.classification.data.datasets import STEP_SEED, check_bad_images, gather_bad_images, seed_all
from natzoo.classification.data.loader import (
    create_evaluation_loader,
    create_training_dataset,
    create_training_loader,
    create_validation_dataset,
    iterate_epoch,
)
from natzoo.classification.device import autocast_context, enable_tf32, explain_memory_errors, pick_device
from natzoo.classification.distributed import World, init_world, kernel_fingerprint
from natzoo.classification.evaluation import check_classes, evaluate
from natzoo.classification.factory import (
    create_loss,
    create_optimizer,
    create_scheduler,
    create_training_model,
    peak_lr,
)
from natzoo.classification.logger import RunLogger
from natzoo.classification.options import parse
from natzoo.classification.signals import Interrupted, SignalHandler

# What a resumed run takes from its options, not from the optimizer's state.
_HYPERPARAMETERS = ("lr", "initial_lr", "lr_scale", "weight_decay", "momentum", "betas", "eps")
# The sums of an epoch before its first update, and how many are in them: updates that are skipped are not, nor is an
# infinite norm, which with fp16 may go with a finite loss.
_NOTHING = {"loss": 0.0, "losses": 0, "norm": 0.0, "norms": 0, "seconds": 0.0}


class Trainer:
    """A run: its model, data and optimizer, and how far it has come.

    Args:
        args: the options of options.py.
        world: the processes of the run; each makes its own Trainer.
        signal_handler: notes the signals on which the run saves and leaves.

    Raises:
        ValueError, FileNotFoundError: saying which option or which file is wrong.
    """

    def __init__(
        self, args: argparse.Namespace, world: World | None = None, signal_handler: SignalHandler | None = None
    ):
        self.args = args
        self.world = world or World()
        self.signal_handler = signal_handler or SignalHandler()
        self.device = pick_device(args.device)
        enable_tf32(self.device)
        installation = "use the same installation and the same NATTEN_BACKEND everywhere"
        self.world.check_same(installation, **kernel_fingerprint(self.device))
        self.autocast = autocast_context(args.amp, self.device)
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.folder = run_folder(args)
        self.checkpoints = CheckpointSaver(self.folder, args.keep_last, self.world)
        resumed = load_resume_state(args, self.world)
        self.build_data_and_model()
        self.images_per_update = args.batch_size * args.grad_accum * self.world.size
        self.updates_per_epoch = len(self.train_loader) // args.grad_accum
        if self.updates_per_epoch == 0:
            batches = len(self.train_loader)
            raise ValueError(f"an epoch has {batches} batches, fewer than --grad-accum {args.grad_accum}: lower that.")
        self.mixup, self.criterion = create_loss(args, self.record["num_classes"])
        self.optimizer = create_optimizer(args, self.model, self.images_per_update)
        self.scheduler, self.epochs = create_scheduler(args, self.optimizer, self.updates_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.ema = ModelEmaV3(self.model, decay=args.model_ema_decay) if args.model_ema else None
        self.warn()
        # How far the run has come: epochs done, updates done in this one, the sums of their losses, gradient norms and
        # seconds, and updates skipped in a row; and the best score, and after which epoch it was.
        self.epoch, self.update, self.totals, self.skipped = 0, 0, dict(_NOTHING), 0
        self.best, self.best_epoch = -math.inf, 0
        if resumed is not None:
            self.load_state(*resumed)
        self.check_same_everywhere()
        self.parallel = self.world.parallel(self.model, self.device)
        self.forward = torch.compile(self.parallel) if args.compile else self.parallel
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self.epoch * self.updates_per_epoch + self.update
        self.log = RunLogger(self.folder, self.epoch, done) if self.world.is_main_process else None

    def build_data_and_model(self) -> None:
        args = self.args
        self.train_images = create_training_dataset(args, self.world)
        self.model, self.record = create_training_model(args, self.train_images.classes, self.world)
        self.model.to(self.device, memory_format=self.memory_format)
        check_classes(self.train_images, self.model.num_classes, are_named=True)
        config, pin = self.record["preprocessing"], self.device.type == "cuda"
        self.train_loader = create_training_loader(args, self.train_images, config, self.world, pin)
        val_images = create_validation_dataset(args, self.train_images.classes, config, self.world)
        batch_size = args.val_batch_size or args.batch_size
        self.val_loader = create_evaluation_loader(val_images, batch_size, args.workers, pin, self.world)

    def check_same_everywhere(self) -> None:
        """Raises ValueError if another process stands elsewhere, or has other data: each has read its own disk."""
        classes = hashlib.sha256("\0".join(self.train_images.classes).encode()).hexdigest()[:12]
        self.world.check_same(
            "all machines must see the same data and the same folder of the run, and be given the same options",
            **{"state (epochs and updates done, best top-1)": (self.epoch, self.update, self.best)},
            **{"number of training images": len(self.train_images), "hash of the classes' names": classes},
            **{"batch size": self.args.batch_size, "accumulation": self.args.grad_accum},
            **{"number of epochs": self.epochs, "seed": self.args.seed},
        )

    def warn(self) -> None:
        """Says what is allowed, but hardly meant."""
        kept = self.args.model_ema_decay ** (self.epochs * self.updates_per_epoch)
        if self.ema is not None and kept > 0.1:
            self.world.say(f"note: at the end {kept:.0%} of the average are the first weights: lower --model-ema-decay")
        if self.args.amp == "fp16" and self.device.type == "cpu":
            self.world.say("note: float16 is slow on a CPU: use --amp bf16 or none")

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
        """What last.pth holds: all that a run needs to go on.

        Learning rates and the states of all random generators follow from the options and from `epoch` and `update`.
        """
        rest = {
            "update": self.update,
            "totals": self.totals,
            "skipped": self.skipped,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "options": vars(self.args),
            "processes": self.world.size,
            "images": self.train_images.extent(),
        }
        return {**self.weights(), **rest}

    def load_state(self, path: Path, state: dict[str, Any]) -> None:
        """Takes over a checkpoint of this run.

        Raises:
            ValueError: if it is of another model or other data.
        """
        check_same_run(path, state["record"], self.record)
        check_same_run(path, state["images"], self.train_images.extent(is_within_epoch=state["update"] > 0))
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["model_ema"])
        ours = [{key: group[key] for key in _HYPERPARAMETERS if key in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, hyperparameters in zip(self.optimizer.param_groups, ours, strict=True):
            group.update(hyperparameters)
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.update, self.skipped = state["epoch"], state["update"], state["skipped"]
        self.totals = dict(state["totals"])
        if path.resolve().parent == self.folder.resolve():  # elsewhere the best weights are not this run's
            self.best, self.best_epoch = state["best"], state["best_epoch"]
        done = self.epoch * self.updates_per_epoch + self.update
        if self.scheduler is not None and done:
            self.scheduler.step_update(done - 1)
        self.world.say(f"goes on from {path}: {self.epoch} epochs and {self.update} updates are done")

    # ----- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> float:
        """Trains to the last epoch and returns the best top-1 accuracy in percent.

        Raises:
            Interrupted: if the run has saved and must leave because of a signal.
        """
        self.signal_handler.handle_ctrl_c()
        self.world.say(self.describe())
        total = self.epochs * self.updates_per_epoch
        done = self.epoch * self.updates_per_epoch + self.update
        is_quiet = None if self.world.is_main_process else True  # None: quiet in a pipe
        self.bar = tqdm(total=total, initial=done, unit="update", disable=is_quiet, dynamic_ncols=True)
        started = time.perf_counter()
        try:
            while self.epoch < self.epochs:
                figures = self.train_epoch()
                result = self.evaluate()
                self.finish_epoch(figures, result)
                passed = self.epoch * self.updates_per_epoch - done
                left = (time.perf_counter() - started) / max(1, passed) * (total - done - passed)
                self.world.say(
                    f"epoch {self.epoch}/{self.epochs}  loss {figures['train_loss']:.4f}  "
                    f"val loss {result['loss']:.4f}  top-1 {result['top1']:.2f}%  lr {figures['lr']:.2e}  "
                    f"{figures['images_per_s']:.1f} images/s  {left / 60:.1f} min left"
                )
        except Interrupted:
            self.save_and_leave()
        finally:
            self.bar.close()
            if self.log is not None:
                self.log.close()
        for images, then in ((self.train_images, "others stood in"), (self.val_loader.dataset, "they are left out")):
            bad = gather_bad_images(images, self.world)
            if bad:
                which = f"images of {images.where} could not be read"
                self.world.say("\n  ".join([f"{len(bad)} {which}; {then}:", *bad]))
        self.world.say(f"best top-1 {self.best:.2f}% after epoch {self.best_epoch}: {self.checkpoints.best}")
        return self.best

    def train_epoch(self) -> dict[str, float]:
        """Sees every training image once, but for what is left of the last update, and returns the epoch's figures."""
        self.model.train()
        self.bar.set_description(f"epoch {self.epoch + 1}/{self.epochs}")
        then = time.perf_counter()
        batches = self.batches() if self.update < self.updates_per_epoch else iter(())
        while self.update < self.updates_per_epoch:
            update = self.epoch * self.updates_per_epoch + self.update
            if self.scheduler is not None:
                self.scheduler.step_update(update)
            loss = self.accumulate(batches)
            norm = self.update_weights(loss)
            if self.ema is not None and not self.skipped:
                self.ema.update(self.model, step=update)
            self.update += 1
            self.bar.update()
            now = time.perf_counter()
            self.totals["seconds"], then = self.totals["seconds"] + now - then, now
            rate = self.update * self.images_per_update / self.totals["seconds"]
            if update % self.args.log_interval == 0:
                self.show(update, loss, norm, rate)
            if self.args.save_interval and self.update % self.args.save_interval == 0 and not self.skipped:
                self.checkpoints.save_last(self.state())
            self.raise_if_signalled()
        totals = self.totals
        return {
            "train_loss": totals["loss"] / totals["losses"] if totals["losses"] else math.nan,
            "grad_norm": totals["norm"] / totals["norms"] if totals["norms"] else math.nan,
            "lr": self.learning_rate(),
            "images_per_s": self.update * self.images_per_update / totals["seconds"],
            "seconds": totals["seconds"],
        }

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches of what is left of the epoch."""
        return iterate_epoch(self.train_loader, self.epoch, self.update * self.args.grad_accum)

    def accumulate(self, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
        """Adds the gradients of the batches of one update; returns the mean of their losses, over all processes."""
        losses = []
        for part in range(self.args.grad_accum):
            is_last = part == self.args.grad_accum - 1
            keep = contextlib.nullcontext if is_last or self.world.size == 1 else self.parallel.no_sync
            step = (self.update * self.args.grad_accum + part) * self.world.size + self.world.rank
            with keep():
                losses.append(self.backward(*next(batches), step=step))
        (total,) = self.world.sum(torch.stack(losses).double().mean().item())
        return total / self.world.size

    def backward(self, x_BCHW: Tensor, target_B: Tensor, step: int) -> Tensor:
        """Adds a batch's gradient; returns its loss. Randomness depends on `step`, the batch's number in the epoch."""
        check_bad_images(self.train_images, self.args.skip_bad_images)
        seed_all(self.args.seed, self.epoch, step, STEP_SEED)
        x_BCHW = x_BCHW.to(self.device, non_blocking=True, memory_format=self.memory_format)
        target_B = target_B.to(self.device, non_blocking=True)
        if self.mixup is not None:
            x_BCHW, target_B = self.mixup(x_BCHW, target_B)
        with self.autocast():
            loss = self.criterion(self.forward(x_BCHW), target_B)
        self.scaler.scale(loss / self.args.grad_accum).backward()
        return loss.detach()

    def update_weights(self, loss: float) -> float:
        """One step of the optimizer on the gradients gathered; returns their norm before clipping.

        The step is skipped, the same in all processes, where loss or gradient is not finite; too often in a row, and
        the run stops. With fp16, a gradient too large for the scale of the loss does not count: the scale is lowered.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad or math.inf).item()
        is_overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if math.isfinite(loss) and (math.isfinite(norm) or is_overflow):
            self.skipped = 0
            self.scaler.step(self.optimizer)
            self.totals["loss"] += loss
            self.totals["losses"] += 1
            if math.isfinite(norm):
                self.totals["norm"] += norm
                self.totals["norms"] += 1
        else:
            self.skipped += 1
            self.check_skipped(loss, norm)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def check_skipped(self, loss: float, norm: float) -> None:
        """Raises ValueError if too many updates in a row had no finite loss or gradient."""
        where = f"update {self.update + 1} of epoch {self.epoch + 1}"
        figures = f"the loss is {loss}, the gradient's norm {norm}, the learning rate {self.learning_rate():.3g}"
        if self.skipped <= self.args.skip_nonfinite:
            self.world.say(f"{where} is skipped: {figures}")
            return
        last = (
            f"the last good state is {self.checkpoints.last}" if self.checkpoints.last.exists() else "nothing is saved"
        )
        raise ValueError(
            f"the run has diverged: at {where} {figures}, after {self.skipped - 1} updates were skipped; {last}. "
            "Lower --lr, and go on with --resume or start again."
        )

    def show(self, update: int, loss: float, norm: float, rate: float) -> None:
        """Figures of the last update on the progress bar and in TensorBoard."""
        lr = self.learning_rate()
        self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.2e}", images_per_s=f"{rate:.1f}")
        if self.log is not None:
            memory = peak_memory_mb(self.device)
            self.log.step(update, loss=loss, lr=lr, grad_norm=norm, images_per_s=rate, memory_mb=memory)

    def evaluate(self) -> dict[str, float]:
        """Accuracy of the averaged weights if there are any, else of the weights, on the validation images."""
        model = self.model if self.ema is None else self.ema.module
        if self.world.size > 1:  # as the first process has them: its are saved
            distribute_bn(model, self.world.size)
        skip, stop = self.args.skip_bad_images, self.raise_if_signalled
        result = evaluate(model, self.val_loader, self.device, self.autocast, skip, self.world, stop)
        if not math.isfinite(result["loss"]):
            raise ValueError(
                f"the run has diverged: the validation loss is {result['loss']} after epoch {self.epoch + 1}, which is "
                "not saved. Lower --lr, and go on with --resume or start again."
            )
        return result

    def finish_epoch(self, figures: dict[str, float], result: dict[str, float]) -> None:
        """Counts the epoch as done: first in the log, then in last.pth, from which a resumed run goes on."""
        is_best = result["top1"] > self.best
        if is_best:
            self.best, self.best_epoch = result["top1"], self.epoch + 1
        bad = gather_bad_images(self.train_images, self.world)
        if self.log is not None:
            self.log.epoch(
                (self.epoch + 1) * self.updates_per_epoch - 1,
                epoch=self.epoch,
                val_loss=result["loss"],
                top1=result["top1"],
                top5=result["top5"],
                bad_images=len(bad),
                **figures,
            )
        self.epoch, self.update, self.totals = self.epoch + 1, 0, dict(_NOTHING)
        if is_best:
            self.checkpoints.save_best(self.weights())
        self.checkpoints.save_last(self.state())
        self.checkpoints.keep_epoch(self.epoch)

    # ----- leaving ----------------------------------------------------------------------------------------------------

    def raise_if_signalled(self) -> None:
        """Raises Interrupted in all processes if any of them was told to end."""
        self.world.raise_if_signalled(self.signal_handler)

    def save_and_leave(self) -> None:
        """Saves between two updates, and raises Interrupted; saves nothing if the run has diverged.

        Where only the loss was not finite, the update was skipped, and the weights are those from before it.
        """
        last, stopped = self.checkpoints.last, f"after {self.epoch} epochs and {self.update} updates"
        if all(value.isfinite().all() for value in self.model.state_dict().values()):
            self.checkpoints.save_last(self.state())
            then = f"go on with --resume from {last}"
        else:
            kept = f"the last good state is {last}" if last.exists() else "nothing is saved"
            then = f"its weights are not finite, and not saved; {kept}"
        self.world.say(f"stopped by {self.signal_handler.name} {stopped}; {then}")
        raise Interrupted

    # ----- figures ----------------------------------------------------------------------------------------------------

    def learning_rate(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def describe(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        images, world, args = self.train_images, self.world, self.args
        changed = ", ".join(f"{key}={value}" for key, value in args.model_kwargs.items())
        return (
            f"{args.model}{changed and f' with {changed}'}: {parameters / 1e6:.2f}M parameters; "
            f"{images.extent()['number of training images']} images of {len(images.classes)} classes\n"
            f"nodes {world.nodes} x processes {world.local_size} x batch {args.batch_size} "
            f"x accumulation {args.grad_accum} = {self.images_per_update} images an update\n"
            f"{self.updates_per_epoch} updates an epoch, {self.epochs} epochs; learning rate "
            f"{peak_lr(args, self.images_per_update):.3g}; writes to {self.folder}"
        )


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that this process has used so far, in 10^6 bytes: of its GPU if it has one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def main(argv: list[str] | None = None) -> float:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with SignalHandler() as signal_handler, init_world(args.device, signal_handler) as (world, args.device):
        try:
            with explain_memory_errors(
                "lower --batch-size and raise --grad-accum, or use --grad-checkpointing or --amp bf16"
            ):
                return Trainer(args, world, signal_handler).run()
        except Interrupted:
            pass
        # Only here is the trainer gone, which the exception held, and with it its loading processes: at the
        # interpreter's exit each would be waited for.
        sys.exit(signal_handler.status)
