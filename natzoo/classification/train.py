"""Train an image classifier, built from timm's components.

Every random number follows from the seed and its position in the run (epoch, step, image). A run that is interrupted
and resumed therefore ends with the same weights as one that is not: bit for bit on a CPU, with the same number of
threads and one or two processes. With three or more processes the reduction order may change between restarts, and with
it the last bits.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from timm.models import model_parameters
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from tqdm import tqdm

from natzoo import command_line
from natzoo.classification.checkpoints import (
    CheckpointSaver,
    changed_options,
    check_same_run,
    load_resume_state,
    lock_run,
    run_folder,
)
from natzoo.classification.data.batches import TrainingBatches
from natzoo.classification.data.datasets import STEP_SEED, check_bad_images, gather_bad_images, seed_all
from natzoo.classification.data.loader import (
    create_evaluation_loader,
    create_training_dataset,
    create_training_loader,
    create_validation_dataset,
    iterate_epoch,
)
from natzoo.classification.distillation import create_distillation, load_projection
from natzoo.classification.distributed import World, init_world, kernel_fingerprint
from natzoo.classification.evaluation import check_classes, evaluate, missing_classes_warning
from natzoo.classification.factory import (
    create_loss,
    create_optimizer,
    create_scheduler,
    create_training_model,
    describe_model,
    peak_lr,
)
from natzoo.classification.freezing import train_mode
from natzoo.classification.logger import EpochMeters, RunLogger, check_trackers
from natzoo.classification.options import parse
from natzoo.classification.sharding import check_sharding, load_weights, shard, shard_optimizer_state, whole
from natzoo.classification.signals import Interrupted, SignalHandler
from natzoo.classification.state import check_tensors, load_optimizer
from natzoo.command_line import counted
from natzoo.device import (
    autocast_context,
    describe_device,
    enable_tf32,
    explain_memory_errors,
    pick_device,
    slow_precision,
)


class Trainer:
    """A run: its model, data, optimizer and progress.

    Args:
        args: the options of options.py.
        world: the processes of the run; each creates its own Trainer.
        signals: records signals; the run then saves and stops.

    Attributes:
        epoch: number of completed epochs.
        update: number of completed updates in the current epoch.
        meters: averages over the current epoch.
        skipped: number of updates skipped in a row.
        best: best top-1 accuracy in percent.
        best_epoch: epoch of the best accuracy, counted from 1.
        first_epoch: number of completed epochs at the start.

    Raises:
        ValueError, FileNotFoundError: naming the option or file that is wrong.
    """

    def __init__(self, args: argparse.Namespace, world: World | None = None, signals: SignalHandler | None = None):
        self.args = args
        self.world = world or World()
        self.signals = signals or SignalHandler()
        self.device = pick_device(args.device)
        enable_tf32(self.device)
        remedy = "use the same installation and the same NATTEN_BACKEND everywhere"
        self.world.check_same(remedy, **kernel_fingerprint(self.device))
        self.autocast = autocast_context(args.amp, self.device)
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        check_sharding(args, self.world)
        check_trackers(args.log)
        self.folder = run_folder(args)
        self.checkpoints = CheckpointSaver(self.folder, args.keep_last, self.world)
        resumed = load_resume_state(args, self.world)
        self.create_data_and_model()
        self.images_per_update = args.batch_size * args.grad_accum * self.world.size
        self.updates_per_epoch = len(self.train_loader) // args.grad_accum
        if self.updates_per_epoch == 0:
            raise ValueError(
                f"--grad-accum {args.grad_accum} exceeds the {len(self.train_loader)} batches of an epoch; lower it."
            )
        self.mixup, self.criterion = create_loss(args, self.record["num_classes"], self.train_dataset)
        self.criterion.to(self.device)
        self.task = None
        if args.teacher:
            self.task = create_distillation(args, self.model, self.criterion, self.record, self.world, self.device)
        # What the optimizer trains: the model, and the projection of feature distillation.
        self.trained: nn.Module = self.model if self.task is None else self.task.trainable_module
        if args.fsdp:
            shard(self.model, self.world, self.device)
        self.optimizer = create_optimizer(args, self.trained, self.images_per_update)
        self.scheduler, self.epochs = create_scheduler(args, self.optimizer, self.updates_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.ema = ModelEmaV3(self.model, decay=args.model_ema_decay) if args.model_ema else None
        self.warn()
        self.epoch, self.update, self.meters, self.skipped = 0, 0, EpochMeters(), 0
        self.best, self.best_epoch = -math.inf, 0
        if resumed is not None:
            self.load_state(*resumed)
        self.first_epoch = self.epoch
        self.check_same_everywhere()
        self.parallel: Any = self.trained if args.fsdp else self.world.data_parallel(self.trained, self.device)
        compiled = args.compile or args.torchcompile
        self.forward = torch.compile(self.parallel, mode=args.torchcompile) if compiled else self.parallel
        if self.task is not None:
            self.task.trainable_module = self.forward
        command_line.create_folder(self.folder, "--work-dir")
        self.log = None
        if self.world.is_main_process:
            self.log = RunLogger(self.folder, self.epoch, self.total_updates, args.log, vars(args))

    @property
    def total_updates(self) -> int:
        """Number of completed updates of the run."""
        return self.epoch * self.updates_per_epoch + self.update

    @property
    def has_stalled(self) -> bool:
        """Whether the accuracy has not improved for as long as --early-stop allows."""
        since = self.best_epoch or self.first_epoch
        return bool(self.args.early_stop) and self.epoch - since >= self.args.early_stop

    @property
    def progress(self) -> str:
        """The last completed update, counted from 1, for messages."""
        epoch, update = self.epoch + 1, self.update
        if self.epoch and not self.update:
            epoch, update = self.epoch, self.updates_per_epoch
        return f"epoch {epoch}/{self.epochs}, update {update}/{self.updates_per_epoch}"

    def create_data_and_model(self) -> None:
        """Create the datasets, the loaders, and the model, whose number of classes depends on the data."""
        args = self.args
        self.train_dataset = create_training_dataset(args, self.world)
        self.model, self.record = create_training_model(args, self.train_dataset.classes, self.world, self.device)
        # A sharded model moves to the device after it is sharded: it may not fit whole.
        self.model.to(device="cpu" if args.fsdp else self.device, memory_format=self.memory_format)
        check_classes(self.train_dataset, self.model.num_classes, matched_by_name=True)
        config, pin_memory = self.record["preprocessing"], self.device.type == "cuda"
        self.train_loader = create_training_loader(args, self.train_dataset, config, self.world, pin_memory)
        val_dataset = create_validation_dataset(args, self.train_dataset.classes, config, self.world)
        batch_size = args.val_batch_size or args.batch_size
        self.val_loader = create_evaluation_loader(val_dataset, batch_size, args.workers, pin_memory, self.world)
        self.prepare = TrainingBatches(args, config, self.device)

    def check_same_everywhere(self) -> None:
        """Raise ValueError if the processes differ in progress, data or options; each has read its own disk."""
        names = "\0".join(self.train_dataset.classes).encode(errors="surrogateescape")
        classes = hashlib.sha256(names).hexdigest()[:12]
        self.world.check_same(
            "all machines must see the same data and the same --work-dir, and receive the same options",
            **{"progress (epochs, updates, best top-1)": (self.epoch, self.update, self.best)},
            **{"number of training images": len(self.train_dataset), "hash of the class names": classes},
            **self.digests(),
            **{"--batch-size": self.args.batch_size, "--grad-accum": self.args.grad_accum},
            **{"number of epochs": self.epochs, "--seed": self.args.seed},
        )

    def warn(self) -> None:
        """Warn about legal but probably unintended settings."""
        initial = self.args.model_ema_decay ** (self.epochs * self.updates_per_epoch)
        if self.ema is not None and initial > 0.1:
            self.world.print(
                f"Warning: --model-ema-decay {self.args.model_ema_decay} is too high for this run: the initial weights "
                f"still make up {initial:.0%} of the final average; lower it."
            )
        missing = missing_classes_warning(self.val_loader.dataset, self.train_dataset.classes)
        for warning in filter(None, (slow_precision(self.args.amp, self.device), missing)):
            self.world.print(warning)

    # ----- checkpoints ------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Any]:
        """Return the content of best.pth: weights, and the record from which the model can be created."""
        return {
            "model": whole(self.model.state_dict(), self.world.is_main_process),
            "model_ema": None if self.ema is None else self.ema.module.state_dict(),
            "record": self.record,
            "epoch": self.epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
        }

    def state(self) -> dict[str, Any]:
        """Return the content of last.pth: everything needed to resume.

        Learning rates and random states are not stored; they follow from the options, `epoch` and `update`.
        """
        progress = {
            "update": self.update,
            "totals": self.meters.state_dict(),
            "skipped": self.skipped,
            "optimizer": whole(self.optimizer.state_dict(), self.world.is_main_process),
            "scaler": self.scaler.state_dict(),
            "options": vars(self.args),
            "processes": self.world.size,
            "images": {**self.train_dataset.resume_key(), **self.digests()},
        }
        if self.task is not None and self.task.get_task_state():
            progress["distillation"] = self.task.get_task_state()  # the projection of features
        return {**self.weights(), **progress}

    def digests(self) -> dict[str, str]:
        """Return hashes by which a resumed run notices that images were moved, renamed or replaced."""
        datasets: dict[str, Any] = {"training": self.train_dataset, "validation": self.val_loader.dataset}
        return {f"digest of the names and sizes of the {name} images": data.digest for name, data in datasets.items()}

    def load_state(self, path: Path, state: dict[str, Any]) -> None:
        """Load a checkpoint of this run.

        Raises:
            ValueError: if it belongs to another model or to other data.
        """
        check_same_run(path, state["record"], self.record)
        digests = self.digests()  # which older checkpoints lack
        images = {**self.train_dataset.resume_key(is_within_epoch=state["update"] > 0), **digests}
        check_same_run(path, {**digests, **state["images"]}, images)
        check_tensors(
            path, state, self.model, None if self.ema is None else self.ema.module, self.optimizer, self.scaler
        )
        if state["update"] > self.updates_per_epoch:
            raise ValueError(f"{path} has update = {state['update']}; an epoch has {self.updates_per_epoch} updates.")
        load_weights(self.model, state["model"])
        if self.task is not None:
            load_projection(self.task, state, path)
        if self.ema is not None:
            self.ema.module.load_state_dict(state["model_ema"])
        load_optimizer(self.optimizer, shard_optimizer_state(self.optimizer, state["optimizer"]))
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.update, self.skipped = state["epoch"], state["update"], state["skipped"]
        self.meters = EpochMeters(**state["totals"])
        if path.resolve().parent == self.folder.resolve():  # the best weights of another folder are not in this one
            self.best, self.best_epoch = state["best"], state["best_epoch"]
        if self.scheduler is not None and self.total_updates:
            self.scheduler.step_update(self.total_updates - 1)
        for line in changed_options(self.args, state["options"]):
            self.world.print(line)
        self.world.print(f"Resumed from {path} ({self.progress}).")
        if self.epoch >= self.epochs:
            self.world.print(
                f"Nothing to do: the run has finished its {counted(self.epochs, 'epoch')}; raise --epochs to continue."
            )

    # ----- training loop ----------------------------------------------------------------------------------------------

    def run(self) -> float:
        """Train to the last epoch and return the best top-1 accuracy in percent.

        Raises:
            Interrupted: if a signal stopped the run; the state has been saved.
        """
        self.signals.handle_ctrl_c()
        self.world.print(self.describe())
        total, done = self.epochs * self.updates_per_epoch, self.total_updates
        disable = None if self.world.is_main_process else True  # None disables the bar unless stderr is a terminal
        self.bar = tqdm(total=total, initial=done, unit="update", disable=disable, dynamic_ncols=True)
        start = time.perf_counter()
        try:
            while self.epoch < self.epochs and not self.has_stalled:
                metrics = self.train_epoch()
                result = self.evaluate()
                self.finish_epoch(metrics, result)
                seconds_per_update = (time.perf_counter() - start) / max(1, self.total_updates - done)
                eta = timedelta(seconds=round(seconds_per_update * (total - self.total_updates)))
                self.world.print(
                    f"Epoch {self.epoch}/{self.epochs}  loss {metrics['train_loss']:.4f}  "
                    f"val loss {result['loss']:.4f}  top-1 {result['top1']:.2f}%  lr {metrics['lr']:.2e}  "
                    f"{metrics['images_per_s']:.1f} img/s  ETA {eta}"
                )
        except Interrupted:
            self.save_and_stop()
        finally:
            self.bar.close()
            if self.log is not None:
                self.log.close()
        datasets: list[tuple[Any, str]] = [(self.train_dataset, "Replaced"), (self.val_loader.dataset, "Ignored")]
        for dataset, action in datasets:
            bad = gather_bad_images(dataset, self.world)
            if bad:
                count = f"{action} {counted(len(bad), 'unreadable image')} in {dataset.source}:"
                self.world.print("\n  ".join([count, *bad]))
        if self.has_stalled and self.epoch < self.epochs:
            self.world.print(f"Stopped early: no better top-1 in {counted(self.args.early_stop, 'epoch')}.")
        if self.best_epoch:
            self.world.print(f"Best top-1 {self.best:.2f}% (epoch {self.best_epoch}): {self.checkpoints.best}")
        return self.best

    def train_epoch(self) -> dict[str, float]:
        """Train for the rest of the epoch and return its metrics. The last incomplete update is dropped."""
        train_mode(self.model)
        self.bar.set_description(f"Epoch {self.epoch + 1}/{self.epochs}")
        previous = time.perf_counter()
        batches = self.batches() if self.update < self.updates_per_epoch else iter(())
        while self.update < self.updates_per_epoch:
            update = self.total_updates
            if self.scheduler is not None:
                self.scheduler.step_update(update)
            loss = self.accumulate(batches)
            norm = self.update_weights(loss)
            if self.ema is not None and not self.skipped:
                self.ema.update(self.model, step=update)
            self.update += 1
            self.bar.update()
            now = time.perf_counter()
            self.meters.seconds += now - previous
            previous = now
            if update % self.args.log_interval == 0:
                self.log_update(update, loss, norm)
            if self.args.save_interval and self.update % self.args.save_interval == 0 and not self.skipped:
                self.checkpoints.save_last(self.state())
            self.raise_if_signalled()
        return {
            "train_loss": self.meters.mean_loss,
            "grad_norm": self.meters.mean_norm,
            "lr": self.learning_rate(),
            "images_per_s": self.images_per_second(),
            "seconds": self.meters.seconds,
        }

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return this process's remaining batches of the epoch."""
        return iterate_epoch(self.train_loader, self.epoch, self.update * self.args.grad_accum)

    def accumulate(self, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
        """Accumulate the gradients of one update and return the mean loss over all processes."""
        losses = []
        for part in range(self.args.grad_accum):
            is_last = part == self.args.grad_accum - 1
            context = contextlib.nullcontext
            if self.args.fsdp:
                self.parallel.set_requires_gradient_sync(is_last)
            elif self.world.size > 1 and not is_last:
                context = self.parallel.no_sync
            step = (self.update * self.args.grad_accum + part) * self.world.size + self.world.rank
            with context():
                losses.append(self.backward(*next(batches), step=step))
        (total,) = self.world.sum(torch.stack(losses).double().mean().item())
        return total / self.world.size

    def backward(self, x_BCHW: Tensor, target_B: Tensor, step: int) -> Tensor:
        """Add the gradient of a batch and return its loss. Random numbers depend on `step`, the batch in the epoch."""
        check_bad_images(self.train_dataset, self.args.skip_bad_images)
        seed_all(self.args.seed, self.epoch, step, STEP_SEED)
        x_BCHW = self.prepare(x_BCHW.to(self.device, non_blocking=True), self.epoch)
        x_BCHW = x_BCHW.contiguous(memory_format=self.memory_format)
        target_B = target_B.to(self.device, non_blocking=True)
        if self.mixup is not None:
            x_BCHW, target_B = self.mixup(x_BCHW, target_B)
        with self.autocast():
            if self.task is None:
                loss = self.criterion(self.forward(x_BCHW), target_B)
            else:
                loss = self.task(x_BCHW, target_B)["loss"]
        self.scaler.scale(loss / self.args.grad_accum).backward()
        return loss.detach()

    def update_weights(self, loss: float) -> float:
        """Step the optimizer and return the gradient norm before clipping.

        All processes skip the step if the loss or the gradient is not finite, and raise after too many skips in a row.
        A gradient that overflows the loss scale of fp16 does not count; the scale is lowered instead.
        """
        self.scaler.unscale_(self.optimizer)
        norm = self.clip_gradients()
        is_overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if math.isfinite(loss) and (math.isfinite(norm) or is_overflow):
            self.skipped = 0
            self.scaler.step(self.optimizer)
            self.meters.update(loss, norm)
        else:
            self.skipped += 1
            self.check_skipped(loss, norm)
        self.scaler.update()
        self.optimizer.zero_grad()
        return norm

    def clip_gradients(self) -> float:
        """Clip the gradients as --clip-mode says, and return their norm before clipping."""
        limit, is_norm = self.args.clip_grad, self.args.clip_mode == "norm"
        found = nn.utils.clip_grad_norm_(self.trained.parameters(), limit if limit and is_norm else math.inf)
        norm = whole(found, keep=True).item()
        if limit and not is_norm and math.isfinite(norm):
            # Adaptive clipping excludes the classifier, as in timm.
            parameters = model_parameters(self.trained, exclude_head=self.args.clip_mode == "agc")
            dispatch_clip_grad(parameters, limit, mode=self.args.clip_mode)
        return norm

    def check_skipped(self, loss: float, norm: float) -> None:
        """Raise ValueError if too many updates in a row had no finite loss or gradient."""
        summary = (
            f"Epoch {self.epoch + 1}/{self.epochs}, update {self.update + 1}/{self.updates_per_epoch}: "
            f"loss {loss}, grad norm {norm}, lr {self.learning_rate():.3g}"
        )
        if self.skipped <= self.args.skip_nonfinite:
            self.world.print(f"{summary}; update skipped")
            return
        raise ValueError(
            f"{summary}, after {self.skipped - 1} skipped updates; the loss diverged. {self.last_good_state()}. "
            "Lower --lr, then resume with --resume or start again."
        )

    def last_good_state(self) -> str:
        last = self.checkpoints.last
        return f"The last good checkpoint is {last}" if last.exists() else "No checkpoint was saved"

    def log_update(self, update: int, loss: float, norm: float) -> None:
        """Show the metrics of the last update on the progress bar, and send them to the trackers."""
        lr, rate = self.learning_rate(), self.images_per_second()
        self.bar.set_postfix({"loss": f"{loss:.3f}", "lr": f"{lr:.2e}", "img/s": f"{rate:.1f}"})
        if self.log is not None:
            memory = peak_memory_mb(self.device)
            metrics = {} if memory is None else {"memory_mb": memory}
            self.log.log_update(update, loss=loss, lr=lr, grad_norm=norm, images_per_s=rate, **metrics)

    def evaluate(self) -> dict[str, float]:
        """Evaluate the averaged weights if there are any, else the weights, on the validation images."""
        model = self.model if self.ema is None else self.ema.module
        if self.world.size > 1:  # use the running statistics of the main process, which are the ones saved
            distribute_bn(model, self.world.size)
        result = evaluate(
            model,
            self.val_loader,
            self.device,
            self.autocast,
            skip_bad_images=self.args.skip_bad_images,
            world=self.world,
            before_batch=self.raise_if_signalled,
            normalize=self.prepare.normalize,
        )
        if not math.isfinite(result["loss"]):
            raise ValueError(
                f"Epoch {self.epoch + 1}/{self.epochs}: val loss {result['loss']}; the loss diverged and the "
                "epoch is not saved. Lower --lr, then resume with --resume or start again."
            )
        return result

    def finish_epoch(self, metrics: dict[str, float], result: dict[str, float]) -> None:
        """Write the log, then the checkpoints: a run killed in between repeats the epoch and rewrites its log."""
        is_best = result["top1"] > self.best
        if is_best:
            self.best, self.best_epoch = result["top1"], self.epoch + 1
        bad = gather_bad_images(self.train_dataset, self.world)
        if self.log is not None:
            self.log.log_epoch(
                (self.epoch + 1) * self.updates_per_epoch - 1,
                epoch=self.epoch,
                val_loss=result["loss"],
                top1=result["top1"],
                top5=result["top5"],
                bad_images=len(bad),
                **metrics,
            )
        self.epoch, self.update, self.meters = self.epoch + 1, 0, EpochMeters()
        if is_best:
            self.checkpoints.save_best(self.weights())
        self.checkpoints.save_last(self.state())
        self.checkpoints.keep_epoch(self.epoch)

    # ----- signals ----------------------------------------------------------------------------------------------------

    def raise_if_signalled(self) -> None:
        """Raise Interrupted in all processes if any of them received a signal."""
        self.world.raise_if_signalled(self.signals)

    def save_and_stop(self) -> None:
        """Save between two updates, unless the weights are not finite, and raise Interrupted."""
        last = self.checkpoints.last
        weights = whole(self.model.state_dict(), keep=True)
        if all(value.isfinite().all() for value in weights.values()):
            self.checkpoints.save_last(self.state())
            outcome = f"Saved {last}; continue with --resume."
        else:
            outcome = f"The weights are not finite and were not saved. {self.last_good_state()}."
        self.world.print(f"Stopped by {self.signals.name} ({self.progress}). {outcome}")
        raise Interrupted

    # ----- metrics ----------------------------------------------------------------------------------------------------

    def learning_rate(self) -> float:
        """Return the largest learning rate of the parameter groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def images_per_second(self) -> float:
        """Return the mean speed over the epoch so far."""
        return self.update * self.images_per_update / self.meters.seconds

    def describe(self) -> str:
        """Return the lines printed at the start of a run."""
        parameters = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        frozen = f", {trained / 1e6:.2f}M trained" if trained < parameters else ""
        dataset, world, args = self.train_dataset, self.world, self.args
        return (
            f"Device: {describe_device(self.device, args.amp)}\n"
            f"Model: {describe_model(args.model, args.model_kwargs)}, {parameters / 1e6:.2f}M parameters{frozen}\n"
            f"Data: {dataset.resume_key()['number of training images']} training images, "
            f"{counted(len(dataset.classes), 'class', 'classes')}\n"
            f"Batch: {counted(self.images_per_update, 'image')} per update (nodes {world.nodes} x processes "
            f"{world.local_size} x batch size {args.batch_size} x accumulation {args.grad_accum})\n"
            f"Schedule: {counted(self.epochs, 'epoch')} of {counted(self.updates_per_epoch, 'update')}, "
            f"lr {peak_lr(args, self.images_per_update):.3g}\n"
            f"Output: {self.folder}"
        )


def peak_memory_mb(device: torch.device) -> float | None:
    """Return the peak memory of this process so far in 10^6 bytes, on the GPU if it uses one; None on Windows' CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def main(argv: Sequence[str] | None = None) -> float:
    """Run train.py with a command line and return the best top-1 accuracy in percent."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with SignalHandler() as signals, init_world(args.device, signals) as (world, args.device):
        try:
            remedy = "lower --batch-size and raise --grad-accum, or use --grad-checkpointing or --amp"
            with lock_run(run_folder(args), world), explain_memory_errors(remedy):
                return Trainer(args, world, signals).run()
        except Interrupted:
            pass
        # Exit outside the except block: its exception refers to the trainer, and the interpreter waits at exit for
        # each data-loading worker that still exists.
        sys.exit(signals.exit_status)


if __name__ == "__main__":
    command_line.run(main)
