"""Cityscapes with panoptic maps, which mmdet lacks: the files that cityscapesscripts writes, read as COCO's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmdet.datasets import CocoPanopticDataset
from mmdet.registry import DATASETS

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


@DATASETS.register_module()
class CityscapesPanopticDataset(CocoPanopticDataset):
    """gtFine/cityscapes_panoptic_{train,val}.json, with the pictures in a folder a city."""

    METAINFO = {  # noqa: RUF012  as mmdet has it
        "classes": (*_THINGS, *_STUFF),
        "thing_classes": tuple(_THINGS),
        "stuff_classes": tuple(_STUFF),
        "palette": [*_THINGS.values(), *_STUFF.values()],
    }

    def parse_data_info(self, raw_data_info: dict[str, Any]) -> dict[str, Any]:
        name = raw_data_info["raw_img_info"]["file_name"]  # CITY_..._leftImg8bit.png
        parsed = super().parse_data_info(raw_data_info)
        parsed["img_path"] = str(Path(self.data_prefix["img"], name.split("_")[0], name))
        parsed["seg_map_path"] = str(Path(self.data_prefix["seg"], name.replace("leftImg8bit", "gtFine_panoptic")))
        return parsed
