"""Checks of datasets before the first iteration, and errors that name the image that cannot be loaded.

`check_dataset` checks a built dataset: classes, images, masks and label maps. It lists folders instead of opening all
files, and opens up to 1000 evenly spaced images. The others are checked when they are loaded (`name_errors`). coco.py
checks annotation files in COCO's format while they are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import cv2
import numpy as np
from mmengine.dataset import Compose
from PIL import ExifTags, Image
from torch import nn

from natzoo.images import check_image_size

# Pattern of a file or folder name -> where it comes from. The first match applies.
_SOURCES = {
    "ade20k_*": "written by Mask2Former's datasets/prepare_ade20k_*.py from ADE20K (sceneparsing.csail.mit.edu)",
    "cityscapes_panoptic_*": "written by cityscapesscripts' createPanopticImgs.py from Cityscapes",
    "*_gtFine_labelTrainIds.png": "written by cityscapesscripts' createTrainIdLabelImgs.py from Cityscapes",
    "instancesonly_filtered_*": "written by mmdet's tools/dataset_converters/cityscapes.py from Cityscapes",
    "coco": "part of COCO 2017 (cocodataset.org/#download): train2017/, val2017/ and annotations/",
    "ADEChallengeData2016": "part of ADE20K, scene parsing (sceneparsing.csail.mit.edu): images/ and annotations/",
    "cityscapes": "part of Cityscapes (cityscapes-dataset.com): leftImg8bit/ and gtFine/",
    "shapes": "written by `python tools/make_data.py shapes data/shapes`",
}

# Heads whose num_classes must equal the number of classes in the dataset.
_HEADS = ("bbox_head", "mask_head", "decode_head")
# With one of these modules, num_classes has another meaning and is not checked.
_EXEMPTING_MODULES = ("semantic_head", "panoptic_fusion_head", "language_model")

_MAX_OPENED = 1000  # images whose dimensions are read, a tenth of a second
_MAX_DECODED = 200_000_000  # pixels of label maps that are decoded, a second or two
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # of Pillow: one channel of integers


def check_dataset(
    dataset: Any, model: nn.Module, metrics: Iterable[Any] = (), is_test: bool = False, is_training: bool = False
) -> None:
    """Check a dataset, once.

    Args:
        dataset: a built dataset of mmdet or mmseg.
        model: the model, whose heads must fit the classes.
        metrics: the metrics that will be computed.
        is_test: accept a dataset without annotations.
        is_training: refuse label maps without a label beyond the first class. Of several datasets, one may contain
            only background.

    Raises:
        ValueError: for the first setting, image or annotation that is invalid.
        FileNotFoundError: for the first missing image or label map.
    """
    parts = list(innermost(dataset))
    for part in parts:
        if getattr(part, "_natzoo_checked", False):
            continue
        if len(part) == 0:
            raise ValueError(
                f"{name_of(part)} has no usable images; check its annotations, and the classes and img_suffix of the "
                "config."
            )
        _check_classes(part)
        _check_heads(part, model)
        _check_palette(part)
        if "reduce_zero_label" in part.metainfo:  # mmseg
            _check_reduce_zero_label(part)
            _check_ignore_index(part, model, metrics)
        _check_infos(part, metrics, needs_objects=not is_test and len(parts) == 1)
        _check_files(part, ignore_index(model), is_training and len(parts) == 1)
        part._natzoo_checked = True


def innermost(dataset: Any) -> Iterator[Any]:
    """Yield the datasets inside wrappers such as RepeatDataset and ConcatDataset."""
    parts = getattr(dataset, "datasets", None) or [
        getattr(dataset, name) for name in ("dataset", "_dataset") if hasattr(dataset, name)
    ]
    if not parts:
        yield dataset
    for part in parts:
        yield from innermost(part)


def name_of(dataset: Any) -> str:
    """Return the annotation file or the image folder of a dataset, for messages."""
    folder = (getattr(dataset, "data_prefix", None) or {}).get("img_path", "the dataset")
    return getattr(dataset, "ann_file", "") or str(folder)


def find_source(names: Sequence[str]) -> str | None:
    """Return where a known file or folder comes from, given the names on its path."""
    matches = (text for pattern, text in _SOURCES.items() if any(fnmatchcase(name, pattern) for name in names))
    return next(matches, None)


def ignore_index(model: nn.Module) -> int:
    """Return the label that the decode head of a segmenter ignores."""
    head = getattr(getattr(model, "module", model), "decode_head", None)
    head = head[0] if isinstance(head, nn.ModuleList) else head
    label = getattr(head, "ignore_index", None)
    return 255 if label is None else label


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def _check_classes(dataset: Any) -> None:
    """Raise ValueError unless COCO annotations have each class of the config once."""
    found, expected = getattr(dataset, "cat_ids", None), dataset.metainfo.get("classes") or ()
    if found is not None and len(found) != len(expected):
        names = ", ".join(map(str, expected[:5])) + (", ..." if len(expected) > 5 else "")
        raise ValueError(
            f"{dataset.ann_file} has only {len(found)} of the {len(expected)} classes in the config ({names}); fix its "
            "categories or the config's metainfo."
        )


def _check_heads(dataset: Any, model: nn.Module) -> None:
    """Raise ValueError for the first head whose number of classes differs from the dataset's."""
    classes = len(dataset.metainfo.get("classes") or ())
    modules = {name.removeprefix("module."): module for name, module in model.named_modules()}
    if not classes or any(name in modules for name in _EXEMPTING_MODULES):
        return
    for name, module in modules.items():
        kind = [part for part in name.split(".") if not part.isdigit()][-1:]  # bbox_head of roi_head.bbox_head.0
        expected = getattr(module, "num_classes", None)
        is_agnostic = getattr(module, "class_agnostic", False)
        if kind == ["auxiliary_head"] and type(module).__name__ == "FCNHead":  # others may predict edges
            kind = ["decode_head"]
        if kind and kind[0] in _HEADS and expected not in (None, classes) and not is_agnostic:
            raise ValueError(
                f"model.{name} has num_classes={expected}, but {name_of(dataset)} has {classes} classes; set "
                f"num_classes={classes}, or the classes in metainfo."
            )


def _check_palette(dataset: Any) -> None:
    palette, classes = dataset.metainfo.get("palette"), dataset.metainfo.get("classes") or ()
    if not isinstance(palette, (list, tuple)):
        return
    valid = all(len(color) == 3 and all(0 <= value <= 255 for value in color) for color in palette)
    if not valid or len(palette) < len(classes):
        raise ValueError(
            f"metainfo.palette of {name_of(dataset)} has {len(palette)} colors for {len(classes)} classes; list three "
            "values from 0 to 255 for each class, or omit it."
        )


def _check_reduce_zero_label(dataset: Any) -> None:
    for step in _iter_steps(dataset.pipeline):
        value = getattr(step, "reduce_zero_label", None)
        if value not in (None, dataset.reduce_zero_label):
            raise ValueError(
                f"reduce_zero_label is {dataset.reduce_zero_label} for {name_of(dataset)}, but {value} for "
                f"{type(step).__name__} in its pipeline; set it in the dataset and omit it from the pipeline."
            )


def _check_ignore_index(dataset: Any, model: nn.Module, metrics: Iterable[Any]) -> None:
    model = getattr(model, "module", model)
    expected = ignore_index(model)
    settings = {f"metric {type(metric).__name__}": getattr(metric, "ignore_index", expected) for metric in metrics}
    for name, module in model.named_modules():
        if name.rstrip(".0123456789").endswith("_head") and getattr(module, "ignore_index", None) is not None:
            settings[f"model.{name}"] = module.ignore_index
    preprocessor = getattr(model, "data_preprocessor", None)
    settings["seg_pad_val of model.data_preprocessor"] = getattr(preprocessor, "seg_pad_val", expected)
    if dataset.ignore_index != 255:  # the default, which mmseg does not use
        settings["the dataset"] = dataset.ignore_index
    for name, value in settings.items():
        if value != expected:
            raise ValueError(
                f"ignore_index is {expected} for model.decode_head, but {value} for {name}; use one label, which is "
                "ignored everywhere."
            )


def _iter_steps(pipeline: Any) -> Iterator[Any]:
    """Yield the steps of a pipeline, also those inside RandomChoice or TestTimeAug."""
    if not isinstance(pipeline, (list, tuple)):
        yield pipeline
        pipeline = [getattr(pipeline, name) for name in ("transforms", "subroutines") if hasattr(pipeline, name)]
    for step in pipeline:
        yield from _iter_steps(step)


# ---------------------------------------------------------------------------------------------------------------------
# Images and annotations
# ---------------------------------------------------------------------------------------------------------------------


def _check_infos(dataset: Any, metrics: Iterable[Any], needs_objects: bool) -> None:
    """Check that all images and label maps exist, and that there are objects, with masks if those are used."""
    needs_masks = any(getattr(step, "with_mask", False) for step in _iter_steps(dataset.pipeline))
    is_panoptic = "thing_classes" in dataset.metainfo  # masks are in the panoptic maps
    listings: dict[str, set[str]] = {}  # one listing per folder: testing each file is slow on network disks
    objects = 0 if hasattr(dataset, "cat_ids") and needs_objects else 1
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        for key in ("img_path", "seg_map_path"):
            if info.get(key):
                _check_listed(info[key], listings, dataset)
        instances = info.get("instances") or ()
        objects += len(instances) or len(info.get("segments_info") or ())
        for instance in instances if needs_masks and not is_panoptic else ():
            if "mask" not in instance:
                left, top, right, bottom = instance["bbox"]
                _refuse_missing_mask(dataset.ann_file, info["img_path"], [left, top, right - left, bottom - top])
    if not objects:
        raise ValueError(
            f"{name_of(dataset)} has no annotation that can be used; check that the image_ids are ids of its images, "
            "the classes in the config, and that each bbox is [x, y, width, height] in pixels."
        )
    for metric in metrics:
        api = getattr(metric, "_coco_api", None)
        for annotation in api.dataset["annotations"] if api and "segm" in getattr(metric, "metrics", ()) else ():
            if "segmentation" not in annotation and annotation["category_id"] in dataset.cat_ids:
                _refuse_missing_mask(
                    name_of(dataset), api.imgs[annotation["image_id"]]["file_name"], annotation["bbox"]
                )


def _check_listed(path: str, listings: dict[str, set[str]], dataset: Any) -> None:
    folder, name = os.path.split(path)
    if folder not in listings:
        listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if name not in listings[folder]:
        source = find_source([name])
        hint = f" It is {source}." if source else ""
        raise FileNotFoundError(f"{path} does not exist, but {name_of(dataset)} refers to it.{hint}")


def _refuse_missing_mask(file: str, image: str, box: Sequence[float]) -> None:
    raise ValueError(
        f"{file} has an annotation without a mask: that of {image} with the bbox {[round(v, 2) for v in box]} has no "
        "segmentation with at least three points; add it, or use a config without masks."
    )


def _check_files(dataset: Any, ignored: int, is_training: bool) -> None:
    """Check the dimensions of evenly spaced images, and the label maps of as many as can be decoded in a second."""
    loaders = {type(step).__name__ for step in _iter_steps(dataset.pipeline)}
    if "LoadImageFromFile" not in loaders:
        return
    maps, pixels = [], 0
    for index in range(0, len(dataset), -(-len(dataset) // _MAX_OPENED)):
        info = dataset.get_data_info(index)
        try:
            sizes, map_sizes = _image_sizes(info.get("img_path")), _image_sizes(info.get("seg_map_path"))
        except ValueError as error:
            raise ValueError(f"{error} {name_of(dataset)} refers to it.") from error
        described = (info.get("width"), info.get("height"))
        if sizes and None not in described and described not in sizes:
            raise ValueError(
                f"{name_of(dataset)} describes {info['img_path']} as {described[0]} x {described[1]} pixels, but it "
                f"has {sizes[0][0]} x {sizes[0][1]}; fix the annotations."
            )
        if sizes and map_sizes and map_sizes[0] not in sizes:
            raise ValueError(
                f"{info['seg_map_path']} has {map_sizes[0][0]} x {map_sizes[0][1]} pixels, but its image "
                f"{sizes[0][0]} x {sizes[0][1]}; a label map has the size of its image."
            )
        if map_sizes:
            maps.append(info["seg_map_path"])
            pixels += map_sizes[0][0] * map_sizes[0][1]
    if maps and "reduce_zero_label" in dataset.metainfo and "LoadAnnotations" in loaders:
        _check_label_maps(dataset, maps[:: -(-pixels // _MAX_DECODED)], ignored, is_training)


def _image_sizes(path: str | None) -> list[tuple[int, int]]:
    """Return width and height of an image, and of the rotated image if its metadata rotates it; [] if unknown.

    Raises:
        ValueError: if the image is too large, or not an image.
    """
    if not path or not os.path.exists(path):  # in a storage of mmengine
        return []
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file; replace it with an image.")
    try:
        with Image.open(path) as image:
            check_image_size(*image.size)
            # Other formats are rarely rotated, and Pillow decodes a PNG to find its metadata.
            is_rotated = image.format == "JPEG" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return [image.size, image.size[::-1]] if is_rotated else [image.size]
    except Image.UnidentifiedImageError as error:
        if not cv2.haveImageReader(path):
            raise ValueError(f"{path} is not an image that can be read; replace it.") from error
        return []
    except Exception as error:  # anything can happen in a damaged file
        raise ValueError(f"{path} {error if isinstance(error, ValueError) else f'cannot be read: {error}'}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Label maps
# ---------------------------------------------------------------------------------------------------------------------


def _check_label_maps(dataset: Any, paths: Sequence[str], ignored: int, is_training: bool) -> None:
    classes, table = len(dataset.metainfo.get("classes") or ()), _label_table(dataset)
    if not classes:
        return
    found = np.zeros(256, bool)
    for path in paths:
        values = _read_values(path)
        invalid = [value for value in values if table[value] >= classes and table[value] != ignored]
        if invalid:
            raise ValueError(describe_invalid_label(path, int(table[invalid[-1]]), int(invalid[-1]), dataset, ignored))
        found[values] = True
    values = np.flatnonzero(found)
    labels = set(table[values].tolist()) - {ignored}
    if is_training and classes > 1 and not labels & set(range(1, classes)):
        raise ValueError(
            f"{dataset.data_prefix['seg_map_path']} has no label of the classes 1 to {classes - 1} in the {len(paths)} "
            f"label maps that were read, only the values {', '.join(map(str, values[:5]))}"
            f"{f' ({ignored} is ignored)' if ignored in table[values] else ''}; label maps must contain the numbers of "
            f"the classes{', counted from 1' if dataset.reduce_zero_label else ''}."
        )


def _label_table(dataset: Any) -> np.ndarray:
    """Return the label for each value in a file, as mmseg's LoadAnnotations computes it."""
    table = np.arange(256)
    if dataset.reduce_zero_label:
        table = np.where((table == 0) | (table == 255), 255, table - 1)
    mapped = table.copy()
    for old, new in (dataset.label_map or {}).items():
        mapped[table == old] = new
    return mapped


def _read_values(path: str) -> np.ndarray:
    """Return the values that occur in a label map.

    Raises:
        ValueError: if it is not an image with one channel of values up to 255.
    """
    try:
        with Image.open(path) as image:
            mode, channels = image.mode, len(image.getbands())
            if mode in ("L", "P"):
                return np.flatnonzero(image.histogram())
            pixels = np.asarray(image) if mode in _LABEL_MODES else np.zeros((1, 1), np.uint8)
    except Exception as error:  # anything can happen in a damaged file
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
    if mode not in _LABEL_MODES:
        raise ValueError(
            f"{path} has {channels} channels ({mode}); a label map has one, whose values are numbers of classes."
        )
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"{path} contains the value {pixels.max()}; labels are from 0 to 255.")
    return np.unique(pixels.astype(np.uint8))


def describe_invalid_label(path: str, label: int, value: int | None, dataset: Any, ignored: int) -> str:
    """Return the message for a label beyond the classes."""
    classes = len(dataset.metainfo.get("classes") or ())
    is_reduced = dataset.metainfo.get("reduce_zero_label")
    text = f"{path} contains the label {label}" + (f" (the value {value})" if value not in (None, label) else "")
    text += f", but the config has only {classes} classes, 0 to {classes - 1} ({ignored} is ignored); "
    if label == classes and is_reduced is False:
        return text + "if its labels begin at 1, set reduce_zero_label=True in the dataset."
    return text + "fix the label map or the config's classes."


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


class SampleError(ValueError):
    """An image that cannot be loaded. Its text is one line, even if PyTorch adds the traceback of a loader process."""

    def __str__(self) -> str:
        return super().__str__().strip().rpartition(f"{type(self).__name__}: ")[2]


class _CheckedPipeline(Compose):
    """A pipeline that checks the dimensions of images before they are decoded, and names the image in errors."""

    def __init__(self, pipeline: Compose):
        self.transforms = pipeline.transforms
        self.reads_images = any(type(step).__name__ == "LoadImageFromFile" for step in self.transforms)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | None:
        path = data.get("img_path")
        skips = any(getattr(step, "ignore_empty", False) for step in self.transforms)
        try:
            _image_sizes(path if isinstance(path, str) and self.reads_images else None)
        except ValueError as error:
            if skips:
                return None
            raise SampleError(str(error)) from error
        try:
            return self._transform(data)
        except Exception as error:  # of any step, which may be a user's
            problem = " ".join(str(error).split())
            raise SampleError(f"{path} cannot be loaded ({type(error).__name__}: {problem}).") from error

    def _transform(self, data: dict[str, Any]) -> dict[str, Any] | None:
        result: dict[str, Any] | None = data
        for step in self.transforms:
            had_labels = "gt_seg_map" in result
            result = step(result)
            if result is None:
                return None
            if "gt_seg_map" in result and not had_labels and result["gt_seg_map"].shape != result["ori_shape"]:
                raise ValueError(
                    f"its label map {result.get('seg_map_path')} has the shape {result['gt_seg_map'].shape}, but the "
                    f"image {result['ori_shape']}"
                )
        return result


@contextmanager
def name_dataset(loader: dict[str, Any]) -> Iterator[None]:
    """Raise ValueError with the name of the annotations if a dataset of a config cannot be built."""
    try:
        yield
    except (KeyError, IndexError, AttributeError, AssertionError, TypeError, ValueError) as error:
        dataset = loader.get("dataset") or {}
        named = os.path.join(dataset.get("data_root") or "", dataset.get("ann_file") or "") or "the dataset"
        if "palette does not match classes" in str(error):
            raise ValueError(f"metainfo.palette of {named} must have a color for each class, or be omitted.") from error
        if isinstance(error, ValueError) or "__init__() got an unexpected keyword argument" in str(error):
            raise
        problem = " ".join(str(error).split())
        raise ValueError(
            f"{named} cannot be read as a {dataset.get('type')} ({type(error).__name__}: {problem}); fix the "
            "annotations or the config."
        ) from error


def name_errors(dataset: Any) -> None:
    """Let the pipelines of a dataset name the image that cannot be loaded; before the loader starts its processes."""
    for part in innermost(dataset):
        if type(getattr(part, "pipeline", None)) is Compose:
            part.pipeline = _CheckedPipeline(part.pipeline)
        palette, classes = part.metainfo.get("palette"), part.metainfo.get("classes") or ()
        if palette is not None and palette == type(part).METAINFO.get("palette") and len(palette) < len(classes):
            del part._metainfo["palette"]  # that of the base class, for other classes
