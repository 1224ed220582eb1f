# A small Mask R-CNN for the images of `python tools/make_data.py shapes data/shapes`; trains in minutes on two cores.
_base_ = "../detection/_base_/small_mask_rcnn.py"

model = dict(
    backbone=dict(dilations=[[1, 4], [1, 2], [1, 1, 1, 1], [1, 1]]),
    roi_head=dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)),
    test_cfg=dict(rcnn=dict(max_per_img=20)),
)
data_root = "data/shapes/"
metainfo = dict(classes=("circle", "square", "triangle"), palette=[(255, 160, 0), (0, 200, 80), (80, 120, 255)])
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "instances_validation.json")
test_evaluator = val_evaluator

train_cfg = dict(max_iters=400, val_interval=200)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=400),
]
