"""Draw the pictures of the pages: diagrams, published figures, and what assets/benchmarks holds.

    python tools/plot.py                                    all of them again, into assets
    python tools/plot.py nat/compute dinat/radar            some of them
    python tools/plot.py natten/kernels --out output/plots  elsewhere

Each is written as NAME_light.png and NAME_dark.png. A picture itself says whether its figures were published or
measured.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pictures.style import places, save, themed, to_png
from plots import diagrams, measured, published
from plots.style import COLOURS, DPI, THEMES, settings
from tqdm import tqdm

from natzoo import command_line

ASSETS = Path(__file__).resolve().parents[1] / "assets"
_NAT = ("NAT", "Swin", "ConvNeXt")
_ALL = ("DiNAT", "DiNAT_s", "NAT", "Swin", "ConvNeXt")
PICTURES = {
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
    """Writes a picture in both themes."""
    for theme, path in places(folder / f"{name}.png", "both").items():
        with themed(theme, **settings(THEMES[theme])):
            save(to_png(PICTURES[name](THEMES[theme]), DPI, COLOURS), path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"pictures; all unless given: {', '.join(PICTURES)}")
    parser.add_argument(
        "--out", type=Path, default=ASSETS, metavar="FOLDER", help="where to write; assets unless given"
    )
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in PICTURES]
    if unknown:
        raise ValueError(f"there is no picture {unknown[0]!r}: name some of {', '.join(PICTURES)}.")
    for name in tqdm(args.names or PICTURES, desc="pictures", unit="picture", disable=None):
        draw(name, args.out)


if __name__ == "__main__":
    command_line.run(main)
