"""Evaluate a segmenter: a checkpoint of train.py, or a published one.

python segmentation/test.py configs/quickstart/upernet.py output/upernet/CHECKPOINT.pth --show-dir output/segmented
"""

from __future__ import annotations

import os

# Before torch starts its threads: beside loading processes, threads that wait by spinning cost more than they save.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from natzoo import command_line


def main(argv: list[str] | None = None):
    from natzoo.openmmlab.runner import SEGMENTATION
    from natzoo.openmmlab.test import main as test

    return test(SEGMENTATION, argv)


if __name__ == "__main__":
    command_line.run(main)
