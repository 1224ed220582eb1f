"""Annotation files in COCO's format: checked while they are read, with what may be left out filled in.

`install` lets mmdet's datasets and metrics read their files with `read_coco`. Each file is still parsed only once.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from natzoo.images import check_image_size

_FORMAT = "COCO's format is an object with images, annotations and categories"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_MAX_NUMBER = 1e9  # larger coordinates and areas are not pixels
_MAX_OUTLINE = 2_000_000  # pixels; drawing the outline of a mask takes 120 bytes for each
_MAX_SEGMENT_ID = 256**3 - 1  # stored in the three colors of a panoptic map


class _Image(NamedTuple):
    name: str
    height: int
    width: int


def read_coco(path: str | Path, panoptic: bool = False) -> dict[str, Any]:
    """Read an annotation file in COCO's format and check all of it.

    A missing `iscrowd` becomes 0, a missing `area` that of the mask or box. Masks without a polygon of three points are
    removed, and so are annotations of images that are not in the file. Annotations are numbered from 1, because
    pycocotools does not count matches of an annotation with the id 0.

    Args:
        path: the file.
        panoptic: the annotations list the segments of panoptic maps.

    Returns:
        the content of the file.

    Raises:
        ValueError: if the file has another format, or an image, annotation or category is invalid; the message begins
            with the file and names the first invalid one.
        FileNotFoundError: if the file does not exist.
    """
    path = Path(path)
    try:
        content = _read_json(path)
        images, categories = _check_images(content), _check_categories(content, panoptic)
        annotations = _section(content, "annotations") if "annotations" in content else []
        content["annotations"] = list(_check_annotations(annotations, images, categories, panoptic))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return content


def install() -> None:
    """Let mmdet read annotation files with `read_coco`, and number classes in the order of the config.

    mmdet itself numbers them in the order of the file, so that a class would have another name in the results.
    """
    from mmdet.datasets.api_wrappers.coco_api import COCO, COCOPanoptic

    def read(self: Any, annotation_file: str | None = None) -> None:
        self.dataset, self.anns, self.cats, self.imgs = {}, {}, {}, {}
        self.imgToAnns, self.catToImgs = defaultdict(list), defaultdict(list)
        if annotation_file is not None:
            self.dataset = read_coco(annotation_file, isinstance(self, COCOPanoptic))
            self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def get_cat_ids(self: Any, cat_names: Sequence[str] = (), sup_names: Any = (), cat_ids: Any = ()) -> list[int]:
        found = self.getCatIds(list(cat_names), sup_names, cat_ids)
        order = {name: number for number, name in enumerate(cat_names)}
        return sorted(found, key=lambda key: order[self.cats[key]["name"]]) if order else found

    COCO.__init__, COCO.get_cat_ids = read, get_cat_ids


# ---------------------------------------------------------------------------------------------------------------------
# Sections of a file. Messages of these functions continue a sentence that begins with the file.
# ---------------------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # a folder, or a device, which could be endless
        raise ValueError(f"is not a file; {_FORMAT}.")
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not a text file in UTF-8; {_FORMAT}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({_guess_format(path)}{error}); {_FORMAT}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"contains a JSON {type(content).__name__}; {_FORMAT}.")
    return content


def _guess_format(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(200).lstrip()
    if start.startswith("<"):
        return "it seems to be XML, as in Pascal VOC: "
    return "it seems to be YOLO's text format: " if re.match(r"\d+( [\d.]+){4}", start) else ""


def _section(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    items = content.get(name)
    if not isinstance(items, list):
        raise ValueError(f"has no list of {name}; {_FORMAT}.")
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise ValueError(f"has {_show(item)} instead of an object at {name}[{number}]; {_FORMAT}.")
    return items


def _check_images(content: dict[str, Any]) -> dict[Any, _Image]:
    """Return id -> image."""
    images = _section(content, "images")
    if not images:
        raise ValueError("has no images.")
    _check_ids(images, "images")
    found = {}
    for image in images:
        name = image.get("file_name")
        described = f"has an image with the id {_show(image['id'])} whose"
        # mmdet writes files with empty names, for metrics; a dataset with such a name is refused later.
        if not _is_path(name) or "://" in name:
            raise ValueError(f"{described} file_name is {_show(name)}; it must be the path of a file.")
        for side in ("height", "width"):
            value = image.get(side)
            if type(value) is float and value.is_integer():
                image[side] = value = int(value)
            if type(value) is not int:
                raise ValueError(f"{described} {side} is {_show(value)}; it must be a number of pixels.")
        try:
            check_image_size(image["width"], image["height"])
        except ValueError as error:
            raise ValueError(f"describes the image {_show(name)}, which {error}") from error
        found[image["id"]] = _Image(name, image["height"], image["width"])
    return found


def _check_categories(content: dict[str, Any], panoptic: bool) -> set[Any]:
    """Return the ids."""
    categories = _section(content, "categories")
    _check_ids(categories, "categories")
    names = [category.get("name") for category in categories]
    for category in categories:
        name, is_thing = category.get("name"), category.get("isthing")
        if not isinstance(name, str) or not name:
            raise ValueError(f"has a category with the id {_show(category['id'])} whose name is {_show(name)}.")
        if names.count(name) > 1:
            raise ValueError(f"has two categories with the name {_show(name)}.")
        if panoptic and is_thing not in (0, 1):
            raise ValueError(f"has a category {_show(name)} whose isthing is {_show(is_thing)}; it must be 0 or 1.")
    return {category["id"] for category in categories}


def _check_ids(items: list[dict[str, Any]], name: str) -> None:
    """Raise ValueError unless the ids of a section are integers or strings, and differ."""
    kind, seen = type(items[0].get("id")) if items else int, set()
    for number, item in enumerate(items):
        key = item.get("id")
        if type(key) not in (int, str) or type(key) is not kind or (kind is int and not -(2**63) <= key < 2**63):
            raise ValueError(f"has the id {_show(key)} at {name}[{number}]; ids must be integers, or all be strings.")
        if key in seen:
            raise ValueError(f"has two {name} with the id {_show(key)}.")
        seen.add(key)


# ---------------------------------------------------------------------------------------------------------------------
# Annotations
# ---------------------------------------------------------------------------------------------------------------------


def _check_annotations(
    annotations: list[dict[str, Any]], images: dict[Any, _Image], categories: set[Any], panoptic: bool
) -> Iterator[dict[str, Any]]:
    """Yield the valid annotations of known images."""
    check, seen, number = (_check_segments if panoptic else _check_instance), set(), 0
    for position, annotation in enumerate(annotations):
        key, image = annotation.get("id"), annotation.get("image_id")
        try:
            if type(image) not in (int, str):
                raise ValueError(f"has the image_id {_show(image)}; it must be the id of an image.")
            if key is not None and not panoptic:  # those of panoptic files have none
                if type(key) not in (int, str) or key in seen:
                    raise ValueError("has an id that is not an integer, or that another annotation has.")
                seen.add(key)
            if image in images:
                check(annotation, images[image], categories)
        except ValueError as error:
            named = f"annotations[{position}]" if key is None else f"annotation {_show(key)}"
            file = f", of {_show(images[image].name)}," if type(image) in (int, str) and image in images else ""
            raise ValueError(f"is invalid: {named}{file} {error}") from error
        if image in images:
            number += 1
            annotation["id"] = number
            yield annotation


def _check_instance(annotation: dict[str, Any], image: _Image, categories: set[Any]) -> None:
    """Check the annotation of an object, and fill in iscrowd and area."""
    _check_object(annotation, categories)
    mask, box = _clean_mask(annotation.pop("segmentation", None), image), annotation["bbox"]
    if mask:
        annotation["segmentation"] = mask
    if annotation.get("area") is None:
        annotation["area"] = _mask_area(mask, image) if mask else box[2] * box[3]


def _check_segments(annotation: dict[str, Any], image: _Image, categories: set[Any]) -> None:
    """Check the segments of a panoptic map, and fill in iscrowd and area."""
    name, segments = annotation.get("file_name"), annotation.get("segments_info")
    if not _is_path(name) or not name:
        raise ValueError(f"has the file_name {_show(name)}; it must be the path of a panoptic map.")
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        raise ValueError("has no list segments_info; panoptic annotations list the segments of a map.")
    for segment in segments:
        key = segment.get("id")
        if type(key) is not int or not 0 < key <= _MAX_SEGMENT_ID:
            raise ValueError(f"has a segment with the id {_show(key)}; it must be from 1 to {_MAX_SEGMENT_ID}.")
        _check_object(segment, categories)
        if segment.get("area") is None:
            segment["area"] = segment["bbox"][2] * segment["bbox"][3]


def _check_object(described: dict[str, Any], categories: set[Any]) -> None:
    """Check category, box, area and iscrowd of an object or segment."""
    category, box, area = described.get("category_id"), described.get("bbox"), described.get("area")
    if type(category) not in (int, str) or category not in categories:
        raise ValueError(f"has the category_id {_show(category)}, which is not the id of a category.")
    if type(box) is not list or len(box) != 4 or not all(map(_is_number, box)) or box[2] < 0 or box[3] < 0:
        raise ValueError(f"has the bbox {_show(box)}; it must be [x, y, width, height] in pixels.")
    if area is not None and not (_is_number(area) and area >= 0):
        raise ValueError(f"has the area {_show(area)}; it must be a number of pixels.")
    crowd = described.get("iscrowd")
    if crowd is None:
        described["iscrowd"] = 0
    elif crowd not in (0, 1):
        raise ValueError(f"has the iscrowd {_show(crowd)}; it must be 0 or 1.")


def _is_path(name: Any) -> bool:
    return isinstance(name, str) and len(name) < 1024 and not _CONTROL.search(name)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_MAX_NUMBER <= value <= _MAX_NUMBER  # False for NaN


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------


def _clean_mask(mask: Any, image: _Image) -> Any:
    """Return a mask without degenerate polygons, or None if there is no mask."""
    if not mask:
        return None
    if isinstance(mask, dict):
        _check_run_lengths(mask, image)
        return mask
    if not isinstance(mask, list) or not all(type(polygon) is list for polygon in mask):
        raise ValueError("has a segmentation that is neither a list of polygons [[x1, y1, x2, ...], ...] nor an RLE.")
    return [polygon for polygon in mask if _is_polygon(polygon)]


def _mask_area(mask: Any, image: _Image) -> int:
    from pycocotools import mask as masks

    is_compressed = isinstance(mask, dict) and isinstance(mask["counts"], str)
    encoded = mask if is_compressed else masks.frPyObjects(mask, image.height, image.width)
    return int(masks.area(masks.merge(encoded) if isinstance(encoded, list) else encoded))


def _is_polygon(polygon: list[Any]) -> bool:
    """Return whether a polygon has three points; raise ValueError if it is invalid."""
    if len(polygon) % 2:
        raise ValueError(f"has a polygon with {len(polygon)} numbers; it must be [x1, y1, x2, y2, ...].")
    if len(polygon) < 6:
        return False
    try:
        total, low, high = sum(polygon), min(polygon), max(polygon)
    except TypeError as error:
        raise ValueError("has a polygon with values that are not numbers.") from error
    if not (low >= -_MAX_NUMBER and high <= _MAX_NUMBER and abs(total) <= len(polygon) * _MAX_NUMBER):  # or NaN
        raise ValueError("has a polygon whose coordinates are not pixels.")
    # The first product, an upper bound, is cheap.
    if len(polygon) * (high - low) > _MAX_OUTLINE and _outline(polygon) > _MAX_OUTLINE:
        raise ValueError(f"has a polygon with an outline of more than {_MAX_OUTLINE} pixels.")
    return True


def _outline(polygon: list[float]) -> float:
    points = np.array([*polygon, *polygon[:2]], float).reshape(-1, 2)
    return float(np.abs(np.diff(points, axis=0)).max(1).sum())


def _check_run_lengths(mask: dict[str, Any], image: _Image) -> None:
    size, counts = mask.get("size"), mask.get("counts")
    if size != [image.height, image.width]:
        raise ValueError(f"has an RLE of the size {_show(size)} in an image of {[image.height, image.width]}.")
    if isinstance(counts, str):
        counts = _decompress(counts)
    elif not isinstance(counts, list) or not set(map(type, counts)) <= {int}:
        raise ValueError("has an RLE whose counts are neither a string nor a list of integers.")
    if not counts or min(counts) < 0 or sum(counts) != image.height * image.width:
        raise ValueError("has an RLE whose counts do not add up to the pixels of the image.")


def _decompress(text: str) -> list[int]:
    """Return the run lengths of a compressed RLE: base 32 with a continuation bit, differences to the last but one.

    pycocotools reads beyond the end of a string that ends with a continuation bit.
    """
    if not text or not all("0" <= letter <= "o" for letter in text):
        raise ValueError("has an RLE with invalid counts.")
    digits = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero(digits < 32)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    lengths = ends - starts + 1
    if not len(ends) or ends[-1] != len(digits) - 1 or lengths.max() > 7:
        raise ValueError("has an RLE with invalid counts.")
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 31) << (5 * places), starts)
    values -= np.where(digits[ends] & 16, 1 << (5 * lengths), 0)  # the sign bit
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values.tolist()


def _show(value: Any) -> str:
    """Return a value for a message: printable and short."""
    text = ascii(value if not isinstance(value, (list, dict)) or len(value) <= 8 else type(value))
    return text if len(text) <= 80 else f"{text[:77]}..."
