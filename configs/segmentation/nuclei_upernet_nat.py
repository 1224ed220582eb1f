# A small UPerNet for nuclei in microscope pictures: 128 to learn from, minutes on two cores.
_base_ = ["./_base_/upernet.py", "./_base_/runtime.py", "../_base_/short_run.py"]

classes = ["background", "nucleus"]
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(192, 192), test_cfg=dict(size_divisor=32)),
    backbone=dict(depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), embed_dim=32, mlp_ratio=3.0, drop_path_rate=0.1),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=64, num_classes=2, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=128, channels=32, num_classes=2, norm_cfg=norm_cfg),
)

dataset_type = "BaseSegDataset"
data_root = "data/nuclei"
metainfo = dict(classes=classes, palette=[[0, 0, 0], [255, 160, 0]])
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomResize", scale=(256, 256), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(192, 192)),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        img_suffix=".png",
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        img_suffix=".png",
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
