"""Panoptic maps: the replacement for panopticapi, the datasets, and a Mask2Former trained and evaluated on them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mutations import check_reader, damaged_bytes, damaged_values
from PIL import Image
from pycocotools.coco import COCO
from runs import ROOT, build_dataset, evaluate_segmenter, load_config, losses, tiny_mask2former, train_segmenter

from natzoo.openmmlab.coco import install, read_coco
from natzoo.openmmlab.panopticapi import id2rgb, rgb2id

CLASSES = ("circle", "square", "triangle", "ground")  # the last is stuff
META_KEYS = ("img_id", "img_path", "ori_shape")


def write_panoptic(folder, name, maps):
    """Write image id -> (segment ids [H, W], segment id -> category) in COCO's layout; return the annotation file."""
    (folder / name).mkdir()
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i, "name": n, "isthing": int(n != "ground")} for i, n in enumerate(CLASSES, 1)]
    for key, (numbers, categories) in maps.items():
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
    """Return mmdet's metrics for maps in Mask2Former's encoding: class + 1000 * instance, with classes from 0."""
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


def test_conversion_between_colors_and_ids():
    assert rgb2id(np.array([[[1, 2, 3], [255, 255, 255]]], np.uint8)).tolist() == [[1 + 2 * 256 + 3 * 65536, 2**24 - 1]]
    numbers = np.random.default_rng(0).integers(0, 2**24, (5, 7))
    assert id2rgb(numbers).dtype == np.uint8
    assert (rgb2id(id2rgb(numbers)) == numbers).all()


def test_quality_of_a_worked_example(tmp_path):
    """A circle with IoU 4/5, ground with IoU 5/6, a missed square and a false triangle."""
    truth = np.full((10, 12), 4)  # ground
    truth[:, :5], truth[:, 10], truth[:, 11] = 1, 2, 0  # circle, square, unlabeled
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
    """The drawn shapes with panoptic maps next to the images."""
    for split in ("training", "validation"):
        coco, maps = COCO(shapes / f"instances_{split}.json"), {}
        for key, image in coco.imgs.items():
            numbers, categories = np.ones((image["height"], image["width"]), int), {1: 4}
            for number, annotation in enumerate(coco.imgToAnns[key], 300):
                numbers[coco.annToMask(annotation) == 1] = number
                categories[number] = annotation["category_id"]
            maps[key] = (numbers, categories)
        write_panoptic(shapes, f"panoptic_{split}", maps)
    return shapes


def test_perfect_predictions(panoptic_shapes):
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


def test_training_and_evaluation(panoptic_shapes, tmp_path):
    config, folder = tiny_mask2former(tmp_path), tmp_path / "folder"
    options = ["--data", panoptic_shapes, "--work-dir", folder]
    train_segmenter(config, *options)
    found = losses(folder)
    assert sorted(found) == [1, 2]
    assert all(np.isfinite(loss) for loss in found.values())
    scores = evaluate_segmenter(config, folder / "iter_2.pth", *options, "--show-dir", tmp_path / "images")
    assert {"coco_panoptic/PQ", "coco_panoptic/PQ_th", "coco_panoptic/PQ_st"} <= scores.keys()
    assert len(list((tmp_path / "images").rglob("*.png"))) == 3


# ----- datasets whose files list the classes in another order -----

# As the preparation scripts write them: image id, file_name, image file, panoptic map.
NAMES = {
    "ade20k": ("ADE_val_00000001", "ADE_val_00000001.jpg", "ADE_val_00000001.jpg", "ADE_val_00000001.png"),
    "cityscapes": (
        "ulm_000000_000019",
        "ulm_000000_000019_gtFine_leftImg8bit.png",
        "ulm/ulm_000000_000019_leftImg8bit.png",
        "ulm_000000_000019_gtFine_panoptic.png",
    ),
}
SCRIPT_NAMES = {"window": "window ", "airplane": "plane"}  # of prepare_ade20k_pan_seg.py


def make_panoptic_dataset(folder, data):
    """Write an image of one thing and one stuff region; return its dataset, the evaluator and a perfect prediction."""
    from mmdet.registry import DATASETS
    from mmengine.evaluator import Evaluator
    from mmengine.registry import init_default_scope

    from natzoo.openmmlab.data import set_data_root

    cfg = load_config(ROOT / "configs" / "segmentation" / f"mask2former_dinat_large_{data}_panoptic.py")
    set_data_root(cfg, folder)
    init_default_scope("mmdet")
    described = DATASETS.get(cfg.val_dataloader.dataset.type).METAINFO
    backwards = described["classes"][::-1]  # unlike any file that mmdet expects
    things = described["thing_classes"]
    categories = [
        {"id": i, "name": SCRIPT_NAMES.get(name, name), "isthing": int(name in things)}
        for i, name in enumerate(backwards, 7)
    ]
    key, file_name, image_name, map_name = NAMES[data]
    prefix = cfg.val_dataloader.dataset.data_prefix
    image, seg = Path(folder, prefix.img, image_name), Path(folder, prefix.seg)
    image.parent.mkdir(parents=True)
    seg.mkdir(parents=True)
    Image.new("RGB", (64, 32)).save(image)
    numbers = np.full((32, 64), 500)
    numbers[:, 20:] = 90000
    Image.fromarray(id2rgb(numbers)).save(seg / map_name)
    thing, stuff = things[1], described["stuff_classes"][2]
    segments = [
        {"id": number, "category_id": 7 + backwards.index(name), "iscrowd": 0, "area": area, "bbox": [x, 0, 30, 32]}
        for number, name, area, x in ((500, thing, 32 * 20, 0), (90000, stuff, 32 * 44, 20))
    ]
    annotations = [{"image_id": key, "file_name": map_name, "segments_info": segments}]
    images = [{"id": key, "file_name": file_name, "height": 32, "width": 64}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = Path(folder, cfg.val_dataloader.dataset.ann_file)
    path.write_text(json.dumps(content))
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    evaluator = Evaluator(cfg.val_evaluator)
    evaluator.dataset_meta = dataset.metainfo
    perfect = np.full((32, 64), described["classes"].index(stuff))
    perfect[:, :20] = 1000 + described["classes"].index(thing)
    return dataset, evaluator, perfect


@pytest.mark.parametrize("data", NAMES)
def test_classes_are_matched_by_name(tmp_path, data):
    dataset, evaluator, perfect = make_panoptic_dataset(tmp_path, data)
    assert len(dataset) == 1
    assert len(dataset.cat_ids) == len(dataset.metainfo["classes"])
    sample = dataset[0]["data_samples"]
    (thing,), (stuff,) = sample.gt_instances.labels.tolist(), set(sample.gt_sem_seg.sem_seg.unique().tolist()) - {1}
    classes = dataset.metainfo["classes"]
    assert (classes[thing], classes[stuff]) == (classes[1], dataset.metainfo["stuff_classes"][2])
    sample.pred_panoptic_seg = PixelData(sem_seg=torch.from_numpy(perfect)[None])
    evaluator.process([sample])
    assert evaluator.evaluate(1)["coco_panoptic/PQ"] == 100


# ----- broken files -----


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content["annotations"][0].pop("segments_info"), "segments_info"),
        (lambda content: content["annotations"][0].pop("file_name"), "file_name"),
        (lambda content: content["annotations"][0].update(image_id=None), "image_id"),
        (lambda content: content["annotations"][0]["segments_info"].append(None), "segments_info"),
        (lambda content: content["annotations"][0]["segments_info"][0].update(id=0), "id 0"),
        (lambda content: content["annotations"][0]["segments_info"][0].update(id=2**24), "id 16777216"),
        (lambda content: content["annotations"][0]["segments_info"][0].pop("category_id"), "category_id"),
        (lambda content: content["annotations"][0]["segments_info"][0].update(bbox=[1]), "bbox"),
        (lambda content: content["categories"][0].pop("isthing"), "isthing"),
    ],
)
def test_broken_annotations_of_panoptic_maps(tmp_path, change, named):
    path = write_panoptic(tmp_path, "maps", {7: (np.ones((10, 12), int), {1: 4})})
    content = read_coco(path, panoptic=True)
    content["annotations"][0]["segments_info"][0].pop("area")
    content["annotations"][0]["segments_info"][0].pop("iscrowd")
    path.write_text(json.dumps(content))
    (segment,) = read_coco(path, panoptic=True)["annotations"][0]["segments_info"]
    assert (segment["iscrowd"], segment["area"]) == (0, 120)
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"maps\.json.*{named}"):
        read_coco(path, panoptic=True)


def test_panoptic_and_instance_files_are_told_apart(tmp_path, shapes):
    path = write_panoptic(tmp_path, "maps", {7: (np.ones((10, 12), int), {1: 4})})
    with pytest.raises(ValueError, match=r"maps\.json"):
        read_coco(path)
    with pytest.raises(ValueError, match=r"instances_training\.json.*isthing"):
        read_coco(shapes / "instances_training.json", panoptic=True)


# ----- random damage -----


@pytest.fixture
def few(tmp_path):
    """Two small images with panoptic maps."""
    maps = {}
    for key in (1, 2):
        numbers = np.full((24, 32), 7)
        numbers[4:20, 4:14], numbers[2:12, 18:30] = 300, 70_000
        maps[key] = (numbers, {7: 4, 300: 1, 70_000: 3})
    path = write_panoptic(tmp_path, "panoptic", maps)
    (tmp_path / "images").mkdir()
    for key in maps:
        Image.new("RGB", (32, 24)).save(tmp_path / "images" / f"{key:04d}.png")
    return path


def use_panoptic(path):
    """Do with panoptic annotations what a run does, with perfect predictions; return the metrics."""
    from mmdet.evaluation import CocoPanopticMetric

    install()
    cfg = {
        "type": "CocoPanopticDataset",
        "ann_file": str(path),
        "data_prefix": {"img": str(path.parent / "images"), "seg": str(path.with_suffix(""))},
        "metainfo": {"classes": CLASSES, "thing_classes": CLASSES[:3], "stuff_classes": CLASSES[3:]},
        "test_mode": True,
        "pipeline": [
            {"type": "LoadImageFromFile"},
            {"type": "LoadPanopticAnnotations"},
            {
                "type": "PackDetInputs",
                "meta_keys": ("img_id", "img_path", "ori_shape", "seg_map_path", "segments_info"),
            },
        ],
    }
    metric = CocoPanopticMetric(ann_file=str(path), seg_prefix=str(path.with_suffix("")))
    dataset = build_dataset(cfg, "mmdet", [metric])
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        sample = dataset[index]["data_samples"]
        found = torch.full_like(sample.gt_sem_seg.sem_seg[0], 3)
        for number, (label, mask) in enumerate(zip(sample.gt_instances.labels, sample.gt_instances.masks, strict=True)):
            found[torch.from_numpy(mask == 1)] = int(label) + 1000 * (number + 1)
        sample.pred_panoptic_seg = PixelData(sem_seg=found[None])
        metric.process({}, [sample.to_dict()])
    return metric.evaluate(len(dataset))


def test_valid_panoptic_data(few):
    assert use_panoptic(few)["coco_panoptic/PQ"] == 100


@pytest.mark.slow
def test_damaged_panoptic_annotations(few):
    valid = few.read_bytes()

    def read(content):
        few.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        use_panoptic(few)

    outcomes = check_reader(read, damaged_bytes(valid, 1000), names=few.parent.name)
    outcomes += check_reader(read, damaged_values(json.loads(valid), 1000), names=few.parent.name)
    assert outcomes["succeeded"] > 50 and outcomes["refused"] > 500, outcomes


@pytest.mark.slow
def test_damaged_panoptic_maps(few):
    path = few.with_suffix("") / "0001.png"
    valid = path.read_bytes()

    def read(content):
        path.write_bytes(content)
        use_panoptic(few)

    outcomes = check_reader(read, damaged_bytes(valid, 2000), names=few.parent.name)
    assert outcomes["refused"] > 500, outcomes
