# A small UPerNet that trains in minutes on two cores. A config sets the classes and the dataset.
_base_ = ["./upernet.py", "./runtime.py", "../../_base_/short_run.py"]

norm_cfg = dict(type="GN", num_groups=8)  # batches are too small for BatchNorm
model = dict(
    data_preprocessor=dict(size=(192, 192), test_cfg=dict(size_divisor=32)),
    backbone=dict(depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), embed_dim=32, mlp_ratio=3.0, drop_path_rate=0.1),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=64, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=128, channels=32, norm_cfg=norm_cfg),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(256, 256), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(192, 192)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
dataset = dict(type="BaseSegDataset", reduce_zero_label=True)  # the value 0 is ignored, 1 is the first class
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

train_cfg = dict(max_iters=800, val_interval=200)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=100, end=800),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=200))
auto_scale_lr = dict(base_batch_size=8)
