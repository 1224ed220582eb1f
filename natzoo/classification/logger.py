"""The log of a run: averages over an epoch, summary.csv, and trackers: TensorBoard, Weights & Biases or Trackio."""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from natzoo.checkpoints import write_atomically, write_table
from natzoo.command_line import printable

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


# ----- trackers ------------------------------------------------------------------------------------------------------


class TensorBoard:
    """Writes scalars to the folder tensorboard/ of a run. Resuming from an earlier update drops the later ones."""

    def __init__(self, folder: Path, options: Mapping[str, Any], first_update: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_update)

    def log(self, metrics: Mapping[str, float], update: int, is_last_of_epoch: bool) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, update)
        if is_last_of_epoch:
            self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class OnlineTracker:
    """Sends scalars to Weights & Biases, or to Trackio, which has the same interface.

    A run has the name of its folder; a resumed run continues it.
    """

    package = ""

    def __init__(self, folder: Path, options: Mapping[str, Any], first_update: int):
        self.module = importlib.import_module(self.package)
        config = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in options.items()}
        more = self.options(folder, first_update)
        self.run = self.module.init(project="natzoo", name=folder.name, config=config, **more)

    def options(self, folder: Path, first_update: int) -> dict[str, Any]:
        return {"resume": "allow" if first_update else "never"}

    def log(self, metrics: Mapping[str, float], update: int, is_last_of_epoch: bool) -> None:
        self.module.log(dict(metrics), step=update)

    def close(self) -> None:
        self.module.finish()


class WandB(OnlineTracker):
    """Weights & Biases; WANDB_MODE=offline keeps the run in its folder.

    The identifier of the run is kept in wandb/run_id: a resumed run continues it.
    """

    package = "wandb"

    def __init__(self, folder: Path, options: Mapping[str, Any], first_update: int):
        super().__init__(folder, options, first_update)
        path = _run_id(folder)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda file: file.write(self.run.id.encode()))

    def options(self, folder: Path, first_update: int) -> dict[str, Any]:
        path = _run_id(folder)
        identifier = path.read_text() if first_update and path.is_file() else None
        return {"dir": str(folder), "id": identifier, "resume": "allow"}


def _run_id(folder: Path) -> Path:
    return folder / "wandb" / "run_id"


class Trackio(OnlineTracker):
    """Trackio, a dashboard on this machine."""

    package = "trackio"


TRACKERS: dict[str, tuple[type, str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WandB, "wandb"),
    "trackio": (Trackio, "trackio"),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError if the package of a tracker is not installed."""
    for name in names:
        package = TRACKERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--log {name} requires the package {package}; install it, or choose another tracker.")


class RunLogger:
    """Writes the metrics of a run to summary.csv and to trackers. Resuming from an earlier epoch drops the later rows.

    A tracker that fails is dropped with a warning; it never stops the run.

    Args:
        folder: folder of the run.
        first_epoch: number of completed epochs, 0 for a new run.
        first_update: number of completed updates.
        trackers: names of trackers.
        options: the options of the run, for the trackers.
    """

    def __init__(
        self,
        folder: Path,
        first_epoch: int = 0,
        first_update: int = 0,
        trackers: Sequence[str] = ("tensorboard",),
        options: Mapping[str, Any] | None = None,
    ):
        self.path = folder / "summary.csv"
        self.rows = [row for row in _read_rows(self.path) if int(row["epoch"]) < first_epoch]
        self.trackers: dict[str, Any] = {}
        for name in trackers:
            with self._drop_if_it_fails(name):
                self.trackers[name] = TRACKERS[name][0](folder, options or {}, first_update)

    def log_update(self, update: int, **metrics: float) -> None:
        """Send each metric to the trackers, under train/."""
        named = {f"train/{name}": value for name, value in metrics.items()}
        self._call(lambda tracker: tracker.log(named, update, is_last_of_epoch=False))

    def log_epoch(self, update: int, **metrics: float) -> None:
        """Write a row of summary.csv, and send the metrics of the epoch to the trackers.

        Raises:
            OSError: if summary.csv cannot be written.
        """
        self.rows.append({name: _format(metrics[name]) for name in COLUMNS})
        named = {f"val/{name.removeprefix('val_')}": metrics[name] for name in ("val_loss", "top1", "top5")}
        named["train/epoch_loss"] = metrics["train_loss"]
        self._call(lambda tracker: tracker.log(named, update, is_last_of_epoch=True))
        write_table(self.path, COLUMNS, self.rows)

    def close(self) -> None:
        """Close the trackers."""
        self._call(lambda tracker: tracker.close())
        self.trackers = {}

    def _call(self, function: Callable[[Any], object]) -> None:
        for name, tracker in list(self.trackers.items()):
            with self._drop_if_it_fails(name):
                function(tracker)

    @contextlib.contextmanager
    def _drop_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of someone else's package, network or disk
            self.trackers.pop(name, None)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            tqdm.write(printable(f"Warning: --log {name} failed ({reason}); the run continues without it."))


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
