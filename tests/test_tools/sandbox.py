"""A copy of the checkout in which the commands of the pages run: drawn data and random weights where they look."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import natzoo  # noqa: F401  registers the models
from natzoo.checkpoints import find_entry, path_in_cache, write_weights
from natzoo.hf import save_folder
from test_tools.pages import ROOT, tracked

_TINY = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "kernel_size": 3, "dilations": [[2], [1]]}
CLASSIFIERS = ("nat_mini", "nat_tiny", "dinat_mini", "dinat_tiny")
DETECTORS = {
    "nat_mini_maskrcnn": "detection/mask_rcnn_nat_mini_3x.py",
    "maskrcnn_dinat_mini": "detection/mask_rcnn_dinat_mini_3x.py",
    "nat_mini_upernet": "segmentation/upernet_nat_mini_160k.py",
    "upernet_dinat_mini": "segmentation/upernet_dinat_mini_160k.py",
}


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    """A command in a copy of the checkout, by the interpreter that runs the tests."""
    programs = folder / ".programs"
    if not programs.exists():
        programs.mkdir()
        for name in ("python", "python3"):
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (programs / "torchrun").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
        for program in programs.iterdir():
            program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    environment |= {"NATZOO_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = ["bash", "-euo", "pipefail", "-c", command]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def copy_checkout(folder: Path) -> None:
    for path in tracked():
        if path.relative_to(ROOT).parts[0] != "tests":
            (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def classifier(name: str, **kwargs) -> None:
    """Random weights where the published ones would be: in the cache, and in place of the hub's repository."""
    model = timm.create_model(name, **kwargs)
    path_in_cache(find_entry(name)).parent.mkdir(exist_ok=True)
    write_weights(path_in_cache(find_entry(name)), model.state_dict())
    if find_entry(name).hub:
        save_folder(model, find_entry(name).hub)


def all_weights() -> None:
    """Those that the commands of the pages load; of the Large models small ones."""
    importlib.import_module("natzoo.openmmlab")
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    torch.manual_seed(0)
    for name in CLASSIFIERS:
        write_cached(name, timm.create_model(name))
    write_cached("dinat_large_21k", timm.create_model("dinat_large_21k", **_TINY))
    for name, config in DETECTORS.items():
        cfg = Config.fromfile(ROOT / "configs" / config)
        init_default_scope(cfg.default_scope)
        cfg.model.backbone.init_cfg = None
        write_cached(name, MODELS.build(cfg.model))


def write_cached(name: str, model: torch.nn.Module) -> None:
    path_in_cache(find_entry(name)).parent.mkdir(exist_ok=True)
    write_weights(path_in_cache(find_entry(name)), model.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def draw_data(folder: Path) -> None:
    """ImageNet, COCO and ADE20K as the pages lay them out, of a few pictures each."""
    noise = np.random.default_rng(0)
    for name, classes, counts in (("IMAGENET", 8, (2, 1)), ("DATA", 3, (4, 2)), ("SIGN_DIGITS", 3, (4, 2))):
        for part, count in zip(("train", "val"), counts, strict=True):
            for number in range(classes * count):
                _picture(noise, folder / name / part / f"n{number % classes:08}" / f"{number}.JPEG", 32)
    (folder / "imagenet").symlink_to("IMAGENET")
    (folder / "classes.txt").write_text("".join(f"n{number:08}\n" for number in range(1000)))
    _picture(noise, folder / "PICTURE" / "0.png")
    _picture(noise, folder / "picture.png")
    (folder / "a.yml").write_text("model: nat_mini\nmodel_kwargs: {depths: [1, 1], num_heads: [1, 2], embed_dim: 16}\n")
    _draw_coco(noise, folder / "data" / "coco")
    _draw_ade(noise, folder / "data" / "ade" / "ADEChallengeData2016")


def _picture(noise: np.random.Generator, path: Path, side: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


def _draw_coco(noise: np.random.Generator, folder: Path) -> None:
    """One picture a split, with one square; the categories have COCO's names."""
    importlib.import_module("natzoo.openmmlab")  # before mmdet, whose compiled operators it stands for
    from mmdet.datasets import CocoDataset

    categories = [{"id": number, "name": name} for number, name in enumerate(CocoDataset.METAINFO["classes"], start=1)]
    square = {"bbox": [10, 10, 40, 40], "area": 1600, "segmentation": [[10, 10, 50, 10, 50, 50, 10, 50]]}
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        _picture(noise, folder / split / "000000000001.jpg")
        content = {
            "images": [{"id": 1, "file_name": "000000000001.jpg", "width": 64, "height": 64}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, **square}],
            "categories": categories,
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _draw_ade(noise: np.random.Generator, folder: Path) -> None:
    for split, count in (("training", 2), ("validation", 1)):
        for number in range(count):
            _picture(noise, folder / "images" / split / f"{number}.jpg")
            labels = noise.integers(0, 151, (64, 64), dtype=np.uint8)
            path = folder / "annotations" / split / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(path)
