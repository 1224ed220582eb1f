"""What one token of a picture attends to: in each layer, or in each head of each layer of a stage."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from torch import Tensor, nn

from natzoo.attention import Layer, attention_layers, layer_inputs, token_at, token_weights
from natzoo.classification.data.datasets import read_image
from natzoo.classification.data.transforms import evaluation_transform, preprocessing
from natzoo.classification.device import pick_device
from natzoo.classification.inference import add_model_options, requested_model
from pictures.overlay import add_key, mark, overlay, panels, to_picture

HELP = "what one token attends to, in each layer or head"


def pixel(text: str) -> tuple[float, float]:
    row, column = map(float, text.split(","))
    return row, column


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", type=Path, help="image to look at")
    add_model_options(parser)
    parser.add_argument(
        "--point", type=pixel, metavar="ROW,COLUMN", help="pixel of the token, in the cropped picture; its middle"
    )
    parser.add_argument("--stage", type=int, help="draw each head of the layers of this stage, counted from 1")
    parser.add_argument("--heads", type=int, nargs="+", metavar="HEAD", help="only these heads, counted from 1")


def prepare(args: argparse.Namespace) -> Callable[[str], plt.Figure]:
    if args.heads and not args.stage:
        raise ValueError("--heads needs --stage: stages differ in their number of heads.")
    device = pick_device(args.device)
    model, record = requested_model(args, device)
    config = preprocessing(args, model, record)
    x_CHW = evaluation_transform(config)(read_image(args.picture))
    height, width = x_CHW.shape[1:]
    point = args.point or (height / 2, width / 2)
    if not (0 <= point[0] < height and 0 <= point[1] < width):
        raise ValueError(f"--point {point[0]:g},{point[1]:g} lies outside of the picture of {height}x{width} pixels.")
    layers = layers_of(model, args.stage)
    maps = weights_at(model, x_CHW[None].to(device), layers, point)
    heads = chosen_heads(args.heads, len(maps[0]))
    picture = to_picture(x_CHW, config)
    if args.stage:
        return lambda theme: draw_heads(picture, layers, maps, point, heads)
    return lambda theme: draw_layers(picture, layers, maps, point)


def layers_of(model: nn.Module, stage: int | None) -> list[Layer]:
    """The attention layers of a stage, or all.

    Raises:
        ValueError: if there is no such stage, or no attention to look at.
    """
    layers = attention_layers(model)
    found = [layer for layer in layers if stage in (None, layer.stage)]
    if not found:
        raise ValueError(f"--stage {stage}: the model has the stages 1 to {layers[-1].stage}.")
    return found


def weights_at(model: nn.Module, x_1CHW: Tensor, layers: list[Layer], point: tuple[float, float]) -> list[Tensor]:
    """For each layer how the token at a pixel weighs the others, [heads, H, W]."""
    return [
        token_weights(layer.module, tokens, *token_at(point, x_1CHW.shape[2:], tokens.shape[1:3])).cpu()
        for layer, tokens in zip(layers, layer_inputs(model, x_1CHW, layers), strict=True)
    ]


def chosen_heads(wanted: list[int] | None, count: int) -> list[int]:
    """Numbers of heads, from 0.

    Raises:
        ValueError: on a head that there is not.
    """
    for head in wanted or []:
        if not 1 <= head <= count:
            raise ValueError(f"--heads {head}: the layers of this stage have the heads 1 to {count}.")
    return [head - 1 for head in wanted] if wanted else list(range(count))


def draw_heads(
    picture: Tensor, layers: list[Layer], maps: list[Tensor], point: tuple[float, float], heads: list[int]
) -> plt.Figure:
    """A row for each layer: the mean over its heads, then the heads."""
    figure, table = panels(len(layers), len(heads) + 1, 1.7, 1.8)
    figure.suptitle(f"attention of the framed token, stage {layers[0].stage}", fontsize=10)
    for row, layer, weights in zip(table, layers, maps, strict=True):
        row[0].set_ylabel(f"layer {layer.number}\n{layer.kind.replace(', ', chr(10))}", fontsize=8)
        for axes, heat in zip(row, [weights.mean(0), *weights[heads]], strict=True):
            draw_weights(axes, picture, heat, point)
    for axes, title in zip(table[0], ["mean", *(f"head {head + 1}" for head in heads)], strict=True):
        axes.set_title(title, fontsize=8)
    add_key(figure, table)
    return figure


def draw_layers(picture: Tensor, layers: list[Layer], maps: list[Tensor], point: tuple[float, float]) -> plt.Figure:
    """Each layer, mean over heads, in rows of up to six; a stage begins a row."""
    rows: list[list[int]] = []
    for index, layer in enumerate(layers):
        if not rows or len(rows[-1]) == 6 or layer.stage != layers[rows[-1][-1]].stage:
            rows.append([])
        rows[-1].append(index)
    figure, table = panels(len(rows), max(map(len, rows)), 1.7, 2.1)
    figure.suptitle("attention of the framed token\nmean over heads", fontsize=10)
    for axes in table.flat:
        axes.set_axis_off()
    for panel_row, row in zip(table, rows, strict=True):
        for axes, index in zip(panel_row, row, strict=False):
            layer = layers[index]
            draw_weights(axes, picture, maps[index].mean(0), point)
            axes.set_title(f"stage {layer.stage}, layer {layer.number}\n{layer.kind}", fontsize=7)
    add_key(figure, table)
    return figure


def draw_weights(axes: plt.Axes, picture: Tensor, heat_HW: Tensor, point: tuple[float, float]) -> None:
    overlay(axes, picture, heat_HW)
    mark(axes, token_at(point, picture.shape[:2], heat_HW.shape), heat_HW.shape, picture.shape)
