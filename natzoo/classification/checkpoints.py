"""The checkpoints of a run: which files there are, what they hold, and from which one a run may go on."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from natzoo.checkpoints import read_checkpoint, write_checkpoint
from natzoo.checkpoints.write import sync
from natzoo.classification.distributed import World

# Where things are and how they are shown does not matter to a run.
_PLACES = (
    *("data", "config", "work_dir", "output", "experiment", "resume", "device", "threads", "workers"),
    *("log_interval", "compile", "save_interval", "keep_last", "grad_accum"),
)
# A run that goes on with another of these would not be the same run.
_KEPT_OPTIONS = ("seed", "opt", "batch_size", "model_ema", "amp", "layer_decay", "decay_rpb")
# What a run's last checkpoint holds.
KEYS = (
    *("model", "model_ema", "record", "epoch", "best", "best_epoch"),  # best.pth too
    *("update", "totals", "skipped", "optimizer", "scaler", "options", "processes", "images"),
)


def run_folder(args: argparse.Namespace) -> Path:
    """Return the folder of the run: --work-dir, or --output and --experiment."""
    if args.work_dir:
        return Path(args.work_dir)
    return Path(args.output) / (args.experiment or (Path(args.config).stem if args.config else args.model))


class CheckpointSaver:
    """last.pth, from which a run goes on; best.pth, the weights of the best epoch; and those of the last epochs.

    Each is written by the first process alone, whole or not at all.

    Args:
        folder: the run's folder.
        keep: of how many epochs, the last ones, the checkpoint stays as epoch-N.pth.
        world: the processes.
    """

    def __init__(self, folder: Path, keep: int, world: World):
        self.folder = folder
        self.keep = keep
        self.world = world
        self.last, self.best = folder / "last.pth", folder / "best.pth"

    def save_last(self, state: dict[str, Any]) -> None:
        if self.world.is_main_process:
            write_checkpoint(self.last, state)

    def save_best(self, weights: dict[str, Any]) -> None:
        if self.world.is_main_process:
            write_checkpoint(self.best, weights)

    def keep_epoch(self, epoch: int) -> None:
        """Keeps last.pth as the checkpoint of that epoch, and removes older ones than the last `keep`."""
        if not self.world.is_main_process or self.keep == 0:
            return
        kept, temporary = self.folder / f"epoch-{epoch:04d}.pth", self.folder / ".epoch.pth.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(self.last, temporary)  # costs nothing: saving last.pth anew leaves this file alone
        except OSError:
            shutil.copyfile(self.last, temporary)
            sync(temporary)
        os.replace(temporary, kept)
        for path in self.folder.glob("epoch-*.pth"):
            number = path.stem.removeprefix("epoch-")
            if number.isdecimal() and int(number) <= epoch - self.keep:
                path.unlink()


def load_resume_state(args: argparse.Namespace, world: World) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that --resume means, if any: its path and what it holds, made with the same options.

    On another number of processes, `args.grad_accum` is changed so that an update is of the same images.

    Raises:
        ValueError: if the run's folder holds a run that --resume does not mean, which would be overwritten; if the
            checkpoint was made with options that another run would need, or lacks something.
        FileNotFoundError: if there is no such file.
    """
    last = run_folder(args) / "last.pth"
    if args.resume == "auto" or _is_started_again(args, last):
        chosen = last if last.exists() else None
        if chosen is None:
            world.say(f"the run begins: there is no {last} yet")
    else:
        chosen = None if args.resume is None else Path(args.resume)
        if last.exists() and (chosen is None or chosen.resolve().parent != last.resolve().parent):
            raise ValueError(f"{last} is there already: go on with it by --resume, or give the run a new --work-dir.")
    if chosen is None:
        return None
    state = read_checkpoint(chosen)
    missing = sorted(set(KEYS) - state.keys())
    if missing:
        raise ValueError(f"{chosen} cannot be resumed, it lacks {', '.join(missing)}: use --initial-checkpoint.")
    theirs = state["options"]
    for key in _KEPT_OPTIONS:
        _check_same(chosen, key, theirs.get(key), getattr(args, key))
    steps = theirs["grad_accum"] * state["processes"]
    if steps % world.size:
        raise ValueError(
            f"{chosen} cannot be resumed by {world.size} processes: its updates are of {steps} batches of "
            f"{args.batch_size} images, which they cannot share evenly."
        )
    if args.grad_accum != steps // world.size:
        args.grad_accum = steps // world.size
        world.say(f"--grad-accum is {args.grad_accum}, to keep {steps * args.batch_size} images an update")
    for key, ours in vars(args).items():
        if theirs.get(key) != ours and key not in _PLACES:
            world.say(f"resumed with another {key}: {ours!r} instead of {theirs.get(key)!r}")
    return chosen, state


def _is_started_again(args: argparse.Namespace, last: Path) -> bool:
    """Whether torchrun has started this run again, with the command that last.pth was made by, after a process died."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0 or not last.exists():
        return False
    return read_checkpoint(last).get("options", {}).get("resume") == args.resume


def check_same_run(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises ValueError if a checkpoint is of another model or other data than this run: has not all that it has."""
    for key, value in ours.items():
        _check_same(path, key, theirs.get(key), value)


def _check_same(path: Path, key: str, theirs: Any, ours: Any) -> None:
    if theirs != ours:
        raise ValueError(
            f"{path} cannot be resumed: its {key} is {_shown(theirs)}, but this run's is {_shown(ours)}: go on with "
            "what it was made with, or give the run a new --work-dir."
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(value)} in all)"
