"""Datasets of configs: set their folder, check them before a run, and skip the data that a resumed run has seen."""

from __future__ import annotations

import os
from collections.abc import Iterator
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

from natzoo.openmmlab.annotations import check_dataset, describe_invalid_label, find_source, ignore_index

# ---------------------------------------------------------------------------------------------------------------------
# Paths in a config
# ---------------------------------------------------------------------------------------------------------------------


def set_data_root(cfg: Config, folder: str | os.PathLike) -> None:
    """Replace the folder of the datasets, in every path of a config that starts with it.

    That folder is the `data_root` of the datasets, else of the config.

    Raises:
        ValueError: if the config has no `data_root`, or its datasets have several.
    """
    loaders = [cfg.get(f"{name}_dataloader") or {} for name in ("train", "val", "test")]
    datasets = [dataset for loader in loaders for dataset in _iter_datasets(loader.get("dataset") or {})]
    common = (cfg.get("data_root") or "").rstrip("/")
    roots = {root.rstrip("/") for dataset in datasets if (root := dataset.get("data_root"))}
    if not roots or (common and all(f"{root}/".startswith(f"{common}/") for root in roots)):
        roots = {common} - {""}
    if len(roots) != 1:
        problem = f"the data_roots {', '.join(sorted(roots))}" if roots else "no data_root"
        raise ValueError(f"--data replaces the data_root, but {cfg.filename} has {problem}; set it with --cfg-options.")
    old, new = roots.pop(), str(folder).rstrip("/")
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
        loaders: names of data loaders in the config, such as "train_dataloader"; those of evaluators follow from them.

    Raises:
        FileNotFoundError: for the first missing file or folder; the message states where it comes from.
    """
    for loader in loaders:
        for dataset in _iter_datasets((cfg.get(loader) or {}).get("dataset") or {}):
            for path in _iter_paths(dataset):
                _require(path, loader, dataset)
        evaluator = loader.replace("dataloader", "evaluator")
        metrics = cfg.get(evaluator) or []
        for metric in metrics if isinstance(metrics, (list, tuple)) else [metrics]:
            for part in filter(None, (metric.get("ann_file"), metric.get("seg_prefix"))):
                _require(Path(part), evaluator, {})


def _require(path: Path, reader: str, dataset: dict[str, Any]) -> None:
    if not (path.is_file() or path.is_dir()):
        problem = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {problem}, but {reader} reads it; {_where_to_get(dataset, path)}")


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
    source = find_source(path.parts[len(root.parts) - 1 :])
    return f"{f'it is {source}; ' if source else ''}put or link it there, or pass another folder with --data."


# ---------------------------------------------------------------------------------------------------------------------
# Checks of the built datasets
# ---------------------------------------------------------------------------------------------------------------------


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Check datasets before the first iteration, and the labels of each batch.

    Training also checks the validation set, which would otherwise fail only after hours.
    """

    def before_train(self, runner: Any) -> None:
        check_dataset(runner.train_dataloader.dataset, runner.model, is_training=True)
        if runner.val_loop is not None:
            self.before_val(runner)

    def before_val(self, runner: Any) -> None:
        check_dataset(runner.val_dataloader.dataset, runner.model, _metrics(runner, "val_evaluator"))

    def before_test(self, runner: Any) -> None:
        check_dataset(runner.test_dataloader.dataset, runner.model, _metrics(runner, "test_evaluator"), is_test=True)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        _check_labels(data_batch, runner.train_dataloader.dataset, runner.model)

    def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        _check_labels(data_batch, runner.val_dataloader.dataset, runner.model)

    def before_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        _check_labels(data_batch, runner.test_dataloader.dataset, runner.model)


def _metrics(runner: Any, name: str) -> list[Any]:
    return list(getattr(getattr(runner, name, None), "metrics", ()))


def _check_labels(batch: Any, dataset: Any, model: nn.Module) -> None:
    """Raise ValueError for the first label map with a value beyond the classes."""
    classes, ignored = len(dataset.metainfo.get("classes") or ()), ignore_index(model)
    samples = batch.get("data_samples", ()) if isinstance(batch, dict) else ()
    for sample in samples:
        for view in sample if isinstance(sample, (list, tuple)) else (sample,):
            if not classes or "gt_sem_seg" not in view:
                continue
            labels = view.gt_sem_seg.get("data", view.gt_sem_seg.get("sem_seg"))  # mmseg's and mmdet's name
            invalid = labels[(labels >= classes) & (labels != ignored)]
            if len(invalid):
                path = view.get("seg_map_path", "a label map")
                raise ValueError(describe_invalid_label(path, int(invalid.max()), None, dataset, ignored))


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
