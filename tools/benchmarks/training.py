"""Time the training loop against its parts, to see what data loading, checks and logging cost.

    python tools/benchmark.py training --synthetic 4096 --config configs/classification/nat_mini.yml --batch-size 64
    python tools/benchmark.py training DATA --config configs/quickstart/nat.yml --updates 30 --out training.csv

Four loops over the same number of images run in turns; the table shows the median of each:

- loader: loading and augmenting batches only;
- step: forward, loss, backward, clipping and optimizer on one batch that is already loaded;
- loop: the loop of train.py on that batch;
- loop and loader: train.py as it runs.

All other options are those of train.py.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.entry import positive
from natten.profiler import Timer
from natzoo.checkpoints import write_atomically
from natzoo.classification import train
from natzoo.classification.data.datasets import ShardDataset
from natzoo.classification.options import parse


class ReadyTrainer(train.Trainer):
    """A Trainer that can repeat one batch instead of reading its loader."""

    ready: tuple[Tensor, Tensor] | None = None

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self.ready) if self.ready is not None else super().batches()


def bare_steps(trainer: train.Trainer, batch: tuple[Tensor, Tensor], steps: int) -> None:
    """Run the arithmetic of `steps` batches, and nothing else."""
    args, model, optimizer = trainer.args, trainer.model, trainer.optimizer
    x_BCHW, target_B = (part.to(trainer.device) for part in batch)
    x_BCHW = trainer.prepare(x_BCHW, trainer.epoch)
    if trainer.mixup is not None:
        x_BCHW, target_B = trainer.mixup(x_BCHW, target_B)
    x_BCHW = x_BCHW.contiguous(memory_format=trainer.memory_format)
    model.train()
    for step in range(steps):
        with trainer.autocast():
            loss = trainer.criterion(trainer.forward(x_BCHW), target_B)
        trainer.scaler.scale(loss / args.grad_accum).backward()
        if step % args.grad_accum == args.grad_accum - 1:
            trainer.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or float("inf"))
            trainer.scaler.step(optimizer)
            trainer.scaler.update()
            optimizer.zero_grad()


def loops(trainer: ReadyTrainer, updates: int) -> dict[str, Callable[[], None]]:
    """Return the loops to time by name, each of the same number of updates."""
    steps = updates * trainer.args.grad_accum
    batch = next(trainer.batches())

    def load() -> None:
        for _ in itertools.islice(trainer.batches(), steps):
            pass

    def run(ready: tuple[Tensor, Tensor] | None) -> None:
        trainer.ready, trainer.update = ready, 0
        trainer.train_epoch()
        trainer.ready, trainer.update = None, 0

    return {
        "loader": load,
        "step": lambda: bare_steps(trainer, batch, steps),
        "loop": lambda: run(batch),
        "loop and loader": lambda: run(None),
    }


def measure(trainer: ReadyTrainer, updates: int, rounds: int) -> dict[str, list[float]]:
    """Return the images per second of each loop in each round, after one round that does not count.

    The epoch is shortened to the images of a loop, so that no images are loaded while the next loop is timed.
    """
    images = updates * trainer.images_per_update
    trainer.updates_per_epoch = updates
    loader = trainer.train_loader
    order = loader.dataset if isinstance(loader.dataset, ShardDataset) else loader.batch_sampler
    order.length = images
    trainer.bar = tqdm(disable=True)
    timers = {
        name: Timer(loop, trainer.device, use_graph=False, context=torch.enable_grad)
        for name, loop in loops(trainer, updates).items()
    }
    for _ in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=None):
        for timer in timers.values():
            timer.sample()
    return {name: [1e3 * images / ms for ms in timer.samples_ms[1:]] for name, timer in timers.items()}


def table(rates: dict[str, list[float]]) -> list[tuple[str, str, str]]:
    """Return rows of loop, images per second, and percent of the bare step in the same round; medians over rounds."""
    rows = [("loop", "images/s", "% of step")]
    for name, values in rates.items():
        shares = [100 * value / step for value, step in zip(values, rates["step"], strict=True)]
        rows.append((name, f"{statistics.median(values):.1f}", f"{statistics.median(shares):.1f}"))
    return rows


def main(argv: list[str]) -> None:
    """Run the subcommand `training`."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--updates", type=positive, default=20, help="updates per loop (default: 20)")
    parser.add_argument("--rounds", type=positive, default=5, help="timed runs of each loop (default: 5)")
    parser.add_argument("--out", type=Path, metavar="CSV", help="file to write the table to")
    own, rest = parser.parse_known_args(argv)
    args = parse(rest)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        args.work_dir, args.resume = folder, None
        trainer = ReadyTrainer(args)
        try:
            if own.updates > trainer.updates_per_epoch:
                raise ValueError(
                    f"--updates {own.updates} exceeds the {trainer.updates_per_epoch} updates of an epoch."
                )
            print(trainer.describe())
            rows = table(measure(trainer, own.updates, own.rounds))
        finally:
            trainer.log.close()
    for row in rows:
        print(f"{row[0]:<16}{row[1]:>10}{row[2]:>11}")
    if own.out:
        text = "".join(",".join(row) + "\n" for row in rows)
        write_atomically(own.out, lambda file: file.write(text.encode()))
