"""The record in a checkpoint: which model it belongs to, its classes, and the preprocessing of images."""

from __future__ import annotations

import os
from typing import Any

import timm

from natzoo.schema import Rule, check_values, integer, mapping, number, one_of, optional, sequence, shown, text

RECORD = "record"  # key of the entry with the record
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
MAX_CLASSES = 1_000_000
MAX_IMAGE_SIZE = 4096  # pixels per side

# Arguments of timm.create_model that name files or addresses; a checkpoint must not set them.
REFUSED_ARGUMENTS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_MAX_ARGUMENT = 100_000  # any integer in the arguments of a model
_MAX_DEPTH = 1000  # blocks of a model; building one takes milliseconds

_RULES: dict[str, Rule] = {
    "model": text(200),
    "model_kwargs": mapping(),
    "num_classes": integer(1, MAX_CLASSES),
    "classes": optional(sequence(text())),
    "preprocessing": mapping(),
}
_PREPROCESSING: dict[str, Rule] = {
    "input_size": sequence(integer(1, MAX_IMAGE_SIZE), 3, 3),
    "crop_pct": Rule("a number above 0, up to 1", lambda value: number(1e-3, 1).holds(value)),
    "interpolation": one_of(*INTERPOLATIONS),
    "mean": sequence(number(-1000, 1000), 1, 1000),
    "std": sequence(number(1e-6, 1000), 1, 1000),
}


def record_of(checkpoint: dict[str, Any], path: str | os.PathLike) -> dict[str, Any] | None:
    """Return the description of the model that the training script or tools/convert.py stored in a checkpoint.

    Args:
        checkpoint: the result of `read_checkpoint`.
        path: the file, for messages.

    Returns:
        None if there is no description, else a dict with

        - model: its registered name;
        - model_kwargs: its arguments;
        - num_classes: its number of classes;
        - classes: their names, or None;
        - preprocessing: size, crop and normalization of images in evaluation.

    Raises:
        ValueError: if it is damaged, names a model unknown to timm, sets arguments that a checkpoint must not set, or
            has implausible values.
    """
    if RECORD not in checkpoint:
        return None
    record, source = checkpoint[RECORD], f"{path} has a damaged record: it"
    check_values(source, record, _RULES, required=_RULES.keys() - {"classes"})
    if not timm.is_model(record["model"]):
        raise ValueError(f"{path} requires the model {shown(record['model'])}, which is not registered with timm.")
    arguments, preprocessing = record["model_kwargs"], record["preprocessing"]
    refused = sorted(REFUSED_ARGUMENTS & arguments.keys())
    if refused:
        raise ValueError(f"{path} sets {', '.join(refused)} in its model_kwargs; a checkpoint must not set them.")
    for name, value in arguments.items():
        if not is_plausible_argument(name, value):
            raise ValueError(f"{source} has the implausible argument {shown(name)} = {shown(value)}.")
    check_values(f"{path} has a damaged record: its preprocessing", preprocessing, _PREPROCESSING, required=())
    channels = arguments.get("in_chans", 3)
    given = {key: len(preprocessing[key]) for key in ("mean", "std") if key in preprocessing}
    if "input_size" in preprocessing:
        given["input_size"] = preprocessing["input_size"][0]
    for key, count in given.items():
        if count != channels and (key == "input_size" or count != 1):
            raise ValueError(f"{source} has {key} = {shown(preprocessing[key])} for {shown(channels)} channels.")
    classes = record.get("classes")
    if classes and len(classes) > record["num_classes"]:
        raise ValueError(f"{source} has {len(classes)} names for {record['num_classes']} classes.")
    return {"classes": None, **record}


def is_plausible_argument(name: str, value: Any) -> bool:
    """Return whether an argument of a model is plain data that does not describe a huge model."""
    return _is_plausible(value, 3) and not ("depth" in name and _total(value) > _MAX_DEPTH)


def _is_plausible(value: Any, levels: int) -> bool:
    """Return whether a value is a short string, a number that is not huge, None, or nested lists and dicts of them."""
    if isinstance(value, dict):
        return mapping().holds(value) and _is_plausible(list(value.values()), levels)
    if isinstance(value, (list, tuple)):
        return levels > 0 and len(value) <= _MAX_DEPTH and all(_is_plausible(item, levels - 1) for item in value)
    is_number = number(-_MAX_ARGUMENT, _MAX_ARGUMENT).holds(value)
    return value is None or type(value) is bool or is_number or text(200).holds(value)


def _total(value: Any) -> float:
    if isinstance(value, (list, tuple)):
        return sum(map(_total, value))
    return abs(value) if isinstance(value, (int, float)) else 0
