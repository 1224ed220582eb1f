"""Panoptic maps: what stands in for panopticapi, and a Mask2Former that is trained and evaluated on them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from runs import losses, run, tiny_mask2former

from natzoo.openmmlab.panoptic import id2rgb, rgb2id
from segmentation import test as segmentation_test
from segmentation import train as segmentation_train

CLASSES = ("circle", "square", "triangle", "ground")  # the last is stuff


def write_panoptic(folder, name, pictures):
    """Writes maps {image id: (numbers [H, W], {number: category})} in COCO's layout, and gives the file of it."""
    (folder / name).mkdir()
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i, "name": n, "isthing": int(n != "ground")} for i, n in enumerate(CLASSES, 1)]
    for key, (numbers, categories) in pictures.items():
        file = f"{key:04d}.png"
        height, width = numbers.shape
        Image.fromarray(id2rgb(numbers)).save(folder / name / file)
        content["images"].append({"id": key, "file_name": file, "height": height, "width": width})
        segments = [
            {"id": number, "category_id": category, "iscrowd": 0, "area": int((numbers == number).sum())}
            | {"bbox": [0, 0, width, height]}
            for number, category in categories.items()
        ]
        content["annotations"].append({"image_id": key, "file_name": file, "segments_info": segments})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


def evaluate(path, predicted):
    """mmdet's metric for maps as Mask2Former gives them: class + 1000 instance, classes counted from 0."""
    from mmdet.evaluation import CocoPanopticMetric

    metric = CocoPanopticMetric(ann_file=str(path), seg_prefix=str(path.with_suffix("")))
    things, stuff = CLASSES[:3], CLASSES[3:]
    metric.dataset_meta = {"classes": CLASSES, "thing_classes": things, "stuff_classes": stuff}
    annotated = json.loads(path.read_text())
    for image, annotation in zip(annotated["images"], annotated["annotations"], strict=True):
        segments = [
            {"id": s["id"], "category": s["category_id"] - 1, "is_thing": s["category_id"] < 4}
            for s in annotation["segments_info"]
        ]
        sample = {
            **{"img_id": image["id"], "ori_shape": (image["height"], image["width"]), "segments_info": segments},
            **{"img_path": image["file_name"], "seg_map_path": str(path.with_suffix("") / image["file_name"])},
            "pred_panoptic_seg": {"sem_seg": torch.from_numpy(predicted[image["id"]])[None]},
        }
        metric.process({}, [sample])
    return metric.evaluate(len(annotated["images"]))


def test_colours_are_numbers():
    assert rgb2id(np.array([[[1, 2, 3], [255, 255, 255]]], np.uint8)).tolist() == [[1 + 2 * 256 + 3 * 65536, 2**24 - 1]]
    numbers = np.random.default_rng(0).integers(0, 2**24, (5, 7))
    assert id2rgb(numbers).dtype == np.uint8
    assert (rgb2id(id2rgb(numbers)) == numbers).all()


def test_quality_by_hand(tmp_path):
    """A circle found to 4/5, ground found to 5/6 with what the circle left, a square missed, a triangle made up."""
    truth = np.full((10, 12), 4)  # ground
    truth[:, :5], truth[:, 10], truth[:, 11] = 1, 2, 0  # circle, square, nothing
    found = np.full((10, 12), 3)
    found[:, :4], found[:, 10], found[:, 11] = 1000, 1002, 1002
    path = write_panoptic(tmp_path, "maps", {7: (truth, {4: 4, 1: 1, 2: 2})})
    scores = evaluate(path, {7: found})
    assert scores["coco_panoptic/PQ_th"] == pytest.approx(100 * (0.8 + 0 + 0) / 3, abs=1e-3)
    assert scores["coco_panoptic/PQ_st"] == pytest.approx(100 * 5 / 6, abs=1e-3)
    assert scores["coco_panoptic/PQ"] == pytest.approx(100 * (0.8 + 0 + 0 + 5 / 6) / 4, abs=1e-3)
    assert scores["coco_panoptic/SQ"] == pytest.approx(100 * (0.8 + 0 + 0 + 5 / 6) / 4, abs=1e-3)
    assert scores["coco_panoptic/RQ"] == pytest.approx(100 * 2 / 4, abs=1e-3)


@pytest.fixture
def panoptic_shapes(shapes):
    """The drawn shapes as panoptic maps, beside their pictures."""
    for split in ("training", "validation"):
        coco, pictures = COCO(shapes / f"instances_{split}.json"), {}
        for key, image in coco.imgs.items():
            numbers, categories = np.ones((image["height"], image["width"]), int), {1: 4}
            for number, annotation in enumerate(coco.imgToAnns[key], 300):
                numbers[coco.annToMask(annotation) == 1] = number
                categories[number] = annotation["category_id"]
            pictures[key] = (numbers, categories)
        write_panoptic(shapes, f"panoptic_{split}", pictures)
    return shapes


def test_perfect_maps(panoptic_shapes):
    path = panoptic_shapes / "panoptic_validation.json"
    predicted = {}
    for annotation in json.loads(path.read_text())["annotations"]:
        numbers = rgb2id(np.array(Image.open(path.with_suffix("") / annotation["file_name"])))
        found = np.zeros_like(numbers)
        for segment in annotation["segments_info"]:
            label = segment["category_id"] - 1
            found[numbers == segment["id"]] = label + 1000 * segment["id"] * (label < 3)
        predicted[annotation["image_id"]] = found
    scores = evaluate(path, predicted)
    assert scores["coco_panoptic/PQ"] == scores["coco_panoptic/PQ_th"] == scores["coco_panoptic/PQ_st"] == 100


def test_from_training_to_evaluation(panoptic_shapes, tmp_path):
    config, folder = tiny_mask2former(tmp_path), tmp_path / "folder"
    options = ["--data", panoptic_shapes, "--work-dir", folder]
    run(segmentation_train.main, config, *options)
    found = losses(folder)
    assert sorted(found) == [1, 2]
    assert all(np.isfinite(loss) for loss in found.values())
    scores = run(segmentation_test.main, config, folder / "iter_2.pth", *options, "--show-dir", tmp_path / "pictures")
    assert {"coco_panoptic/PQ", "coco_panoptic/PQ_th", "coco_panoptic/PQ_st"} <= scores.keys()
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 3
