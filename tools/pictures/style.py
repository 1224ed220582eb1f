"""Light and dark pictures, and how they are written."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from natten.geometry.drawing import PALETTES
from natzoo.checkpoints import write_atomically

DPI = 150
# From nothing to much, beginning at the colour of the page.
SEQUENTIAL = {"light": "Greys", "dark": "gray"}


@contextmanager
def themed(theme: str) -> Iterator[None]:
    """Figures made inside have the colours of a theme, "light" or "dark"."""
    page, ink, _ = PALETTES[theme]
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    with plt.rc_context({**colours, "figure.facecolor": page, "axes.facecolor": page, "legend.facecolor": page}):
        yield


def places(out: Path, theme: str) -> dict[str, Path]:
    """Where the picture of each theme goes: `both` of them to NAME_light and NAME_dark."""
    if theme != "both":
        return {theme: out}
    return {name: out.with_name(f"{out.stem}_{name}{out.suffix}") for name in PALETTES}


def to_png(figure: plt.Figure) -> bytes:
    """A figure as a small PNG; closes the figure."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    plt.close(figure)
    with Image.open(content) as image:
        smaller = io.BytesIO()
        image.convert("RGB").save(smaller, format="png", optimize=True)
    return smaller.getvalue()


def save(content: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content))
    print(f"wrote {path}")
