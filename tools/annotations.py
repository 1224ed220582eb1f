"""Convert labelled images from VOC, YOLO and COCO to the layout of the small configs; used by make_data.py.

The layout is COCO's format for detection and ADE20K's for segmentation:
- images/{training,validation}/NAME
- instances_{training,validation}.json: boxes, and masks as far as the source has them
- annotations/{training,validation}/NAME.png: class of each pixel; 0 is ignored, 1 is the background (on request)
"""

from __future__ import annotations

import json
import os
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

from natzoo import command_line
from natzoo.checkpoints.write import write_folder
from natzoo.images import check_image_size

SPLITS = ("training", "validation")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_VAL_EVERY = 5  # without a validation split, every fifth image


class Labelled(NamedTuple):
    """An image with its objects.

    Attributes:
        path: the image.
        name: relative path of the image in the new folder.
        objects: COCO annotations: category_id from 1 on, bbox, iscrowd, and segmentation if known.
        label_map: a label map of VOC, if there is one.
    """

    path: Path
    name: str
    objects: list[dict[str, Any]]
    label_map: Path | None = None


class Source(NamedTuple):
    """Class names, and the images of each split."""

    classes: list[str]
    splits: dict[str, list[Labelled]]


# ---------------------------------------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------------------------------------


def read_voc(folder: Path) -> Source:
    """Read a folder with JPEGImages/, Annotations/*.xml, and ImageSets/Main/{train,val}.txt if there is a split.

    Objects marked as difficult become iscrowd, which training ignores.

    Raises:
        ValueError: naming the file that is wrong.
        FileNotFoundError: if there are no annotations.
    """
    files = {path.stem: path for path in sorted((folder / "Annotations").glob("*.xml"))}
    if not files:
        raise FileNotFoundError(f"{folder} has no Annotations/*.xml; give the folder that holds JPEGImages/ too.")
    images = _images_by_stem(folder / "JPEGImages")
    parsed = {stem: _read_voc_objects(path) for stem, path in tqdm(files.items(), desc="VOC", disable=None)}
    classes = sorted({name for objects in parsed.values() for name, _ in objects})
    found = {}
    for stem, objects in parsed.items():
        if stem not in images:
            raise ValueError(f"{files[stem]} belongs to no image in {folder / 'JPEGImages'}; remove it.")
        label_map = folder / "SegmentationClass" / f"{stem}.png"
        numbered = [{"category_id": classes.index(name) + 1, **values} for name, values in objects]
        found[stem] = Labelled(images[stem], images[stem].name, numbered, label_map if label_map.is_file() else None)
    lists = [folder / "ImageSets" / "Main" / name for name in ("train.txt", "val.txt")]
    if not all(path.is_file() for path in lists):
        return Source(classes, _divide(list(found.values())))
    lines = [[line.split()[0] for line in path.read_text().splitlines() if line.strip()] for path in lists]
    stems = dict(zip(SPLITS, lines, strict=True))
    missing = [stem for part in stems.values() for stem in part if stem not in found]
    if missing:
        raise ValueError(f"{folder}/ImageSets/Main lists {missing[0]!r}, which has no annotation; remove it there.")
    return Source(classes, {split: [found[stem] for stem in part] for split, part in stems.items()})


def _read_voc_objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    text = command_line.read_text(path, "repair or remove it", limit=2**22)
    try:
        root = ElementTree.fromstring(text)
        objects = []
        for item in root.iter("object"):
            sides = (item.findtext(f"bndbox/{side}", "") for side in ("xmin", "ymin", "xmax", "ymax"))
            left, top, right, bottom = map(float, sides)
            # VOC counts pixels from 1, and its boxes include the last one.
            box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
            is_difficult = int(item.findtext("difficult", "0"))
            objects.append((item.findtext("name", "").strip(), {"bbox": box, "iscrowd": is_difficult}))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path} is not an annotation of VOC ({error}); repair or remove it.") from error
    return objects


def read_yolo(path: Path) -> Source:
    """Read the data.yaml of a YOLO dataset: names, train and val; labels are next to the images, or in labels/.

    A label is `class x y width height`, or `class x1 y1 x2 y2 x3 y3 ...` for a polygon, in fractions of the image.

    Raises:
        ValueError: naming the file that is wrong.
        FileNotFoundError: if a file or folder does not exist.
    """
    path = path / "data.yaml" if path.is_dir() else path
    content = yaml.safe_load(command_line.read_text(path, "give the data.yaml of the dataset", limit=2**20))
    names = content.get("names") if isinstance(content, dict) else None
    names = list(names.values()) if isinstance(names, dict) else names
    if not isinstance(names, list) or not content.get("train"):
        raise ValueError(f"{path} has no names or no train; it must be the data.yaml of a YOLO dataset.")
    root = path.parent / (content.get("path") or "")
    root = root if root.is_dir() else path.parent
    classes = [str(name) for name in names]
    splits = {
        split: [_read_yolo_image(image, base, classes) for image, base in _yolo_images(root, content[key])]
        for split, key in zip(SPLITS, ("train", "val"), strict=True)
        if content.get(key)
    }
    return Source(classes, splits if len(splits) == 2 else _divide(splits["training"]))


def _yolo_images(root: Path, places: Any) -> Iterator[tuple[Path, Path]]:
    """Yield the images of a split, each with the folder that its name is relative to."""
    for place in places if isinstance(places, list) else [places]:
        folder = root / str(place)
        if not folder.exists() and str(place).startswith("../"):  # as exported by Roboflow
            folder = root / str(place).removeprefix("../")
        if folder.is_dir():
            images = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)
            yield from ((image, folder) for image in images)
        elif folder.is_file():
            for line in folder.read_text().split():
                image = root / line
                yield image, image.parent
        else:
            raise FileNotFoundError(f"{folder} does not exist, but data.yaml names it; check train and val.")


def _read_yolo_image(image: Path, base: Path, classes: list[str]) -> Labelled:
    parts = list(image.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    labels = Path(*parts).with_suffix(".txt")
    width, height = _size(image)
    objects = []
    lines = labels.read_text().splitlines() if labels.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            key, *values = map(float, line.split())
            is_polygon = len(values) >= 6 and len(values) % 2 == 0
            if not (is_polygon or len(values) == 4) or not 0 <= key < len(classes):
                raise ValueError("it must be a class and 4 numbers, or a class and at least 3 points")
            objects.append({"category_id": int(key) + 1, "iscrowd": 0, **_yolo_shape(values, width, height)})
        except ValueError as error:
            raise ValueError(f"{labels} has the line {number} {line!r:.60} ({error}).") from error
    return Labelled(image, image.relative_to(base).as_posix(), objects)


def _yolo_shape(values: list[float], width: int, height: int) -> dict[str, Any]:
    if len(values) == 4:
        x, y, w, h = values
        return {"bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]}
    polygon = [value * (height if index % 2 else width) for index, value in enumerate(values)]
    left, top = min(polygon[::2]), min(polygon[1::2])
    return {"bbox": [left, top, max(polygon[::2]) - left, max(polygon[1::2]) - top], "segmentation": [polygon]}


def read_coco(path: Path) -> Source:
    """Read COCO annotations.

    Args:
        path: a folder with annotations/instances_{train,val}*.json and the image folders train*/ and val*/; one with
            {train,valid}/_annotations.coco.json next to the images; or a JSON file next to the images.

    Raises:
        ValueError: naming the file that is wrong.
        FileNotFoundError: if there are no annotations, or an image does not exist.
    """
    pairs = [(path, path.parent)] if path.is_file() else []
    for short in ("train", "val"):
        for file in sorted(path.glob(f"annotations/instances_{short}*.json"))[:1]:
            pairs.append((file, path / file.stem.removeprefix("instances_")))
        pairs += [(file, file.parent) for file in sorted(path.glob(f"{short}*/_annotations.coco.json"))[:1]]
    if not pairs:
        raise FileNotFoundError(
            f"{path} has no annotations/instances_train*.json and no train/_annotations.coco.json; give a JSON file."
        )
    contents = [command_line.read_json(file, "repair it", limit=2**31) for file, _ in pairs]
    classes: list[str] = []
    parts = []
    for (file, images), content in zip(pairs, contents, strict=True):
        try:
            names = {category["id"]: str(category["name"]) for category in content["categories"]}
            used = {one["category_id"] for one in content["annotations"]}
            classes += [name for key, name in names.items() if key in used and name not in classes]
            parts.append(_read_coco_images(content, names, images, classes))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not in COCO's format: {error!r}.") from error
    return Source(classes, dict(zip(SPLITS, parts, strict=False)) if len(parts) > 1 else _divide(parts[0]))


def _read_coco_images(content: dict, names: dict[int, str], folder: Path, classes: list[str]) -> list[Labelled]:
    objects: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for one in content["annotations"]:
        kept = {key: one[key] for key in ("bbox", "segmentation", "iscrowd", "area") if one.get(key) is not None}
        objects[one["image_id"]].append({**kept, "category_id": classes.index(names[one["category_id"]]) + 1})
    labelled = []
    for image in content["images"]:
        name = image["file_name"]
        if not command_line.is_relative_name(name):
            raise ValueError(f"{folder} has an image with the file_name {name!r:.80}; it must be a relative path.")
        labelled.append(Labelled(folder / name, name, objects[image["id"]]))
    return labelled


def _divide(images: list[Labelled]) -> dict[str, list[Labelled]]:
    """Use every fifth image for validation."""
    validation = images[::_VAL_EVERY]
    return {"training": [one for index, one in enumerate(images) if index % _VAL_EVERY], "validation": validation}


def _images_by_stem(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in _SUFFIXES}


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            check_image_size(*image.size)
            return image.size
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}); repair or remove it.") from error


READERS: dict[str, Callable[[Path], Source]] = {"voc": read_voc, "yolo": read_yolo, "coco": read_coco}


# ---------------------------------------------------------------------------------------------------------------------
# Writer
# ---------------------------------------------------------------------------------------------------------------------


def convert(source: Source, folder: Path, with_maps: bool = False, link: bool = False) -> dict[str, int]:
    """Write a dataset in the layout of the small configs.

    Args:
        source: what a reader returned.
        folder: new folder.
        with_maps: also write label maps, of VOC's SegmentationClass or of the masks; images without one are dropped.
        link: make symbolic links to the images instead of copies.

    Returns:
        the number of images per split.

    Raises:
        ValueError: if a class or a split is empty, or there are no masks for label maps.
        FileExistsError: if the folder exists and is not empty.
    """
    splits = source.splits
    if with_maps:
        splits = {split: [one for one in images if _has_map(one)] for split, images in splits.items()}
    if not source.classes or not all(splits.get(split) for split in SPLITS):
        what = "images with masks or label maps" if with_maps else "labelled images"
        raise ValueError(f"{folder} would have no {what} in one of its splits; check the source.")
    write_folder(folder, lambda root: _write(source.classes, splits, root, with_maps, link))
    return {split: len(images) for split, images in splits.items()}


def _has_map(image: Labelled) -> bool:
    return image.label_map is not None or any("segmentation" in one for one in image.objects)


def _write(classes: list[str], splits: dict[str, list[Labelled]], root: Path, with_maps: bool, link: bool) -> None:
    for split, images in splits.items():
        coco: dict[str, list[Any]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": number, "name": name} for number, name in enumerate(classes, start=1)],
        }
        for index, image in enumerate(tqdm(images, desc=split, unit="image", disable=None), start=1):
            width, height = _size(image.path)
            target = root / "images" / split / image.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if link:
                os.symlink(image.path.resolve(), target)
            else:
                shutil.copyfile(image.path, target)
            coco["images"].append({"id": index, "file_name": image.name, "width": width, "height": height})
            for one in image.objects:
                one = {"iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3], **one}
                coco["annotations"].append({"id": len(coco["annotations"]) + 1, "image_id": index, **one})
            if with_maps:
                path = (root / "annotations" / split / image.name).with_suffix(".png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(_label_map(image, width, height)).save(path)
        (root / f"instances_{split}.json").write_text(json.dumps(coco))


def _label_map(image: Labelled, width: int, height: int) -> np.ndarray:
    """Return the class of each pixel, uint8: 0 is ignored, 1 the background, 2 the first class."""
    if image.label_map is not None:
        labels = np.asarray(Image.open(image.label_map))
        return np.where(labels == 255, 0, labels + 1).astype(np.uint8)  # VOC ignores 255, the borders
    from pycocotools import mask as masks

    labels = np.ones((height, width), np.uint8)
    # Small objects are drawn over large ones.
    for one in sorted(image.objects, key=lambda one: -one["bbox"][2] * one["bbox"][3]):
        shape = one.get("segmentation")
        if not shape:
            continue
        encoded = masks.frPyObjects(shape, height, width) if not _is_compressed(shape) else shape
        encoded = masks.merge(encoded) if isinstance(encoded, list) else encoded
        labels[masks.decode(encoded) > 0] = 0 if one.get("iscrowd") else one["category_id"] + 1
    return labels


def _is_compressed(shape: Any) -> bool:
    return isinstance(shape, dict) and isinstance(shape["counts"], (str, bytes))
