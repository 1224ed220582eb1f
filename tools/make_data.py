"""Write a small data set that needs no download, as folders of images.

    python tools/make_data.py digits data/digits
    python tools/make_data.py shapes data/shapes

digits: scikit-learn's digits, 1797 real scans of handwritten digits (UCI, CC BY 4.0), 8x8 enlarged to 32x32,
written as train/<0..9>/*.png (1437) and val/<0..9>/*.png (360): every fifth scan.

shapes: circles, squares and triangles on noise, drawn here, 128x128, for detection and segmentation: the pictures as
images/{training,validation}/*.png (192 and 32); the instances as instances_{training,validation}.json in COCO's format,
with polygons; the classes of pixels as annotations/{training,validation}/*.png in ADE20K's layout, 1 being background.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from natzoo import command_line
from natzoo.checkpoints.write import write_folder

_VAL_EVERY = 5
_SIDE = 32

_SHAPES = ("circle", "square", "triangle")
_COLORS = ((190, 70, 70), (70, 170, 70), (80, 90, 200))  # each kind's, more or less: learned before its form is
_COLOR_RANGE = 70
_SHAPES_SIDE = 128
_SHAPES_COUNTS = {"training": 192, "validation": 32}


def make_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pairs = list(zip(digits.images, digits.target.tolist(), strict=True))

    def write(root: Path) -> None:
        for index, (scan, label) in enumerate(tqdm(pairs, desc="digits", unit="image", disable=None)):
            path = root / ("val" if index % _VAL_EVERY == 0 else "train") / str(label) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray((scan * (255 / 16)).round().astype(np.uint8))
            grey.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(path)

    write_folder(folder, write)


def make_shapes(folder: Path) -> None:
    write_folder(folder, _write_shapes)


def _write_shapes(root: Path) -> None:
    draws = np.random.default_rng(0)
    for split, count in _SHAPES_COUNTS.items():
        coco = {"images": [], "annotations": [], "categories": _categories()}
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in tqdm(range(count), desc=f"shapes, {split}", unit="image", disable=None):
            picture, labels, shapes = draw_shapes(draws)
            name = f"{index:04d}.png"
            picture.save(root / "images" / split / name)
            labels.save(root / "annotations" / split / name)
            coco["images"].append({"id": index, "file_name": name, "width": _SHAPES_SIDE, "height": _SHAPES_SIDE})
            coco["annotations"] += [
                {"id": len(coco["annotations"]) + number, "image_id": index, "iscrowd": 0, **shape}
                for number, shape in enumerate(shapes, start=1)
            ]
        (root / f"instances_{split}.json").write_text(json.dumps(coco))


def _categories() -> list[dict[str, Any]]:
    return [{"id": number, "name": name} for number, name in enumerate(_SHAPES, start=1)]


def draw_shapes(draws: np.random.Generator) -> tuple[Image.Image, Image.Image, list[dict[str, Any]]]:
    """A picture of a few shapes apart from each other, its classes of pixels, its instances as COCO has them."""
    noise = draws.normal(draws.uniform(60, 190), 25, (_SHAPES_SIDE, _SHAPES_SIDE, 3)).clip(0, 255)
    picture = Image.fromarray(noise.astype(np.uint8))
    labels = Image.new("L", picture.size, 1)
    shapes, taken = [], []
    for _ in range(draws.integers(4, 25)):
        radius = draws.uniform(9, 22)
        x, y = draws.uniform(radius + 1, _SHAPES_SIDE - radius - 1, 2)
        if any(math.dist((x, y), place) < radius + other + 2 for *place, other in taken):
            continue
        taken.append((x, y, radius))
        kind = int(draws.integers(len(_SHAPES)))
        corners = _corners(kind, x, y, radius, draws.uniform(0, 2 * math.pi))
        color = draws.uniform(-_COLOR_RANGE, _COLOR_RANGE, 3) + _COLORS[kind]
        ImageDraw.Draw(picture).polygon(corners, fill=tuple(color.clip(0, 255).astype(int).tolist()))
        ImageDraw.Draw(labels).polygon(corners, fill=kind + 2)
        shapes.append({"category_id": kind + 1, **_polygon(corners)})
    return picture, labels, shapes


def _corners(kind: int, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a regular polygon; a circle has many."""
    count = {"circle": 40, "square": 4, "triangle": 3}[_SHAPES[kind]]
    angles = (turn + 2 * math.pi * corner / count for corner in range(count))
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def _polygon(corners: list[tuple[float, float]]) -> dict[str, Any]:
    """A polygon as COCO has it, its box [x, y, width, height], and its area by the shoelace formula."""
    xs, ys = zip(*corners, strict=True)
    shifted = [*corners[1:], corners[0]]
    area = abs(sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in zip(corners, shifted, strict=True))) / 2
    return {
        "segmentation": [[coordinate for corner in corners for coordinate in corner]],
        "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
        "area": area,
    }


_MAKERS = {"digits": make_digits, "shapes": make_shapes}


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
