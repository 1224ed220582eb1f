"""Broken annotations, label maps and images are named before the first iteration; missing fields are filled in."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from broken_data import (
    BROKEN_COCO,
    BROKEN_LABELS,
    TRAINING,
    VALIDATION,
    coco,
    each,
    edit_json,
    everywhere,
    one,
    relabel,
)
from mmengine.dataset import pseudo_collate
from mutations import check_reader, damaged_bytes, damaged_values
from PIL import Image, ImageDraw
from pycocotools.mask import encode
from runs import ROOT, build_dataset, losses, tiny_mask_rcnn, tiny_upernet, train_detector, train_segmenter

from natzoo import command_line
from natzoo.openmmlab.coco import install, read_coco
from natzoo.openmmlab.data import CheckDataHook

CLASSES = ("circle", "square", "triangle")


def use_detection(folder, splits=("training", "validation"), classes=CLASSES, with_mask=True):
    """Do with annotations what a run does, with perfect predictions; return the metrics."""
    from mmdet.evaluation import CocoMetric

    install()
    scores = {}
    load = {"type": "LoadAnnotations", "with_bbox": True, "with_mask": with_mask}
    pack = {"type": "PackDetInputs", "meta_keys": ("img_id", "img_path", "ori_shape")}
    for split in splits:
        file = f"{folder}/instances_{split}.json"
        cfg = {"type": "CocoDataset", "ann_file": file, "data_prefix": {"img": f"{folder}/images/{split}"}}
        cfg |= {"metainfo": {"classes": classes}, "test_mode": split == "validation"}
        metric = CocoMetric(ann_file=file, metric=["bbox", "segm"] if with_mask else "bbox")
        dataset = build_dataset({**cfg, "pipeline": [{"type": "LoadImageFromFile"}, load, pack]}, "mmdet", [metric])
        metric.dataset_meta = dataset.metainfo
        for index in range(len(dataset)):
            sample = dataset[index]["data_samples"].to_dict()
            found = sample["gt_instances"]
            predicted = {"bboxes": found["bboxes"].tensor, "labels": found["labels"]}
            if with_mask:
                predicted["masks"] = torch.from_numpy(found["masks"].masks)
            predicted["scores"] = torch.ones(len(predicted["labels"]))
            metric.process({}, [{**sample, "pred_instances": predicted}])
        scores = metric.evaluate(len(dataset))
    return scores


def use_segmentation(folder, splits=("training", "validation"), reduce_zero_label=True, classes=("ground", *CLASSES)):
    """Do with label maps what a run does."""
    for split in splits:
        cfg = {
            "type": "BaseSegDataset",
            "data_prefix": {
                "img_path": f"{folder}/images/{split}",
                "seg_map_path": f"{folder}/annotations/{split}",
            },
            "img_suffix": ".png",
            "metainfo": {"classes": classes},
            "reduce_zero_label": reduce_zero_label,
            "pipeline": [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}, {"type": "PackSegInputs"}],
        }
        dataset = build_dataset(cfg, "mmseg", is_training=split == "training")
        batch = pseudo_collate([dataset[index] for index in range(len(dataset))])
        runner = SimpleNamespace(val_dataloader=SimpleNamespace(dataset=dataset), model=torch.nn.Identity())
        CheckDataHook().before_val_iter(runner, 0, batch)


# ----- broken files -----


def test_valid_data(shapes):
    assert use_detection(shapes)["coco/segm_mAP"] == 1
    use_segmentation(shapes)


@pytest.mark.parametrize("name", BROKEN_COCO)
def test_broken_annotations(shapes, name):
    damage, file = BROKEN_COCO[name]
    damage(shapes)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        use_detection(shapes)
    assert file in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BROKEN_LABELS)
def test_broken_label_maps(shapes, name):
    damage, file = BROKEN_LABELS[name]
    damage(shapes)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        use_segmentation(shapes)
    assert file in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "file"),
    [BROKEN_COCO["boxes without masks"], BROKEN_COCO["no segmentation for validation"], BROKEN_LABELS["RGB"]],
)
def test_command_reports_one_line_before_training(shapes, tmp_path, capsys, damage, file):
    damage(shapes)
    config, train = tiny_mask_rcnn(tmp_path), train_detector
    if file.endswith(".png"):
        config, train = tiny_upernet(tmp_path), train_segmenter
    with pytest.raises(SystemExit, match="2"):
        command_line.run(lambda: train(config, "--data", shapes, "--work-dir", tmp_path / "run"))
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and file in line
    assert not losses(tmp_path / "run")


# ----- what may be left out -----


def without(*fields):
    return each(**dict.fromkeys(fields, ...))


def test_area_iscrowd_and_id_may_be_left_out(shapes):
    complete = read_coco(shapes / TRAINING)["annotations"]
    without("area", "iscrowd", "id")(shapes)
    found = read_coco(shapes / TRAINING)["annotations"]
    assert [annotation["iscrowd"] for annotation in found] == [0] * len(complete)
    assert [annotation["id"] for annotation in found] == [*range(1, len(complete) + 1)]
    areas = [annotation["area"] for annotation in complete]
    assert [annotation["area"] for annotation in found] == pytest.approx(areas, rel=0.1)
    assert use_detection(shapes)["coco/segm_mAP"] == 1


def test_area_of_a_box_and_of_run_lengths(shapes):
    one(area=..., segmentation=..., bbox=[3, 4, 10, 20])(shapes)
    assert read_coco(shapes / TRAINING)["annotations"][2]["area"] == 200
    drawn = np.zeros((128, 128), np.uint8, order="F")
    drawn[:70, 60] = 1
    for counts in ([128 * 60, 70, 128 * 68 - 70], encode(drawn)["counts"].decode()):
        edit_json(shapes / TRAINING, lambda content: content["annotations"][2].pop("area", None) and None)
        one(segmentation={"size": [128, 128], "counts": counts})(shapes)
        assert read_coco(shapes / TRAINING)["annotations"][2]["area"] == 70


def test_id_0_counts(shapes):
    """pycocotools does not count matches of an annotation with the id 0."""

    def renumber(content):
        for number, annotation in enumerate(content["annotations"]):
            annotation["id"] = number

    coco(renumber, VALIDATION)(shapes)
    assert use_detection(shapes, ["validation"])["coco/bbox_mAP"] == 1


def test_boxes_without_masks_train_a_detector_without_masks(shapes):
    for name in (TRAINING, VALIDATION):
        edit_json(shapes / name, lambda content: [one.pop("segmentation") for one in content["annotations"]] and None)
    assert use_detection(shapes, with_mask=False)["coco/bbox_mAP"] == 1


def test_unknown_images_and_degenerate_polygons_are_dropped(shapes):
    count = len(read_coco(shapes / TRAINING)["annotations"])
    one(image_id=777)(shapes)
    content = read_coco(shapes / TRAINING)
    assert len(content["annotations"]) == count - 1
    triangle = [5, 5, 50, 5, 50, 50]
    one(segmentation=[triangle, [7, 7, 9, 9], []])(shapes)
    edit_json(shapes / TRAINING, lambda content: content["annotations"][2].update(image_id=1))
    assert read_coco(shapes / TRAINING)["annotations"][2]["segmentation"] == [triangle]


def test_classes_in_another_order_than_the_categories(shapes):
    """Labels follow the config, not the file, so names in results are right."""
    install()
    from mmdet.datasets import CocoDataset

    file, order = str(shapes / TRAINING), ("triangle", "circle", "square")
    dataset = CocoDataset(ann_file=file, data_prefix={"img": ""}, metainfo={"classes": order})
    names = {category["id"]: category["name"] for category in json.loads((shapes / TRAINING).read_text())["categories"]}
    assert [names[key] for key in dataset.cat_ids] == list(order)
    assert use_detection(shapes, classes=order)["coco/bbox_mAP"] == 1


def test_metric_without_annotation_file(shapes):
    """mmdet writes the annotations of the images to a file, which it reads."""
    from mmdet.evaluation import CocoMetric

    install()
    metric = CocoMetric(metric=["bbox", "segm"])
    metric.dataset_meta = {"classes": CLASSES}
    for image in (read := read_coco(shapes / VALIDATION))["images"]:
        instances, boxes, labels, masks = [], [], [], []
        for drawn in read["annotations"]:
            if drawn["image_id"] == image["id"]:
                (x, y, width, height), label = drawn["bbox"], drawn["category_id"] - 1
                boxes.append([x, y, x + width, y + height])
                labels.append(label)
                canvas = Image.new("1", (image["width"], image["height"]))
                ImageDraw.Draw(canvas).polygon(drawn["segmentation"][0], fill=1)
                masks.append(np.array(canvas))
                encoded = encode(np.asfortranarray(masks[-1], np.uint8))
                instances.append({"bbox": boxes[-1], "bbox_label": label, "ignore_flag": 0, "mask": encoded})
        found = {"bboxes": torch.tensor(boxes), "labels": torch.tensor(labels), "scores": torch.ones(len(labels))}
        found["masks"] = torch.from_numpy(np.stack(masks))
        size = (image["height"], image["width"])
        metric.process(
            {}, [{"img_id": image["id"], "ori_shape": size, "instances": instances, "pred_instances": found}]
        )
    assert metric.evaluate(3)["coco/segm_mAP"] == 1


# ----- settings of segmentation -----


def test_labels_from_0(shapes, tmp_path):
    """The obvious change of the config on the page for labels that begin at 0."""
    everywhere(lambda values: values - 1)(shapes)
    base = ROOT / "configs" / "segmentation" / "upernet_nat_mini_160k.py"
    metainfo = {"classes": ["ground", *CLASSES], "palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]]}
    mine = {"type": "BaseSegDataset", "data_root": str(shapes), "metainfo": metainfo, "img_suffix": ".png"}
    more = f"""
train_dataloader = dict(dataset=dict(**{mine}, reduce_zero_label=False))
val_dataloader = dict(dataset=dict(**{mine}, reduce_zero_label=False))
test_dataloader = val_dataloader
"""
    from mmengine.config import Config

    path = tmp_path / "mine.py"
    path.write_text(f'_base_ = "{base}"\n{more}')
    cfg = Config.fromfile(path)
    for name in ("train", "val"):
        found = build_dataset(cfg[f"{name}_dataloader"].dataset, "mmseg", is_training=name == "train")[0]
        assert set(found["data_samples"].gt_sem_seg.data.unique().tolist()) <= {0, 1, 2, 3, 255}


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("train_dataloader.dataset.reduce_zero_label=False", "reduce_zero_label"),
        ("val_dataloader.dataset.reduce_zero_label=False", "reduce_zero_label"),
        ("train_dataloader.dataset.pipeline.1.reduce_zero_label=False", "reduce_zero_label"),
        ("model.decode_head.ignore_index=0", "ignore_index"),
        ("model.auxiliary_head.ignore_index=254", "auxiliary_head"),
        ("model.data_preprocessor.seg_pad_val=0", "seg_pad_val"),
        ("val_evaluator.ignore_index=0", "IoUMetric"),
        ("train_dataloader.dataset.ignore_index=0", "ignore_index"),
        ("model.auxiliary_head.num_classes=5", "auxiliary_head has num_classes=5"),
        ("train_dataloader.dataset.metainfo.palette=[[0,0,0]]", "palette"),
        ("train_dataloader.dataset.metainfo.palette=[[0,0],[1,1],[2,2],[3,3]]", "palette"),
        ("train_dataloader.dataset.metainfo.palette=[[0,0,0],[1,1,1],[2,2,2],[3,3,999]]", "palette"),
    ],
)
def test_contradicting_settings(shapes, tmp_path, setting, named):
    with pytest.raises(ValueError, match=named):
        train_segmenter(
            tiny_upernet(tmp_path), "--data", shapes, "--work-dir", tmp_path / "run", "--cfg-options", setting
        )
    assert not losses(tmp_path / "run")


def test_masks_of_two_classes(shapes):
    everywhere(lambda values: (values > 1).astype(np.uint8))(shapes)
    use_segmentation(shapes, reduce_zero_label=False, classes=("background", "object"))


def test_palette_of_another_dataset_is_ignored(shapes):
    """CocoDataset has 80 colors; with more classes, drawing would fail."""
    install()
    classes = tuple(f"class {number}" for number in range(90))

    def rename(content):
        content["categories"] = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]

    coco(rename)(shapes)
    file = str(shapes / TRAINING)
    cfg = {"type": "CocoDataset", "ann_file": file, "data_prefix": {"img": str(shapes / "images" / "training")}}
    dataset = build_dataset({**cfg, "metainfo": {"classes": classes}, "pipeline": []}, "mmdet")
    assert "palette" not in dataset.metainfo


# ----- images -----


@pytest.mark.parametrize("size", [(1, 65_535), (65_535, 1), (2, 5000)])
def test_elongated_image(shapes, size):
    """Named before it is decoded; resizing its short side would fill the memory."""
    Image.new("RGB", size).save(shapes / "images" / "training" / "0001.png")
    relabel(lambda values: np.ones(size[::-1], np.uint8), only="0001")(shapes)
    with pytest.raises(ValueError, match=r"0001\.png.*256 times"):
        use_segmentation(shapes)


def test_image_beyond_the_checked_ones(shapes, monkeypatch):
    """In a large dataset only a part is opened before the first iteration; loading checks the others."""
    monkeypatch.setattr("natzoo.openmmlab.annotations._MAX_OPENED", 1)
    for damage in (BROKEN_LABELS["another size"], BROKEN_LABELS["RGB"], BROKEN_LABELS["text file"]):
        shutil.copytree(shapes, shapes.with_name("copy"))
        damage[0](shapes.with_name("copy"))
        with pytest.raises(ValueError, match=r"0001\.png"):
            use_segmentation(shapes.with_name("copy"))
        shutil.rmtree(shapes.with_name("copy"))


def test_error_in_a_loading_process_is_one_line(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr("natzoo.openmmlab.annotations._MAX_OPENED", 1)
    (shapes / "images" / "training" / "0001.png").write_bytes(b"1 2 3")
    config = tiny_upernet(tmp_path, "train_dataloader.update(num_workers=1)\n")
    with pytest.raises(ValueError, match=r"0001\.png") as caught:
        train_segmenter(config, "--data", shapes, "--work-dir", tmp_path / "run")
    assert "\n" not in str(caught.value)


# ----- damaged files -----


@pytest.fixture
def few(shapes):
    """Two images, so that a damaged file is quickly read."""

    def keep_two(content):
        content["images"] = content["images"][:2]
        keys = [image["id"] for image in content["images"]]
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in keys][:5]
        content["annotations"][1]["segmentation"] = {"size": [128, 128], "counts": [128 * 60, 70, 128 * 68 - 70]}

    for path in (TRAINING, VALIDATION):
        edit_json(shapes / path, keep_two)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            for path in sorted((shapes / kind / split).iterdir())[2:]:
                path.unlink()
    return shapes


@pytest.mark.slow
def test_damaged_annotation_files(few):
    path = few / VALIDATION
    valid = path.read_bytes()

    def read(content):
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        use_detection(few, ["validation"])

    outcomes = check_reader(read, damaged_bytes(valid, 1000), names=few.name)
    outcomes += check_reader(read, damaged_values(json.loads(valid), 1000), names=few.name)
    assert outcomes["succeeded"] > 50 and outcomes["refused"] > 500, outcomes


@pytest.mark.slow
def test_damaged_label_maps(few):
    path = few / "annotations" / "training" / "0001.png"
    valid = path.read_bytes()

    def read(content):
        path.write_bytes(content)
        use_segmentation(few, ["training"])

    outcomes = check_reader(read, damaged_bytes(valid, 2000), names=few.name)
    assert outcomes["refused"] > 500, outcomes
