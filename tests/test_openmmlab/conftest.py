"""Fixtures of the tests that require the extra `openmmlab`; without it, no test is collected (see pytest's header)."""

import functools
import importlib
import shutil
import sys
from pathlib import Path

import pytest
from openmmlab_extra import MISSING, PHOTOGRAPHS, has_photographs

ROOT = Path(__file__).parents[2]
collect_ignore_glob = ["test_*.py"] if MISSING else []


@pytest.fixture(autouse=True)
def _clean_registries():
    from runs import clear_registries

    clear_registries()
    yield
    clear_registries()


@pytest.fixture(autouse=True, scope="session")
def _fast_configs():
    """Skip formatting the config for each checkpoint, and read mmdet's and mmseg's lists of models only once.

    Both would dominate the time of a short run.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmengine.config.config.FormatCode", lambda text, **style: (text, False))
        find = importlib.import_module("mmengine.config.utils")._get_cfg_metainfo
        patch.setattr("mmengine.config.utils._get_cfg_metainfo", functools.cache(find))
        yield


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Images of shapes drawn by tools/make_data.py, shared by all tests: do not modify."""
    sys.path.insert(0, str(ROOT / "tools"))
    import make_data

    folder = tmp_path_factory.mktemp("drawn") / "shapes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_data, "_SHAPES_COUNTS", {"training": 6, "validation": 3})
        make_data.make_shapes(folder)
    return folder


@pytest.fixture
def shapes(drawn, tmp_path):
    """A copy of the drawn images that a test can modify."""
    return Path(shutil.copytree(drawn, tmp_path / "shapes"))


@pytest.fixture(scope="session")
def images(drawn):
    """Dataset settings for detectors and for segmenters, and the classes of the detection dataset."""
    if has_photographs():
        from mmdet.datasets import CocoDataset

        boxes = {"ann_file": "annotations/instances_train2017.json", "data_prefix": {"img": "train2017/"}}
        detection = {"data_root": str(PHOTOGRAPHS / "coco_ccby"), **boxes}
        return detection, {"data_root": str(PHOTOGRAPHS / "coco_ade"), "img_suffix": ".jpg"}, CocoDataset.METAINFO
    boxes = {"ann_file": "instances_training.json", "data_prefix": {"img": "images/training/"}}
    meta = {"classes": ("circle", "square", "triangle")}
    return {"data_root": str(drawn), **boxes}, {"data_root": str(drawn), "img_suffix": ".png"}, meta
