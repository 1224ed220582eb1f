"""Checkpoints of mmengine, safe and whole: plain tensors and numbers, written atomically, read without running code.

mmengine's own hold objects of its classes, which torch.load refuses since PyTorch 2.6; and a run that dies while it
writes one leaves half a file.
"""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import get_torchvision_models

from natzoo.checkpoints import fit_detector, locate, read_checkpoint, weights_of, write_atomically

# Where mmengine would fetch and unpickle by other ways; the last are of services that no longer answer.
_PREFIXES = ("", "http://", "https://", "torchvision://", "modelzoo://")
_CLOSED = ("open-mmlab://", "openmmlab://", "mmcls://", "pavi://", r"(\S+\:)?s3://", r"(\S+\:)?petrel://")
_OF_A_RUN = {"meta", "message_hub", "optimizer"}  # what a checkpoint holds, beside weights, of a run that can go on
_FILE = "file"  # where the loader tells the hook what was loaded


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def load_from_natzoo(name: str, map_location: Any = None, **kwargs: Any) -> dict[str, Any]:
    """A checkpoint as mmengine wants it, of whatever natzoo.checkpoints.locate takes, or of torchvision://MODEL."""
    scheme, _, model = name.partition("://")
    if scheme in ("torchvision", "modelzoo"):
        name = get_torchvision_models()[model]
    path = locate(name)
    checkpoint = read_checkpoint(path)
    if "state_dict" not in checkpoint:
        checkpoint = {"state_dict": weights_of(checkpoint, path), "meta": {}}
    checkpoint[_FILE] = str(path)
    return checkpoint


def _refuse(name: str, **kwargs: Any) -> None:
    raise ValueError(
        f"{name} cannot be fetched: give a path, a URL, or a name that `python tools/download.py list` shows."
    )


CheckpointLoader.register_scheme(_PREFIXES, load_from_natzoo, force=True)
CheckpointLoader.register_scheme(_CLOSED, _refuse, force=True)


def latest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The checkpoint of a run that has come farthest, or None."""
    numbers = {path: re.fullmatch(r"(?:iter|epoch)_(\d+)\.pth", path.name) for path in Path(folder).glob("*.pth")}
    found = {path: int(match[1]) for path, match in numbers.items() if match}
    return max(found, key=found.get, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@register_backend("local", force=True, prefixes="")
class AtomicBackend(LocalBackend):
    """Files of this machine, which appear whole or not at all."""

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(filepath, lambda file: file.write(obj))


class _LateRemoval:
    """A file backend that removes what it is told to only when asked again, and only files of one folder."""

    def __init__(self, backend: LocalBackend, folder: str | os.PathLike):
        self.backend, self.folder = backend, Path(folder).resolve()
        self.waiting: list[str | os.PathLike] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def isfile(self, path: str | os.PathLike) -> bool:
        """False elsewhere, so that mmengine does not remove it."""
        return Path(path).resolve().parent == self.folder and self.backend.isfile(path)

    def remove(self, path: str | os.PathLike) -> None:
        self.waiting.append(path)

    def remove_waiting(self) -> None:
        while self.waiting:
            self.backend.remove(self.waiting.pop())


@HOOKS.register_module(name="CheckpointHook", force=True)
class SafeCheckpointHook(CheckpointHook):
    """mmengine's own, of every config, but an old checkpoint is removed only when the new one is there, and none of
    another run, whose best one a resumed run knows of."""

    def before_train(self, runner: Any) -> None:
        super().before_train(runner)
        self.file_backend = _LateRemoval(self.file_backend, self.out_dir)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        self.file_backend.remove_waiting()

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, float]) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self.file_backend.remove_waiting()


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Makes checkpoints plain when they are written, and what they were when they are read; and checks that they fit.

    Args:
        new_classes: whether the weights of layers for another number of classes are left out, to fine-tune.
    """

    priority = "VERY_LOW"  # sees what other hooks add to a checkpoint

    def __init__(self, new_classes: bool = False):
        self.new_classes = new_classes

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        for key, value in checkpoint.items():
            checkpoint[key] = _plain(value)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError if the checkpoint is of another model, or lacks what a run to resume needs."""
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        path = checkpoint.pop(_FILE, "the checkpoint")
        if runner.cfg.get("resume") and not (checkpoint.keys() >= _OF_A_RUN and "iter" in checkpoint["meta"]):
            raise ValueError(f"{path} holds no run to go on with: use --load-from, which starts one from its weights.")
        checkpoint["state_dict"], notes = fit_detector(checkpoint["state_dict"], model, path, self.new_classes)
        for note in notes:
            print_log(f"{path}: {note}", logger="current", level=logging.INFO)
        if "message_hub" in checkpoint:
            scalars = checkpoint["message_hub"]["log_scalars"]
            checkpoint["message_hub"]["log_scalars"] = OrderedDict(
                (name, _buffer(value) if isinstance(value, dict) else value) for name, value in scalars.items()
            )


def _plain(value: Any) -> Any:
    """The same without objects: NumPy's numbers as Python's, its arrays as tensors, a history as a dict of tensors."""
    if isinstance(value, HistoryBuffer):
        history, counts = value.data
        return {"history": torch.from_numpy(history), "counts": torch.from_numpy(counts), "length": value.max_length}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return type(value)((key, _plain(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value


def _buffer(plain: dict[str, Any]) -> HistoryBuffer:
    return HistoryBuffer(plain["history"].numpy(), plain["counts"].numpy(), plain["length"])
