"""Compile the CPU kernels, for this machine or ahead of time for others.

    python -m natten.build                                            # for this machine, into the cache
    python -m natten.build --list                                     # show which library is used here, and why
    python -m natten.build --cpu x86-64-v3 --cpu x86-64-v4 --out DIR  # ahead of time, for other machines

natten also compiles the kernels automatically on first use. natten/backends/cpu/build.py describes where the library is
searched and stored.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from natten.backends.cpu.build import LEVELS, Unavailable, build_ahead, cpu_library, find
from natten.checks import CommandParser

__all__ = ["LEVELS", "Unavailable", "build_ahead", "cpu_library", "find", "main"]

log = logging.getLogger("natten")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m natten.build` with the given arguments, by default those of the command line."""
    parser = CommandParser(
        prog="python -m natten.build",
        description="Compile the CPU kernels of natten. By default, compile for this machine into the cache.",
        epilog="Environment variables: CXX selects the compiler, NATTEN_CACHE_DIR the cache folder.",
    )
    parser.add_argument(
        "--cpu",
        action="append",
        choices=LEVELS,
        metavar="LEVEL",
        help=f"compile for machines of this CPU level ({', '.join(LEVELS)}) into --out; can be repeated",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the libraries of --cpu")
    parser.add_argument(
        "--list", action="store_true", help="compile nothing; show which library is used here, and why not the others"
    )
    args = parser.parse_args(argv)
    if bool(args.cpu) != bool(args.out) or (args.list and args.cpu):
        parser.error("--cpu LEVEL and --out DIR require each other and exclude --list")
    try:
        if args.list:
            _list()
        elif args.cpu:
            for level in dict.fromkeys(args.cpu):
                print(build_ahead(level, args.out))
        else:
            _build_here()
    except (Unavailable, OSError) as error:
        parser.error(str(error))


def _build_here() -> None:
    found = find()
    if found.path is None:
        raise Unavailable("the CPU kernels compile, but no folder can hold them; set NATTEN_CACHE_DIR.")
    print(f"{found.path}\n{found.origin}")


def _list() -> None:
    handler, level = logging.StreamHandler(sys.stdout), log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        find(may_compile=False)
    except Unavailable as error:
        print(error)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


if __name__ == "__main__":
    main()
