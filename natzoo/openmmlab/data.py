"""Datasets of configs: set their folder, check them before a run, and skip the data that a resumed run has seen."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader

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


# ---------------------------------------------------------------------------------------------------------------------
# Paths in a config
# ---------------------------------------------------------------------------------------------------------------------


def set_data_root(cfg: Config, folder: str | os.PathLike) -> None:
    """Replace `data_root` with another folder, in every path of a config that starts with it.

    Raises:
        ValueError: if the config has no `data_root`.
    """
    if "data_root" not in cfg:
        raise ValueError(f"{cfg.filename} has no data_root, which --data replaces; set the paths with --cfg-options.")
    old, new = cfg.data_root.rstrip("/"), str(folder).rstrip("/")
    for key, value in cfg.to_dict().items():
        cfg[key] = _replace_root(value, old, new)


def _replace_root(value: Any, old: str, new: str) -> Any:
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value.removeprefix(old)
    if isinstance(value, dict):
        return {key: _replace_root(item, old, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replace_root(item, old, new) for item in value)
    return value


def check_data(cfg: Config, loaders: tuple[str, ...]) -> None:
    """Check that the folders and annotation files that a run reads exist.

    Args:
        cfg: the config.
        loaders: names of data loaders in the config, such as "train_dataloader".

    Raises:
        FileNotFoundError: for the first missing file or folder; the message states where it comes from.
    """
    for loader in loaders:
        for dataset in _iter_datasets((cfg.get(loader) or {}).get("dataset") or {}):
            for path in _iter_paths(dataset):
                if not path.exists():
                    raise FileNotFoundError(
                        f"{path} does not exist, but {loader} reads it; {_where_to_get(dataset, path)}"
                    )


def _iter_datasets(dataset: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the innermost datasets of wrappers such as RepeatDataset."""
    inner = dataset.get("datasets") or ([dataset["dataset"]] if "dataset" in dataset else [])
    if not inner:
        yield dataset
    for part in inner:
        yield from _iter_datasets(part)


def _iter_paths(dataset: dict[str, Any]) -> Iterator[Path]:
    root = Path(dataset.get("data_root") or ".")
    if dataset.get("data_root"):
        yield root
    parts = [dataset.get("ann_file"), *(dataset.get("data_prefix") or {}).values()]
    yield from (root / part for part in parts if part)


def _where_to_get(dataset: dict[str, Any], path: Path) -> str:
    # Only the names of the dataset's folder and below are significant; its parents can have any name.
    root = Path(dataset.get("data_root") or path.parent)
    source = _find_source(path.parts[len(root.parts) - 1 :])
    return f"{f'it is {source}; ' if source else ''}put or link it there, or pass another folder with --data."


def _find_source(names: Sequence[str]) -> str | None:
    matches = (text for pattern, text in _SOURCES.items() if any(fnmatchcase(name, pattern) for name in names))
    return next(matches, None)


# ---------------------------------------------------------------------------------------------------------------------
# Checks of the built datasets
# ---------------------------------------------------------------------------------------------------------------------


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Check images, classes and heads before the first iteration, and the labels of each batch.

    Training also checks the validation set, which would otherwise fail only after hours.
    """

    def before_train(self, runner: Any) -> None:
        _check_dataset(runner.train_dataloader.dataset, runner.model)
        if runner.val_loop is not None:
            _check_dataset(runner.val_dataloader.dataset, runner.model)

    def before_val(self, runner: Any) -> None:
        _check_dataset(runner.val_dataloader.dataset, runner.model)

    def before_test(self, runner: Any) -> None:
        _check_dataset(runner.test_dataloader.dataset, runner.model)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        _check_labels(data_batch, runner.train_dataloader.dataset)

    def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        _check_labels(data_batch, runner.val_dataloader.dataset)

    def before_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        _check_labels(data_batch, runner.test_dataloader.dataset)


def _check_dataset(dataset: Any, model: nn.Module) -> None:
    _check_classes(dataset)
    _check_heads(dataset, model)
    _check_files(dataset)


def _check_files(dataset: Any) -> None:
    """Raise FileNotFoundError for the first missing image or label map, ValueError for an empty dataset."""
    if len(dataset) == 0:
        raise ValueError(f"{_name_of(dataset)} has no usable images; check its annotations and the config's classes.")
    if getattr(dataset, "_natzoo_checked", False):
        return
    listings: dict[str, set[str]] = {}  # one listing per folder: testing each file is slow on network disks
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        for key in ("img_path", "seg_map_path"):
            path = info.get(key)
            if not path:
                continue
            folder, name = os.path.split(path)
            if folder not in listings:
                listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if name not in listings[folder]:
                source = _find_source([name])
                hint = f" It is {source}." if source else ""
                raise FileNotFoundError(f"{path} does not exist, but {_name_of(dataset)} refers to it.{hint}")
    dataset._natzoo_checked = True


def _check_classes(dataset: Any) -> None:
    """Raise ValueError if COCO annotations lack classes of the config: mmdet would silently renumber the others."""
    dataset = _unwrap(dataset)
    found, expected = getattr(dataset, "cat_ids", None), dataset.metainfo.get("classes") or ()
    if found is not None and len(found) != len(expected):
        names = ", ".join(expected[:5]) + (", ..." if len(expected) > 5 else "")
        raise ValueError(
            f"{dataset.ann_file} has only {len(found)} of the {len(expected)} classes in the config ({names}); "
            "fix its categories or the config's metainfo."
        )


def _check_heads(dataset: Any, model: nn.Module) -> None:
    """Raise ValueError for the first head whose number of classes differs from the dataset's."""
    classes = len(_unwrap(dataset).metainfo.get("classes") or ())
    modules = {name.removeprefix("module."): module for name, module in model.named_modules()}
    if not classes or any(name in modules for name in _EXEMPTING_MODULES):
        return
    for name, module in modules.items():
        kind = [part for part in name.split(".") if not part.isdigit()][-1:]  # bbox_head of roi_head.bbox_head.0
        expected = getattr(module, "num_classes", None)
        is_agnostic = getattr(module, "class_agnostic", False)
        if kind and kind[0] in _HEADS and expected not in (None, classes) and not is_agnostic:
            raise ValueError(
                f"model.{name} has num_classes={expected}, but {_name_of(dataset)} has {classes} classes; set "
                f"num_classes={classes}, or the classes in metainfo."
            )


def _unwrap(dataset: Any) -> Any:
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


def _name_of(dataset: Any) -> str:
    """Return the annotation file or the image folder of a dataset, for messages."""
    dataset = _unwrap(dataset)
    folder = (getattr(dataset, "data_prefix", None) or {}).get("img_path", "the dataset")
    return getattr(dataset, "ann_file", "") or str(folder)


def _check_labels(batch: Any, dataset: Any) -> None:
    """Raise ValueError for the first label map with a value beyond the classes; 255 is the ignore label."""
    classes = len(dataset.metainfo.get("classes") or ())
    samples = batch.get("data_samples", ()) if isinstance(batch, dict) else ()
    for sample in samples:
        for view in sample if isinstance(sample, (list, tuple)) else (sample,):
            if not classes or "gt_sem_seg" not in view:
                continue
            labels = view.gt_sem_seg.get("data", view.gt_sem_seg.get("sem_seg"))  # mmseg's and mmdet's name
            invalid = labels[(labels >= classes) & (labels != 255)]
            if len(invalid):
                path = view.get("seg_map_path", "a label map")
                raise ValueError(
                    f"{path} contains the label {int(invalid.max())}, but the config has only {classes} classes, 0 to "
                    f"{classes - 1} (255 is ignored); fix the label map or the config's classes."
                )


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------


@HOOKS.register_module()
class SkipSeenDataHook(Hook):
    """Skip the data that a resumed run has already seen, without loading it.

    mmengine loads every batch up to the resumed iteration again, which takes hours in a long run. This hook only draws
    the indices of these batches. It applies to iteration-based training with InfiniteSampler.
    """

    def before_run(self, runner: Any) -> None:
        self.first_seed = runner.seed  # loading a checkpoint replaces it with the seed of the resumed run

    def before_train_epoch(self, runner: Any) -> None:
        loop = runner.train_loop
        sampler, size = loop.dataloader.sampler, loop.dataloader.batch_size
        if getattr(sampler, "seed", None) == self.first_seed:  # otherwise the config sets the sampler's seed
            sampler.seed = runner.seed
        if not isinstance(loop, IterBasedTrainLoop) or loop.iter == 0:
            return
        if isinstance(sampler, InfiniteSampler) and size:
            sampler.indices = sampler._indices_of_rank()  # restart: the loop has already prefetched from it
            next(islice(sampler.indices, loop.iter * size - 1, None))
            loop.dataloader_iterator = _SkippingIterator(loop.dataloader, loop.iter)


class _SkippingIterator:
    """Return None for each batch that the loop wants to skip, then batches."""

    def __init__(self, loader: DataLoader, skip: int):
        self.loader, self.skip, self.batches = loader, skip, None

    def __next__(self) -> Any:
        if self.skip > 0:
            self.skip -= 1
            return None
        if self.batches is None:
            self.batches = iter(self.loader)
        return next(self.batches)
