"""Broken annotations and label maps: name -> a function that breaks the drawn shapes, and the file that is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TRAINING, VALIDATION = "instances_training.json", "instances_validation.json"
Break = Callable[[Path], object]


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    """Change the content of a JSON file in place, or replace it with what `edit` returns."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(edit(content) or content))


def coco(edit: Callable[[Any], Any], file: str = TRAINING) -> Break:
    return lambda folder: edit_json(folder / file, edit)


def each(**values: Any) -> Break:
    """Set fields of all training annotations; ... removes a field."""

    def edit(content):
        for annotation in content["annotations"]:
            annotation.update(values)
            for name in [name for name, value in values.items() if value is ...]:
                del annotation[name]

    return coco(edit)


def one(section: str = "annotations", file: str = TRAINING, **values: Any) -> Break:
    """Set fields of the third image, annotation or category; ... removes a field."""

    def edit(content):
        item = content[section][2]
        item.update(values)
        for name in [name for name, value in values.items() if value is ...]:
            del item[name]

    return coco(edit, file)


def text(content: str | bytes, file: str = TRAINING) -> Break:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / file).write_bytes(data)


VOC = "<annotation><object><name>circle</name><bndbox><xmin>3</xmin></bndbox></object></annotation>"
LONG = "L0O1"  # a compressed RLE of other dimensions

# Each is named before the first iteration.
BROKEN_COCO: dict[str, tuple[Break, str]] = {
    # formats
    "YOLO text": (text("0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.1 0.1\n"), TRAINING),
    "VOC XML": (text(VOC), TRAINING),
    "empty file": (text(""), TRAINING),
    "binary file": (text(bytes(range(256))), TRAINING),
    "cut file": (lambda folder: os.truncate(folder / TRAINING, 1000), TRAINING),
    "JSON list": (coco(lambda content: content["annotations"]), TRAINING),
    "JSON number": (text("3"), TRAINING),
    "LabelMe": (text('{"shapes": [], "imagePath": "0000.png"}'), TRAINING),
    "nested lists": (text("[" * 100_000), TRAINING),
    "folder": (lambda folder: ((folder / TRAINING).unlink(), (folder / TRAINING).mkdir()), TRAINING),
    # sections
    "no images": (coco(lambda content: content.pop("images") and None), TRAINING),
    "empty images": (coco(lambda content: content["images"].clear()), TRAINING),
    "no categories": (coco(lambda content: content.pop("categories") and None), TRAINING),
    "no annotations": (coco(lambda content: content.pop("annotations") and None), TRAINING),
    "empty annotations": (coco(lambda content: content["annotations"].clear()), TRAINING),
    "empty annotations for validation": (coco(lambda content: content["annotations"].clear(), VALIDATION), VALIDATION),
    "annotations as an object": (coco(lambda content: content.update(annotations={})), TRAINING),
    "annotation null": (coco(lambda content: content["annotations"].append(None)), TRAINING),
    "category named twice": (one("categories", name="circle"), TRAINING),
    "missing class": (coco(lambda content: content["categories"].pop() and None), TRAINING),
    "category without name": (one("categories", name=...), TRAINING),
    "category without id": (one("categories", id=...), TRAINING),
    # images
    "image without file_name": (one("images", file_name=...), TRAINING),
    "image with an empty file_name": (one("images", file_name=""), TRAINING),
    "image without id": (one("images", id=...), TRAINING),
    "image without height": (one("images", height=...), TRAINING),
    "width as text": (one("images", width="128"), TRAINING),
    "width 0": (one("images", width=0), TRAINING),
    "width 10^9": (one("images", width=10**9), TRAINING),
    "another height": (one("images", height=127), TRAINING),
    "1 x 65535": (one("images", width=1, height=65535), TRAINING),
    "image twice": (coco(lambda content: content["images"].append(content["images"][0])), TRAINING),
    "file name with a scheme": (one("images", file_name="http://localhost/x.png"), TRAINING),
    "file name of a device": (one("images", file_name="/dev/zero"), "zero"),
    "file name of a folder": (one("images", file_name=".."), ".."),
    # annotations
    "no bbox": (one(bbox=...), TRAINING),
    "bbox null": (one(bbox=None), TRAINING),
    "bbox of 3 numbers": (one(bbox=[1, 2, 3]), TRAINING),
    "bbox of text": (one(bbox=["1", "2", "3", "4"]), TRAINING),
    "bbox NaN": (one(bbox=[1, 2, float("nan"), 4]), TRAINING),
    "bbox infinite": (one(bbox=[1, 2, float("inf"), 4]), TRAINING),
    "bbox 1e300": (one(bbox=[1, 2, 1e300, 4]), TRAINING),
    "bbox of negative size": (one(bbox=[50, 50, -9, -9]), TRAINING),
    "boxes relative to the image": (each(bbox=[0.1, 0.1, 0.5, 0.5]), TRAINING),
    "no category_id": (one(category_id=...), TRAINING),
    "unknown category_id": (one(category_id=77), TRAINING),
    "category_id as text": (one(category_id="circle"), TRAINING),
    "no image_id": (one(image_id=...), TRAINING),
    "image_ids as text": (
        coco(lambda c: [a.update(image_id=str(a["image_id"])) for a in c["annotations"]] and None),
        TRAINING,
    ),
    "id of another annotation": (one(id=1), TRAINING),
    "id as a list": (one(id=[1]), TRAINING),
    "area as text": (one(area="5"), TRAINING),
    "area negative": (one(area=-1), TRAINING),
    "iscrowd as text": (one(iscrowd="no"), TRAINING),
    # masks
    "no segmentation": (one(segmentation=...), TRAINING),
    "no segmentation for validation": (one(file=VALIDATION, segmentation=...), VALIDATION),
    "boxes without masks": (each(segmentation=...), TRAINING),
    "segmentation null": (one(segmentation=None), TRAINING),
    "segmentation empty": (one(segmentation=[]), TRAINING),
    "polygon empty": (one(segmentation=[[]]), TRAINING),
    "polygon of 4 numbers": (one(segmentation=[[5, 5, 50, 50]]), TRAINING),
    "polygon of 7 numbers": (one(segmentation=[[5, 5, 50, 5, 50, 50, 5]]), TRAINING),
    "polygon without list": (one(segmentation=[5, 5, 50, 5, 50, 50]), TRAINING),
    "polygon of points": (one(segmentation=[[[5, 5], [50, 5], [50, 50]]]), TRAINING),
    "polygon of text": (one(segmentation=[["5", "5", "50", "5", "50", "50"]]), TRAINING),
    "polygon NaN": (one(segmentation=[[5, 5, float("nan"), 5, 50, 50]]), TRAINING),
    "polygon 1e300": (one(segmentation=[[5, 5, 1e300, 5, 50, 50]]), TRAINING),
    "polygon of a million edges": (one(segmentation=[[0, 0, 10_000, 1] * 1000]), TRAINING),
    "segmentation as text": (one(segmentation="polygon"), TRAINING),
    "RLE without counts": (one(segmentation={"size": [128, 128]}), TRAINING),
    "RLE without size": (one(segmentation={"counts": [1]}), TRAINING),
    "RLE of another size": (one(segmentation={"size": [64, 128], "counts": [64 * 128]}), TRAINING),
    "RLE that is too short": (one(segmentation={"size": [128, 128], "counts": [5, 5]}), TRAINING),
    "RLE that is negative": (one(segmentation={"size": [128, 128], "counts": [128 * 128 + 5, -5]}), TRAINING),
    "RLE of text": (one(segmentation={"size": [128, 128], "counts": "hello"}), TRAINING),
    "RLE cut in a number": (one(segmentation={"size": [128, 128], "counts": "oooo"}), TRAINING),
    "RLE compressed, too short": (one(segmentation={"size": [128, 128], "counts": LONG}), TRAINING),
}


def relabel(change: Callable[[np.ndarray], np.ndarray], split: str = "training", only: str = "*") -> Break:
    """Replace the values of label maps, which are 1 to 4 in the drawn shapes."""

    def write(folder: Path) -> None:
        for path in (folder / "annotations" / split).glob(f"{only}.png"):
            Image.fromarray(change(np.asarray(Image.open(path)))).save(path)

    return write


def replace(content: bytes) -> Break:
    return lambda folder: (folder / "annotations" / "training" / "0001.png").write_bytes(content)


def everywhere(change: Callable[[np.ndarray], np.ndarray]) -> Break:
    return lambda folder: [relabel(change, split)(folder) for split in ("training", "validation")]


ONE = "0001.png"
BROKEN_LABELS: dict[str, tuple[Break, str]] = {
    "RGB": (relabel(lambda values: np.stack([values] * 3, -1), only="0001"), ONE),
    "RGB for validation": (relabel(lambda values: np.stack([values] * 3, -1), "validation", "0001"), ONE),
    "RGBA": (relabel(lambda values: np.stack([values] * 4, -1), only="0001"), ONE),
    "gray and alpha": (relabel(lambda values: np.stack([values] * 2, -1), only="0001"), ONE),
    "another size": (relabel(lambda values: values[:-9], only="0001"), ONE),
    "another size for validation": (relabel(lambda values: values[:, :-9], "validation", "0001"), ONE),
    "transposed": (relabel(lambda values: values[:-9].T, only="0001"), ONE),
    "16 bits": (relabel(lambda values: values.astype(np.uint16) * 100, only="0001"), ONE),
    "label beyond the classes": (relabel(lambda values: values + 1, only="0001"), ONE),
    "label beyond the classes for validation": (relabel(lambda values: values + 50, "validation", "0001"), ONE),
    "0 and 255": (everywhere(lambda values: np.where(values == 1, 0, 255).astype(np.uint8)), "annotations"),
    "all 0": (everywhere(np.zeros_like), "annotations"),
    "all 255": (everywhere(lambda values: np.full_like(values, 255)), "annotations"),
    "background alone": (relabel(np.ones_like), "annotations"),
    "colors": (everywhere(lambda values: values * 60), ".png"),
    "empty file": (replace(b""), ONE),
    "text file": (replace(b"1 2 3"), ONE),
    "cut file": (lambda folder: os.truncate(folder / "annotations" / "training" / ONE, 150), ONE),
    "folder": (
        lambda folder: [(path := folder / "annotations" / "training" / ONE).unlink(), path.mkdir()],
        ONE,
    ),
}
