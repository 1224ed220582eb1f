"""What train.py and test.py of detection/ and segmentation/ share: their options, and how a config becomes a run."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from natzoo.openmmlab.checkpoints import PlainCheckpointHook
from natzoo.openmmlab.data import CheckDataHook, set_data_root
from natzoo.openmmlab.launch import set_launcher
from natzoo.openmmlab.resume import SkipSeenDataHook


class Project(NamedTuple):
    """A subproject.

    Attributes:
        name: its folder.
        takes: scopes of mmengine's registries that its configs have, each with the only type of model taken of that
            scope, or None for any.
    """

    name: str
    takes: dict[str, str | None]


DETECTION = Project("detection", {"mmdet": None})
SEGMENTATION = Project("segmentation", {"mmseg": None, "mmdet": "Mask2Former"})


class _Changes(DictAction):
    """mmengine's KEY=VALUE, with a word about those that are none."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            try:
                super().__call__(parser, namespace, [value], option_string)
            except (ValueError, AssertionError) as error:  # without "=", or with brackets that do not match
                raise argparse.ArgumentError(self, f"{value!r} is no KEY=VALUE") from error


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="folder of the data, instead of the config's data_root")
    parser.add_argument("--work-dir", type=Path, help="folder of the run; output/<config's name> if not given")
    parser.add_argument(
        "--cfg-options", nargs="+", action=_Changes, default={}, metavar="KEY=VALUE", help="change the config"
    )


def read_config(path: Path, folder: str = "configs") -> Config:
    """The config of a file.

    Args:
        folder: where configs are, for the messages.

    Raises:
        FileNotFoundError, ValueError: if it is not there, or is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no config {path}: see {folder}.")
    if path.suffix != ".py":
        raise ValueError(f"{path} is no config of OpenMMLab, which end in .py: see {folder}.")
    _quieten()
    try:
        cfg = Config.fromfile(path)
    except (SyntaxError, KeyError, AttributeError, TypeError, NameError) as error:
        raise ValueError(f"{path} cannot be read as a config: {error}") from error
    if "model" not in cfg:
        raise ValueError(f"{path} has no model: it is a part for other configs; see {folder}.")
    return cfg


def load_config(args: argparse.Namespace, project: Project) -> Config:
    """The config of --config with the options applied, ready for `make_runner`.

    Raises:
        FileNotFoundError, ValueError: if it is not there, is none, or is one for another subproject.
    """
    path = Path(args.config)
    cfg = read_config(path, f"configs/{project.name}")
    scope = cfg.get("default_scope")
    if scope not in project.takes or project.takes[scope] not in (None, cfg.model.type):
        raise ValueError(
            f"{path} is a config of {scope} with the model {cfg.model.type}, which is not for {project.name}/: "
            f"use the scripts of {'segmentation' if project is DETECTION else 'detection'}/."
        )
    if args.data is not None:
        set_data_root(cfg, args.data)
    cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = str(args.work_dir or cfg.get("work_dir") or Path("output") / path.stem)
    return cfg


def make_runner(cfg: Config, new_classes: bool = False) -> Runner:
    """mmengine's runner with what this project adds: safe checkpoints, checked data, any launcher and device."""
    set_launcher(cfg)
    init_default_scope(cfg.default_scope)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(PlainCheckpointHook(new_classes))
    runner.register_hook(CheckDataHook())
    runner.register_hook(SkipSeenDataHook())
    runner.logger.addFilter(lambda record: not record.getMessage().startswith("paramwise_options"))  # a line a weight
    return runner


@contextmanager
def config_mistakes(cfg: Config) -> Iterator[None]:
    """Turns what mmengine raises of a key that nothing takes, such as a misspelt one, into a ValueError.

    It goes around the whole run: mmengine builds loops, hooks and optimizers only when it gets to them.
    """
    try:
        yield
    except TypeError as error:
        if "__init__() got an unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"{cfg.filename}, or --cfg-options, has a key that nothing takes: {error}.") from error


def _quieten() -> None:
    """Leaves out warnings that a user can do nothing about: of old calls inside mmdet and mmseg."""
    for module in ("mmdet", "mmseg", "mmcv", "mmengine", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=module)
    warnings.filterwarnings("ignore", message=".*(pkg_resources|build_loss|avg_non_ignore|SyncBN|draw is False).*")
    logging.getLogger("PIL").setLevel(logging.WARNING)
