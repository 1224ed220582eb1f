"""Print the windows of a problem as text and, with --out, draw them as a picture.

    python -m natten.geometry --size 12x12 --kernel-size 5 --dilation 2 --query 3,4
    python -m natten.geometry --size 16 --kernel-size 6 --stride 3 --causal
    python -m natten.geometry --size 4x8x8 --kernel-size 3x5x5 --causal 0 --query 2,4,4 --query 3,0,0 --out windows.png

--size takes one number per axis, for 1 to 3 axes; --kernel-size, --stride and --dilation take a single number or one
per axis. A 1-D problem is drawn with one row per query, others with the window of the query at the center by default.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from natten.checks import CAUSAL_HELP, CommandParser, make_axes, parse_causal, parse_numbers
from natten.geometry import Axis, drawing


def read_axes(args: argparse.Namespace) -> tuple[Axis, ...]:
    """Return the axes of the problem that the options describe.

    Raises:
        ValueError: if an option is invalid.
    """
    rank = len(args.size)
    if rank > 3:
        raise ValueError(f"--size has {rank} axes; use 1 to 3.")
    causal = parse_causal(args.causal, rank)
    kernel_size, stride, dilation = (
        values[0] if len(values) == 1 else values for values in (args.kernel_size, args.stride, args.dilation)
    )
    axes = make_axes(args.size, kernel_size, stride, dilation, causal)
    for query in filter(None, args.query):
        if len(query) != rank or not all(
            0 <= position < axis.length for position, axis in zip(query, axes, strict=True)
        ):
            shown = ",".join(map(str, query)), "x".join(map(str, args.size))
            raise ValueError("--query {} is not a token of a {} map; positions start at 0.".format(*shown))
    return axes


def write(figure: Any, path: Path) -> None:
    """Write a figure atomically: to a temporary file, which then replaces the picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.png")
    try:
        figure.savefig(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m natten.geometry` with the given arguments, by default those of the command line."""
    parser = CommandParser(
        prog="python -m natten.geometry", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers: dict[str, Any] = {"type": parse_numbers, "metavar": "N"}
    add = parser.add_argument
    add("--size", **numbers, required=True, help="tokens along each axis, such as 12x12")
    add("--kernel-size", **numbers, required=True, help="window size in tokens")
    add("--stride", **numbers, default=(1,), help="number of queries that share a window (default: 1)")
    add("--dilation", **numbers, default=(1,), help="distance between tokens of a window (default: 1)")
    add("--causal", type=int, nargs="*", metavar="AXIS", help=CAUSAL_HELP)
    add(
        "--query",
        type=parse_numbers,
        action="append",
        metavar="POSITION",
        help="query to show, such as 3,4; repeatable",
    )
    add("--out", type=Path, metavar="PNG", help="picture to write; requires matplotlib")
    add("--theme", choices=drawing.PALETTES, default="light", help="color theme of the picture (default: light)")
    args = parser.parse_args(argv)
    args.query = args.query or [None]
    try:
        axes = read_axes(args)
        print(drawing.to_text(axes, args.query))
        if args.out:
            write(drawing.draw(axes, args.query, args.theme), args.out)
            print(f"\nwrote {args.out}")
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
