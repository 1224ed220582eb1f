"""Panoptic maps of Cityscapes and ADE20K: data sets, and the metric for them.

mmdet numbers classes as the annotation file lists them, and wants the things first. The files that cityscapesscripts
and Mask2Former's scripts write list them otherwise: here classes are told by their names, two of which Mask2Former's
script spells in its own way. Cityscapes' pictures and maps are named after the image's id.
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

# name, colour (R, G, B) as Cityscapes draws it
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

# Names of classes that Mask2Former's script spells otherwise than mmdet; it also writes "window " with a space.
_RESPELLED = {"plane": "airplane"}


class PanopticAnnotations(COCOPanoptic):
    """Annotations whose classes are spelled as mmdet does, and numbered in the order in which they are asked for."""

    def createIndex(self) -> None:
        for category in self.dataset.get("categories", ()):
            name = category["name"].strip()
            category["name"] = _RESPELLED.get(name, name)
        super().createIndex()

    def get_cat_ids(self, cat_names: Sequence[str] = (), sup_names=(), cat_ids=()) -> list[int]:
        found, names = super().get_cat_ids(list(cat_names), sup_names, cat_ids), list(cat_names)
        return sorted(found, key=lambda number: names.index(self.cats[number]["name"])) if names else found


@DATASETS.register_module(force=True)
class ADE20KPanopticDataset(mmdet_ade20k.ADE20KPanopticDataset):
    """ade20k_panoptic_{train,val}.json, with the classes in any order."""

    COCOAPI = PanopticAnnotations


@DATASETS.register_module()
class CityscapesPanopticDataset(CocoPanopticDataset):
    """gtFine/cityscapes_panoptic_{train,val}.json, with the pictures in a folder a city."""

    COCOAPI = PanopticAnnotations
    METAINFO = {  # noqa: RUF012  as mmdet has it
        "classes": (*_THINGS, *_STUFF),
        "thing_classes": tuple(_THINGS),
        "stuff_classes": tuple(_STUFF),
        "palette": [*_THINGS.values(), *_STUFF.values()],
    }

    def parse_data_info(self, raw_data_info: dict[str, Any]) -> dict[str, Any]:
        image = raw_data_info["raw_img_info"]["img_id"]  # CITY_000000_000019; file_name has a gtFine that pictures lack
        parsed = super().parse_data_info(raw_data_info)
        parsed["img_path"] = str(Path(self.data_prefix["img"], image.split("_")[0], f"{image}_leftImg8bit.png"))
        parsed["seg_map_path"] = str(Path(self.data_prefix["seg"], f"{image}_gtFine_panoptic.png"))
        return parsed


@METRICS.register_module()
class PanopticMetric(CocoPanopticMetric):
    """Panoptic quality, with the classes in any order, and the true maps by the names that the annotations give."""

    def __init__(self, ann_file: str, seg_prefix: str, **options: Any):
        super().__init__(ann_file=ann_file, seg_prefix=seg_prefix, **options)
        self._coco_api = PanopticAnnotations(ann_file)
        self._maps = {one["image_id"]: one["file_name"] for one in self._coco_api.dataset["annotations"]}

    def process(self, data_batch: dict[str, Any], data_samples: Sequence[dict[str, Any]]) -> None:
        # mmdet takes the name of a map from that of its picture.
        super().process(data_batch, [{**one, "img_path": self._maps[one["img_id"]]} for one in data_samples])
