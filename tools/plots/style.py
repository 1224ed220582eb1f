"""Light and dark pictures, and how they become small files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

WIDTH = 9.0  # inches; pages show a picture about 900 pixels wide, so that 10 points of type are 14 pixels
_DPI = 200  # twice that, for screens with fine pixels
_COLOURS = 96  # of the palette: more make files larger and nothing better


class Theme(NamedTuple):
    """Colours: of the page, of writing and lines, of what stands back, and of what is told apart."""

    page: str
    ink: str
    faint: str
    families: dict[str, str]


_NAMES = ("NAT", "DiNAT", "DiNAT_s", "Swin", "ConvNeXt")
THEMES = {
    "light": Theme(
        "#ffffff",
        "#1f2328",
        "#d0d7de",
        dict(zip(_NAMES, ("#1f6fc4", "#d1343c", "#e08a00", "#7d8590", "#2e9e6b"), strict=True)),
    ),
    "dark": Theme(
        "#0d1117",
        "#e6edf3",
        "#30363d",
        dict(zip(_NAMES, ("#58a6ff", "#ff6b6b", "#f0b13c", "#8b949e", "#4ccb92"), strict=True)),
    ),
}


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Figures made inside have the colours of a theme."""
    inks = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), theme.ink)
    pages = dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor", "savefig.facecolor"), theme.page)
    lines = dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), theme.faint)
    others = {"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context({**inks, **pages, **lines, **others}):
        yield


def to_png(figure: plt.Figure) -> bytes:
    """A figure as a small PNG; closes the figure."""
    content, smaller = io.BytesIO(), io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    plt.close(figure)
    with Image.open(content) as image:
        image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(smaller, format="png", optimize=True)
    return smaller.getvalue()
