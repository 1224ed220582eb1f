"""What a prediction rests on: the evidence for it, and the window of the token with the most evidence."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from natzoo.attention import attention_layers, layer_inputs, token_weights
from natzoo.classification.data.datasets import read_image
from natzoo.classification.data.transforms import evaluation_transform, preprocessing
from natzoo.classification.device import pick_device
from natzoo.classification.inference import add_model_options, class_names, requested_model
from pictures.overlay import add_key, mark, overlay, panels, to_picture

HELP = "what a prediction rests on"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", type=Path, nargs="+", help="images to look at")
    add_model_options(parser)


class Evidence(NamedTuple):
    """What a prediction rests on.

    Attributes:
        number: of the class.
        evidence_HW: for that class, of each token: feature times gradient where positive (HiResCAM, arXiv:2011.08891).
        token: row and column of the token with the most.
        weights_HW: how that token weighs the others, mean over heads.
    """

    number: int
    evidence_HW: Tensor
    token: tuple[int, int]
    weights_HW: Tensor


def evidence_and_window(model: nn.Module, x_1CHW: Tensor) -> Evidence:
    """What a prediction rests on, at the first stage.

    Raises:
        ValueError: if the model has no neighborhood attention.
    """
    layer = [layer for layer in attention_layers(model) if layer.stage == 1][-1]
    block = next(module for module in model.modules() if getattr(module, "attn", None) is layer.module)
    seen: dict[str, Tensor] = {}
    hook = block.register_forward_hook(lambda _, __, output: seen.update(features=output))
    try:
        logits = model(x_1CHW.requires_grad_())
    finally:
        hook.remove()
    number = int(logits.argmax())
    (gradient,) = torch.autograd.grad(logits[0, number], seen["features"])
    evidence = (seen["features"] * gradient).sum(-1)[0].relu().detach()
    token = divmod(int(evidence.argmax()), evidence.shape[1])
    (tokens,) = layer_inputs(model, x_1CHW, [layer])
    return Evidence(number, evidence, token, token_weights(layer.module, tokens, *token).mean(0))


def prepare(args: argparse.Namespace) -> Callable[[str], plt.Figure]:
    device = pick_device(args.device)
    model, record = requested_model(args, device)
    config = preprocessing(args, model, record)
    transform, names = evaluation_transform(config), class_names(record, model.num_classes)
    inputs = [transform(read_image(path)) for path in args.pictures]
    found = [evidence_and_window(model, x_CHW[None].to(device)) for x_CHW in inputs]
    seen = [to_picture(x_CHW, config) for x_CHW in inputs]
    titles = [f"{path.parent.name}/{path.name}" for path in args.pictures]
    return lambda theme: draw_evidence(seen, titles, found, names)


def draw_evidence(seen: list[Tensor], titles: list[str], found: list[Evidence], names: list[str]) -> plt.Figure:
    """A row for each picture: itself, the evidence for its class, the window of the token with the most of it."""
    figure, table = panels(len(seen), 3, 2.5, 2.6)
    for row, picture, title, answer in zip(table, seen, titles, found, strict=True):
        row[0].imshow(picture.numpy())
        row[0].set_title(title, fontsize=8)
        overlay(row[1], picture, answer.evidence_HW, f"evidence for {names[answer.number]}")
        overlay(row[2], picture, answer.weights_HW, "attention of the framed token")
        for axes in row[1:]:
            mark(axes, answer.token, answer.weights_HW.shape, picture.shape)
    add_key(figure, table)
    figure.supxlabel(
        "evidence: features times gradients of the first stage, where positive; background counts too", fontsize=8
    )
    return figure
