"""Training and evaluation: results, checkpoints, interruption, distributed runs and mixed precision."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS
from openmmlab_extra import PHOTOGRAPHS, has_photographs
from runs import (
    ROOT,
    evaluate_detector,
    evaluate_segmenter,
    losses,
    tiny_mask_rcnn,
    tiny_upernet,
    train_detector,
    train_segmenter,
)

from natzoo.checkpoints import read_checkpoint
from natzoo.openmmlab import train
from natzoo.runs import lock_folder


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def weights(path):
    return read_checkpoint(path)["state_dict"]


# ----- training, evaluation, visualization -----


@pytest.fixture(scope="module")
def segmenter(drawn, tmp_path_factory):
    """Config and folder of a run of four iterations: do not modify."""
    folder = tmp_path_factory.mktemp("segmenter")
    config = tiny_upernet(folder)
    train_segmenter(config, "--data", drawn, "--work-dir", folder / "run")
    return config, folder / "run"


def test_segmentation_end_to_end(segmenter, drawn, tmp_path):
    config, folder = segmenter
    assert sorted(losses(folder)) == [1, 2, 3, 4]
    assert (folder / "iter_4.pth").exists()
    assert list(folder.glob("*/vis_data/events.out.tfevents.*"))
    options = [config, folder / "iter_4.pth", "--data", drawn, "--work-dir", tmp_path / "test"]
    found = evaluate_segmenter(*options, "--eval", "mIoU", "mDice", "--show-dir", tmp_path / "images")
    assert {"mIoU", "mDice"} <= found.keys()
    assert [path.suffix for path in (tmp_path / "images").iterdir()] == [".png"] * 3


def test_detection_end_to_end(drawn, tmp_path):
    config, folder = tiny_mask_rcnn(tmp_path), tmp_path / "folder"
    train_detector(config, "--data", drawn, "--work-dir", folder)
    assert sorted(losses(folder)) == [1, 2, 3, 4]
    options = [config, folder / "iter_4.pth", "--data", drawn, "--work-dir", tmp_path / "test"]
    found = evaluate_detector(*options, "--eval", "bbox", "--show-dir", tmp_path / "images")
    assert "coco/bbox_mAP" in found
    assert "coco/segm_mAP" not in found
    assert len(list((tmp_path / "images").rglob("*.png"))) == 3


TTA = """
tta_model = dict(type="SegTTAModel")
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(side, side), keep_ratio=True) for side in SIDES],
            [dict(type="RandomFlip", prob=prob, direction="horizontal") for prob in PROBS],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
"""


def test_test_time_augmentation(segmenter, drawn, tmp_path):
    """With a single scale and no flips, it equals plain evaluation."""
    _, folder = segmenter
    data = ["--data", drawn, "--work-dir", tmp_path / "test"]
    results = []
    for sides, probs, tta_option in (
        ("(128,)", "(0.0,)", ["--tta"]),
        ("(128,)", "(0.0,)", []),
        ("(96, 160)", "(0.0, 1.0)", ["--tta"]),
    ):
        config = tiny_upernet(tmp_path, TTA.replace("SIDES", sides).replace("PROBS", probs))
        results.append(evaluate_segmenter(config, folder / "iter_4.pth", *data, *tta_option))
    assert results[0]["mIoU"] == pytest.approx(results[1]["mIoU"])
    assert results[2]["aAcc"] != results[1]["aAcc"]


def test_test_time_augmentation_under_torchrun(segmenter, drawn, tmp_path, monkeypatch):
    """The wrapper for distributed runs contains the one for augmentation."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    variables = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, **address}
    threads = {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1}  # otherwise mmengine sets them for the whole process
    for name, value in {**variables, **threads}.items():
        monkeypatch.setenv(name, str(value))
    config = tiny_upernet(tmp_path, TTA.replace("SIDES", "(128,)").replace("PROBS", "(0.0,)"))
    options = ["--data", drawn, "--work-dir", tmp_path / "test", "--tta"]
    try:
        assert "mIoU" in evaluate_segmenter(config, segmenter[1] / "iter_4.pth", *options)
    finally:
        torch.distributed.destroy_process_group()


# ----- checkpoints -----


def test_checkpoints_contain_plain_values(segmenter):
    checkpoint = torch.load(segmenter[1] / "iter_4.pth", weights_only=True)
    assert {"state_dict", "optimizer", "param_schedulers", "message_hub", "meta"} <= checkpoint.keys()
    assert checkpoint["meta"]["iter"] == 4
    assert checkpoint["message_hub"]["log_scalars"]["train/loss"]["history"].shape == (4,)


@pytest.mark.parametrize(
    ("workers", "resume"),
    [
        ("", ["--resume"]),
        pytest.param(
            "train_dataloader.update(num_workers=1, persistent_workers=True)\n",
            ["--cfg-options", "resume=True"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resumed_run_equals_uninterrupted_run(drawn, tmp_path, workers, resume, capfd):
    """Without random augmentation, two iterations and two more give the same bits as four.

    Each start draws another seed; the seed of the first start is used throughout.
    """
    shuffled = (
        "train_dataloader.update(sampler=dict(type='InfiniteSampler', shuffle=True))\nrandomness = dict(seed=None)\n"
    )
    config = tiny_upernet(tmp_path, shuffled + workers)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    two = ["--data", drawn, "--work-dir", str(parts)]
    np.random.seed(0)
    train_segmenter(config, *two, "--resume", "--cfg-options", "train_cfg.max_iters=2")
    meta = read_checkpoint(parts / "iter_2.pth")["meta"]
    assert meta["iter"] == 2
    while (parts / time.strftime("%Y%m%d_%H%M%S")).exists():  # mmengine names log folders by the second
        time.sleep(0.05)
    np.random.seed(1)
    train_segmenter(config, *two, *resume)
    train_segmenter(config, "--data", drawn, "--work-dir", str(whole), "--seed", meta["seed"])
    assert sorted(losses(parts)) == [1, 2, 3, 4]
    assert losses(parts) == losses(whole)
    for name, value in weights(whole / "iter_4.pth").items():
        assert torch.equal(weights(parts / "iter_4.pth")[name], value), name
    capfd.readouterr()
    train_segmenter(config, *two, *resume)
    assert "train_cfg.max_iters=4" in "".join(capfd.readouterr())
    assert sorted(losses(parts)) == [1, 2, 3, 4]


@pytest.mark.slow
def test_killed_run_can_be_resumed(drawn, tmp_path):
    """After SIGKILL, no checkpoint is truncated, and the resumed run has the losses of an uninterrupted one."""
    config, folder = str(tiny_upernet(tmp_path)), tmp_path / "folder"
    options = ["--data", drawn, "--work-dir", folder, "--cfg-options", "train_cfg.max_iters=30"]
    command = [sys.executable, str(ROOT / "segmentation" / "train.py"), config, *options[:4], "--resume", *options[4:]]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 1200
    while not (folder / "iter_6.pth").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in folder.glob("*.pth"):
        read_checkpoint(path)
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    whole = tmp_path / "whole"
    train_segmenter(config, "--data", drawn, "--work-dir", str(whole), *options[4:])
    assert sorted(losses(folder)) == list(range(1, 31))
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-5)


def test_fine_tuning_with_other_classes(segmenter, drawn, tmp_path):
    """--load-from accepts another number of classes, --resume rejects it. Neither loads `init_cfg` of the backbone."""
    more = "model['decode_head']['num_classes'] = model['auxiliary_head']['num_classes'] = 9\n"
    more += "nine = dict(metainfo=dict(classes=[*'abcdefghi'], palette=[[0, 0, 0]] * 9))\n"
    more += "train_dataloader.update(dataset=nine)\nval_dataloader = dict(dataset=nine)\n"
    more += "model['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='nowhere.pth')\n"
    config, old = tiny_upernet(tmp_path, more), segmenter[1] / "iter_4.pth"
    options = [config, "--data", drawn, "--work-dir"]
    train_segmenter(
        *options,
        tmp_path / "fine",
        "--load-from",
        old,
        "--cfg-options",
        "train_cfg.max_iters=1",
    )
    with pytest.raises(ValueError, match=r"iter_4\.pth"):
        train_segmenter(*options, tmp_path / "resumed", "--resume", old)


def test_folder_of_another_run_is_refused(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr("natzoo.runs._PATIENCE_S", 0.0)
    with lock_folder(tmp_path / "run"), pytest.raises(ValueError, match="run is used by another run"):
        train_segmenter(tiny_upernet(tmp_path), "--data", drawn, "--work-dir", tmp_path / "run")


def test_seed_keeps_other_randomness_settings(drawn, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("natzoo.openmmlab.train.make_runner", lambda cfg, **_: made.append(cfg) or Mock())
    config = tiny_upernet(tmp_path, "randomness = dict(deterministic=True)\n")
    train_segmenter(config, "--data", drawn, "--work-dir", tmp_path / "run", "--seed", "3")
    assert made[0].randomness == {"seed": 3, "deterministic": True}


def test_full_disk_keeps_old_checkpoint(tmp_path, monkeypatch):
    from mmengine.fileio import get_file_backend

    path = tmp_path / "iter_1.pth"
    backend = get_file_backend(path)
    backend.put(b"old", path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="iter_1"):
        backend.put(b"new", path)
    assert path.read_bytes() == b"old"


class FakeRunner:
    """Runner for CheckpointHook that records which files existed when each checkpoint was written."""

    logger = logging.getLogger("test")
    max_iters, epoch = 100, 0

    def __init__(self, folder):
        folder.mkdir()
        self.work_dir, self.message_hub, self.existing = str(folder), MessageHub("test"), {}
        options = {"by_epoch": False, "interval": 2, "max_keep_ckpts": 1, "save_best": "mIoU"}
        self.hook = HOOKS.build({"type": "CheckpointHook", **options})

    def save_checkpoint(self, folder, filename, *args, **kwargs):
        self.existing.setdefault(filename, sorted(path.name for path in Path(folder).glob("*.pth")))
        Path(folder, filename).touch()

    def train(self, scores):
        self.hook.before_train(self)
        for iteration, score in scores.items():
            self.iter = iteration - 1
            self.hook.after_train_iter(self, self.iter)
            self.iter = iteration
            self.hook.after_val_epoch(self, {"mIoU": score})
        return sorted(path.name for path in Path(self.work_dir).glob("*.pth"))


def test_old_checkpoint_is_removed_after_new_one_is_written(tmp_path):
    one = FakeRunner(tmp_path / "one")
    assert one.train({2: 0.1, 4: 0.2, 6: 0.1}) == ["best_mIoU_iter_4.pth", "iter_6.pth"]
    assert one.existing["best_mIoU_iter_4.pth"] == ["best_mIoU_iter_2.pth", "iter_4.pth"]
    assert one.existing["iter_6.pth"] == ["best_mIoU_iter_4.pth", "iter_4.pth"]


def test_best_checkpoint_of_another_run_is_kept(tmp_path):
    """A run resumed in another folder knows the best checkpoint of the first run."""
    one, two = FakeRunner(tmp_path / "one"), FakeRunner(tmp_path / "two")
    one.train({2: 0.1})
    two.message_hub = one.message_hub
    assert two.train({4: 0.2}) == ["best_mIoU_iter_4.pth", "iter_4.pth"]
    assert (tmp_path / "one" / "best_mIoU_iter_2.pth").exists()


# ----- distributed runs and mixed precision -----


def test_two_processes_equal_one_with_twice_the_batch(segmenter, drawn, tmp_path):
    (config, one), two = segmenter, tmp_path / "two"
    script = ROOT / "segmentation" / "dist_train.sh"
    options = ["--data", drawn, "--work-dir", str(two), "--cfg-options", "train_dataloader.batch_size=2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PORT": str(free_port()),
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(["bash", script, config, "2", *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = weights(one / "iter_4.pth"), weights(two / "iter_4.pth")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5, msg=name)
    start = torch.cat([value.flatten() for value in expected.values()])
    assert (torch.cat([found[name].flatten() for name in expected]) - start).norm() < 1e-4 * start.norm()


def test_mixed_precision_on_cpu(drawn, tmp_path):
    """bfloat16 activations and float32 weights: losses are close to full precision, but not equal.

    Options of GPU mixed precision in the config are ignored.
    """
    runs = {}
    more = "optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic', dtype='float16')\n"
    config = tiny_mask_rcnn(tmp_path, more)
    for option in ("--amp", "--no-amp"):
        folder = tmp_path / option
        train_detector(config, "--data", drawn, "--work-dir", folder, option)
        runs[option] = losses(folder)
        assert {value.dtype for value in weights(folder / "iter_4.pth").values()} <= {torch.float32, torch.int64}
    assert runs["--amp"][1] == pytest.approx(runs["--no-amp"][1], rel=0.05)
    assert runs["--amp"] != runs["--no-amp"]


@pytest.mark.parametrize(
    ("amp", "has_units", "expected"),
    [
        (None, False, "OptimWrapper"),
        (None, True, "CpuAmpOptimWrapper"),
        (True, False, "CpuAmpOptimWrapper"),
        (True, True, "CpuAmpOptimWrapper"),
        (False, False, "OptimWrapper"),
    ],
)
def test_mixed_precision_of_a_config_is_off_on_cpus_without_bfloat16(amp, has_units, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_units)
    cfg = Config({"optim_wrapper": {"type": "AmpOptimWrapper", "loss_scale": "dynamic"}})
    train.set_precision(cfg, amp)
    assert cfg.optim_wrapper.type == expected
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (amp is not False and not has_units)


@pytest.fixture(params=["shapes", "photographs"])
def annotated(request, drawn):
    """An annotation file in COCO's format, and its classes."""
    if request.param == "shapes":
        return drawn / "instances_validation.json", ("circle", "square", "triangle")
    if not has_photographs():
        pytest.skip("NATTEN_TEST_DATA is not a folder with photographs")
    from mmdet.datasets import CocoDataset

    return PHOTOGRAPHS / "coco_ccby" / "annotations" / "instances_val2017.json", CocoDataset.METAINFO["classes"]


def test_perfect_detections_have_ap_1(annotated):
    from mmdet.evaluation import CocoMetric
    from pycocotools.coco import COCO

    path, classes = annotated
    coco = COCO(path)
    labels = {key: classes.index(category["name"]) for key, category in coco.cats.items()}
    metric = CocoMetric(ann_file=str(path), metric=["bbox", "segm"])
    metric.dataset_meta = {"classes": classes}
    for image in coco.imgs.values():
        annotations = coco.imgToAnns[image["id"]]
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        size = (image["height"], image["width"])
        masks = np.array([coco.annToMask(annotation) for annotation in annotations], np.uint8).reshape(-1, *size)
        predictions = {
            "bboxes": boxes,
            "scores": torch.ones(len(boxes)),
            "labels": torch.tensor([labels[annotation["category_id"]] for annotation in annotations]),
            "masks": torch.from_numpy(masks),
        }
        metric.process({}, [{"img_id": image["id"], "ori_shape": size, "pred_instances": predictions}])
    found = metric.evaluate(len(coco.imgs))
    assert found["coco/bbox_mAP"] == found["coco/segm_mAP"] == 1.0
