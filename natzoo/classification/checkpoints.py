"""Checkpoints of a run: which files are written, what they hold, and which of them a run can resume from."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from natzoo import command_line
from natzoo.checkpoints import read_checkpoint, write_checkpoint
from natzoo.checkpoints.write import copy_atomically
from natzoo.classification.distributed import World
from natzoo.classification.options import make_parser
from natzoo.classification.state import check_progress
from natzoo.runs import lock_folder
from natzoo.schema import same, shown

# Options that a resumed run may change without notice: they do not affect the result.
_NO_EFFECT = (
    *("data", "config", "work_dir", "output", "experiment", "resume", "device", "threads", "workers"),
    *("log_interval", "log", "compile", "torchcompile", "fsdp", "save_interval", "keep_last", "grad_accum"),
    "early_stop",
)
# Options that a resumed run must not change.
_FIXED = ("seed", "opt", "batch_size", "model_ema", "amp", "layer_decay", "decay_rpb")


def run_folder(args: argparse.Namespace) -> Path:
    """Return the folder of a run: --work-dir, else --output and --experiment, else output/<config or model name>."""
    if args.work_dir:
        return Path(args.work_dir)
    return Path(args.output) / (args.experiment or (Path(args.config).stem if args.config else args.model))


@contextlib.contextmanager
def lock_run(folder: Path, world: World) -> Iterator[None]:
    """Keep all other runs out of the folder of a run until the end of the block. All processes must call it.

    Raises:
        ValueError, OSError: in all processes, as in `lock_folder`.
    """
    problem: Exception | None = None
    with contextlib.ExitStack() as stack:
        if world.is_main_process:
            try:
                stack.enter_context(lock_folder(folder))
            except command_line.USER_ERRORS as error:
                problem = error
        problem = world.gather(problem)[0]
        if problem is not None:
            raise problem
        yield


class CheckpointSaver:
    """Writes last.pth (to resume from), best.pth (weights of the best epoch) and epoch-N.pth (the last epochs).

    Only the main process writes. A file is replaced as a whole: a crash or a full disk leaves the previous one.

    Args:
        folder: folder of the run.
        keep: number of epochs whose checkpoints are kept as epoch-N.pth.
        world: the processes.
    """

    def __init__(self, folder: Path, keep: int, world: World):
        self.folder = folder
        self.keep = keep
        self.world = world
        self.last, self.best = folder / "last.pth", folder / "best.pth"

    def save_last(self, state: dict[str, Any]) -> None:
        """Write last.pth.

        Raises:
            OSError: if the disk is full or not writable; names the file.
        """
        if self.world.is_main_process:
            write_checkpoint(self.last, state)

    def save_best(self, weights: dict[str, Any]) -> None:
        """Write best.pth; raises as `save_last`."""
        if self.world.is_main_process:
            write_checkpoint(self.best, weights)

    def keep_epoch(self, epoch: int) -> None:
        """Keep last.pth as epoch-N.pth and remove those of older epochs."""
        if not self.world.is_main_process or self.keep == 0:
            return
        copy_atomically(self.last, self.folder / f"epoch-{epoch:04d}.pth")  # the next save replaces last.pth
        for path in self.folder.glob("epoch-*.pth"):
            number = path.stem.removeprefix("epoch-")
            if number.isdecimal() and int(number) <= epoch - self.keep:
                path.unlink()


def load_resume_state(args: argparse.Namespace, world: World) -> tuple[Path, dict[str, Any]] | None:
    """Read the checkpoint to resume from, if any, and check that its options fit.

    If the number of processes changed, set `args.grad_accum` so that an update still has the same number of images.

    Returns:
        the path and the content, or None for a new run.

    Raises:
        ValueError: if the folder holds a run that would be overwritten, or the checkpoint cannot be resumed.
        FileNotFoundError: if the file does not exist.
    """
    last = run_folder(args) / "last.pth"
    if args.resume == "auto" or _is_restart(args, last):
        path = last if last.exists() else None
        if path is None:
            world.print(f"No checkpoint found in {last.parent}; starting from scratch.")
    else:
        path = None if args.resume is None else Path(args.resume)
        if path is not None:
            command_line.require_file(path, "pass a checkpoint such as last.pth in the folder of a run", "--resume")
        if last.exists() and (path is None or path.resolve().parent != last.resolve().parent):
            raise ValueError(f"{last} already exists; continue that run with --resume, or choose a new --work-dir.")
    if path is None:
        return None
    state = read_checkpoint(path)
    check_progress(path, state)
    options = state["options"]
    for key in _FIXED:
        _check_equal(path, key, options.get(key), getattr(args, key))
    steps = options["grad_accum"] * state["processes"]
    if steps % world.size:
        raise ValueError(
            f"{path} has updates of {steps} batches of {args.batch_size} images, which {world.size} processes cannot "
            "share evenly; change the number of processes."
        )
    if args.grad_accum != steps // world.size:
        args.grad_accum = steps // world.size
        world.print(f"Set --grad-accum {args.grad_accum} to keep {steps * args.batch_size} images per update.")
    return path, state


def changed_options(args: argparse.Namespace, options: dict[str, Any]) -> list[str]:
    """Return a line for each option that may affect the result and differs from the one in a checkpoint."""
    defaults = make_parser()
    saved = {key: options.get(key, defaults.get_default(key)) for key in vars(args)}  # earlier versions lack some
    return [
        f"Resuming with {key} = {value!r}; the checkpoint has {shown(saved[key])}."
        for key, value in vars(args).items()
        if key not in _NO_EFFECT and not same(saved[key], value)
    ]


def _is_restart(args: argparse.Namespace, last: Path) -> bool:
    """Return whether torchrun restarted, after a process died, the command that wrote last.pth."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0 or not last.exists():
        return False
    options = read_checkpoint(last).get("options")
    return isinstance(options, dict) and same(options.get("resume"), args.resume)


def check_same_run(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Check that a checkpoint has all values of this run.

    Raises:
        ValueError: naming the file and the first value that differs.
    """
    for key, value in current.items():
        _check_equal(path, key, saved.get(key), value)


def _check_equal(path: Path, key: str, saved: Any, current: Any) -> None:
    if not same(saved, current):
        raise ValueError(
            f"{path} has {key} = {shown(saved)} but this run has {shown(current)}; resume with the original "
            "value, or choose a new --work-dir."
        )
