"""Trained models: from checkpoints of train.py, published weights, or any other weight file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from natzoo.checkpoints import load_weights, locate, locate_config, read_checkpoint, record_of, weights_of
from natzoo.checkpoints.record import RECORD
from natzoo.checkpoints.timm_config import read_timm_record
from natzoo.classification.data.transforms import preprocessing
from natzoo.classification.factory import TimmModel, check_input_size, create_model, describe_model, input_kwargs
from natzoo.classification.options import KeyValues, add_input_options, crop_pct, num_classes
from natzoo.schema import shown

_MAX_GROWTH, _SMALL = 4, 10**7  # how much larger than its weights a model may be, and values that never matter


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `requested_model` reads."""
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="checkpoint of train.py, folder or hf-hub:OWNER/NAME of timm or transformers, or weights for --model",
    )
    parser.add_argument("--model", metavar="NAME", help="timm model name; not needed with a checkpoint of train.py")
    parser.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="arguments of --model",
    )
    parser.add_argument("--num-classes", type=num_classes, metavar="N", help="number of classes of --model")
    parser.add_argument("--pretrained", action="store_true", help="load the published weights of --model")
    parser.add_argument(
        "--random", action="store_true", help="give --model random weights, to try a command without a download"
    )
    add_input_options(parser)
    parser.add_argument(
        "--crop-pct", type=crop_pct, metavar="FRACTION", help="center crop fraction (default: from the model)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto uses the GPU if there is one")


def requested_model(args: argparse.Namespace, device: torch.device) -> tuple[TimmModel, dict[str, Any]]:
    """Create the model that the options of `add_model_options` name.

    Returns:
        the model in eval mode, and its record: model, model_kwargs, classes and preprocessing, as far as known.

    Raises:
        ValueError, FileNotFoundError: if the options name no model, or as raised by `restore` and `create_model`.
    """
    if args.random and (args.checkpoint or args.pretrained):
        raise ValueError("--random requires --model, without --checkpoint and --pretrained.")
    if args.checkpoint:
        kwargs = {"num_classes": args.num_classes, **input_kwargs(args)}
        model, record = restore(args.checkpoint, args.model, kwargs, device)
    elif args.model and (args.pretrained or args.random):
        torch.manual_seed(0)
        kwargs = {"pretrained": args.pretrained, "num_classes": args.num_classes, **input_kwargs(args)}
        model = create_model(args.model, kwargs).to(device).eval()
        record = {"classes": None, "preprocessing": {}}
    else:
        raise ValueError("--checkpoint FILE, --model NAME --pretrained, or --model NAME --random is required.")
    check_input_size(model, preprocessing(args, model, record))
    return model, record


def restore(
    path: str,
    model_name: str | None = None,
    kwargs: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[TimmModel, dict[str, Any]]:
    """Create the model of a checkpoint and load its weights.

    Args:
        path: file, folder, URL or published name.
        model_name: name of the model, required if the checkpoint does not record it.
        kwargs: arguments of the model, used if the checkpoint does not record them.
        device: device to move the model to.

    Returns:
        the model in eval mode, and its record.

    Raises:
        ValueError: if the model is unknown, or the weights do not fit.
        FileNotFoundError: if the file does not exist.
    """
    model, record = create_from_checkpoint(read_with_record(path)[0], path, model_name, kwargs)
    return model.to(device).eval(), record


def read_with_record(path: str) -> tuple[dict[str, Any], Path]:
    """Read a checkpoint; for a folder or repository in the form of timm or transformers, add the record of its model.

    Returns:
        the checkpoint, and the path of its file.

    Raises:
        ValueError, FileNotFoundError, DownloadError: as raised by `locate`, `locate_config` and `read_checkpoint`.
        ModuleNotFoundError: if the form requires transformers.
    """
    source = locate(path)
    checkpoint = read_checkpoint(source)
    config = locate_config(path, source)
    if config is None:
        return checkpoint, source
    record = read_timm_record(config)
    if record is None:
        from natzoo.hf.folders import read_record

        record = read_record(config.parent)
    return checkpoint if record is None else {"state_dict": checkpoint, RECORD: record}, source


def create_from_checkpoint(
    checkpoint: dict[str, Any], path: str, model_name: str | None = None, kwargs: dict[str, Any] | None = None
) -> tuple[TimmModel, dict[str, Any]]:
    """Create the model of a checkpoint that `read_with_record` returned, on the CPU.

    Args:
        checkpoint: its content.
        path: its path, for messages.
        model_name, kwargs: as for `restore`.

    Returns:
        the model, and its record.

    Raises:
        ValueError: if the model is unknown, or the weights do not fit.
    """
    record = record_of(checkpoint, path)
    if record is None:
        if model_name is None:
            raise ValueError(f"{path} does not record which model it belongs to; name the model with --model.")
        record = {"model": model_name, "model_kwargs": kwargs or {}, "classes": None, "preprocessing": {}}
    elif model_name not in (None, record["model"]):
        raise ValueError(f"{path} belongs to the model {record['model']}, not to {model_name}; remove --model.")
    weights = weights_of(checkpoint, path)
    arguments = {"num_classes": record.get("num_classes"), **record["model_kwargs"]}
    try:
        _check_size(record["model"], arguments, weights)
        model = create_model(record["model"], arguments)
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    load_weights(model, weights, path)
    return model, record


def _check_size(name: str, arguments: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Check that a model is about as large as its weights before it is built: a record can describe any size."""
    try:
        with torch.device("meta"):
            model = create_model(name, arguments)
    except ValueError:  # wrong arguments, for which the real one raises too, or one of the few models that need memory
        return
    needed = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
    stored = sum(value.numel() for value in weights.values())
    if needed > _MAX_GROWTH * stored + _SMALL:
        described = shown(describe_model(name, arguments))
        raise ValueError(f"it has {stored} values, but its model {described} has {needed}.")


def class_names(record: dict[str, Any], num_classes: int) -> list[str]:
    """Return a name for each output of the model: from the record, else ImageNet's, else the class number."""
    names = list(record["classes"] or [])
    if not names and num_classes == 1000:
        info = ImageNetInfo()
        names = [info.index_to_description(number) for number in range(num_classes)]
    return names + [str(number) for number in range(len(names), num_classes)]
