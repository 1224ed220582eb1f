"""Draw the window of a query: plain, dilated, causal and strided.

A PNG shows a query in a corner, at a border and in the interior. A GIF moves the query over the whole map. To draw
any other problem, use `python -m natten.geometry`.
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

from figures.style import Theme, image_grid
from natten.checks import make_axes
from natten.geometry import Axis
from natten.geometry.drawing import Palette, Part, add_legend, axis_window, draw_parts, parts_of, settle_layout
from natzoo.classification.options import positive

HELP = "the window of a query, plain, dilated, causal and strided, as PNG or as animated GIF"
FRAME_MS = 120
LOOP_PAUSE_MS = 1500
GIF_DPI = 100


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=positive, default=11, help="side of the map in tokens (default: 11)")
    parser.add_argument("--kernel-size", type=positive, default=5, help="side of the window in tokens (default: 5)")
    parser.add_argument("--dilation", type=positive, default=2, help="dilation of the dilated window (default: 2)")
    parser.add_argument("--stride", type=positive, default=3, help="stride of the strided window (default: 3)")


def make_problems(size: int, kernel_size: int, dilation: int, stride: int) -> dict[str, tuple[Axis, ...]]:
    """Return the four problems by title.

    Raises:
        ValueError: the window does not fit the map.
    """
    space = (size, size)
    return {
        f"Plain\nwindow {kernel_size}x{kernel_size}": make_axes(space, kernel_size),
        f"Dilated\ndilation {dilation}": make_axes(space, kernel_size, 1, dilation),
        "Causal\nboth axes": make_axes(space, kernel_size, is_causal=True),
        f"Strided\nstride {stride}": make_axes(space, kernel_size, stride),
    }


def prepare(args: argparse.Namespace) -> Callable[[Theme], plt.Figure | bytes]:
    problems = make_problems(args.size, args.kernel_size, args.dilation, args.stride)
    if args.out.suffix.lower() == ".gif":
        return lambda theme: to_gif(problems, args.size, theme)
    return lambda theme: draw_windows(problems, args.size, theme)


def draw_windows(problems: dict[str, tuple[Axis, ...]], size: int, theme: Theme) -> plt.Figure:
    """Draw a row per place of the query and a column per problem."""
    center = size // 2
    places = {"corner": (0, 0), "border": (center, size - 1), "interior": (center, center)}
    figure, table = image_grid(len(places), len(problems), 1.75, 2.05)
    seen = set()
    for row, (place, query) in zip(table, places.items(), strict=True):
        for axes, (title, problem) in zip(row, problems.items(), strict=True):
            parts = parts_of(problem, query)
            seen.update(parts.unique().tolist())
            draw_parts(axes, parts, theme.windows)
            if place == "corner":  # the first row
                axes.set_title(title, fontsize=9)
        row[0].set_ylabel(place, fontsize=9)
    add_legend(figure, seen, theme.windows, ncols=2)
    return figure


def caption(axes: Sequence[Axis], query: Sequence[int]) -> str:
    """Describe the window of a query of a plain problem."""
    shifted = sum(
        position - axis_window(axis, position)[0][0] != axis.kernel_size // 2
        for axis, position in zip(axes, query, strict=True)
    )
    return (
        "Interior: the window is centered on the query.",
        "Border: the window is shifted along one axis and keeps its size.",
        "Corner: the window is shifted along both axes and keeps its size.",
    )[shifted]


def to_gif(problems: dict[str, tuple[Axis, ...]], size: int, theme: Theme) -> bytes:
    """Animate the query row by row over the map, in all problems at once."""
    figure, table = image_grid(1, len(problems), 2.2, 3.3)
    figure.set_dpi(GIF_DPI)
    canvas = FigureCanvasAgg(figure)
    queries = list(itertools.product(range(size), repeat=2))
    plain = next(iter(problems.values()))
    text = figure.suptitle(caption(plain, queries[0]), fontsize=10)
    add_legend(figure, [Part.QUERY, Part.KEY, Part.KEY_SHARES, Part.SAME_CLASS], theme.windows, ncols=2)
    meshes = []
    for axes, (title, problem) in zip(table[0], problems.items(), strict=True):
        meshes.append(draw_parts(axes, parts_of(problem, queries[0]), theme.windows))
        axes.set_title(title, fontsize=9)
    settle_layout(figure)
    figure.set_layout_engine("none")  # keeps everything in place in all frames
    frames = []
    for query in tqdm(queries, desc="frames", leave=False, disable=None):
        text.set_text(caption(plain, query))
        for mesh, problem in zip(meshes, problems.values(), strict=True):
            mesh.set_array(parts_of(problem, query).numpy())
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    plt.close(figure)
    return encode(frames, theme.windows)


def encode(frames: list[Image.Image], palette: Palette) -> bytes:
    """Encode frames as an endless GIF with the colors of a palette, and shades of the ink for antialiased text."""
    page, ink, *parts = (np.array(to_rgb(color)) for color in (palette.page, palette.ink, *palette.parts))
    shades = [page + (ink - page) * share for share in (0.2, 0.4, 0.6, 0.8)]
    colors = Image.new("P", (1, 1))
    colors.putpalette((np.stack([page, ink, *parts, *shades]) * 255).round().astype(np.uint8).tobytes())
    flat = [frame.quantize(palette=colors, dither=Image.Dither.NONE) for frame in frames]
    content = io.BytesIO()
    timing = {"duration": [FRAME_MS] * (len(flat) - 1) + [LOOP_PAUSE_MS], "loop": 0}
    flat[0].save(content, format="gif", save_all=True, append_images=flat[1:], optimize=True, **timing)
    return content.getvalue()
