"""Diagrams: the tokens that each kind of attention reads, and the architecture of the networks."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import timm
import torch
from matplotlib.patches import FancyBboxPatch, Rectangle

import natzoo  # noqa: F401  registers the models
from figures.style import WIDTH, Theme, image_grid
from natten.geometry import Axis
from natten.geometry.drawing import axis_window

# ---------------------------------------------------------------------------------------------------------------------
# Attention patterns
# ---------------------------------------------------------------------------------------------------------------------

Place = tuple[int, int]  # row and column of a token


def draw_nat_intro(theme: Theme) -> plt.Figure:
    """Draw self-attention, Swin's windows and neighborhood attention, for a query inside and one near a border."""
    side, size, queries = 14, 7, ((10, 5), (1, 8))
    blocks = [range(start, start + size) for start in range(0, side, size)]
    swin = [[(r, c) for r in blocks[row // size] for c in blocks[column // size]] for row, column in queries]
    panels = {
        "Self-attention\nall tokens": [[(r, c) for r in range(side) for c in range(side)]],
        "Window attention (Swin)\none block of a fixed grid": swin,
        "Neighborhood attention\nthe nearest tokens": [_window(side, size, 1, place) for place in queries],
    }
    figure, axes = image_grid(1, 3, WIDTH / 3, 3.7)
    for panel, (title, keys) in zip(axes[0], panels.items(), strict=True):
        _draw_grid(panel, theme, side, zip(queries, keys, strict=False))
        panel.set_title(title)
    figure.supxlabel(
        "Queries (red) and the keys they attend to, on a map of 14x14 tokens. Window size: 7x7.", fontsize=9
    )
    return figure


def draw_dinat_intro(theme: Theme) -> plt.Figure:
    """Draw the same window at three dilations."""
    side, size, place = 28, 7, (11, 16)
    figure, axes = image_grid(1, 3, WIDTH / 3, 3.6)
    for panel, dilation in zip(axes[0], (1, 2, 4), strict=True):
        _draw_grid(panel, theme, side, [(place, _window(side, size, dilation, place))])
        panel.set_title("Neighborhood attention" if dilation == 1 else f"Dilation {dilation}")
    note = "One query (red) and its 49 keys, on a map of 28x28 tokens. Dilation enlarges the window at the same cost."
    figure.supxlabel(note, fontsize=9)
    return figure


def _window(side: int, size: int, dilation: int, place: Place) -> list[Place]:
    """Return the keys of a query on a square map."""
    axis = Axis(side, size, 1, dilation, False)
    rows, columns = (axis_window(axis, position)[0] for position in place)
    return [(row, column) for row in rows for column in columns]


def _draw_grid(axes: plt.Axes, theme: Theme, side: int, windows: Iterable[tuple[Place, list[Place]]]) -> None:
    """Draw a map of tokens, with one color per pair of query and keys."""
    gap = 0.08 if side < 20 else 0.12

    def draw_cell(place: Place, color: str, alpha: float) -> None:
        corner = (place[1] + gap, place[0] + gap)
        axes.add_patch(Rectangle(corner, 1 - 2 * gap, 1 - 2 * gap, lw=0, facecolor=color, alpha=alpha))

    for place in ((row, column) for row in range(side) for column in range(side)):
        draw_cell(place, theme.faint, 0.45)
    for (query, keys), family in zip(windows, ("NAT", "DiNAT_s"), strict=False):
        for place in keys:
            draw_cell(place, theme.families[family], 0.5)
        axes.add_patch(Rectangle((query[1], query[0]), 1, 1, facecolor=theme.families["DiNAT"], lw=0, zorder=3))
    axes.set(xlim=(0, side), ylim=(side, 0), aspect="equal")
    axes.spines[:].set_visible(False)


# ---------------------------------------------------------------------------------------------------------------------
# Architecture
# ---------------------------------------------------------------------------------------------------------------------


def draw_architecture(theme: Theme, name: str) -> plt.Figure:
    """Draw the stages of a registered model with their shapes at 224x224, and one block."""
    with torch.device("meta"):
        model = timm.create_model(name)
    figure, axes = plt.subplots(figsize=(WIDTH, 4.5), layout="compressed")
    axes.set(xlim=(0, 100), ylim=(0, 50), aspect="equal")
    axes.axis("off")
    colors = [theme.families["NAT"], theme.families["DiNAT"]]
    is_dilated = any(block.attn.dilation[0] > 1 for level in model.levels for block in level.blocks)
    _draw_stages(axes, theme, model, colors, is_dilated)
    attention = "(dilated)\nneighborhood attention" if is_dilated else "neighborhood\nattention"
    _draw_block(axes, theme, colors[is_dilated], attention)
    legend = " Blue: dilation 1. Red: dilation > 1." if is_dilated else ""
    axes.text(3, 1, f"{name} at 224x224.{legend} /2: stride 2.", fontsize=9, va="bottom")
    return figure


def _draw_stages(axes: plt.Axes, theme: Theme, model: torch.nn.Module, colors: list[str], is_dilated: bool) -> None:
    y, height, width, pitch = 31, 11, 11.6, 14.8
    _draw_box(axes, theme, 0.5, y, 9, height, "image\n224x224\n3 channels")
    _draw_box(axes, theme, 12, y, 11, height, "tokenizer\n3x3 conv /2\n3x3 conv /2")
    starts = [26 + pitch * number for number in range(4)]
    for number, (x, level, info) in enumerate(zip(starts, model.levels, model.feature_info, strict=True), start=1):
        side = 224 // info["reduction"]
        _draw_box(axes, theme, x, y, width, height, f"stage {number}\n{side}x{side}\n{info['num_chs']} channels")
        dilations = [block.attn.dilation[0] for block in level.blocks]
        distinct = list(dict.fromkeys(dilations))
        note = f"\ndilation {' and '.join(map(str, distinct))}" if is_dilated else ""
        axes.text(x + width / 2, y + height + 3.4, f"{len(dilations)} blocks{note}", ha="center", fontsize=9)
        step = width / len(dilations)
        for index, dilation in enumerate(dilations):
            corner = (x + (index + 0.08) * step, y + height + 0.8)
            axes.add_patch(Rectangle(corner, 0.84 * step, 1.6, facecolor=colors[dilation > 1], alpha=0.85))
        if number < 4:
            axes.text(x + (width + pitch) / 2, y - 2.4, "3x3 conv /2", ha="center", fontsize=8.5)
    last = starts[-1] + pitch
    _draw_box(axes, theme, last, y, 99.5 - last, height, "LayerNorm\naverage pooling\nlinear")
    ends = [9.5, 23, *(start + width for start in starts)]
    for left, right in zip(ends, [12, *starts, last], strict=True):
        _draw_arrow(axes, theme, (left, y + height / 2), (right, y + height / 2))


def _draw_block(axes: plt.Axes, theme: Theme, color: str, attention: str) -> None:
    y, height, middle = 7, 9.5, 11.75
    axes.text(3, 22.5, "One block", fontsize=11, weight="bold")
    boxes = (
        (10, 13, "LayerNorm", None),
        (26, 19, attention, color),
        (56, 13, "LayerNorm", None),
        (72, 13, "MLP", None),
    )
    for x, width, text, fill in boxes:
        _draw_box(axes, theme, x, y, width, height, text, fill)
    for left, right in ((2, 10), (23, 26), (45, 48.6), (51.4, 56), (69, 72), (85, 88.6), (91.4, 98)):
        _draw_arrow(axes, theme, (left, middle), (right, middle))
    for start, x in ((6, 50), (53.5, 90)):
        axes.text(x, middle, "+", ha="center", va="center", fontsize=15)
        top = y + height + 2.2
        axes.plot([start, start, x], [middle, top, top], color=theme.ink, lw=1)
        _draw_arrow(axes, theme, (x, top), (x, middle + 1.2))


def _draw_box(
    axes: plt.Axes, theme: Theme, x: float, y: float, width: float, height: float, text: str, fill: str | None = None
) -> None:
    style = {"boxstyle": "round,pad=0,rounding_size=1", "edgecolor": theme.ink, "lw": 1}
    axes.add_patch(FancyBboxPatch((x, y), width, height, facecolor=theme.page, **style))
    if fill:
        axes.add_patch(FancyBboxPatch((x, y), width, height, facecolor=fill, alpha=0.35, **style))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, linespacing=1.4)


def _draw_arrow(axes: plt.Axes, theme: Theme, start: tuple[float, float], end: tuple[float, float]) -> None:
    arrow = {"arrowstyle": "-|>", "color": theme.ink, "lw": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=arrow)
