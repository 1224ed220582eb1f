"""Write a small data set that a package brings along, as folders of images.

    python tools/make_data.py digits data/digits

digits: scikit-learn's digits, 1797 real scans of handwritten digits (UCI, CC BY 4.0), 8x8 enlarged to 32x32,
written as train/<0..9>/*.png (1437) and val/<0..9>/*.png (360): every fifth scan.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from natzoo import command_line

_VAL_EVERY = 5
_SIDE = 32


def make_digits(folder: Path) -> None:
    """Writes the digits under a temporary name and renames the folder, so that it is never half there."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        root = Path(temporary) / folder.name
        pairs = list(zip(digits.images, digits.target.tolist(), strict=True))
        for index, (scan, label) in enumerate(tqdm(pairs, desc="digits", unit="image", disable=None)):
            path = root / ("val" if index % _VAL_EVERY == 0 else "train") / str(label) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray((scan * (255 / 16)).round().astype(np.uint8))
            grey.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(path)
        shutil.move(root, folder)


_MAKERS = {"digits": make_digits}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=_MAKERS, help="which data set")
    parser.add_argument("folder", type=Path, help="where to write it")
    args = parser.parse_args(argv)
    if args.folder.exists():
        print(f"{args.folder} is there already; nothing was written")
        return
    _MAKERS[args.name](args.folder)
    print(f"wrote {args.folder}")


if __name__ == "__main__":
    command_line.run(main)
