"""Count parameters, MACs, FLOPs and activations of registered models and of detection and segmentation configs.

    python tools/flops.py nat_mini dinat_large_384 swin_tiny_patch4_window7_224
    python tools/flops.py configs/detection/mask_rcnn_nat_mini_3x.py configs/segmentation/upernet_nat_*.py
    python tools/flops.py dinat_tiny --size 512 512
    python tools/flops.py nat_mini --per-layer 4 --csv layers.csv

The counts are for one image of the size of the published figures, or of --size. A MAC is one multiplication and one
addition, or two FLOPs; papers often call MACs FLOPs. MACs of matrix products, convolutions and attention are counted,
and activations are the numbers that these output. Models run on the meta device, which takes seconds, except
Mask2Former, whose masks must be computed: it takes a minute.
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
    """Count a registered model and its modules.

    Args:
        name: name of the model.
        size: height and width of the image in pixels; the model's default if None.

    Returns:
        The counts, with the whole model first, and the height and width.

    Raises:
        ValueError: if the model is unknown, or does not support images of that size.
    """
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        raise ValueError(f"{name!r} is neither a config (.py) nor a registered model{hint}")
    with torch.device("meta"):
        model = _create(name, size)
        size = size or model.default_cfg["input_size"][1:]
        image = torch.zeros(1, 3, *size)
    try:
        return count(model, lambda: model(image)), size
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"{name} does not support images of {size[0]} x {size[1]}: {error}") from error


def _create(name: str, size: tuple[int, int] | None) -> torch.nn.Module:
    """Create a model, passing the image size to models that have a fixed one."""
    if size and timm.get_pretrained_cfg(name).fixed_input_size:
        return timm.create_model(name, img_size=size).eval()
    return timm.create_model(name).eval()


def count_anything(what: str, size: tuple[int, int] | None = None) -> Counted:
    """Count a registered model or a config (.py); see `count_model`."""
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
    parser.add_argument("what", nargs="+", help="registered model names or config files")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="image size in pixels")
    parser.add_argument(
        "--per-layer",
        nargs="?",
        type=int,
        const=2,
        default=0,
        metavar="DEPTH",
        help="also print modules down to this depth (default: 2)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="file to write the exact counts to")
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
