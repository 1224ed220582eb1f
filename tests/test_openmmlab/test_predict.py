"""detection/predict.py and segmentation/predict.py give the results of mmdet's and mmseg's own functions."""

import json

import numpy as np
import pytest
from PIL import Image
from runs import clear_registries, load_config, tiny_mask2former, tiny_mask_rcnn, tiny_upernet

from natzoo.checkpoints import write_checkpoint
from natzoo.openmmlab import predict
from natzoo.openmmlab.runner import DETECTION, SEGMENTATION


def save_model(config, path):
    """Write a checkpoint of a model with random weights, and return the model."""
    from mmengine.registry import MODELS, init_default_scope

    cfg = load_config(config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).eval()
    write_checkpoint(path, {"state_dict": model.state_dict(), "meta": {}})
    return model


def run(project, *arguments):
    clear_registries()
    predict.main(project, [str(argument) for argument in (*arguments, "--device", "cpu")])


def test_detector(drawn, tmp_path, capsys):
    from mmdet.apis import inference_detector, init_detector
    from pycocotools import mask as masks

    config = tiny_mask_rcnn(tmp_path)
    save_model(config, tmp_path / "model.pth")
    images = drawn / "images" / "validation"
    run(DETECTION, config, tmp_path / "model.pth", images, "--out", tmp_path / "out", "--score", 0, "--batch-size", 2)
    clear_registries()
    model = init_detector(str(config), str(tmp_path / "model.pth"), device="cpu")
    for path in sorted(images.iterdir()):
        expected = inference_detector(model, str(path)).pred_instances
        found = json.loads((tmp_path / "out" / f"{path.stem}.json").read_text())
        assert len(found) == len(expected) > 0
        assert [one["score"] for one in found] == pytest.approx(expected.scores.tolist(), abs=1e-3)
        left, top, width, height = found[0]["bbox"]
        assert [left, top, left + width, top + height] == pytest.approx(expected.bboxes[0].tolist(), abs=0.1)
        assert (masks.decode(found[0]["segmentation"]) != expected.masks[0].numpy()).mean() < 0.01
        assert found[0]["class"] == ("circle", "square", "triangle")[expected.labels[0]]
        with Image.open(path) as image, Image.open(tmp_path / "out" / f"{path.stem}.jpg") as drawing:
            assert drawing.size == image.size
            difference = np.abs(np.asarray(drawing, int) - np.asarray(image.convert("RGB"), int)).mean()
        assert 1 < difference < 100  # something is drawn, in the colors of the image
    assert capsys.readouterr().out.count(".png: ") == 3


def test_segmenter(drawn, tmp_path):
    from mmseg.apis import inference_model, init_model

    config = tiny_upernet(tmp_path)
    save_model(config, tmp_path / "model.pth")
    path = next((drawn / "images" / "validation").iterdir())
    run(SEGMENTATION, config, tmp_path / "model.pth", path, "--out", tmp_path / "out")
    clear_registries()
    model = init_model(str(config), str(tmp_path / "model.pth"), device="cpu")
    expected = inference_model(model, str(path)).pred_sem_seg.data[0].numpy()
    with Image.open(tmp_path / "out" / f"{path.stem}.png") as labels:
        assert (np.asarray(labels) == expected).all()
    assert (tmp_path / "out" / f"{path.stem}.jpg").is_file()


@pytest.mark.parametrize("is_empty", [False, True])
def test_panoptic_segmenter(drawn, tmp_path, is_empty):
    """Each pixel belongs to a segment of the list, or to none."""
    config = tiny_mask2former(tmp_path)
    save_model(config, tmp_path / "model.pth")
    path = next((drawn / "images" / "validation").iterdir())
    threshold = f"model.test_cfg.object_mask_thr={0.99 if is_empty else 0.0}"
    more = ["--cfg-options", threshold, "model.test_cfg.iou_thr=0.0"]
    run(SEGMENTATION, config, tmp_path / "model.pth", path, "--out", tmp_path / "out", *more)
    segments = json.loads((tmp_path / "out" / f"{path.stem}.json").read_text())
    pixels = np.asarray(Image.open(tmp_path / "out" / f"{path.stem}.png"), int) @ (1, 256, 65536)
    assert set(np.unique(pixels)) - {0} == {one["id"] for one in segments}
    assert {one["class"] for one in segments} <= {"circle", "square", "triangle", "ground"}
    assert bool(segments) != is_empty
    assert (tmp_path / "out" / f"{path.stem}.jpg").is_file()


def test_errors(drawn, tmp_path):
    config = tiny_mask_rcnn(tmp_path)
    path = next((drawn / "images" / "validation").iterdir())
    save_model(tiny_upernet(tmp_path), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth"):
        run(DETECTION, config, tmp_path / "other.pth", path, "--out", tmp_path / "out")
    save_model(config, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        run(DETECTION, config, tmp_path / "model.pth", tmp_path / "nowhere.png", "--out", tmp_path / "out")
