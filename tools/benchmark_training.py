"""Time the training loop against its parts: what do data, checks and logs cost beside the arithmetic?

    python tools/benchmark_training.py --synthetic 4096 --config configs/classification/nat_mini.yml --batch-size 64
    python tools/benchmark_training.py DATA --config configs/quickstart/nat.yml --updates 30 --out training.csv

Four loops over as many images, in turns, round after round; the table gives the median of each:

- loader: the loading and augmenting of batches alone;
- step: forward, loss, backward, clipping and optimizer on one batch that is there already, and nothing else;
- loop: train.py's own loop on that batch;
- loop and loader: train.py as it runs.

The other options are those of train.py. Times depend on the machine; read them side by side.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from natzoo import command_line
from natzoo.checkpoints import write_atomically
from natzoo.classification import train
from natzoo.classification.data.datasets import ShardDataset
from natzoo.classification.options import parse, positive


class ReadyTrainer(train.Trainer):
    """A Trainer that sees one batch again and again, or what its loader gives."""

    ready: tuple[Tensor, Tensor] | None = None

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self.ready) if self.ready is not None else super().batches()


def bare_steps(trainer: train.Trainer, batch: tuple[Tensor, Tensor], steps: int) -> None:
    """The arithmetic of `steps` batches, and nothing else."""
    args, model, optimizer = trainer.args, trainer.model, trainer.optimizer
    x_BCHW, target_B = (part.to(trainer.device) for part in batch)
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
    """What is timed, by name; each for as many updates."""
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
    """Images a second of each loop in each round, after one round that does not count.

    An epoch ends with the last image that a loop sees, so that none is loaded while the next loop is timed.
    """
    images = updates * trainer.images_per_update
    trainer.updates_per_epoch = updates
    loader = trainer.train_loader
    order = loader.dataset if isinstance(loader.dataset, ShardDataset) else loader.batch_sampler
    order.length = images
    trainer.bar = tqdm(disable=True)
    rates: dict[str, list[float]] = {}
    timed = loops(trainer, updates)
    for number in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=None):
        for name, function in timed.items():
            start = time.perf_counter()
            function()
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
            if number > 0:
                rates.setdefault(name, []).append(images / (time.perf_counter() - start))
    return rates


def table(rates: dict[str, list[float]]) -> list[tuple[str, str, str]]:
    """Rows of loop, images a second, and percent of the bare step of the same round; medians over the rounds."""
    rows = [("loop", "images/s", "% of step")]
    for name, values in rates.items():
        shares = [100 * value / step for value, step in zip(values, rates["step"], strict=True)]
        rows.append((name, f"{statistics.median(values):.1f}", f"{statistics.median(shares):.1f}"))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="and all options of train.py")
    parser.add_argument("--updates", type=positive, default=20, help="updates of a loop")
    parser.add_argument("--rounds", type=positive, default=5, help="times that each loop is timed")
    parser.add_argument("--out", type=Path, metavar="CSV", help="table to write")
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
                    f"--updates {own.updates} is more than an epoch's {trainer.updates_per_epoch}: lower it."
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


if __name__ == "__main__":
    command_line.run(main)
