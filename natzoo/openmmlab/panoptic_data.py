"""Panoptic datasets and metric for Cityscapes and ADE20K; list this module in `custom_imports` to use them.

mmdet numbers classes in the order of the annotation file and requires things before stuff. The files written by
cityscapesscripts and by Mask2Former's scripts have another order, so this module matches classes by name. For
Cityscapes, it derives the paths of images and panoptic maps from the image id.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoPanopticDataset
from mmdet.datasets import ade20k as mmdet_ade20k
from mmdet.datasets.api_wrappers import COCOPanoptic
from mmdet.evaluation import CocoPanopticMetric
from mmdet.registry import DATASETS, METRICS

from natzoo.openmmlab import coco

coco.install()

# Class -> color (R, G, B) of the Cityscapes palette.
_THINGS = {
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
_STUFF = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
}

# Class names of Mask2Former's script that differ from mmdet's. The script also writes "window " with a trailing space.
_RENAMED = {"plane": "airplane"}


class PanopticAnnotations(COCOPanoptic):
    """Annotations with mmdet's class names."""

    def createIndex(self) -> None:
        for category in self.dataset.get("categories", ()):
            name = category["name"].strip()
            category["name"] = _RENAMED.get(name, name)
        super().createIndex()


@DATASETS.register_module(force=True)
class ADE20KPanopticDataset(mmdet_ade20k.ADE20KPanopticDataset):
    """ADE20K from ade20k_panoptic_{train,val}.json, whose classes may have any order."""

    COCOAPI = PanopticAnnotations


@DATASETS.register_module()
class CityscapesPanopticDataset(CocoPanopticDataset):
    """Cityscapes from gtFine/cityscapes_panoptic_{train,val}.json, with one image folder per city."""

    COCOAPI = PanopticAnnotations
    METAINFO = {  # noqa: RUF012  an instance attribute in mmdet too
        "classes": (*_THINGS, *_STUFF),
        "thing_classes": tuple(_THINGS),
        "stuff_classes": tuple(_STUFF),
        "palette": [*_THINGS.values(), *_STUFF.values()],
    }

    def parse_data_info(self, raw_data_info: dict[str, Any]) -> dict[str, Any]:
        image = raw_data_info["raw_img_info"]["img_id"]  # CITY_000000_000019; file_name does not match the image files
        parsed = super().parse_data_info(raw_data_info)
        parsed["img_path"] = str(Path(self.data_prefix["img"], image.split("_")[0], f"{image}_leftImg8bit.png"))
        parsed["seg_map_path"] = str(Path(self.data_prefix["seg"], f"{image}_gtFine_panoptic.png"))
        return parsed


@METRICS.register_module()
class PanopticMetric(CocoPanopticMetric):
    """Panoptic quality for annotation files with any order of classes and any names of panoptic maps."""

    def __init__(self, ann_file: str, seg_prefix: str, **options: Any):
        super().__init__(ann_file=ann_file, seg_prefix=seg_prefix, **options)
        self._coco_api = PanopticAnnotations(ann_file)
        self._maps = {one["image_id"]: one["file_name"] for one in self._coco_api.dataset["annotations"]}

    def process(self, data_batch: dict[str, Any], data_samples: Sequence[dict[str, Any]]) -> None:
        # mmdet derives the name of a panoptic map from that of its image.
        super().process(data_batch, [{**one, "img_path": self._maps[one["img_id"]]} for one in data_samples])
