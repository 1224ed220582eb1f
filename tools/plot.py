"""Draw the figures of the pages: diagrams, published results, and the measurements in assets/benchmarks.

    python tools/plot.py                                    all figures, into assets
    python tools/plot.py nat/compute dinat/radar            some of them
    python tools/plot.py natten/kernels --out output/plots  into another folder

Each figure is written as NAME_light.png and NAME_dark.png. Its last line states whether the results were published or
measured.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from figures import diagrams, measured, published
from figures.style import PAGE_COLORS, PAGE_DPI, save, theme_paths, themed, to_png
from tqdm import tqdm

from natzoo import command_line

ASSETS = Path(__file__).resolve().parents[1] / "assets"
_NAT = ("NAT", "Swin", "ConvNeXt")
_ALL = ("DiNAT", "DiNAT_s", "NAT", "Swin", "ConvNeXt")
FIGURES = {
    "nat/intro": diagrams.draw_nat_intro,
    "nat/architecture": partial(diagrams.draw_architecture, name="nat_mini"),
    "nat/compute": partial(published.draw_compute, families=_NAT),
    "nat/downstream": partial(published.draw_downstream, families=_NAT),
    "nat/throughput": partial(measured.draw_models, families=_NAT, column="images_per_s"),
    "nat/memory": partial(measured.draw_models, families=_NAT, column="peak_memory_mb"),
    "dinat/intro": diagrams.draw_dinat_intro,
    "dinat/architecture": partial(diagrams.draw_architecture, name="dinat_mini"),
    "dinat/compute": partial(published.draw_compute, families=_ALL),
    "dinat/downstream": partial(published.draw_downstream, families=_ALL),
    "dinat/throughput": partial(measured.draw_models, families=_ALL, column="images_per_s"),
    "dinat/memory": partial(measured.draw_models, families=_ALL, column="peak_memory_mb"),
    "dinat/radar": partial(published.draw_radar, families=_ALL),
    "natten/kernels": measured.draw_kernels,
    "natten/layer_time": partial(measured.draw_layers, column="p50_ms"),
    "natten/layer_memory": partial(measured.draw_layers, column="peak_memory_mb"),
}


def draw(name: str, folder: Path) -> None:
    """Write a figure in both themes."""
    for theme_name, path in theme_paths(folder / f"{name}.png", "both").items():
        with themed(theme_name) as theme:
            save(to_png(FIGURES[name](theme), PAGE_DPI, PAGE_COLORS), path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"figures (default: all): {', '.join(FIGURES)}")
    parser.add_argument("--out", type=Path, default=ASSETS, metavar="FOLDER", help="output folder (default: assets)")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in FIGURES:
            raise ValueError(f"NAME {name!r} is unknown; choose from {', '.join(FIGURES)}.")
    for name in tqdm(args.names or FIGURES, desc="figures", unit="figure", disable=None):
        draw(name, args.out)


if __name__ == "__main__":
    command_line.run(main)
