"""Plots of published figures, from natzoo/zoo.yaml and assets/published/peers.csv; none of them was measured here."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

from natzoo.checkpoints import zoo_entries
from plots.style import WIDTH, Theme

PEERS = Path(__file__).resolve().parents[2] / "assets" / "published" / "peers.csv"
SIZES = ("Mini", "Tiny", "Small", "Base")  # trained on ImageNet-1K alone; the Large ones saw more
_FAMILIES = {"NAT": "nat_{}", "DiNAT": "dinat_{}", "DiNAT_s": "dinat_s_{}"}
INITIALS = "M, T, S, B: Mini, Tiny, Small, Base. "
_NOTE = "Figures as published with the models; none was measured here. "


class Published(NamedTuple):
    """What was published of a model, and of a Cascade Mask R-CNN and an UPerNet on it; figures that are not there are
    missing.

    Attributes:
        name: that timm has it under.
        figures: params (millions), macs (10^9, at 224x224), top1; box_ap, mask_ap, box_macs; miou, miou_ms, miou_macs.
    """

    family: str
    size: str
    name: str
    figures: dict[str, float]


@cache
def published() -> list[Published]:
    """All models of SIZES, ours and their peers'."""
    rows = [
        Published(family, size, name, _of_zoo(name))
        for family, pattern in _FAMILIES.items()
        for size in SIZES
        if (name := pattern.format(size.lower())) in zoo_entries()
    ]
    with PEERS.open(newline="") as file:
        for row in csv.DictReader(file):
            texts = [row.pop(name) for name in ("family", "size", "name")]
            del row["source"]
            rows.append(Published(*texts, {name: float(value) for name, value in row.items()}))
    return rows


def _of_zoo(backbone: str) -> dict[str, float]:
    figures = {name: zoo_entries()[backbone].facts[name] for name in ("params", "macs", "top1")}
    for entry in zoo_entries().values():
        facts = entry.facts
        if facts.get("backbone") == backbone and facts.get("model") == "cascade_mask_rcnn":
            figures |= {"box_ap": facts["box_ap"], "mask_ap": facts["mask_ap"], "box_macs": facts["macs"]}
        elif facts.get("backbone") == backbone and facts.get("model") == "upernet":
            figures |= {"miou": facts["miou"], "miou_ms": facts["miou_ms"], "miou_macs": facts["macs"]}
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy against cost
# ---------------------------------------------------------------------------------------------------------------------


def draw_compute(theme: Theme, families: tuple[str, ...]) -> plt.Figure:
    """Top-1 accuracy against MACs and against parameters."""
    figure, (left, right) = _panels("ImageNet-1K, 224 x 224, trained without other data.")
    draw_lines(left, theme, families, published(), "macs", "top1")
    draw_lines(right, theme, families, published(), "params", "top1")
    left.set(xlabel="MACs (10⁹), logarithmic", ylabel="top-1 accuracy (%)", title="Accuracy against arithmetic")
    right.set(xlabel="parameters (10⁶), logarithmic", title="Accuracy against parameters")
    left.legend(loc="lower right", frameon=False)
    return figure


def draw_downstream(theme: Theme, families: tuple[str, ...]) -> plt.Figure:
    """Detection and segmentation against MACs."""
    figure, (left, right) = _panels("COCO: 36 epochs. ADE20K: 160,000 iterations.")
    draw_lines(left, theme, families, published(), "box_macs", "box_ap")
    draw_lines(right, theme, families, published(), "miou_macs", "miou")
    left.set(xlabel="MACs (10⁹) at 1280 x 800, logarithmic", ylabel="box AP", title="COCO, Cascade Mask R-CNN")
    right.set(xlabel="MACs (10⁹) at 2048 x 512, logarithmic", ylabel="mIoU, one scale", title="ADE20K, UPerNet")
    left.legend(loc="lower right", frameon=False)
    return figure


def _panels(note: str) -> tuple[plt.Figure, list[plt.Axes]]:
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.4), layout="constrained")
    figure.supxlabel(f"{note} {INITIALS}\n{_NOTE.strip()}", fontsize=8.5)
    return figure, axes


def draw_lines(
    axes: plt.Axes, theme: Theme, families: tuple[str, ...], models: list[Published], x: str, y: str
) -> None:
    """A line a family, from its smallest model to its largest; ours have the initials of their sizes."""
    for number, family in enumerate(families):
        rows = [row for row in models if row.family == family and x in row.figures and y in row.figures]
        xs, ys = ([row.figures[name] for row in rows] for name in (x, y))
        is_ours, colour = family in _FAMILIES, theme.families[family]
        style = {"marker": "o", "lw": 2, "ms": 11} if is_ours else {"marker": "s", "lw": 1.2, "ms": 5, "ls": "--"}
        axes.plot(xs, ys, color=colour, zorder=3, lw=style.pop("lw"), ls=style.pop("ls", "-"))
        axes.plot(xs, ys, color=colour, label=family, zorder=10 - number, ls="none", **style)
        for row in rows if is_ours else ():
            place = (row.figures[x], row.figures[y])
            style = {"ha": "center", "va": "center_baseline", "fontsize": 7.5, "weight": "bold"}
            axes.text(*place, row.size[0], color=theme.page, zorder=10.5 - number, **style)
        if number == 0:
            ticks = _apart({float(f"{value:.4g}") for value in xs})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.1, y=0.1)
    axes.grid(alpha=0.6)


def _apart(values: Iterable[float]) -> list[float]:
    """Those that have room for their labels on a logarithmic axis."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value > 1.04 * kept[-1]:
            kept.append(value)
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Radar
# ---------------------------------------------------------------------------------------------------------------------

_SPOKES = {
    "top1": "ImageNet\ntop-1",
    "box_ap": "COCO\nbox AP",
    "mask_ap": "COCO\nmask AP",
    "miou": "ADE20K\nmIoU",
    "miou_ms": "ADE20K, mIoU,\nseveral scales",
}


def draw_radar(theme: Theme, families: tuple[str, ...]) -> plt.Figure:
    """Five results of the Tiny and of the Base models, each spoke from the least to the most of them."""
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 5.0), layout="constrained", subplot_kw={"projection": "polar"})
    for axes, size in zip(panels, ("Tiny", "Base"), strict=True):
        rows = [row for row in published() if row.size == size and row.family in families]
        _draw_spokes(axes, theme, sorted(rows, key=lambda row: -families.index(row.family)))
        axes.set_title(size, pad=48, fontsize=12)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=len(families), frameon=False)
    note = "COCO: Cascade Mask R-CNN. ADE20K: UPerNet. Each spoke has its own scale: least and most of the five models."
    figure.supxlabel(f"{note}\n{_NOTE.strip()}", fontsize=8.5)
    return figure


def _draw_spokes(axes: plt.Axes, theme: Theme, rows: list[Published]) -> None:
    inner = 0.35  # where the least of a spoke lies
    angles = [2 * math.pi * number / len(_SPOKES) for number in range(len(_SPOKES))]
    ranges = {name: sorted(row.figures[name] for row in rows) for name in _SPOKES}
    for row in rows:
        radii = []
        for name, (least, *_, most) in ranges.items():
            radii.append(inner + (1 - inner) * (row.figures[name] - least) / (most - least))
        colour = theme.families[row.family]
        axes.plot([*angles, angles[0]], [*radii, radii[0]], color=colour, lw=2, label=row.family)
        axes.fill(angles, radii, color=colour, alpha=0.08)
    axes.set_theta_zero_location("N")
    axes.set(ylim=(0, 1.02), yticks=[inner, 1])
    axes.set_yticklabels([])
    labels = [f"{label}\n{ranges[name][0]:.1f} to {ranges[name][-1]:.1f}" for name, label in _SPOKES.items()]
    axes.set_xticks(angles, [""] * len(angles))
    for label, angle in zip(labels, angles, strict=True):
        across, up = -math.sin(angle), math.cos(angle)
        ha = "center" if abs(across) < 0.7 else "left" if across > 0 else "right"
        axes.text(angle, 1.1, label, ha=ha, va="bottom" if up > 0.9 else "top" if up < 0 else "center", fontsize=9)
    axes.spines["polar"].set_visible(False)
    axes.grid(alpha=0.7)
