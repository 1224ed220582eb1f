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
from tqdm import tqdm

from natten.geometry.drawing import PALETTES
from natzoo.checkpoints import write_atomically

DPI = 150
# From nothing to much, beginning at the colour of the page.
SEQUENTIAL = {"light": "Greys", "dark": "gray"}


@contextmanager
def themed(theme: str, **more) -> Iterator[None]:
    """Figures made inside have the colours of a theme, "light" or "dark", and `more` settings of matplotlib."""
    page, ink, _ = PALETTES[theme]
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    pages = ("figure.facecolor", "axes.facecolor", "legend.facecolor", "savefig.facecolor")
    with plt.rc_context({**dict.fromkeys(inks, ink), **dict.fromkeys(pages, page), **more}):
        yield


def places(out: Path, theme: str) -> dict[str, Path]:
    """Where the picture of each theme goes: `both` of them to NAME_light and NAME_dark."""
    if theme != "both":
        return {theme: out}
    return {name: out.with_name(f"{out.stem}_{name}{out.suffix}") for name in PALETTES}


def to_png(figure: plt.Figure, dpi: int = DPI, colours: int | None = None) -> bytes:
    """A figure as a small PNG, of so many colours if that is said; closes the figure."""
    content, smaller = io.BytesIO(), io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    plt.close(figure)
    with Image.open(content) as image:
        image = image.convert("RGB")
        if colours is not None:
            image = image.quantize(colours, dither=Image.Dither.NONE)
        image.save(smaller, format="png", optimize=True)
    return smaller.getvalue()


def save(content: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content))
    tqdm.write(f"wrote {path}")
