"""Models as train.py builds them and as its checkpoints record them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import nn

from natzoo.checkpoints import load_weights, locate, read_checkpoint, record_of, weights_of
from natzoo.checkpoints.write import RECORD
from natzoo.classification.factory import create_model
from natzoo.classification.options import KeyValues


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that `requested_model` reads."""
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="checkpoint of train.py, folder of transformers, or weights of --model"
    )
    parser.add_argument("--model", help="a name that timm.create_model knows; a checkpoint of train.py has its own")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, help="KEY=VALUE for --model")
    parser.add_argument("--num-classes", type=int, help="classes of --model; its own unless given")
    parser.add_argument("--pretrained", action="store_true", help="use the published weights of --model")
    parser.add_argument("--img-size", type=int, help="side of the image in pixels; the model's own unless given")
    parser.add_argument("--crop-pct", type=float, help="share of the image that is kept; the model's own unless given")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is the GPU if there is one")


def requested_model(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """The model of `add_model_options` in eval mode, and its record: model, kwargs, classes, preprocessing.

    Raises:
        ValueError, FileNotFoundError: if no model is named, or as `restore` and `create_model`.
    """
    if args.checkpoint:
        return restore(args.checkpoint, args.model, {"num_classes": args.num_classes, **args.model_kwargs}, device)
    if not (args.model and args.pretrained):
        raise ValueError("no model to use: give --checkpoint FILE, or --model NAME --pretrained.")
    model = create_model(args.model, {"pretrained": True, "num_classes": args.num_classes, **args.model_kwargs})
    return model.to(device).eval(), {"classes": None, "preprocessing": {}}


def restore(
    path: str,
    model_name: str | None = None,
    kwargs: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint in eval mode, and the record that train.py left in it.

    Args:
        path: a checkpoint of train.py, a folder of transformers, or bare weights.
        model_name: which model bare weights are of.
        kwargs: that model's arguments.
        device: where to put it.

    Raises:
        ValueError: if neither the file nor `model_name` says which model it is of; or as `load_weights`.
        FileNotFoundError: if there is no such file.
    """
    model, record = create_from_checkpoint(read_with_record(path)[0], path, model_name, kwargs)
    return model.to(device).eval(), record


def read_with_record(path: str) -> tuple[dict[str, Any], Path]:
    """A checkpoint with the record of its model, if there is one, and where it is; a folder's is made of its config.

    Raises:
        ValueError, FileNotFoundError: as `locate` and `read_checkpoint`.
        ModuleNotFoundError: if a folder needs transformers to be read.
    """
    source = locate(path)
    checkpoint = read_checkpoint(source)
    if not (Path(path) / "config.json").is_file():
        return checkpoint, source
    from natzoo.hf.folders import read_record

    record = read_record(path)
    return checkpoint if record is None else {"state_dict": checkpoint, RECORD: record}, source


def create_from_checkpoint(
    checkpoint: dict[str, Any], path: str, model_name: str | None = None, kwargs: dict[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The same of what `read_checkpoint` returned, on the CPU."""
    record = record_of(checkpoint, path)
    if record is None:
        if model_name is None:
            raise ValueError(f"{path} does not say which model it is of: name it with --model.")
        record = {"model": model_name, "model_kwargs": kwargs or {}, "classes": None, "preprocessing": {}}
    elif model_name not in (None, record["model"]):
        raise ValueError(f"{path} is of the model {record['model']!r}, not of {model_name!r}: leave --model out.")
    model = create_model(record["model"], {"num_classes": record.get("num_classes"), **record["model_kwargs"]})
    load_weights(model, weights_of(checkpoint, path), path)
    return model, record


def class_names(record: dict[str, Any], num_classes: int) -> list[str]:
    """Names from the checkpoint, else ImageNet's, else numbers; one for each output of the model."""
    names = list(record["classes"] or [])
    if not names and num_classes == 1000:
        info = ImageNetInfo()
        names = [info.index_to_description(number) for number in range(num_classes)]
    return names + [str(number) for number in range(len(names), num_classes)]
