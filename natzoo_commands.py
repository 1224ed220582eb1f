"""Entry points of the console commands and of the scripts in classification/, detection/ and segmentation/.

This module imports only the standard library, because environment defaults must be set before PyTorch is imported. Each
function takes a command line, `sys.argv[1:]` by default. On a user error it prints one line and exits with status 2.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import ModuleType

# Top-level modules of the packages that each extra of pyproject.toml installs, as far as the commands import them.
_EXTRAS = {"train": {"matplotlib", "sklearn", "tensorboard", "tqdm", "yaml"}}
_EXTRAS["openmmlab"] = _EXTRAS["train"] | {
    *("ftfy", "mmcv", "mmdet", "mmengine", "mmseg", "pkg_resources", "pycocotools", "regex", "torchvision"),
}

# Idle OpenMP threads spin by default, which takes CPU time from data-loading workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def train(argv: Sequence[str] | None = None) -> None:
    """Train an image classifier (natzoo-train)."""
    _run_classification("train", argv, "if last.pth exists, continue the run with --resume")


def validate(argv: Sequence[str] | None = None) -> None:
    """Evaluate image classifiers (natzoo-validate)."""
    _run_classification("validate", argv)


def predict(argv: Sequence[str] | None = None) -> None:
    """Classify images (natzoo-predict)."""
    _run_classification("predict", argv)


def probe(argv: Sequence[str] | None = None) -> None:
    """Judge frozen features on a data set (natzoo-probe)."""
    _run_classification("probe", argv)


def detection_train(argv: Sequence[str] | None = None) -> None:
    """Train a detector (natzoo-detection-train)."""
    _run_openmmlab("train", "DETECTION", argv)


def detection_test(argv: Sequence[str] | None = None) -> None:
    """Evaluate a detector (natzoo-detection-test)."""
    _run_openmmlab("test", "DETECTION", argv)


def detection_predict(argv: Sequence[str] | None = None) -> None:
    """Detect objects in pictures (natzoo-detection-predict)."""
    _run_openmmlab("predict", "DETECTION", argv)


def segmentation_train(argv: Sequence[str] | None = None) -> None:
    """Train a segmentation model (natzoo-segmentation-train)."""
    _run_openmmlab("train", "SEGMENTATION", argv)


def segmentation_test(argv: Sequence[str] | None = None) -> None:
    """Evaluate a segmentation model (natzoo-segmentation-test)."""
    _run_openmmlab("test", "SEGMENTATION", argv)


def segmentation_predict(argv: Sequence[str] | None = None) -> None:
    """Segment pictures (natzoo-segmentation-predict)."""
    _run_openmmlab("predict", "SEGMENTATION", argv)


def _run_classification(module: str, argv: Sequence[str] | None, after_interrupt: str = "") -> None:
    from natzoo import command_line

    command_line.run(lambda: _import(f"natzoo.classification.{module}", "train").main(argv), after_interrupt)


def _run_openmmlab(module: str, project: str, argv: Sequence[str] | None) -> None:
    from natzoo import command_line

    def main() -> None:
        runner = _import("natzoo.openmmlab.runner", "openmmlab")
        _import(f"natzoo.openmmlab.{module}", "openmmlab").main(getattr(runner, project), argv)

    command_line.run(main)


def _import(module: str, extra: str) -> ModuleType:
    """Import a module of natzoo.

    Raises:
        ImportError: naming the missing package, and the extra if it installs the package.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRAS[extra]:
            raise
        raise ImportError(f"{error.name} is not installed; install natten with the extra [{extra}].") from error
