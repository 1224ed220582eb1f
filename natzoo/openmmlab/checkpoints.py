"""Checkpoints for mmengine's runner: written atomically as plain tensors and numbers, read without running code.

mmengine's own checkpoints contain objects of its classes, which torch.load rejects since PyTorch 2.6, and a run that
dies while it writes one leaves a truncated file.
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
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop
from mmengine.runner.checkpoint import get_torchvision_models

from natzoo.checkpoints import fit_detector, locate, read_checkpoint, weights_of, write_atomically
from natzoo.checkpoints.read import is_dense
from natzoo.schema import Rule, check_values, integer, mapping, optional, sequence, shown

_LOADABLE_PREFIXES = ("", "http://", "https://", "torchvision://", "modelzoo://")
# Services that no longer exist, or whose files mmengine would unpickle.
_REJECTED_PREFIXES = (
    "open-mmlab://",
    "openmmlab://",
    "mmcls://",
    "pavi://",
    r"(\S+\:)?s3://",
    r"(\S+\:)?petrel://",
)
# In addition to the weights, what resuming a run needs.
_RUN_RULES = {"meta": mapping(), "message_hub": mapping(), "optimizer": mapping()}
_META_RULES = {"epoch": integer(0, 10**9), "iter": integer(0, 10**12), "seed": optional(integer(0, 2**32 - 1))}
_HUB_RULES = {"log_scalars": mapping(), "runtime_info": mapping(), "resumed_keys": mapping()}
_IS_GROUP = Rule("a group of parameters", lambda value: isinstance(value, dict) and "params" in value)
_OPTIMIZER_RULES = {
    "state": Rule("a dictionary of dictionaries", lambda value: isinstance(value, dict) and _are_dicts(value)),
    "param_groups": sequence(_IS_GROUP, 1),
}
PATH_KEY = "file"  # passes the path from load_from_natzoo to PlainCheckpointHook


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def load_from_natzoo(name: str, map_location: Any = None, **kwargs: Any) -> dict[str, Any]:
    """Read a checkpoint for mmengine, whose log calls it by the name of this function without `load_from_`.

    Args:
        name: anything that natzoo.checkpoints.locate accepts, or "torchvision://MODEL".
        map_location: ignored; tensors are read to the CPU, and mmengine copies them to the model's device.
        kwargs: ignored; other arguments of mmengine's loaders.

    Returns:
        A dictionary with at least "state_dict" and "meta".

    Raises:
        ValueError, FileNotFoundError, DownloadError: as in `locate` and `read_checkpoint`.
    """
    scheme, _, model = name.partition("://")
    if scheme in ("torchvision", "modelzoo"):
        name = get_torchvision_models()[model]
    path = locate(name)
    checkpoint = read_checkpoint(path)
    _drop_configs(checkpoint)
    if "state_dict" not in checkpoint:
        checkpoint = {"state_dict": weights_of(checkpoint, path)}
    checkpoint.setdefault("meta", {})  # mmseg requires it
    checkpoint[PATH_KEY] = str(path)
    return checkpoint


def _drop_configs(checkpoint: dict[str, Any]) -> None:
    """Remove the configs that a checkpoint contains as text: mmengine would execute them, and they may be anyone's."""
    hub = checkpoint.get("message_hub")
    for part in (checkpoint.get("meta"), hub.get("runtime_info") if isinstance(hub, dict) else None):
        for key in ("config", "cfg") if isinstance(part, dict) else ():
            part.pop(key, None)


def _reject(name: str, **kwargs: Any) -> None:
    raise ValueError(f"{name} uses an unsupported scheme; use a path, a URL or the name of a published checkpoint.")


CheckpointLoader.register_scheme(_LOADABLE_PREFIXES, load_from_natzoo, force=True)
CheckpointLoader.register_scheme(_REJECTED_PREFIXES, _reject, force=True)


def latest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """Return the checkpoint with the highest iteration or epoch in the folder of a run, or None."""
    matches = {path: re.fullmatch(r"(?:iter|epoch)_(\d+)\.pth", path.name) for path in Path(folder).glob("*.pth")}
    progress = {path: int(match[1]) for path, match in matches.items() if match}
    return max(progress, key=progress.get, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@register_backend("local", force=True, prefixes="")
class AtomicBackend(LocalBackend):
    """Local file backend that writes to a temporary file and renames it."""

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(filepath, lambda file: file.write(obj))


class _DelayedRemoval:
    """File backend that collects files to remove until `flush`, and ignores files outside one folder."""

    def __init__(self, backend: LocalBackend, folder: str | os.PathLike):
        self.backend, self.folder = backend, Path(folder).resolve()
        self.pending: list[str | os.PathLike] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def isfile(self, path: str | os.PathLike) -> bool:
        # mmengine removes only what exists: deny files of other folders.
        return Path(path).resolve().parent == self.folder and self.backend.isfile(path)

    def remove(self, path: str | os.PathLike) -> None:
        self.pending.append(path)

    def flush(self) -> None:
        while self.pending:
            self.backend.remove(self.pending.pop())


@HOOKS.register_module(name="CheckpointHook", force=True)
class SafeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, except that it removes old checkpoints only after the new one is written.

    It also never removes files of another run: a run resumed in a new folder knows the best checkpoint of the old one.
    """

    def before_train(self, runner: Any) -> None:
        super().before_train(runner)
        self.file_backend = _DelayedRemoval(self.file_backend, self.out_dir)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        self.file_backend.flush()

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, float]) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self.file_backend.flush()


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Convert checkpoints to plain values before writing and back after reading, and check that they fit the model.

    Args:
        new_classes: keep the model's own values in layers for another number of classes, to fine-tune.
    """

    priority = "VERY_LOW"  # runs last, after other hooks have added to the checkpoint

    def __init__(self, new_classes: bool = False):
        self.new_classes = new_classes

    def before_train(self, runner: Any) -> None:
        loop = runner.train_loop
        key = "max_epochs" if isinstance(loop, EpochBasedTrainLoop) else "max_iters"
        if runner.iter >= loop.max_iters:
            text = f"Nothing to do: the run has reached train_cfg.{key}={getattr(loop, key)}; raise it to continue."
            print_log(text, logger="current", level=logging.INFO)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        for key, value in checkpoint.items():
            checkpoint[key] = _to_plain(value)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Adapt the weights to the model and restore the history buffers.

        Raises:
            ValueError: if the checkpoint belongs to another model, or lacks what resuming requires.
        """
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        path = checkpoint.pop(PATH_KEY, "the checkpoint")
        if not mapping().holds(checkpoint["state_dict"]):
            raise ValueError(f"{path} has no weights in its state_dict, but {shown(checkpoint['state_dict'])}.")
        if runner.cfg.get("resume"):
            _check_state(checkpoint, path)
        else:
            checkpoint.pop("message_hub", None)
        checkpoint["state_dict"], notes = fit_detector(checkpoint["state_dict"], model, path, self.new_classes)
        for note in notes:
            print_log(f"{path}: {note}", logger="current", level=logging.INFO)
        if "message_hub" in checkpoint:
            scalars = checkpoint["message_hub"]["log_scalars"]
            checkpoint["message_hub"]["log_scalars"] = OrderedDict(
                (name, _to_buffer(value, path) if isinstance(value, dict) else value) for name, value in scalars.items()
            )


def _check_state(checkpoint: dict[str, Any], path: str) -> None:
    """Check what mmengine resumes a run from.

    Raises:
        ValueError: naming the file and the first entry that is missing or wrong.
    """
    meta = checkpoint.get("meta")
    if not checkpoint.keys() >= _RUN_RULES.keys() or (isinstance(meta, dict) and "iter" not in meta):
        raise ValueError(f"{path} contains only weights and cannot be resumed; use --load-from to start a new run.")
    check_values(path, checkpoint, _RUN_RULES)
    check_values(f"{path}: meta", checkpoint["meta"], _META_RULES, required=("epoch", "iter"))
    check_values(f"{path}: message_hub", checkpoint["message_hub"], _HUB_RULES)
    check_values(f"{path}: optimizer", checkpoint["optimizer"], _OPTIMIZER_RULES)


def _are_dicts(values: dict[Any, Any]) -> bool:
    return all(type(key) is int and isinstance(value, dict) for key, value in values.items())


def _to_plain(value: Any) -> Any:
    """Convert NumPy arrays to tensors, NumPy scalars to Python's, and history buffers to dictionaries of tensors."""
    if isinstance(value, HistoryBuffer):
        history, counts = value.data
        return {"history": torch.from_numpy(history), "counts": torch.from_numpy(counts), "length": value.max_length}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return type(value)((key, _to_plain(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_to_plain(item) for item in value)
    return value


def _to_buffer(plain: dict[str, Any], path: str) -> HistoryBuffer:
    rules = {"history": _NUMBERS, "counts": _NUMBERS, "length": integer(1, 10**9)}
    check_values(f"{path}: a history in message_hub", plain, rules)
    return HistoryBuffer(plain["history"].numpy(), plain["counts"].numpy(), plain["length"])


_NUMBERS = Rule(
    "a list of numbers", lambda value: isinstance(value, torch.Tensor) and is_dense(value) and value.dim() == 1
)
