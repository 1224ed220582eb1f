"""Turn a config and command-line options into mmengine's runner, shared by training and evaluation."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from natzoo import command_line
from natzoo.openmmlab import coco
from natzoo.openmmlab.annotations import name_dataset, name_errors
from natzoo.openmmlab.checkpoints import PlainCheckpointHook
from natzoo.openmmlab.data import CheckDataHook, SkipSeenDataHook, set_data_root


class Project(NamedTuple):
    """A subproject and the configs it accepts.

    Attributes:
        name: name of its folder.
        models: for each accepted `default_scope` of a config, the accepted model type; None accepts all.
    """

    name: str
    models: dict[str, str | None]


DETECTION = Project("detection", {"mmdet": None})
SEGMENTATION = Project("segmentation", {"mmseg": None, "mmdet": "Mask2Former"})


# ---------------------------------------------------------------------------------------------------------------------
# Options and configs
# ---------------------------------------------------------------------------------------------------------------------


class _ConfigOptions(DictAction):
    """mmengine's parser for KEY=VALUE, with error messages that name the malformed value."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            try:
                super().__call__(parser, namespace, [value], option_string)
            except (ValueError, AssertionError) as error:  # no "=", or unbalanced brackets
                raise argparse.ArgumentError(self, f"{value!r} is not of the form KEY=VALUE") from error


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and evaluation share."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset folder (default: data_root of the config)")
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="folder of this run (default: work_dir of the config, else output/<config name>)",
    )
    add_config_options(parser)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add --cfg-options, which overrides settings of the config."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_ConfigOptions,
        default={},
        metavar="KEY=VALUE",
        help="override settings of the config, such as optim_wrapper.optimizer.lr=5e-5",
    )


def read_config(path: Path, folder: str = "configs") -> Config:
    """Read a config file.

    Args:
        path: the file.
        folder: folder of complete configs, for messages.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not a complete config.
    """
    command_line.require_file(path, f"use a config from {folder} of the checkout")
    if path.suffix != ".py":
        raise ValueError(f"{path} is not a .py file; use a config from {folder}.")
    _filter_warnings()
    try:
        cfg = Config.fromfile(path)
    except (SyntaxError, KeyError, AttributeError, TypeError, NameError) as error:
        raise ValueError(f"{path} is not a valid config: {error}") from error
    if "model" not in cfg:
        raise ValueError(f"{path} defines no model, so it is only a base config; use a config from {folder}.")
    return cfg


def load_config(args: argparse.Namespace, project: Project) -> Config:
    """Read the config given on the command line and apply the common options.

    Args:
        args: the parsed command line, with the options of `add_common_options`.
        project: the subproject.

    Raises:
        FileNotFoundError: if the config does not exist.
        ValueError: if it is not a complete config, or belongs to another subproject.
    """
    path = Path(args.config)
    cfg = read_config(path, f"configs/{project.name}")
    scope = cfg.get("default_scope")
    if scope not in project.models or project.models[scope] not in (None, cfg.model.type):
        other = "segmentation" if project is DETECTION else "detection"
        raise ValueError(f"{path} has default_scope {scope} and model {cfg.model.type}; use the scripts in {other}/.")
    if args.data is not None:
        set_data_root(cfg, args.data)
    cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = str(args.work_dir or cfg.get("work_dir") or Path("output") / path.stem)
    return cfg


def _filter_warnings() -> None:
    """Hide warnings about deprecated calls inside mmdet and mmseg, which users cannot fix."""
    for module in ("mmdet", "mmseg", "mmcv", "mmengine", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=module)
    warnings.filterwarnings("ignore", message=".*(pkg_resources|build_loss|avg_non_ignore|SyncBN|draw is False).*")
    logging.getLogger("PIL").setLevel(logging.WARNING)


# ---------------------------------------------------------------------------------------------------------------------
# Runner
# ---------------------------------------------------------------------------------------------------------------------


class _CheckedRunner(Runner):
    """mmengine's runner, with errors that name the annotations or the image."""

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False):
        with name_dataset(dataloader if isinstance(dataloader, dict) else {}):
            loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        name_errors(loader.dataset)
        return loader


def make_runner(cfg: Config, new_classes: bool = False) -> Runner:
    """Build mmengine's runner with safe checkpoints, checked data, and support for CPUs and torchrun.

    Args:
        cfg: a config from `load_config`; modified.
        new_classes: accept a checkpoint with another number of classes, to fine-tune.
    """
    set_launcher(cfg)
    init_default_scope(cfg.default_scope)
    command_line.create_folder(Path(cfg.work_dir), "--work-dir")
    if cfg.default_scope == "mmdet":
        coco.install()
    runner = _CheckedRunner.from_cfg(cfg)
    runner.register_hook(PlainCheckpointHook(new_classes))
    runner.register_hook(CheckDataHook())
    runner.register_hook(SkipSeenDataHook())
    # mmengine logs one "paramwise_options" line per parameter.
    runner.logger.addFilter(lambda record: not record.getMessage().startswith("paramwise_options"))
    return runner


@contextmanager
def report_unknown_keys(cfg: Config) -> Iterator[None]:
    """Raise ValueError for an unknown config key, such as a misspelled one.

    This context must contain the whole run, because mmengine builds loops, hooks and optimizers on first use.
    """
    try:
        yield
    except TypeError as error:
        if "__init__() got an unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"{cfg.filename} or --cfg-options has an unknown key: {error}.") from error


# ---------------------------------------------------------------------------------------------------------------------
# Distributed runs
# ---------------------------------------------------------------------------------------------------------------------

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_distributed() -> bool:
    """Return whether torchrun started this process."""
    return all(name in os.environ for name in _TORCHRUN_VARIABLES)


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ["WORLD_SIZE"]) if is_distributed() else 1


def is_main_process() -> bool:
    """Return whether this is the process with rank 0; works before the process group exists."""
    return not is_distributed() or os.environ["RANK"] == "0"


def set_launcher(cfg: Config) -> None:
    """Prepare a config for one process, or for the processes of torchrun: NCCL on GPUs, Gloo on CPUs."""
    if not is_distributed():
        cfg.launcher = "none"
        return
    cfg.launcher = "pytorch"
    if torch.cuda.is_available():
        return
    # mmengine's own setup requires GPUs.
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    cfg.model_wrapper_cfg = ConfigDict(
        type="MMDistributedDataParallel",
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get("find_unused_parameters", False),
    )
    _replace_sync_batch_norm(cfg.model)


def _replace_sync_batch_norm(node) -> None:
    """Replace SyncBN, which PyTorch supports only on GPUs, with BatchNorm over the images of each process."""
    for value in node.values() if isinstance(node, dict) else node:
        if isinstance(value, dict) and value.get("type") == "SyncBN":
            value["type"] = "BN"
        if isinstance(value, (dict, list, tuple)):
            _replace_sync_batch_norm(value)
