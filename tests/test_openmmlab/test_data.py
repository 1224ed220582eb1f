"""Bad input to training and evaluation: an error in one sentence that names it, or the right result."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from PIL import Image
from runs import ROOT, load_config, run, tiny_mask_rcnn, tiny_upernet

from detection import test as detection_test
from detection import train as detection_train
from natzoo.checkpoints import write_checkpoint
from segmentation import test as segmentation_test
from segmentation import train as segmentation_train


def detect(config, data, tmp_path, *more):
    return run(detection_train.main, config, "--data", data, "--work-dir", tmp_path / "run", *more)


def segment(config, data, tmp_path, *more):
    return run(segmentation_train.main, config, "--data", data, "--work-dir", tmp_path / "run", *more)


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# ----- configs -----


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("configs/nothing.py", FileNotFoundError, "there is no config configs/nothing.py"),
        ("configs/quickstart/nat.yml", ValueError, "nat.yml is no config of OpenMMLab, which end in .py"),
        ("configs/detection/_base_/coco_3x.py", ValueError, "has no model: it is a part for other configs"),
        (
            "configs/quickstart/upernet.py",
            ValueError,
            "a config of mmseg with the model EncoderDecoder, which is not for detection/: use .* segmentation/",
        ),
    ],
)
def test_wrong_config(config, error, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(error, match=message):
        run(detection_train.main, config)


def test_mask2former_belongs_to_segmentation(tmp_path):
    config = ROOT / "configs" / "segmentation" / "mask2former_dinat_large_coco_instance.py"
    with pytest.raises(FileNotFoundError, match="which train_dataloader of the config reads: it is part of COCO 2017"):
        run(segmentation_train.main, config, "--data", tmp_path / "coco")
    with pytest.raises(ValueError, match="the model MaskRCNN, which is not for segmentation/"):
        run(segmentation_train.main, tiny_mask_rcnn(tmp_path))


def test_broken_config(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("model = dict(")
    with pytest.raises(ValueError, match=r"broken\.py cannot be read as a config"):
        run(detection_train.main, path)


@pytest.mark.parametrize("change", ["foo", "model.x=[1,(2]"])
def test_change_that_is_none(change, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(detection_train.main, "x.py", "--cfg-options", "a=1", change)
    assert f"argument --cfg-options: {change!r} is no KEY=VALUE" in capsys.readouterr().err


def test_change_that_nothing_takes(drawn, tmp_path):
    with pytest.raises(ValueError, match=r"has a key that nothing takes: .*'max_iter'"):
        segment(tiny_upernet(tmp_path), drawn, tmp_path, "--cfg-options", "train_cfg.max_iter=2")


def test_metric_that_the_config_has_not(drawn, tmp_path):
    with pytest.raises(ValueError, match="has no metric that measures mIoU"):
        run(detection_test.main, tiny_mask_rcnn(tmp_path), "x.pth", "--data", drawn, "--eval", "mIoU")
    with pytest.raises(ValueError, match="has no tta_pipeline and tta_model"):
        run(detection_test.main, tiny_mask_rcnn(tmp_path), "x.pth", "--data", drawn, "--tta")


def test_pictures_by_several_processes(drawn, tmp_path, monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=r"--show-dir draws in one process alone, but there are 2: use test\.py"):
        run(
            detection_test.main, tiny_mask_rcnn(tmp_path), "x.pth", "--data", drawn, "--show-dir", tmp_path / "pictures"
        )


def test_errors_end_a_script_with_status_2(tmp_path):
    script = ROOT / "detection" / "train.py"
    done = subprocess.run([sys.executable, str(script), "nowhere.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: there is no config nowhere.py")
    assert "Traceback" not in done.stderr


# ----- checkpoints -----


def test_missing_checkpoint(drawn, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint nowhere/x\.pth"):
        run(segmentation_test.main, tiny_upernet(tmp_path), "nowhere/x.pth", "--data", drawn)


def test_resume_and_load_from(drawn, tmp_path):
    with pytest.raises(ValueError, match="--resume goes on with a run, --load-from starts one"):
        segment(tiny_upernet(tmp_path), drawn, tmp_path, "--resume", "a.pth", "--load-from", "b.pth")


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, {"state_dict": {}, "meta": {"iter": 1}, "message_hub": {}}])
def test_weights_alone_are_no_run(drawn, tmp_path, content):
    """Bare ones, and the best checkpoint of a run, which is without the optimizer."""
    write_checkpoint(tmp_path / "weights.pth", content)
    with pytest.raises(ValueError, match=r"weights\.pth holds no run to go on with: use --load-from"):
        segment(tiny_upernet(tmp_path), drawn, tmp_path, "--resume", tmp_path / "weights.pth")


def test_nothing_to_resume(drawn, tmp_path, capsys):
    segment(tiny_upernet(tmp_path, "train_cfg = dict(max_iters=1)\n"), drawn, tmp_path, "--resume")
    assert "run holds no checkpoint to go on from: this run begins" in capsys.readouterr().err


def test_a_run_is_not_overwritten(drawn, tmp_path):
    """Neither by one that starts anew, nor by one that goes on from elsewhere."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "iter_2.pth").write_bytes(b"")
    for start in ([], ["--load-from", "b.pth"], ["--resume", tmp_path / "other" / "iter_4.pth"]):
        with pytest.raises(
            ValueError, match=r"iter_2\.pth is there already: go on with it by --resume, or .*--work-dir"
        ):
            segment(tiny_upernet(tmp_path), drawn, tmp_path, *start)


# ----- data -----


@pytest.mark.parametrize(
    ("config", "folder", "advice"),
    [
        ("detection/mask_rcnn_nat_mini_3x.py", "data/coco", "it is part of COCO 2017"),
        ("segmentation/upernet_nat_mini_160k.py", "data/ade/ADEChallengeData2016", "it is part of ADE20K"),
        ("segmentation/mask2former_dinat_large_cityscapes_semantic.py", "data/cityscapes", "it is part of Cityscapes"),
        ("quickstart/mask_rcnn.py", "data/shapes", "make_data.py shapes data/shapes"),
    ],
)
def test_data_that_is_not_there(config, folder, advice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = detection_train.main if "rcnn" in config else segmentation_train.main
    with pytest.raises(FileNotFoundError, match=rf"there is no {folder}.*{advice}.*name another folder with --data"):
        run(main, ROOT / "configs" / config)


@pytest.mark.parametrize("folder", ["coco_ade", "shapes/mine"])
def test_data_of_names_that_begin_or_lie_like_known_ones(folder, tmp_path):
    """No advice is better than a wrong one."""
    with pytest.raises(FileNotFoundError, match=rf"there is no .*{folder}, which .* of the config reads: put or link"):
        run(segmentation_train.main, tiny_upernet(tmp_path), "--data", tmp_path / folder)


def test_labels_of_cityscapes_that_are_not_written(tmp_path):
    from mmseg.registry import DATASETS

    from natzoo.openmmlab.data import CheckDataHook, set_data_root

    cfg = load_config(ROOT / "configs" / "segmentation" / "mask2former_dinat_large_cityscapes_semantic.py")
    set_data_root(cfg, tmp_path)
    for kind in ("leftImg8bit", "gtFine"):
        (tmp_path / kind / "val" / "ulm").mkdir(parents=True)
    Image.new("RGB", (64, 32)).save(tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_000000_000019_leftImg8bit.png")
    init_default_scope("mmseg")
    loader = SimpleNamespace(dataset=DATASETS.build(cfg.val_dataloader.dataset))
    message = r"000019_gtFine_labelTrainIds\.png, but .*: it is written by .* createTrainIdLabelImgs\.py from"
    with pytest.raises(FileNotFoundError, match=message):
        CheckDataHook().before_val(SimpleNamespace(val_dataloader=loader, model=torch.nn.Identity()))


def test_maps_that_are_not_written(tmp_path):
    (tmp_path / "cityscapes").mkdir()
    config = ROOT / "configs" / "segmentation" / "mask2former_dinat_large_cityscapes_panoptic.py"
    message = (
        r"there is no .*cityscapes_panoptic_train\.json, .*: it is written by cityscapesscripts' createPanopticImgs"
    )
    with pytest.raises(FileNotFoundError, match=message):
        run(segmentation_train.main, config, "--data", tmp_path / "cityscapes")


def test_missing_annotations(shapes, tmp_path):
    (shapes / "instances_training.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*instances_training\.json, which train_dataloader"):
        detect(tiny_mask_rcnn(tmp_path), shapes, tmp_path)


@pytest.mark.parametrize("split", ["training", "validation"])
def test_annotated_picture_that_is_absent(shapes, tmp_path, split):
    """Also in the validation set, which is read only after hours."""
    picture = sorted((shapes / "images" / split).iterdir())[2]
    picture.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"instances_{split}\.json names .*{picture.name}, but there is no such file"
    ):
        detect(tiny_mask_rcnn(tmp_path), shapes, tmp_path)
    assert not list((tmp_path / "run").glob("*.pth"))


def test_label_picture_that_is_absent(shapes, tmp_path):
    (shapes / "annotations" / "training" / "0003.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"names .*annotations/training/0003\.png, but there is no such file"):
        segment(tiny_upernet(tmp_path), shapes, tmp_path)


def test_annotations_without_a_class_of_the_config(shapes, tmp_path):
    for split in ("training", "validation"):
        change(shapes / f"instances_{split}.json", lambda coco: [c.update(name="x") for c in coco["categories"]])
    with pytest.raises(
        ValueError, match=r"instances_training\.json has 0 of the config's 3 classes \(circle, square, triangle\)"
    ):
        detect(tiny_mask_rcnn(tmp_path), shapes, tmp_path)


@pytest.mark.parametrize("split", ["training", "validation"])
def test_label_beyond_the_classes(shapes, tmp_path, split):
    path = shapes / "annotations" / split / "0001.png"
    labels = np.array(Image.open(path))
    labels[5, 5] = 77
    Image.fromarray(labels).save(path)
    more = "train_cfg = dict(max_iters=2, val_interval=1)\n"
    with pytest.raises(ValueError, match=r"0001\.png has the label 76, but there are only 4 classes, 0 to 3"):
        segment(tiny_upernet(tmp_path, more), shapes, tmp_path)


@pytest.mark.parametrize("head", ["roi_head.bbox_head", "roi_head.mask_head"])
def test_detection_head_for_other_classes(shapes, tmp_path, head):
    with pytest.raises(
        ValueError,
        match=rf"model\.{head} is for 80 classes, but .*instances_training\.json is read with 3: set num_classes=3",
    ):
        detect(tiny_mask_rcnn(tmp_path), shapes, tmp_path, "--cfg-options", f"model.{head}.num_classes=80")


def test_segmentation_head_for_other_classes(shapes, tmp_path):
    with pytest.raises(ValueError, match=r"model\.decode_head is for 3 classes, but .* is read with 4"):
        segment(tiny_upernet(tmp_path), shapes, tmp_path, "--cfg-options", "model.decode_head.num_classes=3")


def test_ignored_pixels_are_no_error(shapes, tmp_path):
    for path in (shapes / "annotations" / "training").glob("*.png"):
        labels = np.array(Image.open(path))
        labels[:20] = 0  # ignore
        Image.fromarray(labels).save(path)
    segment(tiny_upernet(tmp_path, "train_cfg = dict(max_iters=1)\n"), shapes, tmp_path)


def test_odd_annotations(shapes, tmp_path):
    """Pictures without objects, crowds, boxes without area, an annotation of no picture: all harmless."""

    def edit(coco):
        first, second, third, *_ = coco["images"]
        coco["annotations"] = [one for one in coco["annotations"] if one["image_id"] != first["id"]]
        crowd = next(one for one in coco["annotations"] if one["image_id"] == second["id"])
        crowd.update(iscrowd=1, segmentation={"size": [128, 128], "counts": [128 * 64, 128 * 10, 128 * 54]})
        flat = {**crowd, "id": 9001, "image_id": third["id"], "iscrowd": 0, "area": 0, "bbox": [5, 5, 0, 9]}
        flat["segmentation"] = [[5, 5, 5, 14, 5, 14]]
        coco["annotations"] += [flat, {**crowd, "id": 9002, "image_id": 777}]

    for split in ("training", "validation"):
        change(shapes / f"instances_{split}.json", edit)
    more = """
train_cfg = dict(max_iters=2, val_interval=2)
train_dataloader.update(batch_size=6, dataset=dict(filter_cfg=dict(filter_empty_gt=False)))
"""
    detect(tiny_mask_rcnn(tmp_path, more), shapes, tmp_path)
    rows = [json.loads(line) for log in (tmp_path / "run").glob("*/vis_data/scalars.json") for line in log.open()]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert any("coco/segm_mAP" in row for row in rows)
