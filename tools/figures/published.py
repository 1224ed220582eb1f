"""Plots of published results, read from natzoo/zoo.yaml and assets/published/peers.csv. Nothing is measured here."""

from __future__ import annotations

import csv
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

from figures.style import WIDTH, Theme, linear_ticks, log_ticks, open_frame
from natzoo.checkpoints import zoo_entries

PEERS = Path(__file__).resolve().parents[2] / "assets" / "published" / "peers.csv"
SIZES = ("Mini", "Tiny", "Small", "Base")  # trained on ImageNet-1K only; the Large models were pretrained on more
INITIALS = "M, T, S, B: Mini, Tiny, Small, Base."
_FAMILIES = {"NAT": "nat_{}", "DiNAT": "dinat_{}", "DiNAT_s": "dinat_s_{}"}
_NOTE = "Results as published by the authors; not measured here."


class Published(NamedTuple):
    """Published results of a model, and of Cascade Mask R-CNN and UPerNet with this backbone.

    Attributes:
        family: name of the model family.
        size: one of SIZES.
        name: model name in timm.
        figures: any of params (millions), macs (10^9, at 224x224), top1 (%); box_ap, mask_ap, box_macs; miou, miou_ms,
            miou_macs. Unpublished results have no entry.
    """

    family: str
    size: str
    name: str
    figures: dict[str, float]


@cache
def published() -> list[Published]:
    """Return the published results of NAT, DiNAT, DiNAT_s, Swin and ConvNeXt."""
    models = [
        Published(family, size, name, _zoo_figures(name))
        for family, pattern in _FAMILIES.items()
        for size in SIZES
        if (name := pattern.format(size.lower())) in zoo_entries()
    ]
    with PEERS.open(newline="") as file:
        for row in csv.DictReader(file):
            family, size, name = (row.pop(column) for column in ("family", "size", "name"))
            del row["source"]
            models.append(Published(family, size, name, {column: float(value) for column, value in row.items()}))
    return models


def _zoo_figures(backbone: str) -> dict[str, float]:
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
    """Plot top-1 accuracy against MACs and against parameters."""
    figure, (left, right) = _create_panels(f"224x224, trained on ImageNet-1K only. {INITIALS}")
    draw_families(left, theme, families, published(), "macs", "top1")
    draw_families(right, theme, families, published(), "params", "top1")
    left.set(xlabel="MACs (G), log scale", ylabel="ImageNet-1K top-1 (%)", title="Accuracy vs. MACs")
    right.set(xlabel="parameters (M), log scale", title="Accuracy vs. parameters")
    left.legend(loc="lower right", frameon=False)
    return figure


def draw_downstream(theme: Theme, families: tuple[str, ...]) -> plt.Figure:
    """Plot detection and segmentation results against MACs."""
    figure, (left, right) = _create_panels(f"COCO: 36 epochs. ADE20K: 160k iterations. {INITIALS}")
    draw_families(left, theme, families, published(), "box_macs", "box_ap", log=False)
    draw_families(right, theme, families, published(), "miou_macs", "miou", log=False)
    left.set(xlabel="MACs (G) at 1280x800", ylabel="box AP", title="COCO, Cascade Mask R-CNN")
    right.set(xlabel="MACs (G) at 2048x512", ylabel="mIoU (%), single scale", title="ADE20K, UPerNet")
    left.legend(loc="lower right", frameon=False)
    return figure


def _create_panels(note: str) -> tuple[plt.Figure, list[plt.Axes]]:
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.4), layout="constrained")
    figure.supxlabel(f"{note}\n{_NOTE}", fontsize=8.5)
    return figure, axes


def draw_families(
    axes: plt.Axes,
    theme: Theme,
    families: tuple[str, ...],
    models: list[Published],
    x: str,
    y: str,
    log: bool = True,
) -> None:
    """Draw one line per family, from its smallest model to its largest. Ours are labelled with their sizes.

    Args:
        axes: axes to draw on.
        theme: colors.
        families: families to draw; the first is drawn on top.
        models: their results.
        x: name of the figure on the x axis.
        y: name of the figure on the y axis.
        log: whether the x axis is logarithmic.
    """
    drawn = []
    for number, family in enumerate(families):
        rows = [row for row in models if row.family == family and x in row.figures and y in row.figures]
        drawn += rows
        xs, ys = ([row.figures[name] for row in rows] for name in (x, y))
        is_ours, color = family in _FAMILIES, theme.families[family]
        line = {"lw": 2} if is_ours else {"lw": 1.2, "ls": "--"}
        marker = {"marker": "o", "ms": 11} if is_ours else {"marker": "s", "ms": 5}
        axes.plot(xs, ys, color=color, zorder=3, **line)
        axes.plot(xs, ys, color=color, zorder=10 - number, ls="none", label=family, **marker)
        for row in rows if is_ours else ():
            place = (row.figures[x], row.figures[y])
            text = {"ha": "center", "va": "center_baseline", "fontsize": 7.5, "weight": "bold"}
            axes.text(*place, row.size[0], color=theme.page, zorder=10.5 - number, **text)
    axes.margins(x=0.1, y=0.1)
    if log:
        costs = [row.figures[x] for row in drawn]
        log_ticks(axes.xaxis, min(costs), max(costs))
    else:
        linear_ticks(axes.xaxis)
    linear_ticks(axes.yaxis)
    open_frame(axes)


# ---------------------------------------------------------------------------------------------------------------------
# Radar
# ---------------------------------------------------------------------------------------------------------------------

_SPOKES = {
    "top1": "ImageNet-1K\ntop-1 (%)",
    "box_ap": "COCO\nbox AP",
    "mask_ap": "COCO\nmask AP",
    "miou": "ADE20K\nmIoU (%)",
    "miou_ms": "ADE20K\nmulti-scale\nmIoU (%)",
}


def draw_radar(theme: Theme, families: tuple[str, ...]) -> plt.Figure:
    """Plot five results of the Tiny and of the Base models; each spoke spans the range of these results."""
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4.9), layout="compressed", subplot_kw={"projection": "polar"})
    for axes, size in zip(panels, ("Tiny", "Base"), strict=True):
        rows = [row for row in published() if row.size == size and row.family in families]
        _draw_spokes(axes, theme, sorted(rows, key=lambda row: -families.index(row.family)))
        axes.set_title(size, pad=48, fontsize=12)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=len(families), frameon=False)
    note = "COCO: Cascade Mask R-CNN. ADE20K: UPerNet. Each axis spans the range of the five models."
    figure.supxlabel(f"{note}\n{_NOTE}", fontsize=8.5)
    return figure


def _draw_spokes(axes: plt.Axes, theme: Theme, rows: list[Published]) -> None:
    inner = 0.35  # radius of the lowest result
    angles = [2 * math.pi * number / len(_SPOKES) for number in range(len(_SPOKES))]
    ranges = {
        name: (min(row.figures[name] for row in rows), max(row.figures[name] for row in rows)) for name in _SPOKES
    }
    for row in rows:
        radii = [
            inner + (1 - inner) * (row.figures[name] - lowest) / (highest - lowest)
            for name, (lowest, highest) in ranges.items()
        ]
        color = theme.families[row.family]
        axes.plot([*angles, angles[0]], [*radii, radii[0]], color=color, lw=2, label=row.family)
        axes.fill(angles, radii, color=color, alpha=0.08)
    axes.set_theta_zero_location("N")
    axes.set(ylim=(0, 1.02), yticks=[inner, 1])
    axes.set_yticklabels([])
    axes.set_xticks(angles, [""] * len(angles))
    for angle, (name, label) in zip(angles, _SPOKES.items(), strict=True):
        lowest, highest = ranges[name]
        across, up = -math.sin(angle), math.cos(angle)
        ha = "center" if abs(across) < 0.7 else "left" if across > 0 else "right"
        va = "bottom" if up > 0.9 else "top" if up < 0 else "center"
        axes.text(angle, 1.1, f"{label}\n{lowest:.1f} to {highest:.1f}", ha=ha, va=va, fontsize=9)
    axes.spines["polar"].set_visible(False)
    axes.grid(alpha=0.7)
