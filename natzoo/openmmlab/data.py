"""Data sets of configs: where they are, checked before a run needs them, with words that say how to get them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

# By the name of a file or folder: what it is and where it comes from; the first that fits.
_SOURCES = {
    "ade20k_*": "written by Mask2Former's datasets/prepare_ade20k_*.py from ADE20K (sceneparsing.csail.mit.edu)",
    "cityscapes_panoptic_*": "written by cityscapesscripts' createPanopticImgs.py from Cityscapes",
    "*_gtFine_labelTrainIds.png": "written by cityscapesscripts' createTrainIdLabelImgs.py from Cityscapes",
    "instancesonly_filtered_*": "written by mmdet's tools/dataset_converters/cityscapes.py from Cityscapes",
    "coco": "part of COCO 2017 (cocodataset.org/#download): train2017/, val2017/ and annotations/",
    "ADEChallengeData2016": "part of ADE20K, scene parsing (sceneparsing.csail.mit.edu): images/ and annotations/",
    "cityscapes": "part of Cityscapes (cityscapes-dataset.com): leftImg8bit/ and gtFine/",
    "shapes": "drawn by `python tools/make_data.py shapes data/shapes`",
}

# Heads whose num_classes is that of the data; but for models with the parts below, where it is that of things or words.
_HEADS = ("bbox_head", "mask_head", "decode_head")
_OTHERWISE = ("semantic_head", "panoptic_fusion_head", "language_model")


def set_data_root(cfg: Config, folder: str | os.PathLike) -> None:
    """Lets a config read its data from another folder than its `data_root`.

    Raises:
        ValueError: if it has none.
    """
    if "data_root" not in cfg:
        raise ValueError(
            f"{cfg.filename} has no data_root, which --data would replace: set its paths by --cfg-options."
        )
    old, new = cfg.data_root.rstrip("/"), str(folder).rstrip("/")
    for key, value in cfg.to_dict().items():
        cfg[key] = _moved(value, old, new)


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value.removeprefix(old)
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, old, new) for item in value)
    return value


def check_data(cfg: Config, loaders: tuple[str, ...]) -> None:
    """Checks that the folders and annotation files that a run reads are there.

    Args:
        loaders: names of the config's data loaders.

    Raises:
        FileNotFoundError: naming the first that is missing and how to get it.
    """
    for loader in loaders:
        for dataset in _datasets((cfg.get(loader) or {}).get("dataset") or {}):
            for path in _paths(dataset):
                if not path.exists():
                    reader = f"{loader} of the config"
                    raise FileNotFoundError(f"there is no {path}, which {reader} reads: {_advice(dataset, path)}")


def _datasets(dataset: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those that a wrapper such as RepeatDataset holds, else the data set itself."""
    inner = dataset.get("datasets") or ([dataset["dataset"]] if "dataset" in dataset else [])
    if not inner:
        yield dataset
    for part in inner:
        yield from _datasets(part)


def _paths(dataset: dict[str, Any]) -> Iterator[Path]:
    root = Path(dataset.get("data_root") or ".")
    if dataset.get("data_root"):
        yield root
    parts = [dataset.get("ann_file"), *(dataset.get("data_prefix") or {}).values()]
    yield from (root / part for part in parts if part)


def _advice(dataset: dict[str, Any], path: Path) -> str:
    # The data set's own folder and what is in it: the folders around it may have any names.
    root = Path(dataset.get("data_root") or path.parent)
    known = _source(path.parts[len(root.parts) - 1 :])
    return f"{f'it is {known}; ' if known else ''}put or link it there, or name another folder with --data."


def _source(names: Sequence[str]) -> str | None:
    return next((text for known, text in _SOURCES.items() if any(fnmatchcase(name, known) for name in names)), None)


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Finds, before the first iteration, pictures that the annotations name and the folders lack, and most heads for
    another number of classes than the data has; and later labels that no class has."""

    def before_train(self, runner: Any) -> None:
        _check_data_set(runner.train_dataloader.dataset, runner.model)
        if runner.val_loop is not None:
            _check_data_set(runner.val_dataloader.dataset, runner.model)

    def before_val(self, runner: Any) -> None:
        _check_data_set(runner.val_dataloader.dataset, runner.model)

    def before_test(self, runner: Any) -> None:
        _check_data_set(runner.test_dataloader.dataset, runner.model)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        _check_labels(data_batch, runner.train_dataloader.dataset)

    def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        _check_labels(data_batch, runner.val_dataloader.dataset)

    def before_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        _check_labels(data_batch, runner.test_dataloader.dataset)


def _check_data_set(dataset: Any, model: nn.Module) -> None:
    _check_classes(dataset)
    _check_heads(dataset, model)
    _check_pictures(dataset)


def _check_pictures(dataset: Any) -> None:
    """Raises FileNotFoundError naming the first file that is missing; ValueError without pictures."""
    if len(dataset) == 0:
        raise ValueError(f"{_origin(dataset)} has no picture to use: check its annotations and the config's classes.")
    if getattr(dataset, "_natzoo_checked", False):
        return
    there: dict[str, set[str]] = {}  # a listing a folder, since asking for each file is slow on network disks
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        for key in ("img_path", "seg_map_path"):
            path = info.get(key)
            if not path:
                continue
            folder, name = os.path.split(path)
            if folder not in there:
                there[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if name not in there[folder]:
                known = _source([name])
                advice = f": it is {known}" if known else ""
                raise FileNotFoundError(f"{_origin(dataset)} names {path}, but there is no such file{advice}.")
    dataset._natzoo_checked = True


def _check_classes(dataset: Any) -> None:
    """Raises ValueError if annotations in COCO's format lack classes of the config: mmdet would mix up the others."""
    dataset = _inner(dataset)
    found, wanted = getattr(dataset, "cat_ids", None), dataset.metainfo.get("classes") or ()
    if found is not None and len(found) != len(wanted):
        names = ", ".join(wanted[:5])
        raise ValueError(
            f"{dataset.ann_file} has {len(found)} of the config's {len(wanted)} classes ({names}): correct its "
            "categories, or metainfo in the config."
        )


def _check_heads(dataset: Any, model: nn.Module) -> None:
    """Raises ValueError naming the head that is for another number of classes than the data set has."""
    classes = len(_inner(dataset).metainfo.get("classes") or ())
    modules = {name.removeprefix("module."): module for name, module in model.named_modules()}
    if not classes or any(part in modules for part in _OTHERWISE):
        return
    for name, module in modules.items():
        kind = [part for part in name.split(".") if not part.isdigit()][-1:]
        wanted = getattr(module, "num_classes", None)
        is_agnostic = getattr(module, "class_agnostic", False)
        if kind and kind[0] in _HEADS and wanted not in (None, classes) and not is_agnostic:
            raise ValueError(
                f"the config's model.{name} is for {wanted} classes, but {_origin(dataset)} is read with "
                f"{classes}: set num_classes={classes} there, or the classes in metainfo."
            )


def _inner(dataset: Any) -> Any:
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


def _origin(dataset: Any) -> str:
    dataset = _inner(dataset)
    return getattr(dataset, "ann_file", "") or str(
        (getattr(dataset, "data_prefix", None) or {}).get("img_path", "data")
    )


def _check_labels(batch: Any, dataset: Any) -> None:
    """Raises ValueError naming the label picture that has a value beyond the classes; 255 stands for none."""
    classes = len(dataset.metainfo.get("classes") or ())
    samples = batch.get("data_samples", ()) if isinstance(batch, dict) else ()
    for sample in samples:
        for one in sample if isinstance(sample, (list, tuple)) else (sample,):
            if not classes or "gt_sem_seg" not in one:
                continue
            labels = one.gt_sem_seg.get("data", one.gt_sem_seg.get("sem_seg"))  # as mmseg and as mmdet call it
            wrong = labels[(labels >= classes) & (labels != 255)]
            if len(wrong):
                path = one.get("seg_map_path", "a label picture")
                raise ValueError(
                    f"{path} has the label {int(wrong.max())}, but there are "
                    f"only {classes} classes, 0 to {classes - 1} (255 for none): correct it or the config's classes."
                )
