"""Models as train.py builds them and as its checkpoints record them."""

from __future__ import annotations

import argparse
import difflib
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import nn

import natzoo  # noqa: F401  registers the models
from natzoo.checkpoints import load_weights, read_checkpoint


def create_model(name: str, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
    """timm.create_model with errors that help; arguments that are None are left to the model.

    Raises:
        ValueError: on a name that timm does not know, naming the nearest one; on arguments the model does not take.
    """
    kwargs = {key: value for key, value in {"num_classes": num_classes, **kwargs}.items() if value is not None}
    if "/" not in name and not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.0)
        raise ValueError(f"there is no model {name!r}: did you mean {nearest[0]!r}?")
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        raise ValueError(f"model {name!r} does not take these arguments: {error}.") from error


def preprocessing(args: argparse.Namespace, model: nn.Module, record: dict[str, Any] | None = None) -> dict[str, Any]:
    """Size, crop and colours of evaluation: from the options, else from a checkpoint's record, else the model's own."""
    given = {name: getattr(args, name, None) for name in ("img_size", "crop_pct", "interpolation", "mean", "std")}
    given = {key: value for key, value in given.items() if value is not None}
    recorded = (record or {}).get("preprocessing", {})
    if "img_size" in given:
        recorded = {key: value for key, value in recorded.items() if key != "input_size"}
    config = resolve_data_config({**recorded, **given}, model=model)
    kept = ("input_size", "crop_pct", "interpolation", "mean", "std")
    return {name: list(value) if isinstance(value := config[name], tuple) else value for name in kept}


def evaluation_transform(config: dict[str, Any]):
    """PIL image -> normalised tensor, as `preprocessing` says."""
    return create_transform(is_training=False, **config)


def restore(path: str, model_name: str | None = None, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """The model of a checkpoint and the record that train.py left in it: model, kwargs, classes, preprocessing.

    Args:
        path: a checkpoint of train.py, or bare weights.
        model_name: which model bare weights are of.

    Raises:
        ValueError: if neither the file nor `model_name` says which model it is of; or as `load_weights`.
        FileNotFoundError: if there is no such file.
    """
    record = read_checkpoint(path).get("record")
    if not isinstance(record, dict):
        if model_name is None:
            raise ValueError(f"{path} does not say which model it is of: name it with --model.")
        record = {"model": model_name, "model_kwargs": {}, "num_classes": None, "classes": None, "preprocessing": {}}
    elif model_name not in (None, record["model"]):
        raise ValueError(f"{path} is of the model {record['model']!r}, not of {model_name!r}: leave --model out.")
    model = create_model(record["model"], record["num_classes"], **record["model_kwargs"])
    load_weights(model, path)
    return model.to(device).eval(), record
