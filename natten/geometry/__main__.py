"""Draws the windows of a problem, as text and, with --out, as a picture.

    python -m natten.geometry --size 12x12 --kernel-size 5 --dilation 2 --query 3,4
    python -m natten.geometry --size 16 --kernel-size 6 --stride 3 --causal
    python -m natten.geometry --size 4x8x8 --kernel-size 3x5x5 --causal 0 --query 2,4,4 --query 3,0,0 --out windows.png

Sizes are one number, or one an axis: 1 to 3 axes. A 1-D problem is drawn with a row for each query.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from natten.command_line import Parser, causal_axes, numbers
from natten.geometry import Axis, drawing, make_axes


def problem(args: argparse.Namespace) -> tuple[Axis, ...]:
    """The axes that the options ask for.

    Raises:
        ValueError: where they make no problem.
    """
    rank = len(args.size)
    if rank > 3:
        raise ValueError(f"--size has {rank} axes, but neighborhood attention has 1 to 3.")
    causal = causal_axes(args.causal, rank)
    window = (values[0] if len(values) == 1 else values for values in (args.kernel_size, args.stride, args.dilation))
    axes = make_axes(args.size, *window, causal)
    for query in filter(None, args.query):
        if len(query) != rank or not all(
            0 <= position < axis.length for position, axis in zip(query, axes, strict=True)
        ):
            shown = ",".join(map(str, query)), "x".join(map(str, args.size))
            raise ValueError("--query {} is no token of a map of {} tokens, counted from 0.".format(*shown))
    return axes


def write(figure, path: Path) -> None:
    """Writes a figure by way of a temporary file, so that what was there is only replaced by a whole picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.png")
    try:
        figure.savefig(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m natten.geometry", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=numbers, required=True, help="tokens, such as 12x12")
    parser.add_argument("--kernel-size", type=numbers, required=True, help="tokens a window has")
    parser.add_argument("--stride", type=numbers, default=(1,), help="queries that share a window")
    parser.add_argument("--dilation", type=numbers, default=(1,), help="distance between the tokens of a window")
    parser.add_argument("--causal", type=int, nargs="*", metavar="AXIS", help="causal axes; all of them unless named")
    parser.add_argument(
        "--query", type=numbers, action="append", help="token to draw the window of, such as 3,4; may be repeated"
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="picture to write")
    parser.add_argument("--theme", choices=drawing.PALETTES, default="light", help="colours of the picture")
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
