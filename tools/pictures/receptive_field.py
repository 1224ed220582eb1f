"""Effective receptive fields by stage: which pixels the middle of a stage's feature map depends on, and how much.

For each input the middle token's features are pushed in a random direction of +-1, and the gradient with respect to the
pixels is squared; the mean over inputs then is the sum over features of their squared gradients (its root is drawn).
After arXiv:1701.04128.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from natzoo.classification.data.datasets import read_image
from natzoo.classification.data.transforms import evaluation_transform
from natzoo.classification.device import pick_device
from natzoo.classification.options import positive
from pictures.models import Contestant, contestant
from pictures.models import add_options as add_model_options
from pictures.overlay import panels
from pictures.style import SEQUENTIAL

HELP = "the pixels that the middle of each stage depends on, of several models"
STAGES = 4  # of models that count each block as a stage, so many of them, evenly
SHARE = 0.95
DECADES = 4  # what is weaker by more powers of ten than these has the colour of nothing


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", type=Path, nargs="*", help="images to average over; noise, where there are none")
    add_model_options(parser, ["nat_mini", "dinat_mini"])
    parser.add_argument("--inputs", type=positive, default=16, help="how many inputs of noise, without pictures")


def receptive_fields(model: nn.Module, inputs: Iterable[Tensor]) -> list[Tensor]:
    """For each stage the root mean square gradient of its middle token, [H, W] pixels.

    Args:
        inputs: pictures [1, C, H, W] of one size.

    Raises:
        ValueError: if the model cannot give the feature maps of its stages.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{type(model).__name__} has no forward_intermediates, which gives the maps of its stages.")
    draws = torch.Generator().manual_seed(0)
    totals: list[Tensor] = []
    count = 0
    for x_1CHW in inputs:
        x_1CHW = x_1CHW.detach().requires_grad_()
        maps = spread(model.forward_intermediates(x_1CHW, intermediates_only=True, output_fmt="NCHW"))
        squares = []
        for map_1CHW in maps:
            middle = map_1CHW[0, :, map_1CHW.shape[2] // 2, map_1CHW.shape[3] // 2]
            direction = (torch.randint(0, 2, middle.shape, generator=draws) * 2 - 1).to(middle)
            (gradient,) = torch.autograd.grad(middle @ direction, x_1CHW, retain_graph=True)
            squares.append(gradient[0].square().sum(0))
        totals = [total + square for total, square in zip(totals, squares, strict=True)] if totals else squares
        count += 1
    return [(total / count).sqrt().cpu() for total in totals]


def spread(maps: list[Tensor]) -> list[Tensor]:
    """All maps, or of more than STAGES so many, evenly, the last among them."""
    return [maps[(number + 1) * len(maps) // STAGES - 1] for number in range(STAGES)] if len(maps) > STAGES else maps


def square_of_share(field_HW: Tensor, share: float = SHARE) -> tuple[int, int, int]:
    """Row, column and side in pixels of the smallest square that holds this share of a field; a part may lie outside.

    It is that around the centre of mass of the field's square, since a token does not stand in the middle of a picture.
    """
    height, width = field_HW.shape
    field = field_HW.double()
    mass = field.square() / field.square().sum()
    y, x = torch.arange(height), torch.arange(width)
    row, column = round(float(mass.sum(1) @ y.double())), round(float(mass.sum(0) @ x.double()))
    distance = torch.maximum((y - row).abs()[:, None], (x - column).abs()[None])
    inside = torch.zeros(max(height, width), dtype=torch.float64)
    inside = inside.index_add_(0, distance.flatten(), field.flatten()).cumsum(0)
    return row, column, 2 * int((inside >= share * inside[-1]).nonzero()[0]) + 1


def prepare(args: argparse.Namespace) -> Callable[[str], plt.Figure]:
    device = pick_device(args.device)
    images = [read_image(path) for path in args.pictures]
    contestants, fields = [], []
    for word in args.models:
        each = contestant(word, args.pretrained, device)
        if images:
            inputs = [evaluation_transform(each.config)(image)[None].to(device) for image in images]
        else:
            draws = torch.Generator().manual_seed(0)
            shape = (1, *each.config["input_size"])
            inputs = [torch.randn(shape, generator=draws).to(device) for _ in range(args.inputs)]
        fields.append(receptive_fields(each.model, tqdm(inputs, desc=each.name, leave=False, disable=None)))
        contestants.append(each._replace(model=nn.Identity()))  # what is drawn needs no weights
    source = f"{len(images)} pictures" if images else f"{args.inputs} inputs of noise"
    return lambda theme: draw_fields(contestants, fields, source, SEQUENTIAL[theme])


def draw_fields(contestants: list[Contestant], fields: list[list[Tensor]], source: str, colours: str) -> plt.Figure:
    """A row for each model, a column for each stage, with the square that holds most of the gradient."""
    figure, table = panels(len(fields), max(map(len, fields)), 2.0, 2.25)
    figure.suptitle(
        f"effective receptive field of the middle token, mean over {source}\n"
        f"logarithmic, {DECADES} powers of ten; the square holds {SHARE:.0%} of the gradient",
        fontsize=9,
    )
    for panels_of, each, stages in zip(table, contestants, fields, strict=True):
        panels_of[0].set_ylabel(each.title, fontsize=8)
        for axes in panels_of[len(stages) :]:
            axes.set_axis_off()
        for number, (axes, field) in enumerate(zip(panels_of, stages, strict=False), start=1):
            strength = (field / field.max()).clamp(min=10.0**-DECADES).log10()
            axes.imshow(strength.numpy(), cmap=colours, vmin=-DECADES, vmax=0)
            row, column, side = square_of_share(field)
            corner = (column - side / 2, row - side / 2)
            axes.add_patch(plt.Rectangle(corner, side, side, fill=False, edgecolor="C1", linewidth=1.2))
            axes.set_title(f"stage {number}: {min(side, *field.shape)} pixels", fontsize=8)
    return figure
