"""The log of a run: averages over an epoch, TensorBoard events and summary.csv."""

from __future__ import annotations

import contextlib
import csv
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from natzoo.checkpoints import write_table

log = logging.getLogger(__name__)

# Column names are part of the file format: other tools read them.
COLUMNS = (
    *("epoch", "train_loss", "val_loss", "top1", "top5"),
    *("lr", "grad_norm", "images_per_s", "seconds", "bad_images"),
)


@dataclass
class EpochMeters:
    """Sums over the updates of an epoch so far. Field names are part of the checkpoint format.

    Attributes:
        loss: sum of the losses of updates that were not skipped.
        losses: number of these updates.
        norm: sum of the finite gradient norms; with fp16 a norm may be infinite where the loss is finite.
        norms: number of these norms.
        seconds: time spent.
    """

    loss: float = 0.0
    losses: int = 0
    norm: float = 0.0
    norms: int = 0
    seconds: float = 0.0

    def update(self, loss: float, norm: float) -> None:
        """Add an update that was not skipped."""
        self.loss += loss
        self.losses += 1
        if math.isfinite(norm):
            self.norm += norm
            self.norms += 1

    @property
    def mean_loss(self) -> float:
        """Mean loss of the epoch so far; NaN before the first update."""
        return self.loss / self.losses if self.losses else math.nan

    @property
    def mean_norm(self) -> float:
        """Mean finite gradient norm of the epoch so far; NaN before the first one."""
        return self.norm / self.norms if self.norms else math.nan

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


class RunLogger:
    """Writes the metrics of a run to TensorBoard and summary.csv. Resuming from an earlier epoch drops the later rows.

    Args:
        folder: folder of the run.
        first_epoch: number of completed epochs, 0 for a new run.
        first_update: number of completed updates.
    """

    def __init__(self, folder: Path, first_epoch: int = 0, first_update: int = 0):
        self.path = folder / "summary.csv"
        self.rows = [row for row in _read_rows(self.path) if int(row["epoch"]) < first_epoch]
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_update)

    def log_update(self, update: int, **metrics: float) -> None:
        """Write each metric to TensorBoard, under train/.

        Raises:
            OSError: if the disk is full.
        """
        with self._name_folder_in_errors():
            for name, value in metrics.items():
                self.writer.add_scalar(f"train/{name}", value, update)

    def log_epoch(self, update: int, **metrics: float) -> None:
        """Write a row of summary.csv, and the metrics of the epoch to TensorBoard.

        Raises:
            OSError: if the disk is full.
        """
        self.rows.append({name: _format(metrics[name]) for name in COLUMNS})
        with self._name_folder_in_errors():
            for name in ("val_loss", "top1", "top5"):
                self.writer.add_scalar(f"val/{name.removeprefix('val_')}", metrics[name], update)
            self.writer.add_scalar("train/epoch_loss", metrics["train_loss"], update)
            self.writer.flush()
        write_table(self.path, COLUMNS, self.rows)

    def close(self) -> None:
        """Flush and close. Ignore a full disk, which must not hide the error that ended the run."""
        with contextlib.suppress(OSError):
            self.writer.close()

    @contextlib.contextmanager
    def _name_folder_in_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = f"{self.writer.log_dir} could not be written ({error.strerror}); the checkpoints are intact."
            raise OSError(error.errno, text) from error


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Read the complete rows of summary.csv. Keep a damaged file under another name: the run replaces it."""
    if not path.is_file():
        return []
    table: list[dict[str, str | None]] = []
    is_damaged = True
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file, contextlib.suppress(csv.Error):
        reader = csv.DictReader(file)
        table += reader
        is_damaged = reader.fieldnames is not None and not set(COLUMNS) <= set(reader.fieldnames)
    rows = []
    for row in table:
        values = {name: value for name in COLUMNS if (value := row.get(name)) is not None}
        if len(values) == len(COLUMNS) and values["epoch"].isdecimal():
            rows.append(values)
    if is_damaged or len(rows) < len(table):
        copy = path.with_suffix(".damaged.csv")
        path.replace(copy)
        log.warning("%s is damaged; it is now %s, and its readable rows are kept.", path, copy.name)
    return rows


def _format(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"
