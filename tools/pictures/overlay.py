"""Maps of tokens drawn over the picture that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from torch import Tensor


def panels(rows: int, columns: int, width: float, height: float) -> tuple[plt.Figure, Any]:
    """A figure with a table of panels without ticks, each of that many inches."""
    return plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        layout="constrained",
        squeeze=False,
        subplot_kw={"xticks": [], "yticks": []},
    )


def to_picture(x_CHW: Tensor, config: dict[str, Any]) -> Tensor:
    """The network's input as a picture [H, W, 3] again; `config` has its mean and std."""
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    return (x_CHW.detach().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)


def overlay(axes: plt.Axes, picture_HW3: Tensor, heat_hw: Tensor, title: str = "") -> None:
    """Draws a map of tokens, at least 0, over a picture, each token as the square of pixels that it stands for."""
    height, width = picture_HW3.shape[:2]
    heat = F.interpolate(heat_hw[None, None].cpu(), size=(height, width), mode="nearest")[0, 0]
    axes.imshow(picture_HW3.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    share = heat / heat.max().clamp(min=1e-12)
    axes.imshow(share.numpy(), cmap="inferno", vmin=0, vmax=1, alpha=(0.35 + 0.4 * share).numpy())
    if title:
        axes.set_title(title, fontsize=8)


def mark(axes: plt.Axes, token: tuple[int, int], grid: Sequence[int], picture: Sequence[int]) -> None:
    """Draws a frame around a token of a grid [rows, columns] over a picture [height, width]."""
    height, width = picture[0] / grid[0], picture[1] / grid[1]
    corner = (token[1] * width - 0.5, token[0] * height - 0.5)
    axes.add_patch(plt.Rectangle(corner, width, height, fill=False, edgecolor="cyan", linewidth=1.5, clip_on=False))


def add_key(figure: plt.Figure, table: Any) -> None:
    """A scale of the overlays' colours below the panels: each has its own."""
    bar = figure.colorbar(ScalarMappable(cmap="inferno"), ax=table, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_ticks([0, 1], labels=["none", "the most in the panel"], fontsize=8)
