"""Load the models of --models: a name in timm with or without published weights, or a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from natzoo.classification.data.transforms import preprocessing
from natzoo.classification.factory import create_model
from natzoo.classification.inference import class_names, restore

RANDOM = "random weights"


class LoadedModel(NamedTuple):
    """A model in eval mode.

    Attributes:
        name: model name, or the name of the run.
        weights: origin of the weights, for titles.
        model: the model itself.
        config: preprocessing of its input images.
        classes: names of its classes.
    """

    name: str
    weights: str
    model: nn.Module
    config: dict[str, Any]
    classes: list[str]

    @property
    def title(self) -> str:
        return f"{self.name}\n{self.weights}"

    @property
    def is_trained(self) -> bool:
        return self.weights != RANDOM


def add_options(parser: argparse.ArgumentParser, default: list[str]) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        default=default,
        metavar="MODEL",
        help="model names in timm, checkpoints written by train.py, or NAME=FILE for a file that contains weights only "
        f"(default: {' '.join(default)})",
    )
    parser.add_argument("--pretrained", action="store_true", help="load published weights for models given by name")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if available)")


def load_model(spec: str, pretrained: bool, device: torch.device) -> LoadedModel:
    """Load one model of --models. Random weights are the same in every call.

    Args:
        spec: NAME, FILE or NAME=FILE, as `--models` accepts them.
        pretrained: whether a NAME has its published weights.
        device: device of the model.

    Raises:
        ValueError: unknown name, or weights that do not fit the model.
        FileNotFoundError: missing file.
    """
    name, _, file = spec.partition("=")
    if file or Path(spec).exists():
        path = Path(file or spec).absolute()
        model, record = restore(file or spec, name if file else None)
        name = name if file else path.parent.name
        weights = path.name
    else:
        torch.manual_seed(0)
        model, record = create_model(name, {"pretrained": pretrained}).eval(), {"classes": None}
        weights = "published weights" if pretrained else RANDOM
    config = preprocessing(argparse.Namespace(), model, record)
    return LoadedModel(name, weights, model.to(device), config, class_names(record, model.num_classes))
