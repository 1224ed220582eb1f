"""What the pictures of the pages look like, beyond tools/pictures/style.py: size, and colours of families of models."""

from __future__ import annotations

from typing import NamedTuple

from natten.geometry.drawing import PALETTES

WIDTH = 9.0  # inches; pages show a picture about 900 pixels wide, so that 10 points of type are 14 pixels
DPI = 200  # twice that, for screens with fine pixels
COLOURS = 96  # of a file's palette: more make files larger and nothing better


class Theme(NamedTuple):
    """Colours: of the page, of writing and lines, of what stands back, and of what is told apart."""

    page: str
    ink: str
    faint: str
    families: dict[str, str]


_NAMES = ("NAT", "DiNAT", "DiNAT_s", "Swin", "ConvNeXt")
_FAMILIES = {
    "light": ("#d0d7de", "#1f6fc4", "#d1343c", "#e08a00", "#7d8590", "#2e9e6b"),
    "dark": ("#30363d", "#58a6ff", "#ff6b6b", "#f0b13c", "#8b949e", "#4ccb92"),
}
THEMES = {
    name: Theme(PALETTES[name].page, PALETTES[name].ink, faint, dict(zip(_NAMES, colours, strict=True)))
    for name, (faint, *colours) in _FAMILIES.items()
}


def settings(theme: Theme) -> dict:
    """Of matplotlib: faint axes, open at the top and on the right."""
    lines = dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), theme.faint)
    return {**lines, "font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}
