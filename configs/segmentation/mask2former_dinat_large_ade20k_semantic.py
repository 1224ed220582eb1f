# Mask2Former, DiNAT-Large, ADE20K semantic: 220 M parameters, 518 GMACs (arXiv:2209.15001).
# Published: mIoU 58.1 (multi-scale).
_base_ = [
    "./_base_/mask2former.py",
    "mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py",
]

custom_imports = dict(imports=["natzoo.openmmlab", "mmdet.models"])
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=_base_.backbone,
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(
        type="RandomChoiceResize",
        scales=[int(640 * tenths / 10) for tenths in range(5, 21)],
        resize_type="ResizeShortestEdge",
        max_size=2560,
    ),
    dict(type="RandomCrop", crop_size=(640, 640), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2560, 640), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

sizes = [(4480, side) for side in (320, 480, 640, 800, 960, 1120)]
# Replace only the scales in the base's pipeline for --tta.
_base_.tta_pipeline[1].transforms[0] = [dict(type="Resize", scale=size, keep_ratio=True) for size in sizes]
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.custom_keys))
default_hooks, visualizer = _base_.two_checkpoints, _base_.tensorboard
