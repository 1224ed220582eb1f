"""These tests need the extra `openmmlab`; where it is not installed none is collected, and the run says so."""

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
def _forget_other_tests():
    from runs import forget

    forget()
    yield
    forget()


@pytest.fixture(autouse=True, scope="session")
def _configs_without_waiting():
    """Leaves out what mmengine spends most of a short run on: laying out its config's text, again for each checkpoint,
    and reading the lists of all published models to find a base of mmdet's or mmseg's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmengine.config.config.FormatCode", lambda text, **style: (text, False))
        find = importlib.import_module("mmengine.config.utils")._get_cfg_metainfo
        patch.setattr("mmengine.config.utils._get_cfg_metainfo", functools.cache(find))
        yield


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A few pictures of shapes, as tools/make_data.py draws them; not to be changed."""
    sys.path.insert(0, str(ROOT / "tools"))
    import make_data

    folder = tmp_path_factory.mktemp("drawn") / "shapes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_data, "_SHAPES_COUNTS", {"training": 6, "validation": 3})
        make_data.make_shapes(folder)
    return folder


@pytest.fixture
def shapes(drawn, tmp_path):
    """The same pictures, for a test of its own to change."""
    return Path(shutil.copytree(drawn, tmp_path / "shapes"))


@pytest.fixture(scope="session")
def pictures(drawn):
    """Folders of pictures for detectors and for segmenters, and what data sets on them need to be told."""
    if has_photographs():
        from mmdet.datasets import CocoDataset

        boxes = {"ann_file": "annotations/instances_train2017.json", "data_prefix": {"img": "train2017/"}}
        detection = {"data_root": str(PHOTOGRAPHS / "coco_ccby"), **boxes}
        return detection, {"data_root": str(PHOTOGRAPHS / "coco_ade"), "img_suffix": ".jpg"}, CocoDataset.METAINFO
    boxes = {"ann_file": "instances_training.json", "data_prefix": {"img": "images/training/"}}
    meta = {"classes": ("circle", "square", "triangle")}
    return {"data_root": str(drawn), **boxes}, {"data_root": str(drawn), "img_suffix": ".png"}, meta
