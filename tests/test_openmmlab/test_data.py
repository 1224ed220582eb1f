"""Invalid configs, checkpoints and data raise an error that names the cause, before the first iteration."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from PIL import Image
from runs import (
    ROOT,
    evaluate_detector,
    evaluate_segmenter,
    load_config,
    tiny_mask_rcnn,
    tiny_upernet,
    train_detector,
    train_segmenter,
)

from natzoo.checkpoints import write_checkpoint


def detect(config, data, tmp_path, *options):
    train_detector(config, "--data", data, "--work-dir", tmp_path / "run", *options)


def segment(config, data, tmp_path, *options):
    train_segmenter(config, "--data", data, "--work-dir", tmp_path / "run", *options)


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# ----- configs -----


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ("configs/nothing.py", FileNotFoundError),
        ("configs/quickstart/nat.yml", ValueError),
        ("configs/detection/_base_/coco_3x.py", ValueError),
        ("configs/quickstart/upernet.py", ValueError),  # for segmentation
    ],
)
def test_unusable_config(config, error, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(error, match=config):
        train_detector(config)


def test_mask2former_belongs_to_segmentation(tmp_path):
    config = ROOT / "configs" / "segmentation" / "mask2former_dinat_large_coco_instance.py"
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "coco")):  # accepted, but has no data
        train_segmenter(config, "--data", tmp_path / "coco")
    with pytest.raises(ValueError, match=r"mask_rcnn\.py"):
        train_segmenter(tiny_mask_rcnn(tmp_path))


def test_config_with_syntax_error(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("model = dict(")
    with pytest.raises(ValueError, match=r"broken\.py"):
        train_detector(path)


@pytest.mark.parametrize("option", ["foo", "model.x=[1,(2]"])
def test_malformed_config_option(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_detector("x.py", "--cfg-options", "a=1", option)
    assert f"argument --cfg-options: {option!r}" in capsys.readouterr().err


def test_unknown_config_key(drawn, tmp_path):
    with pytest.raises(ValueError, match="'max_iter'"):
        segment(tiny_upernet(tmp_path), drawn, tmp_path, "--cfg-options", "train_cfg.max_iter=2")


def test_evaluation_option_that_config_does_not_support(drawn, tmp_path):
    with pytest.raises(ValueError, match="--eval"):
        evaluate_detector(tiny_mask_rcnn(tmp_path), "x.pth", "--data", drawn, "--eval", "mIoU")
    with pytest.raises(ValueError, match="--tta"):
        evaluate_detector(tiny_mask_rcnn(tmp_path), "x.pth", "--data", drawn, "--tta")


def test_show_dir_requires_one_process(drawn, tmp_path, monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="--show-dir"):
        evaluate_detector(tiny_mask_rcnn(tmp_path), "x.pth", "--data", drawn, "--show-dir", tmp_path / "images")


@pytest.mark.parametrize("script", ["detection/train.py", "segmentation/test.py"])
def test_script_exits_with_status_2_on_error(script):
    words = [sys.executable, str(ROOT / script), "nowhere.py", *(["x.pth"] if "test" in script else [])]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "nowhere.py" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("folder", ["detection", "segmentation"])
@pytest.mark.parametrize(
    ("script", "arguments"),
    [("dist_train.sh", ["x.py"]), ("dist_train.sh", ["8", "x.py"]), ("dist_test.sh", ["x.py", "8"])],
)
def test_launcher_prints_usage(folder, script, arguments):
    done = subprocess.run(["bash", ROOT / folder / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{folder}/{script} CONFIG" in done.stderr


# ----- checkpoints -----


def test_missing_checkpoint(drawn, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/x\.pth"):
        evaluate_segmenter(tiny_upernet(tmp_path), "nowhere/x.pth", "--data", drawn)


def test_resume_and_load_from_exclude_each_other(drawn, tmp_path):
    with pytest.raises(ValueError, match=r"--resume.*--load-from"):
        segment(tiny_upernet(tmp_path), drawn, tmp_path, "--resume", "a.pth", "--load-from", "b.pth")


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, {"state_dict": {}, "meta": {"iter": 1}, "message_hub": {}}])
def test_checkpoint_without_optimizer_cannot_be_resumed(drawn, tmp_path, content):
    """Bare weights, and the best checkpoint of a run, which mmengine saves without the optimizer."""
    write_checkpoint(tmp_path / "weights.pth", content)
    with pytest.raises(ValueError, match=r"weights\.pth"):
        segment(tiny_upernet(tmp_path), drawn, tmp_path, "--resume", tmp_path / "weights.pth")


def test_resume_without_checkpoint_starts_from_scratch(drawn, tmp_path):
    more = "train_cfg = dict(max_iters=1)\ndefault_hooks = dict(checkpoint=dict(interval=1))\n"
    segment(tiny_upernet(tmp_path, more), drawn, tmp_path, "--resume")
    assert (tmp_path / "run" / "iter_1.pth").exists()


def test_existing_run_is_not_overwritten(drawn, tmp_path):
    """Neither by a new run, nor by one resumed from another folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "iter_2.pth").write_bytes(b"")
    for start in ([], ["--load-from", "b.pth"], ["--resume", tmp_path / "other" / "iter_4.pth"]):
        with pytest.raises(ValueError, match=r"iter_2\.pth"):
            segment(tiny_upernet(tmp_path), drawn, tmp_path, *start)


# ----- data -----


@pytest.mark.parametrize(
    ("config", "folder", "source"),
    [
        ("detection/mask_rcnn_nat_mini_3x.py", "data/coco", r"cocodataset\.org"),
        ("segmentation/upernet_nat_mini_160k.py", "data/ade/ADEChallengeData2016", r"sceneparsing\.csail\.mit\.edu"),
        ("segmentation/mask2former_dinat_large_cityscapes_semantic.py", "data/cityscapes", r"cityscapes-dataset\.com"),
        ("quickstart/mask_rcnn.py", "data/shapes", r"tools/make_data\.py"),
    ],
)
def test_missing_dataset(config, folder, source, tmp_path, monkeypatch):
    """The error names the folder, and where to get the dataset."""
    monkeypatch.chdir(tmp_path)
    train = train_detector if "rcnn" in config else train_segmenter
    with pytest.raises(FileNotFoundError, match=rf"{folder}.*{source}"):
        train(ROOT / "configs" / config)


@pytest.mark.parametrize("folder", ["coco_ade", "shapes/mine"])
def test_missing_dataset_with_a_similar_name(folder, tmp_path):
    """The error suggests no source for a folder that only resembles a known dataset."""
    with pytest.raises(FileNotFoundError, match=folder) as caught:
        train_segmenter(tiny_upernet(tmp_path), "--data", tmp_path / folder)
    assert not any(source in str(caught.value) for source in ("cocodataset", "sceneparsing", "make_data"))


def test_missing_label_maps_of_cityscapes(tmp_path):
    from mmseg.registry import DATASETS

    from natzoo.openmmlab.data import CheckDataHook, set_data_root

    cfg = load_config(ROOT / "configs" / "segmentation" / "mask2former_dinat_large_cityscapes_semantic.py")
    set_data_root(cfg, tmp_path)
    for kind in ("leftImg8bit", "gtFine"):
        (tmp_path / kind / "val" / "ulm").mkdir(parents=True)
    Image.new("RGB", (64, 32)).save(tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_000000_000019_leftImg8bit.png")
    init_default_scope("mmseg")
    loader = SimpleNamespace(dataset=DATASETS.build(cfg.val_dataloader.dataset))
    with pytest.raises(FileNotFoundError, match=r"000019_gtFine_labelTrainIds\.png.*createTrainIdLabelImgs\.py"):
        CheckDataHook().before_val(SimpleNamespace(val_dataloader=loader, model=torch.nn.Identity()))


def test_missing_panoptic_maps(tmp_path):
    (tmp_path / "cityscapes").mkdir()
    config = ROOT / "configs" / "segmentation" / "mask2former_dinat_large_cityscapes_panoptic.py"
    with pytest.raises(FileNotFoundError, match=r"cityscapes_panoptic_train\.json.*createPanopticImgs"):
        train_segmenter(config, "--data", tmp_path / "cityscapes")


def test_missing_annotations(shapes, tmp_path):
    (shapes / "instances_training.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances_training\.json"):
        detect(tiny_mask_rcnn(tmp_path), shapes, tmp_path)


@pytest.mark.parametrize("split", ["training", "validation"])
def test_missing_image(shapes, tmp_path, split):
    """Also of the validation set, before training starts."""
    image = sorted((shapes / "images" / split).iterdir())[2]
    image.unlink()
    with pytest.raises(FileNotFoundError, match=image.name) as caught:
        detect(tiny_mask_rcnn(tmp_path), shapes, tmp_path)
    assert f"instances_{split}.json" in str(caught.value)
    assert not list((tmp_path / "run").glob("*.pth"))


def test_missing_label_map(shapes, tmp_path):
    (shapes / "annotations" / "training" / "0003.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations/training/0003\.png"):
        segment(tiny_upernet(tmp_path), shapes, tmp_path)


def test_annotations_without_classes_of_config(shapes, tmp_path):
    for split in ("training", "validation"):
        change(shapes / f"instances_{split}.json", lambda coco: [c.update(name="x") for c in coco["categories"]])
    with pytest.raises(ValueError, match=r"instances_training\.json"):
        detect(tiny_mask_rcnn(tmp_path), shapes, tmp_path)


@pytest.mark.parametrize("split", ["training", "validation"])
def test_label_beyond_classes(shapes, tmp_path, split):
    path = shapes / "annotations" / split / "0001.png"
    labels = np.array(Image.open(path))
    labels[5, 5] = 77
    Image.fromarray(labels).save(path)
    more = "train_cfg = dict(max_iters=2, val_interval=1)\n"
    with pytest.raises(ValueError, match=r"0001\.png.*\b76\b"):
        segment(tiny_upernet(tmp_path, more), shapes, tmp_path)


@pytest.mark.parametrize("head", ["roi_head.bbox_head", "roi_head.mask_head"])
def test_detection_head_for_other_classes(shapes, tmp_path, head):
    with pytest.raises(ValueError, match=rf"model\.{head}.*instances_training\.json"):
        detect(tiny_mask_rcnn(tmp_path), shapes, tmp_path, "--cfg-options", f"model.{head}.num_classes=80")


def test_segmentation_head_for_other_classes(shapes, tmp_path):
    with pytest.raises(ValueError, match=r"model\.decode_head"):
        segment(tiny_upernet(tmp_path), shapes, tmp_path, "--cfg-options", "model.decode_head.num_classes=3")


def test_ignored_pixels_are_accepted(shapes, tmp_path):
    for path in (shapes / "annotations" / "training").glob("*.png"):
        labels = np.array(Image.open(path))
        labels[:20] = 0  # read as the ignore label
        Image.fromarray(labels).save(path)
    segment(tiny_upernet(tmp_path, "train_cfg = dict(max_iters=1)\n"), shapes, tmp_path)


def test_unusual_annotations(shapes, tmp_path):
    """Images without objects, crowds, empty boxes and annotations of unknown images are accepted."""

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


def test_missing_files_of_metrics(shapes, tmp_path):
    """Panoptic configs evaluate masks too, with an annotation file that the datasets do not read."""
    more = "val_evaluator = [_base_.val_evaluator, dict(type='CocoMetric', ann_file=_base_.data_root + 'other.json')]\n"
    with pytest.raises(FileNotFoundError, match=r"other\.json.*val_evaluator"):
        detect(tiny_mask_rcnn(tmp_path, more), shapes, tmp_path)


@pytest.mark.parametrize("roots", [("a/b", "a/b"), ("a/b/", "a/b"), ("a/b/c", "a/b/d")])
def test_data_root_of_datasets(roots):
    """--data replaces the folder of the datasets, wherever the config sets it."""
    from mmengine.config import Config

    from natzoo.openmmlab.data import set_data_root

    names = ("train_dataloader", "val_dataloader")
    loaders = {name: {"dataset": {"data_root": root}} for name, root in zip(names, roots, strict=True)}
    cfg = Config({**loaders, "data_root": "a/b", "val_evaluator": {"ann_file": "a/b/x.json"}})
    if roots[0] == roots[1]:
        cfg.pop("data_root")
    set_data_root(cfg, "new")
    found = {cfg[name].dataset.data_root.rstrip("/") for name in loaders}
    assert found == {root.replace("a/b", "new").rstrip("/") for root in roots}
    assert cfg.val_evaluator.ann_file == "new/x.json"


@pytest.mark.parametrize("roots", [("a", "b"), (None, None)])
def test_data_needs_one_root(roots):
    from mmengine.config import Config

    from natzoo.openmmlab.data import set_data_root

    names = ("train_dataloader", "val_dataloader")
    loaders = {name: {"dataset": {"data_root": root}} for name, root in zip(names, roots, strict=True)}
    with pytest.raises(ValueError, match="--data"):
        set_data_root(Config(loaders), "new")
