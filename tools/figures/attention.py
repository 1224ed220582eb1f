"""Show the evidence for a prediction, and the attention of the token with the most evidence.

The evidence of a token is its feature times the gradient of the predicted class, where positive (HiResCAM,
arXiv:2011.08891), after the last block of stage 1. The attention is that of the same block, averaged over its heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from figures.overlay import add_color_scale, mark_token, overlay, to_image
from figures.style import Theme, image_grid
from natzoo.attention import attention_layers, layer_inputs, token_weights
from natzoo.classification.data.datasets import read_image
from natzoo.classification.data.transforms import evaluation_transform, preprocessing
from natzoo.classification.inference import add_model_options, class_names, requested_model
from natzoo.device import pick_device

HELP = "evidence for a prediction, and the attention of the token with the most evidence"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    add_model_options(parser)


class Evidence(NamedTuple):
    """Evidence for a prediction, and the attention of the token with the most evidence.

    Attributes:
        number: index of the predicted class.
        evidence_HW: evidence per token, at least 0.
        token: row and column of the token with the most evidence.
        weights_HW: attention weights of that token, averaged over the heads.
    """

    number: int
    evidence_HW: Tensor
    token: tuple[int, int]
    weights_HW: Tensor


def compute_evidence(model: nn.Module, x_1CHW: Tensor) -> Evidence:
    """Compute the evidence for the predicted class of one image, after the last block of stage 1.

    Args:
        model: NAT, DiNAT or DiNAT_s in eval mode.
        x_1CHW: normalized input [1, 3, H, W].

    Raises:
        ValueError: the model has no neighborhood attention.
    """
    layer = [layer for layer in attention_layers(model) if layer.stage == 1][-1]
    block = next(module for module in model.modules() if getattr(module, "attn", None) is layer.module)
    outputs: dict[str, Tensor] = {}
    hook = block.register_forward_hook(lambda _, __, output: outputs.update(features=output))
    try:
        logits = model(x_1CHW.requires_grad_())
    finally:
        hook.remove()
    number = int(logits.argmax())
    (gradient,) = torch.autograd.grad(logits[0, number], outputs["features"])
    evidence = (outputs["features"] * gradient).sum(-1)[0].relu().detach()
    token = divmod(int(evidence.argmax()), evidence.shape[1])
    (tokens,) = layer_inputs(model, x_1CHW, [layer])
    return Evidence(number, evidence, token, token_weights(layer.module, tokens, *token).mean(0))


def prepare(args: argparse.Namespace) -> Callable[[Theme], plt.Figure]:
    device = pick_device(args.device)
    model, record = requested_model(args, device)
    config = preprocessing(args, model, record)
    transform, classes = evaluation_transform(config), class_names(record, model.num_classes)
    inputs = [transform(read_image(path)) for path in args.images]
    answers = [compute_evidence(model, x_CHW[None].to(device)) for x_CHW in inputs]
    images = [to_image(x_CHW, config) for x_CHW in inputs]
    titles = [f"{path.parent.name}/{path.name}" for path in args.images]
    return lambda theme: draw_evidence(images, titles, answers, classes)


def draw_evidence(images: list[Tensor], titles: list[str], answers: list[Evidence], classes: list[str]) -> plt.Figure:
    """Draw a row per image: the image, the evidence for its class, and the attention of the token with the most.

    Args:
        images: images [H, W, 3] with values from 0 to 1.
        titles: one title per image.
        answers: result of `compute_evidence` per image.
        classes: names of the classes.
    """
    figure, table = image_grid(len(images), 3, 2.5, 2.6)
    for row, image, title, answer in zip(table, images, titles, answers, strict=True):
        row[0].imshow(image.numpy())
        row[0].set_title(title, fontsize=8)
        overlay(row[1], image, answer.evidence_HW, f"evidence for {classes[answer.number]}")
        overlay(row[2], image, answer.weights_HW, "attention, mean over heads")
        for axes in row[1:]:
            mark_token(axes, answer.token, answer.weights_HW.shape, image.shape)
    add_color_scale(figure, table)
    figure.supxlabel(
        "Evidence: positive part of feature times gradient (HiResCAM), after the last block of stage 1.\n"
        "Attention: of the framed token, the one with the most evidence, in that block. Stages count from 1.",
        fontsize=8,
    )
    return figure
