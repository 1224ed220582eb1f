"""Neighborhood attention itself: the window that slides with its query, plain, dilated, causal and with a stride.

A PNG shows a corner, a border and the inside; a GIF moves the query over the whole map. Any other problem is drawn by
`python -m natten.geometry`.
"""

from __future__ import annotations

import argparse
import io
import itertools
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image
from tqdm import tqdm

from natten.geometry import Axis, make_axes
from natten.geometry.drawing import PALETTES, Palette, Part, add_legend, axis_window, draw_parts, parts_of
from natzoo.classification.options import positive
from pictures.overlay import panels

HELP = "the window of a query, plain, dilated, causal and with a stride: PNG, or GIF of the sliding window"
FRAME_MS = 120
LOOP_PAUSE_MS = 1500
GIF_DPI = 100


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=positive, default=11, help="tokens on each side of the map")
    parser.add_argument("--kernel-size", type=positive, default=5, help="tokens on each side of the window")
    parser.add_argument("--dilation", type=positive, default=2, help="of the dilated window")
    parser.add_argument("--stride", type=positive, default=3, help="of the window with a stride")


def kinds(size: int, kernel_size: int, dilation: int, stride: int) -> dict[str, tuple[Axis, ...]]:
    """The four problems that are drawn, by title.

    Raises:
        ValueError: where the window does not fit the map.
    """
    space = (size, size)
    return {
        f"neighborhood attention\n{kernel_size}x{kernel_size}": make_axes(space, kernel_size),
        f"dilated\nby {dilation}": make_axes(space, kernel_size, 1, dilation),
        "causal\non both axes": make_axes(space, kernel_size, is_causal=True),
        f"stride {stride}\n{stride}x{stride} queries share": make_axes(space, kernel_size, stride),
    }


def prepare(args: argparse.Namespace) -> Callable[[str], plt.Figure | bytes]:
    problems = kinds(args.size, args.kernel_size, args.dilation, args.stride)
    if args.out.suffix.lower() == ".gif":
        return lambda theme: to_gif(problems, args.size, theme)
    return lambda theme: draw_cases(problems, args.size, theme)


def draw_cases(problems: dict[str, tuple[Axis, ...]], size: int, theme: str) -> plt.Figure:
    """A row for each place of the query, a column for each problem."""
    middle = size // 2
    cases = {"in the corner": (0, 0), "at the border": (middle, size - 1), "inside": (middle, middle)}
    figure, table = panels(len(cases), len(problems), 2.0, 2.05)
    palette, seen = PALETTES[theme], set()
    for row, (place, query) in zip(table, cases.items(), strict=True):
        for axes, (title, problem) in zip(row, problems.items(), strict=True):
            parts = parts_of(problem, query)
            seen.update(parts.unique().tolist())
            draw_parts(axes, parts, palette)
            if row is table[0] or query == (0, 0):
                axes.set_title(title, fontsize=9)
        row[0].set_ylabel(place, fontsize=9)
    add_legend(figure, seen, palette, ncols=2)
    return figure


def caption(axes: Sequence[Axis], query: Sequence[int]) -> str:
    """What the window does at a query of a plain problem."""
    moved = sum(
        position - axis_window(axis, position)[0][0] != axis.kernel_size // 2
        for axis, position in zip(axes, query, strict=True)
    )
    return (
        "inside: the query is in the middle of the plain window",
        "at a border: the plain window stays on the map and has as many keys, the query is off its middle",
        "in a corner: the same on both axes",
    )[moved]


def to_gif(problems: dict[str, tuple[Axis, ...]], size: int, theme: str) -> bytes:
    """The query moves over the map, row by row, in all problems at once."""
    palette = PALETTES[theme]
    figure, table = panels(1, len(problems), 2.2, 3.3)
    figure.set_dpi(GIF_DPI)
    canvas = FigureCanvasAgg(figure)
    queries = list(itertools.product(range(size), repeat=2))
    text = figure.suptitle("room for two lines\nof which one is used", fontsize=10)
    add_legend(figure, [Part.QUERY, Part.KEY, Part.KEY_SHARES, Part.SAME_CLASS], palette, ncols=2)
    meshes = []
    for axes, (title, problem) in zip(table[0], problems.items(), strict=True):
        meshes.append(draw_parts(axes, parts_of(problem, queries[0]), palette))
        axes.set_title(title, fontsize=9)
    canvas.draw()
    figure.set_layout_engine("none")  # what stands there stays there
    frames = []
    for query in tqdm(queries, desc="frames", leave=False, disable=None):
        text.set_text(caption(next(iter(problems.values())), query))
        for mesh, problem in zip(meshes, problems.values(), strict=True):
            mesh.set_array(parts_of(problem, query).numpy())
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    plt.close(figure)
    return encode(frames, palette)


def encode(frames: list[Image.Image], palette: Palette) -> bytes:
    """An endless GIF of a theme's colours, and those between ink and page for the edges of letters."""
    page, ink, *parts = (np.array(to_rgb(colour)) for colour in (palette.page, palette.ink, *palette.parts))
    greys = [page + (ink - page) * share for share in (0.2, 0.4, 0.6, 0.8)]
    colours = Image.new("P", (1, 1))
    colours.putpalette((np.stack([page, ink, *parts, *greys]) * 255).round().astype(np.uint8).tobytes())
    flat = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    content = io.BytesIO()
    timing = {"duration": [FRAME_MS] * (len(flat) - 1) + [LOOP_PAUSE_MS], "loop": 0}
    flat[0].save(content, format="gif", save_all=True, append_images=flat[1:], optimize=True, **timing)
    return content.getvalue()
