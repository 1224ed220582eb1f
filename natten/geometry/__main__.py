"""Print the windows of a problem as text, and with --out draw them as a picture.

    python -m natten.geometry --size 12x12 --kernel-size 5 --dilation 2 --query 3,4
    python -m natten.geometry --size 16 --kernel-size 6 --stride 3 --causal
    python -m natten.geometry --size 4x8x8 --kernel-size 3x5x5 --causal 0 --query 2,4,4 --query 3,0,0 --out windows.png

Sizes are a single number or one per axis, for 1 to 3 axes. A 1-D problem is drawn with one row per query.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from natten.checks import make_axes
from natten.geometry import Axis, drawing


def parse_numbers(text: str) -> tuple[int, ...]:
    """Parse a single number, or one per axis, such as "7" or "56x56"."""
    try:
        return tuple(int(word) for word in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or numbers such as 12x12") from None


def parse_causal(axes: Sequence[int] | None, rank: int) -> tuple[bool, ...]:
    """Return which axes are causal for the option ``--causal [AXIS ...]``: without axes, all of them.

    Raises:
        ValueError: if it names an axis that does not exist.
    """
    if axes and not set(axes) <= set(range(rank)):
        raise ValueError(f"--causal names axes {axes}, but --size has axes 0 to {rank - 1}")
    return tuple(axes is not None and (not axes or axis in axes) for axis in range(rank))


def problem(args: argparse.Namespace) -> tuple[Axis, ...]:
    """Return the axes that the options describe.

    Raises:
        ValueError: if they are invalid.
    """
    rank = len(args.size)
    if rank > 3:
        raise ValueError(f"--size has {rank} axes; use 1 to 3")
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
            raise ValueError("--query {} is not a token of a {} map; positions start at 0".format(*shown))
    return axes


def write(figure, path: Path) -> None:
    """Write a figure to a temporary file and rename it, so that an existing picture is only replaced by a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.png")
    try:
        figure.savefig(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = _Parser(
        prog="python -m natten.geometry", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=parse_numbers, required=True, help="map size in tokens, such as 12x12")
    parser.add_argument("--kernel-size", type=parse_numbers, required=True, help="window size in tokens")
    parser.add_argument("--stride", type=parse_numbers, default=(1,), help="number of queries that share a window")
    parser.add_argument("--dilation", type=parse_numbers, default=(1,), help="distance between tokens of a window")
    parser.add_argument("--causal", type=int, nargs="*", metavar="AXIS", help="causal axes; default: all axes")
    parser.add_argument(
        "--query", type=parse_numbers, action="append", help="query whose window is drawn, such as 3,4; repeatable"
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="picture to write")
    parser.add_argument("--theme", choices=drawing.PALETTES, default="light", help="color theme of the picture")
    args = parser.parse_args(argv)
    args.query = args.query or [None]
    try:
        axes = problem(args)
        print(drawing.to_text(axes, args.query))
        if args.out:
            write(drawing.draw(axes, args.query, args.theme), args.out)
            print(f"\nwrote {args.out}")
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
