"""What a run leaves to look at: TensorBoard events, summary.csv, and a line an epoch."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from natzoo.checkpoints import write_table

COLUMNS = (
    *("epoch", "train_loss", "val_loss", "top1", "top5"),
    *("lr", "grad_norm", "images_per_s", "seconds", "bad_images"),
)


class RunLogger:
    """Writes a run's figures; one that goes on from an earlier epoch drops what came after it.

    Args:
        folder: the run's folder.
        first_epoch: the epoch that comes next; 0 for a new run.
        first_step: the optimizer step that comes next.
    """

    def __init__(self, folder: Path, first_epoch: int = 0, first_step: int = 0):
        self.path = folder / "summary.csv"
        self.rows = [row for row in _read(self.path) if int(row["epoch"]) < first_epoch]
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def step(self, step: int, **figures: float) -> None:
        """A point of each figure in TensorBoard, under train/.

        Raises:
            OSError: if the disk is full.
        """
        with self._naming_itself():
            for name, value in figures.items():
                self.writer.add_scalar(f"train/{name}", value, step)

    def epoch(self, step: int, **figures: float) -> None:
        """A row of summary.csv, and the epoch's figures in TensorBoard; raises OSError as `step`."""
        self.rows.append({name: _format(figures[name]) for name in COLUMNS})
        with self._naming_itself():
            for name in ("val_loss", "top1", "top5"):
                self.writer.add_scalar(f"val/{name.removeprefix('val_')}", figures[name], step)
            self.writer.add_scalar("train/epoch_loss", figures["train_loss"], step)
            self.writer.flush()
        write_table(self.path, COLUMNS, self.rows)

    def close(self) -> None:
        """Writes what is left, and raises nothing: whatever ended the run has its own message."""
        with contextlib.suppress(OSError):
            self.writer.close()

    @contextlib.contextmanager
    def _naming_itself(self) -> Iterator[None]:
        """Gives errors of the disk a text that says which file it was."""
        try:
            yield
        except OSError as error:
            text = f"{self.writer.log_dir} could not be written; the checkpoints are unharmed ({error.strerror})."
            raise OSError(error.errno, text) from error


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _format(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"
