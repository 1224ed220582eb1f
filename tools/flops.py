"""Parameters, MACs, FLOPs and activations: of registered models, and of configs for detection and segmentation.

    python tools/flops.py nat_mini dinat_large_384 swin_tiny_patch4_window7_224
    python tools/flops.py configs/detection/mask_rcnn_nat_mini_3x.py configs/segmentation/upernet_nat_*.py
    python tools/flops.py dinat_tiny --size 512 512
    python tools/flops.py nat_mini --per-layer 4 --csv layers.csv

For one picture of the size that the published figures are for, or of --size. A MAC is a multiplication with its
addition, of matrix products, convolutions and attention, and makes two FLOPs; papers call a MAC a FLOP. Activations are
the numbers that these put out. Nothing is computed but shapes, so it takes seconds; Mask2Former, which looks at its
masks on the way, takes a minute.
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

import timm
import torch

import natzoo  # noqa: F401  registers the models
from natzoo import command_line
from natzoo.checkpoints import write_table
from natzoo.counting import Layer, count

COLUMNS = ("model", "layer", "kind", "height", "width", "parameters", "macs", "flops", "activations")
Counted = tuple[list[Layer], tuple[int, int]]


def count_model(name: str, size: tuple[int, int] | None = None) -> Counted:
    """A registered model and its modules with what they take, and the height and width that this is for.

    Raises:
        ValueError: if timm knows no such model, or it does not take pictures of that size.
    """
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f": did you mean {nearest[0]!r}?" if nearest else "."
        raise ValueError(f"{name!r} is neither a config (.py) nor a model that timm knows{hint}")
    with torch.device("meta"):
        model = _create(name, size)
        size = size or model.default_cfg["input_size"][1:]
        image = torch.zeros(1, 3, *size)
    try:
        return count(model, lambda: model(image)), size
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"{name} does not take a picture of {size[0]} x {size[1]}: {error}") from error


def _create(name: str, size: tuple[int, int] | None) -> torch.nn.Module:
    """Models made for one size must be told of another."""
    if size and timm.get_pretrained_cfg(name).fixed_input_size:
        return timm.create_model(name, img_size=size).eval()
    return timm.create_model(name).eval()


def count_anything(what: str, size: tuple[int, int] | None = None) -> Counted:
    """The same of a model's name or a config's path."""
    if not what.endswith(".py"):
        return count_model(what, size)
    from natzoo.openmmlab.counting import count_config
    from natzoo.openmmlab.runner import read_config

    return count_config(read_config(Path(what)), size)


def format_row(name: str, size: str, layer: Layer) -> str:
    millions, billions = (layer.parameters / 1e6, layer.activations / 1e6), (layer.macs / 1e9, 2 * layer.macs / 1e9)
    parameters, activations = (f"{number:.2f} M" for number in millions)
    macs, flops = (f"{number:.{1 if number >= 0.1 else 3}f} G" for number in billions)
    return f"{name:<44} {size:>14} " + " ".join(f"{figure:>12}" for figure in (parameters, macs, flops, activations))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="registered names or paths of configs")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the picture, in pixels")
    parser.add_argument(
        "--per-layer",
        nargs="?",
        type=int,
        const=2,
        default=0,
        metavar="DEPTH",
        help="modules too, so deep; 2 unless given",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="table to write, in plain numbers")
    args = parser.parse_args(argv)
    titles = ("parameters", "MACs", "FLOPs", "activations")
    print(f"{'model':<44} {'height x width':>14} " + " ".join(f"{title:>12}" for title in titles))
    rows = []
    for what in args.what:
        layers, (height, width) = count_anything(what, tuple(args.size) if args.size else None)
        name = Path(what).stem if what.endswith(".py") else what
        print(format_row(name, f"{height} x {width}", layers[0]), flush=True)
        for layer in layers:
            if layer.depth > args.per_layer or not (layer.parameters or layer.macs):
                continue
            if layer.name:
                print(format_row("  " * layer.depth + layer.name, "", layer))
            figures = (layer.parameters, layer.macs, 2 * layer.macs, layer.activations)
            row = (name, layer.name, layer.kind, height, width, *figures)
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        write_table(args.csv, COLUMNS, rows)
        print(f"wrote {args.csv}")


if __name__ == "__main__":
    command_line.run(main)
