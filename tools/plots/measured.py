"""Plots of what was measured: the tables of assets/benchmarks, which tools/benchmark.py wrote."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from plots.published import INITIALS, Published, draw_lines, published
from plots.style import WIDTH, Theme

TABLES = Path(__file__).resolve().parents[2] / "assets" / "benchmarks"
Rows = list[dict[str, str]]

# By the names of the tables: what a bar is called, and the place of its colour.
_PROVIDERS = {
    "natten-cpu": ("natten, cpu", "NAT"),
    "natten-reference": ("natten, reference", "DiNAT_s"),
    "sdpa": ("scaled_dot_product_attention, masked", "Swin"),
    "flex_attention": ("flex_attention, compiled", "ConvNeXt"),
    "gather": ("gathered windows", "DiNAT"),
    "timm-window": ("Swin's windows (timm)", "Swin"),
    "timm-shifted-window": ("Swin's shifted windows (timm)", "ConvNeXt"),
}
_CASES = {
    "b8_7x7_h16_d32_k7": "7x7",
    "b8_14x14_h8_d32_k7": "14x14",
    "b8_28x28_h4_d32_k7": "28x28",
    "b8_56x56_h2_d32_k7": "56x56",
    "b8_56x56_h2_d32_k7_dil8": "56x56\ndilation 8",
    "b8_56x56_h2_d32_k13": "56x56\n13x13",
    "b8_4096_h4_d32_k63": "4096\n1-D, 63",
    "b1_16x32x32_h4_d32_k5x7x7": "16x32x32\n5x7x7",
}


def read(kind: str) -> Rows:
    with (TABLES / f"{kind}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _where(rows: Rows) -> str:
    """The machine and the versions that figures are of."""
    row = rows[0]
    cpu = row["cpu_model"].replace("(R)", "")
    return f"Measured on {row['threads']} cores of an {cpu}, float32, PyTorch {row['torch_version'].split('+')[0]}."


# ---------------------------------------------------------------------------------------------------------------------
# The operator and the layer against what else there is
# ---------------------------------------------------------------------------------------------------------------------


def draw_kernels(theme: Theme) -> plt.Figure:
    """Time of the operator, forward, and forward with backward."""
    rows = read("ops")
    figure, panels = plt.subplots(2, 1, figsize=(WIDTH, 6.4), layout="constrained", sharex=True)
    providers = ("natten-cpu", "natten-reference", "sdpa", "flex_attention", "gather")
    for axes, what in zip(panels, ("forward", "forward+backward"), strict=True):
        _bars(axes, theme, [row for row in rows if row["group"] in _CASES], providers, what, "p50_ms")
        axes.set(ylabel="ms, logarithmic", title=what.replace("+", " and "), yscale="log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    missing = "A bar that is missing: it cannot, or took too long."
    note = f"Neighborhood attention with bias, windows 7x7 unless said, batch 8 (3-D: 1). {missing}\n{_where(rows)}"
    figure.supxlabel(note, fontsize=8.5)
    return figure


def draw_layers(theme: Theme, column: str) -> plt.Figure:
    """Time ("p50_ms") or peak memory ("peak_memory_mb") of the attention layer with its projections."""
    rows = read("layers")
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4.2), layout="constrained")
    providers = ("natten-cpu", "timm-window", "timm-shifted-window", "natten-reference")
    for axes, what in zip(panels, ("forward", "forward+backward"), strict=True):
        _bars(axes, theme, rows, providers, what, column)
        axes.set_title(what.replace("+", " and "))
    panels[0].set_ylabel({"p50_ms": "ms", "peak_memory_mb": "peak memory of the layer (MB)"}[column])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9, columnspacing=1.2)
    figure.supxlabel(f"Attention layers of equal width, windows 7x7, batch 8. {_where(rows)}", fontsize=8.5)
    return figure


def _bars(axes: plt.Axes, theme: Theme, rows: Rows, providers: Iterable[str], what: str, column: str) -> None:
    """A group of bars a case, a bar a provider."""
    providers = tuple(providers)
    cases = [case for case in _CASES if any(row["group"] == case for row in rows)]
    width = 0.82 / len(providers)
    for number, provider in enumerate(providers):
        values = {row["case"]: float(row[column]) for row in rows if (row["provider"], row["pass"]) == (provider, what)}
        places = [index for index, case in enumerate(cases) if case in values]
        heights = [values[cases[place]] for place in places]
        left = [place + (number - (len(providers) - 1) / 2) * width for place in places]
        label, colour = _PROVIDERS[provider]
        axes.bar(left, heights, width, color=theme.families[colour], label=label)
    axes.set_xticks(range(len(cases)), [_CASES[case] for case in cases])
    axes.grid(axis="y", alpha=0.6)
    axes.set_axisbelow(True)


# ---------------------------------------------------------------------------------------------------------------------
# Models: what was measured against the accuracy that was published
# ---------------------------------------------------------------------------------------------------------------------


def draw_models(theme: Theme, families: tuple[str, ...], column: str) -> plt.Figure:
    """Published top-1 against measured speed ("images_per_s") or peak memory ("peak_memory_mb")."""
    rows = read("models")
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4.4), layout="constrained", sharey=True)
    label = {"images_per_s": "images a second", "peak_memory_mb": "peak memory (MB)"}[column]
    cases = {"inference_b8_224": "inference, batch 8", "step_b8_224": "training step, batch 8"}
    for axes, (case, title) in zip(panels, cases.items(), strict=True):
        draw_lines(axes, theme, families, _with_measured(rows, case, column), column, "top1")
        axes.set(title=title, xlabel=f"{label}, logarithmic")
    panels[0].set_ylabel("published top-1 accuracy (%)")
    panels[0].legend(loc="lower left" if column == "images_per_s" else "lower right", frameon=False)
    figure.supxlabel(f"ImageNet-1K, 224 x 224; accuracy as published. {INITIALS}\n{_where(rows)}", fontsize=8.5)
    return figure


def _with_measured(rows: Rows, case: str, column: str) -> list[Published]:
    """The models that were measured, each with that figure, to three digits, beside the published ones."""
    values = {
        row["provider"]: float(f"{float(row[column]):.3g}") for row in rows if row["case"] == case and row[column]
    }
    return [
        model._replace(figures={**model.figures, column: values[model.name]})
        for model in published()
        if model.name in values
    ]
