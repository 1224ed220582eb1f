"""Diagrams: which tokens attention sees, and how the networks are built."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import timm
import torch
from matplotlib.patches import FancyBboxPatch, Rectangle

import natzoo  # noqa: F401  registers the models
from natten.geometry import Axis, axis_tiles
from plots.style import WIDTH, Theme

# ---------------------------------------------------------------------------------------------------------------------
# What a token sees
# ---------------------------------------------------------------------------------------------------------------------

Place = tuple[int, int]


def window(length: int, kernel_size: int, dilation: int, place: int) -> list[int]:
    """Positions of the keys of a query along one axis."""
    tiles = axis_tiles(Axis(length, kernel_size, 1, dilation, False), 1)
    return tiles.key_TK[tiles.place_L[place]].tolist()


def draw_nat_intro(theme: Theme) -> plt.Figure:
    """All tokens, Swin's windows, the neighborhood: each for a token inside and one near a border."""
    side, size, queries = 14, 7, ((10, 5), (1, 8))
    blocks = [range(start, start + size) for start in range(0, side, size)]
    of_block = lambda at: blocks[at // size]  # noqa: E731
    panels = {
        "self attention:\nall tokens": [[(r, c) for r in range(side) for c in range(side)]],
        "Swin:\nthe token's block of a fixed grid": [
            [(r, c) for r in of_block(row) for c in of_block(column)] for row, column in queries
        ],
        "neighborhood attention:\nthe nearest tokens": [_square(side, size, 1, place) for place in queries],
    }
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.65), layout="constrained")
    for panel, (title, seen) in zip(axes, panels.items(), strict=True):
        _draw_grid(panel, theme, side, list(zip(queries, seen, strict=False)))
        panel.set_title(title)
    note = "Queries (red) and the keys that each attends to, on 14 x 14 tokens; windows of 7 x 7."
    figure.supxlabel(note, fontsize=9)
    return figure


def draw_dinat_intro(theme: Theme) -> plt.Figure:
    """The same window at three dilations."""
    side, size, place = 28, 7, (11, 16)
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.8), layout="constrained")
    for panel, dilation in zip(axes, (1, 2, 4), strict=True):
        _draw_grid(panel, theme, side, [(place, _square(side, size, dilation, place))])
        panel.set_title("neighborhood attention" if dilation == 1 else f"dilation {dilation}")
    note = "One query (red) and its 49 keys on 28 x 28 tokens: the window grows, the cost does not."
    figure.supxlabel(note, fontsize=9)
    return figure


def _square(side: int, size: int, dilation: int, place: Place) -> list[Place]:
    rows, columns = (window(side, size, dilation, at) for at in place)
    return [(row, column) for row in rows for column in columns]


def _draw_grid(axes: plt.Axes, theme: Theme, side: int, seen: Iterable[tuple[Place, list[Place]]]) -> None:
    """A grid of tokens; of several queries each has a colour of its own."""
    gap = 0.08 if side < 20 else 0.12
    cell = lambda place, **style: axes.add_patch(  # noqa: E731
        Rectangle((place[1] + gap, place[0] + gap), 1 - 2 * gap, 1 - 2 * gap, lw=0, **style)
    )
    for place in ((row, column) for row in range(side) for column in range(side)):
        cell(place, facecolor=theme.faint, alpha=0.45)
    for (query, keys), family in zip(seen, ("NAT", "DiNAT_s"), strict=False):
        for place in keys:
            cell(place, facecolor=theme.families[family], alpha=0.5)
        axes.add_patch(Rectangle((query[1], query[0]), 1, 1, facecolor=theme.families["DiNAT"], lw=0, zorder=3))
    axes.set(xlim=(0, side), ylim=(side, 0), aspect="equal")
    axes.axis("off")


# ---------------------------------------------------------------------------------------------------------------------
# How the networks are built
# ---------------------------------------------------------------------------------------------------------------------


def draw_architecture(theme: Theme, name: str) -> plt.Figure:
    """The stages of a registered model with their shapes at 224 x 224, and one block."""
    with torch.device("meta"):
        model = timm.create_model(name)
    figure, axes = plt.subplots(figsize=(WIDTH, 4.7), layout="constrained")
    axes.set(xlim=(0, 100), ylim=(0, 52), aspect="equal")
    axes.axis("off")
    colours = [theme.families["NAT"], theme.families["DiNAT"]]
    is_dilated = any(block.attn.dilation[0] > 1 for level in model.levels for block in level.blocks)
    _draw_stages(axes, theme, model, colours, is_dilated)
    attention = "(dilated)\nneighborhood attention" if is_dilated else "neighborhood\nattention"
    _draw_block(axes, theme, colours[is_dilated], attention)
    colour = "Blue: dilation 1; red: more. " if is_dilated else ""
    axes.text(3, 1, f"{colour}Numbers are those of {name} at 224 x 224. /2 is a stride of 2.", fontsize=9, va="bottom")
    return figure


def _draw_stages(axes: plt.Axes, theme: Theme, model: torch.nn.Module, colours: list[str], is_dilated: bool) -> None:
    y, height, width, pitch = 32, 11, 11.6, 14.8
    _box(axes, theme, 0.5, y, 9, height, "image\n224 x 224\n3")
    _box(axes, theme, 12, y, 11, height, "tokenizer\n3x3 conv /2\n3x3 conv /2")
    starts = [26 + pitch * number for number in range(4)]
    for number, (x, level, info) in enumerate(zip(starts, model.levels, model.feature_info, strict=True), start=1):
        side = 224 // info["reduction"]
        _box(axes, theme, x, y, width, height, f"stage {number}\n{side} x {side}\n{info['num_chs']} channels")
        dilations = [block.attn.dilation[0] for block in level.blocks]
        words = f"\ndilation {', '.join(map(str, dict.fromkeys(dilations)))}" if is_dilated else ""
        axes.text(x + width / 2, y + height + 3.4, f"{len(dilations)} blocks{words}", ha="center", fontsize=9)
        step = width / len(dilations)
        for index, dilation in enumerate(dilations):
            place = (x + (index + 0.08) * step, y + height + 0.8)
            axes.add_patch(Rectangle(place, 0.84 * step, 1.6, facecolor=colours[dilation > 1], alpha=0.85))
        if number < 4:
            axes.text(x + (width + pitch) / 2, y - 2.4, "3x3 conv /2", ha="center", fontsize=8.5)
    last = starts[-1] + pitch
    _box(axes, theme, last, y, 99.5 - last, height, "LayerNorm\nmean, linear")
    ends = [9.5, 23, *(start + width for start in starts)]
    for left, right in zip(ends, [12, *starts, last], strict=True):
        _arrow(axes, theme, (left, y + height / 2), (right, y + height / 2))


def _draw_block(axes: plt.Axes, theme: Theme, colour: str, attention: str) -> None:
    y, height, middle = 8, 9.5, 12.75
    axes.text(3, 24, "a block", fontsize=11, weight="bold")
    parts = (
        (10, 13, "LayerNorm", None),
        (26, 19, attention, colour),
        (56, 13, "LayerNorm", None),
        (72, 13, "MLP", None),
    )
    for x, width, text, fill in parts:
        _box(axes, theme, x, y, width, height, text, fill)
    for left, right in ((2, 10), (23, 26), (45, 48.6), (51.4, 56), (69, 72), (85, 88.6), (91.4, 98)):
        _arrow(axes, theme, (left, middle), (right, middle))
    for start, x in ((6, 50), (53.5, 90)):
        axes.text(x, middle, "+", ha="center", va="center", fontsize=15)
        top = y + height + 2.2
        axes.plot([start, start, x], [middle, top, top], color=theme.ink, lw=1)
        _arrow(axes, theme, (x, top), (x, middle + 1.2))


def _box(
    axes: plt.Axes, theme: Theme, x: float, y: float, width: float, height: float, text: str, fill: str | None = None
) -> None:
    style = {"boxstyle": "round,pad=0,rounding_size=1", "edgecolor": theme.ink, "lw": 1}
    axes.add_patch(FancyBboxPatch((x, y), width, height, facecolor=theme.page, **style))
    if fill:
        axes.add_patch(FancyBboxPatch((x, y), width, height, facecolor=fill, alpha=0.35, **style))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, linespacing=1.4)


def _arrow(axes: plt.Axes, theme: Theme, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": theme.ink, "lw": 1, "shrinkA": 0, "shrinkB": 0}
    )
