"""Train a part of a model: freeze its first stages, or everything but the classifier."""

from __future__ import annotations

import argparse
from typing import Any

from timm.models import group_parameters
from torch import nn


def freeze(args: argparse.Namespace, model: Any) -> None:
    """Freeze what --freeze and --linear-probe name; `train_mode` keeps these parts in eval mode.

    Raises:
        ValueError: if the model has no such stages, or no classifier.
    """
    if args.linear_probe:
        classifier = list(model.get_classifier().parameters())
        if not classifier:
            raise ValueError(f"--linear-probe requires a classifier, which the model {args.model} lacks.")
        model.requires_grad_(False)
        for parameter in classifier:
            parameter.requires_grad_(True)
    elif args.freeze is not None:
        # timm's groups: 0 is the stem, then the stages; the last one is what follows them.
        groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        stages = max(groups.values()) - 1
        if args.freeze > stages:
            raise ValueError(f"--freeze {args.freeze} exceeds the {stages} stages of the model; use --linear-probe.")
        for name, parameter in model.named_parameters():
            if groups[name] <= args.freeze:
                parameter.requires_grad_(False)


def train_mode(model: nn.Module) -> None:
    """Set the training mode of a model, except for modules whose parameters are all frozen."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
