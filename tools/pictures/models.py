"""Models side by side: by registered name, with or without published weights, or by a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from natzoo.classification.data.transforms import preprocessing
from natzoo.classification.factory import create_model
from natzoo.classification.inference import class_names, restore


class Contestant(NamedTuple):
    """A model to be compared; `config` says how pictures are made its input, `weights` where its numbers come from."""

    name: str
    weights: str
    model: nn.Module
    config: dict[str, Any]
    names: list[str]

    @property
    def title(self) -> str:
        return f"{self.name}\n{self.weights}"

    @property
    def is_trained(self) -> bool:
        return self.weights != RANDOM


RANDOM = "random weights"


def add_options(parser: argparse.ArgumentParser, default: list[str]) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        default=default,
        metavar="MODEL",
        help="names that timm.create_model knows, checkpoints of train.py, or NAME=FILE for bare weights "
        f"(default: {' '.join(default)})",
    )
    parser.add_argument("--pretrained", action="store_true", help="use published weights where only a name is given")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is the GPU if there is one")


def contestant(word: str, pretrained: bool, device: torch.device) -> Contestant:
    """The model that one word of --models stands for, in eval mode; random weights are the same each time.

    Raises:
        ValueError, FileNotFoundError: as `restore` and `create_model`.
    """
    name, _, file = word.partition("=")
    if file or Path(word).exists():
        model, record = restore(file or word, name if file else None)
        path = Path(file or word).absolute()
        name = name if file else path.parent.name  # the run's: its model may be its name's in little
        weights = f"weights of {path.name}"
    else:
        torch.manual_seed(0)
        model, record = create_model(name, {"pretrained": pretrained}).eval(), {"classes": None}
        weights = "published weights" if pretrained else RANDOM
    config = preprocessing(argparse.Namespace(), model, record)
    return Contestant(name, weights, model.to(device), config, class_names(record, model.num_classes))
