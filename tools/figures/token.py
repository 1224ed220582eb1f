"""Show the attention of one token: in each layer, or in each head of the layers of one stage."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from torch import Tensor, nn

from figures.overlay import add_color_scale, mark_token, overlay, to_image
from figures.style import Theme, image_grid
from natzoo.attention import Layer, attention_layers, layer_inputs, token_at, token_weights
from natzoo.classification.data.datasets import read_image
from natzoo.classification.data.transforms import evaluation_transform, preprocessing
from natzoo.classification.inference import add_model_options, requested_model
from natzoo.device import pick_device

HELP = "attention of one token, per layer or per head"


def pixel(text: str) -> tuple[float, float]:
    """Parse ROW,COLUMN."""
    row, column = map(float, text.split(","))
    return row, column


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE", help="image file")
    add_model_options(parser)
    parser.add_argument(
        "--point",
        type=pixel,
        metavar="ROW,COLUMN",
        help="pixel of the model input that the token covers (default: the center)",
    )
    parser.add_argument("--stage", type=int, help="show each head of the layers of this stage, counted from 1")
    parser.add_argument("--heads", type=int, nargs="+", metavar="HEAD", help="heads to show, counted from 1")


def prepare(args: argparse.Namespace) -> Callable[[Theme], plt.Figure]:
    if args.heads and not args.stage:
        raise ValueError("--heads requires --stage, because the number of heads differs per stage.")
    device = pick_device(args.device)
    model, record = requested_model(args, device)
    config = preprocessing(args, model, record)
    x_CHW = evaluation_transform(config)(read_image(args.image))
    height, width = x_CHW.shape[1:]
    point = args.point or (height / 2, width / 2)
    if not (0 <= point[0] < height and 0 <= point[1] < width):
        raise ValueError(f"--point {point[0]:g},{point[1]:g} is outside the image of {height}x{width} pixels.")
    layers = select_layers(model, args.stage)
    maps = compute_weights(model, x_CHW[None].to(device), layers, point)
    heads = select_heads(args.heads, len(maps[0]))
    image = to_image(x_CHW, config)
    if args.stage:
        return lambda theme: draw_heads(image, layers, maps, point, heads)
    return lambda theme: draw_layers(image, layers, maps, point)


def select_layers(model: nn.Module, stage: int | None) -> list[Layer]:
    """Return the attention layers of a stage counted from 1, or of all stages.

    Raises:
        ValueError: unknown stage, or no attention layer.
    """
    layers = attention_layers(model)
    selected = [layer for layer in layers if stage in (None, layer.stage)]
    if not selected:
        raise ValueError(f"--stage {stage} is unknown; the model has stages 1 to {layers[-1].stage}.")
    return selected


def compute_weights(model: nn.Module, x_1CHW: Tensor, layers: list[Layer], point: tuple[float, float]) -> list[Tensor]:
    """Return the attention weights [heads, H, W] of the token at a pixel (row, column), per layer."""
    return [
        token_weights(layer.module, tokens, *token_at(point, x_1CHW.shape[2:], tokens.shape[1:3])).cpu()
        for layer, tokens in zip(layers, layer_inputs(model, x_1CHW, layers), strict=True)
    ]


def select_heads(requested: list[int] | None, count: int) -> list[int]:
    """Convert heads counted from 1 to indices; return all of them if None.

    Raises:
        ValueError: unknown head.
    """
    for head in requested or []:
        if not 1 <= head <= count:
            raise ValueError(f"--heads {head} is unknown; the layers of this stage have heads 1 to {count}.")
    return [head - 1 for head in requested] if requested else list(range(count))


def draw_heads(
    image: Tensor, layers: list[Layer], maps: list[Tensor], point: tuple[float, float], heads: list[int]
) -> plt.Figure:
    """Draw a row per layer: the mean over all heads, then the selected heads.

    Args:
        image: image [H, W, 3] with values from 0 to 1.
        layers: layers of one stage.
        maps: attention weights [heads, h, w] per layer.
        point: row and column of the token's pixel.
        heads: indices of the heads.
    """
    figure, table = image_grid(len(layers), len(heads) + 1, 1.7, 1.8)
    figure.suptitle(f"Attention of the framed token, stage {layers[0].stage}", fontsize=10)
    for row, layer, weights in zip(table, layers, maps, strict=True):
        row[0].set_ylabel(f"layer {layer.number}\n{layer.kind.replace(', ', chr(10))}", fontsize=8)
        for axes, heat in zip(row, [weights.mean(0), *weights[heads]], strict=True):
            draw_weights(axes, image, heat, point)
    for axes, title in zip(table[0], ["mean", *(f"head {head + 1}" for head in heads)], strict=True):
        axes.set_title(title, fontsize=8)
    add_color_scale(figure, table)
    return figure


def draw_layers(image: Tensor, layers: list[Layer], maps: list[Tensor], point: tuple[float, float]) -> plt.Figure:
    """Draw the mean over the heads of each layer, up to six layers per row. Each stage starts a new row.

    Args:
        image: image [H, W, 3] with values from 0 to 1.
        layers: layers of the model.
        maps: attention weights [heads, h, w] per layer.
        point: row and column of the token's pixel.
    """
    rows: list[list[int]] = []
    for index, layer in enumerate(layers):
        if not rows or len(rows[-1]) == 6 or layer.stage != layers[rows[-1][-1]].stage:
            rows.append([])
        rows[-1].append(index)
    figure, table = image_grid(len(rows), max(map(len, rows)), 1.7, 2.1)
    figure.suptitle("Attention of the framed token,\nmean over heads", fontsize=10)
    for axes in table.flat:
        axes.set_axis_off()
    for panel_row, row in zip(table, rows, strict=True):
        for axes, index in zip(panel_row, row, strict=False):
            layer = layers[index]
            draw_weights(axes, image, maps[index].mean(0), point)
            axes.set_title(f"stage {layer.stage}, layer {layer.number}\n{layer.kind}", fontsize=7)
    add_color_scale(figure, table)
    return figure


def draw_weights(axes: plt.Axes, image: Tensor, heat_hw: Tensor, point: tuple[float, float]) -> None:
    overlay(axes, image, heat_hw)
    mark_token(axes, token_at(point, image.shape[:2], heat_hw.shape), heat_hw.shape, image.shape)
