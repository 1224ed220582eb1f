"""The parts of tools/gpu_check.sh: correctness, speed of the operator, of the layer and of whole models on a GPU.

    python tools/gpu_check.py operators --seconds 130 --rows output/gpu/rows.txt

Each line that it adds to the file of rows is a row of the table to come: part | what | result. Times are medians of
CUDA events around replays of a CUDA graph (around calls where a graph cannot be made), over several sets of inputs that
together exceed the L2 cache. The floor is the least traffic over the rate of a large copy, or the least work over the
rate of a large bfloat16 matrix product, whichever is longer; both rates are measured first.
`--rehearse` runs all parts on the CPU with tiny shapes, to see that they run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

import torch  # noqa: E402
from gpu_checks.check import Check  # noqa: E402

# Each a module of gpu_checks, with a function of its name.
PARTS = ("correctness", "sanitizer", "operators", "layers", "models")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=600.0, help="about how long it may take")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="file to add rows to")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --rehearse runs on the CPU")
    check = Check(args.seconds, args.rows, args.rehearse)
    # Alone, as compute-sanitizer would watch whatever else is loaded, timm's for one.
    part = importlib.import_module(f"gpu_checks.{args.part}")
    getattr(part, args.part)(check)
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
