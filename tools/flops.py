"""Parameters and MACs of models: of registered names, and of configs for detection and segmentation.

    python tools/flops.py nat_mini dinat_large_384
    python tools/flops.py configs/detection/mask_rcnn_nat_mini_3x.py configs/segmentation/upernet_*.py
    python tools/flops.py dinat_tiny --size 512 512

For one picture of the size that the published figures are for, or of --size. A MAC is a multiplication with its
addition, of matrix products, convolutions and attention; papers call it a FLOP. Nothing is computed but shapes, so it
takes seconds; Mask2Former, which looks at its masks on the way, takes a minute.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import natten.flops  # noqa: F401  teaches the counter neighborhood attention
import natzoo  # noqa: F401  registers the models
from natzoo import command_line


def count_model(name: str, size: tuple[int, int] | None = None) -> tuple[int, int, tuple[int, int]]:
    """Parameters and MACs of a registered model, and the height and width that they are for.

    Raises:
        ValueError: if timm knows no such model.
    """
    if not timm.is_model(name):
        raise ValueError(f"{name!r} is neither a config (.py) nor a model that timm knows.")
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        size = size or model.default_cfg["input_size"][1:]
        image = torch.zeros(1, 3, *size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2, size


def count(what: str, size: tuple[int, int] | None = None) -> tuple[int, int, tuple[int, int]]:
    """The same of a model's name or a config's path."""
    if not what.endswith(".py"):
        return count_model(what, size)
    from natzoo.openmmlab.counting import count_config
    from natzoo.openmmlab.options import read_config

    return count_config(read_config(Path(what)), size)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="registered names or paths of configs")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the picture, in pixels")
    args = parser.parse_args(argv)
    print(f"{'model':<44} {'height x width':>14} {'parameters':>12} {'MACs':>10}")
    for what in args.what:
        parameters, macs, (height, width) = count(what, tuple(args.size) if args.size else None)
        name = Path(what).stem if what.endswith(".py") else what
        print(f"{name:<44} {f'{height} x {width}':>14} {parameters / 1e6:>10.2f} M {macs / 1e9:>8.1f} G", flush=True)


if __name__ == "__main__":
    command_line.run(main)
