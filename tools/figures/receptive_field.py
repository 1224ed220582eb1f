"""Compare effective receptive fields: how much the center token of each stage depends on each pixel.

Per input, the features of the center token are projected onto a random direction of +1 and -1, and the gradient with
respect to the pixels is squared. The mean over the inputs estimates the sum of squared gradients of all features; its
square root is drawn (after arXiv:1701.04128).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from figures.models import LoadedModel, load_model
from figures.models import add_options as add_model_options
from figures.style import Theme, image_grid
from natzoo.classification.data.datasets import read_image
from natzoo.classification.data.transforms import evaluation_transform
from natzoo.classification.options import positive
from natzoo.device import pick_device

HELP = "effective receptive field of the center token of each stage, for several models"
STAGES = 4  # number of feature maps shown for models that return one per block
SHARE = 0.95  # of the gradient, inside the square that is drawn
DECADES = 4  # powers of ten of the color scale


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", type=Path, nargs="*", metavar="IMAGE", help="image files to average over (default: random noise)"
    )
    add_model_options(parser, ["nat_mini", "dinat_mini"])
    parser.add_argument(
        "--inputs", type=positive, default=16, help="number of noise inputs if no images are given (default: 16)"
    )


def receptive_fields(model: nn.Module, inputs: Iterable[Tensor]) -> list[Tensor]:
    """Compute the root mean square gradient of the center token of each stage.

    Args:
        model: backbone or classifier of timm.
        inputs: normalized inputs [1, C, H, W] of one size.

    Returns:
        One map [H, W] in pixels per stage.

    Raises:
        ValueError: the model has no `forward_intermediates`.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{type(model).__name__} has no forward_intermediates, which returns the maps of its stages.")
    generator = torch.Generator().manual_seed(0)
    totals: list[Tensor] = []
    count = 0
    for x_1CHW in inputs:
        x_1CHW = x_1CHW.detach().requires_grad_()
        maps = select_maps(model.forward_intermediates(x_1CHW, intermediates_only=True, output_fmt="NCHW"))
        squares = []
        for map_1CHW in maps:
            center = map_1CHW[0, :, map_1CHW.shape[2] // 2, map_1CHW.shape[3] // 2]
            direction = (torch.randint(0, 2, center.shape, generator=generator) * 2 - 1).to(center)
            (gradient,) = torch.autograd.grad(center @ direction, x_1CHW, retain_graph=True)
            squares.append(gradient[0].square().sum(0))
        totals = [total + square for total, square in zip(totals, squares, strict=True)] if totals else squares
        count += 1
    return [(total / count).sqrt().cpu() for total in totals]


def select_maps(maps: list[Tensor]) -> list[Tensor]:
    """Return all maps, or STAGES evenly spaced maps including the last if there are more."""
    return [maps[(number + 1) * len(maps) // STAGES - 1] for number in range(STAGES)] if len(maps) > STAGES else maps


def smallest_square(field_HW: Tensor, share: float = SHARE) -> tuple[int, int, int]:
    """Find the smallest square that contains a share of a field.

    The square is centered on the center of mass of the squared field, since the center token is not exactly at the
    center of the image. It can extend beyond the image.

    Returns:
        Row and column of its center, and its side, in pixels.
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


def prepare(args: argparse.Namespace) -> Callable[[Theme], plt.Figure]:
    device = pick_device(args.device)
    images = [read_image(path) for path in args.images]
    models, fields = [], []
    for spec in args.models:
        loaded = load_model(spec, args.pretrained, device)
        if images:
            inputs = [evaluation_transform(loaded.config)(image)[None].to(device) for image in images]
        else:
            generator = torch.Generator().manual_seed(0)
            shape = (1, *loaded.config["input_size"])
            inputs = [torch.randn(shape, generator=generator).to(device) for _ in range(args.inputs)]
        fields.append(receptive_fields(loaded.model, tqdm(inputs, desc=loaded.name, leave=False, disable=None)))
        models.append(loaded._replace(model=nn.Identity()))  # frees the weights
    source = f"images: {len(images)}" if images else f"noise inputs: {args.inputs}"
    return lambda theme: draw_fields(models, fields, source, theme.sequential)


def draw_fields(models: list[LoadedModel], fields: list[list[Tensor]], source: str, colormap: str) -> plt.Figure:
    """Draw a row per model and a column per stage.

    Args:
        models: models to compare.
        fields: result of `receptive_fields` per model.
        source: the inputs, for the title.
        colormap: name of a matplotlib colormap.
    """
    figure, table = image_grid(len(fields), max(map(len, fields)), 2.0, 2.25)
    figure.suptitle(
        f"Effective receptive field of the center token ({source})\n"
        f"log scale over {DECADES} decades; the square contains {SHARE:.0%} of the gradient",
        fontsize=9,
    )
    for row_of_axes, loaded, stages in zip(table, models, fields, strict=True):
        row_of_axes[0].set_ylabel(loaded.title, fontsize=8)
        for axes in row_of_axes[len(stages) :]:
            axes.set_axis_off()
        for number, (axes, field) in enumerate(zip(row_of_axes, stages, strict=False), start=1):
            strength = (field / field.max()).clamp(min=10.0**-DECADES).log10()
            axes.imshow(strength.numpy(), cmap=colormap, vmin=-DECADES, vmax=0)
            row, column, side = smallest_square(field)
            corner = (column - side / 2, row - side / 2)
            axes.add_patch(plt.Rectangle(corner, side, side, fill=False, edgecolor="C1", linewidth=1.2))
            axes.set_title(f"stage {number}: {min(side, *field.shape)} pixels", fontsize=8)
    return figure
