"""Tiny configs based on the quickstart, and functions that run them in this process within seconds."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope, init_default_scope
from mmengine.visualization import Visualizer

from natzoo.openmmlab import test, train
from natzoo.openmmlab.annotations import check_dataset, name_dataset, name_errors
from natzoo.openmmlab.runner import DETECTION, SEGMENTATION

ROOT = Path(__file__).parents[2]
_BACKBONE = (
    "depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), embed_dim=16, kernel_size=3, dilations=None, drop_path_rate=0.0"
)
_COMMON = """
train_cfg = dict(max_iters=4, val_interval=100)
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
log_processor = dict(window_size=1)
randomness = dict(seed=0)
env_cfg = dict(cudnn_benchmark=False)
"""


def build_dataset(cfg, scope, metrics=(), is_training=True):
    """Build and check a dataset as a run does."""
    init_default_scope(scope)
    with name_dataset({"dataset": cfg}):
        dataset = DATASETS.build({**cfg, "serialize_data": False})  # serializing collects garbage, a third of a second
    name_errors(dataset)
    check_dataset(dataset, torch.nn.Identity(), metrics, is_training=is_training)
    return dataset


def clear_registries() -> None:
    """Empty mmengine's global registries: the scope, and the visualizers, which keep the folder of the first run."""
    kinds = [DefaultScope, Visualizer]
    for kind in kinds:
        kinds += kind.__subclasses__()
        kind._instance_dict.clear()


def load_config(path: Path) -> Config:
    """Return a copy of a config; the file is read once."""
    return copy.deepcopy(_read_config(path))


_read_config = functools.cache(Config.fromfile)


def train_detector(*arguments: object) -> None:
    """Run detection/train.py with these arguments."""
    clear_registries()
    train.main(DETECTION, [str(argument) for argument in arguments])


def evaluate_detector(*arguments: object) -> dict[str, float]:
    """Run detection/test.py with these arguments."""
    clear_registries()
    return test.main(DETECTION, [str(argument) for argument in arguments])


def train_segmenter(*arguments: object) -> None:
    """Run segmentation/train.py with these arguments."""
    clear_registries()
    train.main(SEGMENTATION, [str(argument) for argument in arguments])


def evaluate_segmenter(*arguments: object) -> dict[str, float]:
    """Run segmentation/test.py with these arguments."""
    clear_registries()
    return test.main(SEGMENTATION, [str(argument) for argument in arguments])


def losses(work_dir: Path) -> dict[int, float]:
    """Return iteration -> loss, of all runs that wrote to a folder."""
    found = {}
    for log in sorted(work_dir.glob("*/vis_data/scalars.json")):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        found.update({row["step"]: row["loss"] for row in rows if "loss" in row})
    return found


def tiny_upernet(folder: Path, more: str = "") -> Path:
    """Write a config of UPerNet without randomness and without norms over the batch."""
    norm = 'norm_cfg=dict(type="GN", num_groups=4), dropout_ratio=0.0'
    model = f"""
model = dict(
    backbone=dict({_BACKBONE}),
    decode_head=dict(in_channels=[16, 32, 64, 128], channels=16, {norm}),
    auxiliary_head=dict(in_channels=64, channels=16, {norm}),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
"""
    fixed = """
train_dataloader.update(sampler=dict(type="InfiniteSampler", shuffle=False), dataset=dict(pipeline=train_pipeline))
"""
    return _write(folder / "upernet.py", model + _COMMON + fixed + more)


def tiny_mask_rcnn(folder: Path, more: str = "") -> Path:
    """Write a config of Mask R-CNN."""
    model = f"""
model = dict(
    backbone=dict({_BACKBONE}),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16),
    ),
)
"""
    return _write(folder / "mask_rcnn.py", model + _COMMON + more)


def tiny_mask2former(folder: Path) -> Path:
    """Write a config of a panoptic Mask2Former on panoptic_{training,validation}.json and the folders of that name."""
    text = f"""
model = dict(
    data_preprocessor=dict(batch_augments=None),
    backbone=dict(arch=None, {_BACKBONE}, init_cfg=None),
    panoptic_head=dict(
        in_channels=[16, 32, 64, 128],
        num_queries=10,
        num_things_classes=3,
        num_stuff_classes=1,
        pixel_decoder=dict(encoder=dict(num_layers=1)),
        transformer_decoder=dict(num_layers=1),
        loss_cls=dict(class_weight=[1.0] * 4 + [0.1]),
    ),
    panoptic_fusion_head=dict(num_things_classes=3, num_stuff_classes=1),
    train_cfg=dict(num_points=64),
    test_cfg=dict(max_per_image=10),
)

shapes = dict(
    type="CocoPanopticDataset",
    data_root=_base_.data_root,
    metainfo=dict(
        classes=("circle", "square", "triangle", "ground"),
        thing_classes=("circle", "square", "triangle"),
        stuff_classes=("ground",),
        palette=[(255, 160, 0), (0, 200, 80), (80, 120, 255), (90, 90, 90)],
    ),
)
train_pipeline = [_base_.load_image, _base_.load_annotations, *_base_.pack]
test_pipeline = [_base_.load_image, _base_.load_annotations, _base_.test_pack]
"""
    data = """
train_cfg = dict(max_iters=2, val_interval=100)
train_dataloader.update(batch_size=2)
for loader, split, pipeline in (
    (train_dataloader, "training", train_pipeline), (val_dataloader, "validation", test_pipeline)
):
    loader["dataset"] = dict(
        **shapes,
        ann_file=f"panoptic_{split}.json",
        data_prefix=dict(img=f"images/{split}/", seg=f"panoptic_{split}/"),
        pipeline=pipeline,
    )
del loader, split, pipeline
test_dataloader = val_dataloader
maps = _base_.data_root + "panoptic_validation"
val_evaluator = [dict(type="CocoPanopticMetric", ann_file=maps + ".json", seg_prefix=maps + "/")]
test_evaluator = val_evaluator
"""
    base = ROOT / "configs" / "segmentation" / "mask2former_dinat_large_ade20k_panoptic.py"
    return _write(folder / "mask2former.py", text + _COMMON + data, base)


def _write(path: Path, text: str, base: Path | None = None) -> Path:
    path.write_text(f'_base_ = "{base or ROOT / "configs" / "quickstart" / path.name}"\n{text}\n')
    return path
