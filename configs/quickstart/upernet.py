# A small UPerNet for the images of `python tools/make_data.py shapes data/shapes`; trains in minutes on two cores.
_base_ = "../segmentation/_base_/upernet_small.py"

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(dilations=[[1, 4], [1, 2], [1, 1, 1, 1], [1, 1]]),
    decode_head=dict(num_classes=4),
    auxiliary_head=dict(num_classes=4),
)

data_root = "data/shapes"
metainfo = dict(
    classes=["background", "circle", "square", "triangle"],
    palette=[[0, 0, 0], [255, 160, 0], [0, 200, 80], [80, 120, 255]],
)
shapes = dict(data_root=data_root, metainfo=metainfo, img_suffix=".png")
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(**shapes, pipeline=train_pipeline))
val_dataloader = dict(dataset=shapes)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=500, val_interval=100)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=500),
]
