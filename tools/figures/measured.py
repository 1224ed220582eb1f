"""Plots of measurements: the tables in assets/benchmarks, written by tools/benchmark.py."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import matplotlib.pyplot as plt

from figures.published import INITIALS, Published, draw_families, published
from figures.style import WIDTH, Theme, linear_ticks, log_ticks, open_frame

TABLES = Path(__file__).resolve().parents[2] / "assets" / "benchmarks"
Rows = list[dict[str, str]]

# Provider in the tables: label of its bars, and the family whose color they have.
_PROVIDERS = {
    "natten-cpu": ("natten (cpu)", "NAT"),
    "natten-reference": ("natten (reference)", "DiNAT_s"),
    "sdpa": ("SDPA with mask", "Swin"),
    "flex_attention": ("FlexAttention (compiled)", "ConvNeXt"),
    "gather": ("gathered windows", "DiNAT"),
    "timm-window": ("Swin windows (timm)", "Swin"),
    "timm-shifted-window": ("Swin shifted windows (timm)", "ConvNeXt"),
}
# Case in the tables: label.
_CASES = {
    "b8_7x7_h16_d32_k7": "7x7",
    "b8_14x14_h8_d32_k7": "14x14",
    "b8_28x28_h4_d32_k7": "28x28",
    "b8_56x56_h2_d32_k7": "56x56",
    "b8_56x56_h2_d32_k7_dil8": "56x56\ndilation 8",
    "b8_56x56_h2_d32_k13": "56x56\nwindow 13x13",
    "b8_4096_h4_d32_k63": "4096 (1-D)\nwindow 63",
    "b1_16x32x32_h4_d32_k5x7x7": "16x32x32\nwindow 5x7x7",
}
_PASSES = {"forward": "Forward", "forward+backward": "Forward + backward"}


def read_table(kind: str) -> Rows:
    """Return the rows of assets/benchmarks/KIND.csv."""
    with (TABLES / f"{kind}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _machine(rows: Rows) -> str:
    """Return the machine and versions of a table in one sentence."""
    row = rows[0]
    cpu = row["cpu_model"].replace("(R)", "").replace("Processor @ ", "").replace("GHz", " GHz")
    return f"Measured on {row['threads']} cores of an {cpu}, float32, PyTorch {row['torch_version'].split('+')[0]}."


# ---------------------------------------------------------------------------------------------------------------------
# Operator and layer
# ---------------------------------------------------------------------------------------------------------------------


def draw_kernels(theme: Theme) -> plt.Figure:
    """Plot the time of the operator per backend, next to other implementations."""
    rows = [row for row in read_table("ops") if row["group"] in _CASES]
    figure, panels = plt.subplots(2, 1, figsize=(WIDTH, 6.4), layout="constrained", sharex=True)
    providers = ("natten-cpu", "natten-reference", "sdpa", "flex_attention", "gather")
    for axes, (name, title) in zip(panels, _PASSES.items(), strict=True):
        heights = _draw_bars(axes, theme, rows, providers, name, "p50_ms")
        axes.set(ylabel="time (ms), log scale", title=title)
        log_ticks(axes.yaxis, min(heights), 10.0 ** math.ceil(math.log10(max(heights))), decades=True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(providers), frameon=False, fontsize=9)
    note = "Neighborhood attention with bias; window 7x7 and batch size 8, except 3-D: batch size 1."
    figure.supxlabel(f"{note} Missing bars: unsupported or too slow.\n{_machine(rows)}", fontsize=8.5)
    return figure


def draw_layers(theme: Theme, column: str) -> plt.Figure:
    """Plot time ("p50_ms") or peak memory ("peak_memory_mb") of the attention layer, including its projections."""
    rows = read_table("layers")
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4.2), layout="constrained")
    providers = ("natten-cpu", "timm-window", "timm-shifted-window", "natten-reference")
    for axes, (name, title) in zip(panels, _PASSES.items(), strict=True):
        _draw_bars(axes, theme, rows, providers, name, column)
        linear_ticks(axes.yaxis)
        axes.set(title=title, xlabel="map (tokens)")
    panels[0].set_ylabel({"p50_ms": "time (ms)", "peak_memory_mb": "peak memory (MB)"}[column])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9, columnspacing=1.2)
    note = "Attention layers of equal width, window 7x7, batch size 8. A 7x7 map has no shifted windows."
    figure.supxlabel(f"{note}\n{_machine(rows)}", fontsize=8.5)
    return figure


def _draw_bars(
    axes: plt.Axes, theme: Theme, rows: Rows, providers: tuple[str, ...], name: str, column: str
) -> list[float]:
    """Draw one group of bars per case and one bar per provider, and return the heights of all bars."""
    cases = [case for case in _CASES if any(row["group"] == case for row in rows)]
    width = 0.82 / len(providers)
    drawn = []
    for number, provider in enumerate(providers):
        values = {row["case"]: float(row[column]) for row in rows if (row["provider"], row["pass"]) == (provider, name)}
        places = [place for place, case in enumerate(cases) if case in values]
        heights = [values[cases[place]] for place in places]
        left = [place + (number - (len(providers) - 1) / 2) * width for place in places]
        label, family = _PROVIDERS[provider]
        axes.bar(left, heights, width, color=theme.families[family], label=label)
        drawn += heights
    axes.set_xticks(range(len(cases)), [_CASES[case] for case in cases], fontsize=9)
    open_frame(axes)
    axes.grid(visible=False, axis="x")
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def draw_models(theme: Theme, families: tuple[str, ...], column: str) -> plt.Figure:
    """Plot published top-1 against measured throughput ("images_per_s") or peak memory ("peak_memory_mb")."""
    rows = read_table("models")
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4.4), layout="constrained", sharey=True)
    label = {"images_per_s": "throughput (img/s)", "peak_memory_mb": "peak memory (MB)"}[column]
    cases = {"inference_b8_224": "Inference", "step_b8_224": "Training step"}
    for axes, (case, title) in zip(panels, cases.items(), strict=True):
        draw_families(axes, theme, families, _with_measured(rows, case, column), column, "top1")
        axes.set(title=title, xlabel=f"{label}, log scale")
    panels[0].set_ylabel("ImageNet-1K top-1 (%)")
    panels[0].legend(loc="lower left" if column == "images_per_s" else "lower right", frameon=False)
    note = f"224x224, batch size 8. Accuracy as published. {INITIALS}"
    figure.supxlabel(f"{note}\n{_machine(rows)}", fontsize=8.5)
    return figure


def _with_measured(rows: Rows, case: str, column: str) -> list[Published]:
    """Return the published models that were measured, with the measurement added to their figures."""
    values = {row["provider"]: float(row[column]) for row in rows if row["case"] == case and row[column]}
    return [
        model._replace(figures={**model.figures, column: values[model.name]})
        for model in published()
        if model.name in values
    ]
