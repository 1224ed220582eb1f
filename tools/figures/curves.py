"""Plot the learning curves of classification runs."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt

from figures.style import Theme, linear_ticks, open_frame

HELP = "loss and accuracy per epoch"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders written by train.py")


def prepare(args: argparse.Namespace) -> Callable[[Theme], plt.Figure]:
    return lambda theme: draw_curves(args.runs)


def read_summary(folder: Path) -> dict[str, list[float]]:
    """Return the columns of a run's summary.csv.

    Raises:
        FileNotFoundError: the folder has no summary.csv.
        ValueError: summary.csv has no rows.
    """
    path = folder / "summary.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; pass the folder of a training run.")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows; wait until the first epoch is complete.")
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def draw_curves(folders: list[Path]) -> plt.Figure:
    """Plot loss and top-1 accuracy of one or more runs per epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, folder in enumerate(folders):
        run = read_summary(folder)
        epochs = [epoch + 1 for epoch in run["epoch"]]
        left.plot(epochs, run["train_loss"], color=f"C{index}", linestyle=":", label=f"{folder.name}, training")
        left.plot(epochs, run["val_loss"], color=f"C{index}", label=f"{folder.name}, validation")
        right.plot(epochs, run["top1"], color=f"C{index}", label=f"{folder.name}, best {max(run['top1']):.2f}%")
    left.set(xlabel="epoch", ylabel="loss", title="Loss")
    right.set(xlabel="epoch", ylabel="top-1 (%)", title="Validation accuracy")
    for axes in (left, right):
        linear_ticks(axes.xaxis, integer=True)
        linear_ticks(axes.yaxis)
        open_frame(axes)
        axes.legend()
    return figure
