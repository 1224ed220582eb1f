"""The state in last.pth, checked once before a run uses any of it."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natzoo.checkpoints.adapt import check_fit
from natzoo.checkpoints.read import is_dense
from natzoo.classification.logger import EpochMeters
from natzoo.schema import Rule, check_values, integer, mapping, number, optional, shown

# Options of a run that a resumed run takes from its own command line, not from the state of the optimizer.
HYPERPARAMETERS = ("lr", "initial_lr", "lr_scale", "weight_decay", "momentum", "betas", "eps")
_LARGE = 10**12

# Keys of last.pth. The format is stable: runs resume from checkpoints of earlier versions.
RULES: dict[str, Rule] = {
    # also in best.pth
    "model": mapping(),
    "model_ema": optional(mapping()),
    "record": mapping(),
    "epoch": integer(0, 10**6),
    "best": Rule("a number up to 100", number(high=100).holds),
    "best_epoch": integer(0, 10**6),
    # only in last.pth
    "update": integer(0, 10**9),
    "totals": mapping(),
    "skipped": integer(0, 10**9),
    "optimizer": mapping(),
    "scaler": mapping(),
    "options": mapping(),
    "processes": integer(1, 10**6),
    "images": mapping(),
}
_OPTIONS = {"grad_accum": integer(1, 10**6)}
_TOTALS = {
    field.name: integer(0, 10**9) if field.name in ("losses", "norms") else number(-1e30, 1e30)
    for field in fields(EpochMeters)
}
_SCALER = {
    "scale": number(1e-30, 1e30),
    "growth_factor": number(1, 1e6),
    "backoff_factor": number(1e-6, 1),
    "growth_interval": integer(1, _LARGE),
    "_growth_tracker": integer(0, _LARGE),
}


def check_progress(path: Path, state: dict[str, Any]) -> None:
    """Check the entries of a state that do not depend on the model.

    Raises:
        ValueError: naming the file and the first entry that is missing or wrong.
    """
    missing = sorted(RULES.keys() - state.keys())
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)} to resume from; use --initial-checkpoint.")
    check_values(f"{path}", state, RULES)
    check_values(f"{path}: options", state["options"], _OPTIONS)
    check_values(f"{path}: totals", state["totals"], _TOTALS)
    unknown = state["totals"].keys() - _TOTALS.keys()
    if unknown:
        raise ValueError(f"{path} has totals of {shown(sorted(unknown))}, which this version does not know.")
    if state["scaler"]:
        check_values(f"{path}: scaler", state["scaler"], _SCALER)


def check_tensors(
    path: Path,
    state: dict[str, Any],
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Check that the tensors of a state fit the model, its moving average and the optimizer of this run.

    Raises:
        ValueError: naming the file and the first entry that does not fit.
    """
    for key, target in {"model": model, "model_ema": ema}.items():
        if target is None:
            continue
        weights = state[key]
        if weights is None:
            raise ValueError(f"{path} has no moving average of the weights; resume without --model-ema.")
        for name, value in weights.items():
            if not isinstance(value, Tensor) or not is_dense(value):
                raise ValueError(f"{path} has {key}[{shown(name)}] = {shown(value)}; it must be a dense tensor.")
        check_fit(target, weights, path)
    if scaler.is_enabled() and not state["scaler"]:
        raise ValueError(f"{path} has an empty scaler, which --amp fp16 requires.")
    # With fp16, the first updates may overflow, and the optimizer has then not stepped.
    is_begun = not scaler.is_enabled() and (state["epoch"] > 0 or state["update"] > state["skipped"])
    _check_optimizer(path, state["optimizer"], optimizer, is_begun)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a checked state. Its groups contribute only what the optimizer counts, such as steps."""
    own = optimizer.state_dict()["param_groups"]
    groups = [{**ours, **_counters(theirs, ours)} for ours, theirs in zip(own, state["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def _counters(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a group in a checkpoint, except those that the options of this run set."""
    return {
        key: value
        for key, value in theirs.items()
        if key not in HYPERPARAMETERS and number().holds(value) and number().holds(ours.get(key, 0))
    }


def _check_optimizer(path: Path, state: dict[str, Any], optimizer: torch.optim.Optimizer, is_begun: bool) -> None:
    source = f"{path}: optimizer"
    groups, entries = state.get("param_groups"), state.get("state")
    own = optimizer.state_dict()["param_groups"]
    if (
        not isinstance(groups, list)
        or not all(isinstance(group, dict) for group in groups)
        or not isinstance(entries, dict)
    ):
        raise ValueError(f"{source} is not the state of an optimizer; use a checkpoint of this run.")
    if [group.get("params") for group in groups] != [group["params"] for group in own]:
        raise ValueError(f"{source} has other groups of parameters than this run; resume with the original model.")
    for group, ours in zip(groups, own, strict=True):
        if not mapping().holds(group):
            raise ValueError(f"{source} has a group with names that are not strings.")
        for key, value in _counters(group, ours).items():
            if not -_LARGE <= value <= _LARGE or (key in ("step", "k") and value < 0):
                raise ValueError(f"{source} has {shown(key)} = {shown(value)} in a group.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected = _state_after_one_step(optimizer) or {}
    if is_begun and any(expected.values()) and not entries:
        raise ValueError(f"{source} has no state after the first update; use --initial-checkpoint.")
    for index, entry in entries.items():
        if type(index) is not int or not 0 <= index < len(parameters) or not mapping().holds(entry):
            raise ValueError(f"{source} has the state {shown(index)} = {shown(entry)}, which belongs to no parameter.")
        for name, value in entry.items():
            if not _is_state(value) or (name == "step" and not _is_step(value)):
                raise ValueError(f"{source} has {shown(name)} = {shown(value)} for parameter {index}.")
        for name, shape in expected.get(index, {}).items():
            value = entry.get(name)
            found = value.shape if isinstance(value, Tensor) else None if value is None else torch.Size()
            if found != shape:
                raise ValueError(
                    f"{source} has {name} = {shown(value)} for parameter {index}; it must be of shape {list(shape)}."
                )


def _is_state(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_state, value))
    if isinstance(value, Tensor):
        return is_dense(value)
    return value is None or isinstance(value, (bool, str)) or number(-1e30, 1e30).holds(value)


def _is_step(value: Any) -> bool:
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    return number(0, _LARGE).holds(value)


def _state_after_one_step(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, torch.Size]] | None:
    """Return the shape of each value that the optimizer keeps per parameter, or None if that cannot be predicted.

    It follows from a step on parameters without storage.
    """
    try:
        groups = [
            {**group, "params": [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        trial = copy.copy(optimizer)
        trial.state, trial.param_groups = defaultdict(dict), groups
        for group in trial.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)
        trial.step()
        state = trial.state_dict()["state"]
    except Exception:  # an optimizer that reads values, or wraps another one
        return None
    return {
        index: {
            name: value.shape if isinstance(value, Tensor) else torch.Size()
            for name, value in entry.items()
            if isinstance(value, (Tensor, int, float))
        }
        for index, entry in state.items()
    }
