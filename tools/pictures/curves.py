"""Learning curves of runs of train.py."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt

HELP = "loss and accuracy over the epochs"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", help="folders that train.py wrote")


def prepare(args: argparse.Namespace) -> Callable[[str], plt.Figure]:
    return lambda theme: draw_curves(args.runs)


def read_summary(folder: Path) -> dict[str, list[float]]:
    """The columns of a run's summary.csv.

    Raises:
        FileNotFoundError: if the folder has none.
        ValueError: if it has no rows yet.
    """
    path = folder / "summary.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no summary.csv: name the folder of a run of train.py.")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows yet: let the run finish an epoch.")
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def draw_curves(folders: list[Path]) -> plt.Figure:
    """Loss and top-1 accuracy over the epochs, of one or several runs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, folder in enumerate(folders):
        run = read_summary(folder)
        epochs = [epoch + 1 for epoch in run["epoch"]]
        left.plot(epochs, run["train_loss"], color=f"C{index}", linestyle=":", label=f"{folder.name}, training")
        left.plot(epochs, run["val_loss"], color=f"C{index}", label=f"{folder.name}, validation")
        right.plot(epochs, run["top1"], color=f"C{index}", label=f"{folder.name}, best {max(run['top1']):.2f}%")
    left.set(xlabel="epoch", ylabel="loss", title="Loss")
    right.set(xlabel="epoch", ylabel="top-1 accuracy (%)", title="Validation accuracy")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
