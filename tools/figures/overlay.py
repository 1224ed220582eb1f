"""Draw maps of tokens over the image they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from torch import Tensor


def to_image(x_CHW: Tensor, config: dict[str, Any]) -> Tensor:
    """Convert a model input back to an image [H, W, 3] with values from 0 to 1.

    Args:
        x_CHW: normalized input [3, H, W].
        config: preprocessing, with `mean` and `std`.
    """
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    return (x_CHW.detach().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)


def overlay(axes: plt.Axes, image_HW3: Tensor, heat_hw: Tensor, title: str = "") -> None:
    """Draw a non-negative map of tokens [h, w], scaled to its maximum, over an image."""
    height, width = image_HW3.shape[:2]
    heat = F.interpolate(heat_hw[None, None].cpu(), size=(height, width), mode="nearest")[0, 0]
    axes.imshow(image_HW3.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    share = heat / heat.max().clamp(min=1e-12)
    axes.imshow(share.numpy(), cmap="inferno", vmin=0, vmax=1, alpha=(0.35 + 0.4 * share).numpy())
    if title:
        axes.set_title(title, fontsize=8)


def mark_token(axes: plt.Axes, token: tuple[int, int], grid: Sequence[int], image: Sequence[int]) -> None:
    """Draw a frame around a token.

    Args:
        axes: axes that show the image.
        token: row and column.
        grid: rows and columns of tokens.
        image: height and width of the image in pixels.
    """
    height, width = image[0] / grid[0], image[1] / grid[1]
    corner = (token[1] * width - 0.5, token[0] * height - 0.5)
    axes.add_patch(plt.Rectangle(corner, width, height, fill=False, edgecolor="cyan", linewidth=1.5, clip_on=False))


def add_color_scale(figure: plt.Figure, table: Any) -> None:
    """Draw the color scale of the overlays below the panels."""
    bar = figure.colorbar(ScalarMappable(cmap="inferno"), ax=table, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_ticks([0, 1], labels=["0", "maximum per panel"], fontsize=8)
