"""Write a small data set without a download, or convert yours to the layout of the small configs.

    python tools/make_data.py digits data/digits
    python tools/make_data.py shapes data/shapes
    python tools/make_data.py voc VOCdevkit/VOC2012 data/mine
    python tools/make_data.py yolo dataset/data.yaml data/mine
    python tools/make_data.py coco dataset data/mine --maps

digits: 1797 scans of handwritten digits from scikit-learn (UCI, CC BY 4.0), enlarged from 8x8 to 32x32 pixels, as
train/<0..9>/*.png (1437) and val/<0..9>/*.png (every fifth scan, 360).

shapes: generated images of circles, squares and triangles on noise, 128x128 pixels, for detection and segmentation:
- images/{training,validation}/*.png (192 and 32);
- instances_{training,validation}.json: instances with polygons, in COCO's format;
- annotations/{training,validation}/*.png: class of each pixel, in ADE20K's layout; 1 is the background.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import annotations
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from natzoo import command_line
from natzoo.checkpoints.write import write_folder

_VAL_EVERY = 5
_SIDE = 32

_SHAPES = ("circle", "square", "triangle")
_COLORS = ((190, 70, 70), (70, 170, 70), (80, 90, 200))  # typical color of each shape, which is learned before its form
_COLOR_RANGE = 70
_SHAPES_SIDE = 128
_SHAPES_COUNTS = {"training": 192, "validation": 32}


def make_digits(folder: Path) -> None:
    """Write the digits."""
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
    """Write the shapes."""
    write_folder(folder, _write_shapes)


def _write_shapes(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in _SHAPES_COUNTS.items():
        coco = {"images": [], "annotations": [], "categories": _categories()}
        for name in ("images", "annotations"):
            (root / name / split).mkdir(parents=True)
        for index in tqdm(range(count), desc=f"shapes, {split}", unit="image", disable=None):
            image, labels, shapes = draw_shapes(rng)
            name = f"{index:04d}.png"
            image.save(root / "images" / split / name)
            labels.save(root / "annotations" / split / name)
            coco["images"].append({"id": index, "file_name": name, "width": _SHAPES_SIDE, "height": _SHAPES_SIDE})
            coco["annotations"] += [
                {"id": len(coco["annotations"]) + number, "image_id": index, "iscrowd": 0, **shape}
                for number, shape in enumerate(shapes, start=1)
            ]
        (root / f"instances_{split}.json").write_text(json.dumps(coco))


def _categories() -> list[dict[str, Any]]:
    return [{"id": number, "name": name} for number, name in enumerate(_SHAPES, start=1)]


def draw_shapes(rng: np.random.Generator) -> tuple[Image.Image, Image.Image, list[dict[str, Any]]]:
    """Draw a few separate shapes; return the image, the class of each pixel, and the instances in COCO's format."""
    noise = rng.normal(rng.uniform(60, 190), 25, (_SHAPES_SIDE, _SHAPES_SIDE, 3)).clip(0, 255)
    image = Image.fromarray(noise.astype(np.uint8))
    labels = Image.new("L", image.size, 1)
    shapes, taken = [], []
    for _ in range(rng.integers(4, 25)):
        radius = rng.uniform(9, 22)
        x, y = rng.uniform(radius + 1, _SHAPES_SIDE - radius - 1, 2)
        if any(math.dist((x, y), center) < radius + other + 2 for *center, other in taken):
            continue
        taken.append((x, y, radius))
        shape = int(rng.integers(len(_SHAPES)))
        corners = _corners(shape, x, y, radius, rng.uniform(0, 2 * math.pi))
        color = rng.uniform(-_COLOR_RANGE, _COLOR_RANGE, 3) + _COLORS[shape]
        ImageDraw.Draw(image).polygon(corners, fill=tuple(color.clip(0, 255).astype(int).tolist()))
        ImageDraw.Draw(labels).polygon(corners, fill=shape + 2)
        shapes.append({"category_id": shape + 1, **_polygon(corners)})
    return image, labels, shapes


def _corners(shape: int, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon; a circle has 40."""
    count = {"circle": 40, "square": 4, "triangle": 3}[_SHAPES[shape]]
    angles = (turn + 2 * math.pi * corner / count for corner in range(count))
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def _polygon(corners: list[tuple[float, float]]) -> dict[str, Any]:
    """Return a polygon in COCO's format, with its box [x, y, width, height] and its area by the shoelace formula."""
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
    """Run make_data.py with a command line.

    Raises:
        ValueError, FileNotFoundError: if the source cannot be converted.
    """
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*_MAKERS, *annotations.READERS), help="data set to write, or format of SOURCE")
    parser.add_argument("source", nargs="?", type=Path, metavar="SOURCE", help="voc, yolo, coco: what to convert")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new folder to write to")
    parser.add_argument("--maps", action="store_true", help="also write label maps, for segmentation, from masks")
    parser.add_argument("--link", action="store_true", help="make symbolic links to the images instead of copies")
    args = parser.parse_args(argv)
    if (args.source is None) != (args.name in _MAKERS):
        parser.error(f"{args.name} {'has no SOURCE' if args.source else 'requires SOURCE and FOLDER'}")
    if args.folder.exists():
        print(f"{args.folder} already exists; nothing was written")
        return
    if args.name in _MAKERS:
        _MAKERS[args.name](args.folder)
        print(f"wrote {args.folder}")
        return
    source = annotations.READERS[args.name](args.source)
    counts = annotations.convert(source, args.folder, args.maps, args.link)
    suffixes = sorted({image.path.suffix for images in source.splits.values() for image in images})
    print(f"wrote {args.folder}: {counts['training']} training and {counts['validation']} validation images")
    print("In a copy of a small config, set:")
    print(f'    data_root = "{args.folder}/"')
    classes = [*(["background"] if args.maps else []), *source.classes]
    print(f"    classes = {classes!r}" + (f"\n    img_suffix = {suffixes[0]!r}" if args.maps else ""))
    if args.maps and len(suffixes) > 1:
        print(f"Warning: images end with {', '.join(suffixes)}; mmseg reads one of them, so convert the others first.")


if __name__ == "__main__":
    command_line.run(main)
