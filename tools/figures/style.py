"""Colors, sizes and ticks shared by all figures, and how figures are saved."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from PIL import Image
from tqdm import tqdm

from natten.geometry.drawing import PALETTES, Palette, settle_layout
from natzoo.checkpoints import write_atomically

WIDTH = 9.0  # inches; pages show figures about 880 pixels wide, which makes 10 pt text 14 pixels high
MIN_WIDTH = 5.0  # inches
PAGE_DPI = 200  # figures of the pages: twice the shown width, for high-density screens
DPI = 150
PAGE_COLORS = 96  # palette size of the PNG files of the pages; a larger palette only makes the files larger
STEPS = (1, 2, 5, 10)  # tick values are these times a power of ten


# ---------------------------------------------------------------------------------------------------------------------
# Themes
# ---------------------------------------------------------------------------------------------------------------------


class Theme(NamedTuple):
    """Colors of a light or dark page.

    Attributes:
        page: background.
        ink: text and lines.
        faint: axes, grids and empty cells.
        families: one color per model family.
        windows: colors of the tokens of a neighborhood.
        sequential: matplotlib colormap that starts near the page color.
    """

    page: str
    ink: str
    faint: str
    families: dict[str, str]
    windows: Palette
    sequential: str


_FAMILIES = ("NAT", "DiNAT", "DiNAT_s", "Swin", "ConvNeXt")
_LIGHT = ("#1f6fc4", "#d1343c", "#e08a00", "#7d8590", "#2e9e6b")
_DARK = ("#58a6ff", "#ff6b6b", "#f0b13c", "#8b949e", "#4ccb92")


def _theme(name: str, faint: str, families: Iterable[str], sequential: str) -> Theme:
    windows = PALETTES[name]
    return Theme(windows.page, windows.ink, faint, dict(zip(_FAMILIES, families, strict=True)), windows, sequential)


THEMES = {
    "light": _theme("light", "#d0d7de", _LIGHT, "Greys"),
    "dark": _theme("dark", "#30363d", _DARK, "gray"),
}


@contextmanager
def themed(name: str) -> Iterator[Theme]:
    """Set matplotlib's defaults for the theme "light" or "dark" within the block."""
    theme = THEMES[name]
    ink = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    page = ("figure.facecolor", "axes.facecolor", "legend.facecolor", "savefig.facecolor")
    faint = ("axes.edgecolor", "grid.color", "legend.edgecolor")
    colors = {**dict.fromkeys(ink, theme.ink), **dict.fromkeys(page, theme.page), **dict.fromkeys(faint, theme.faint)}
    with plt.rc_context({**colors, "font.size": 10, "axes.titlesize": 11}):
        yield theme


# ---------------------------------------------------------------------------------------------------------------------
# Axes
# ---------------------------------------------------------------------------------------------------------------------


def image_grid(rows: int, columns: int, width: float, height: float) -> tuple[plt.Figure, Any]:
    """Create a figure with a grid of axes without ticks for images.

    Args:
        rows: number of rows.
        columns: number of columns.
        width: width per column in inches.
        height: height per row in inches. Narrow figures are widened to MIN_WIDTH, which leaves room for the title.

    Returns:
        The figure, and its axes as an array [rows, columns].
    """
    return plt.subplots(
        rows,
        columns,
        figsize=(max(width * columns, MIN_WIDTH), height * rows),
        layout="compressed",
        squeeze=False,
        subplot_kw={"xticks": [], "yticks": []},
    )


def open_frame(axes: plt.Axes) -> None:
    """Draw a grid behind the data and no frame at the top and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.6)
    axes.set_axisbelow(True)


def linear_ticks(axis: Axis, integer: bool = False) -> None:
    """Set round tick values on a linear axis."""
    axis.set_major_locator(MaxNLocator(nbins=8, steps=STEPS, integer=integer))


def log_ticks(axis: Axis, low: float, high: float, decades: bool = False) -> None:
    """Make an axis logarithmic, with round tick values.

    Ticks are 1, 2 and 5 times powers of ten. If the data range contains fewer than three of them, the limits are
    extended to the next ticks.

    Args:
        axis: x or y axis of a plot.
        low: lowest value that must be visible.
        high: highest value that must be visible.
        decades: whether ticks are powers of ten only.
    """
    name = axis.axis_name
    getattr(axis.axes, f"set_{name}scale")("log")
    ticks = [step * 10.0**power for power in range(-3, 7) for step in ((1,) if decades else STEPS[:-1])]
    room = (high / low) ** 0.07
    first = max(tick for tick in ticks if tick <= low)
    last = min(tick for tick in ticks if tick >= high)
    low, high = low / room, high * room
    kept = [tick for tick in ticks if low <= tick <= high]
    for tick in sorted({first, last} - set(kept), key=lambda tick: abs(math.log(tick / math.sqrt(low * high)))):
        if len(kept) < 3:
            kept.append(tick)
    getattr(axis.axes, f"set_{name}lim")(min(low, *kept), max(high, *kept))
    axis.set_major_locator(FixedLocator(sorted(kept)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def theme_paths(path: Path, theme: str) -> dict[str, Path]:
    """Return the output file per theme; with "both", NAME_light and NAME_dark."""
    if theme != "both":
        return {theme: path}
    return {name: path.with_name(f"{path.stem}_{name}{path.suffix}") for name in THEMES}


def to_png(figure: plt.Figure, dpi: int = DPI, colors: int | None = None) -> bytes:
    """Encode a figure as PNG and close it.

    Args:
        figure: the figure.
        dpi: pixels per inch.
        colors: palette size; RGB if None.
    """
    content, smaller = io.BytesIO(), io.BytesIO()
    settle_layout(figure)
    figure.savefig(content, format="png", dpi=dpi)
    plt.close(figure)
    with Image.open(content) as image:
        image = image.convert("RGB")
        if colors is not None:
            image = image.quantize(colors, dither=Image.Dither.NONE)
        image.save(smaller, format="png", optimize=True)
    return smaller.getvalue()


def save(content: bytes, path: Path) -> None:
    """Write a file atomically, creating its folder, and log its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content))
    tqdm.write(f"wrote {path}")
