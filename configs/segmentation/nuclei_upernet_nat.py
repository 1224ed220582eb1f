# A small UPerNet for nuclei in microscope images, trained on 128 images in minutes on two cores.
_base_ = "./_base_/upernet_small.py"

model = dict(
    data_preprocessor=dict(size=(256, 256)), decode_head=dict(num_classes=2), auxiliary_head=dict(num_classes=2)
)

data_root = "data/nuclei"
metainfo = dict(classes=["background", "nucleus"], palette=[[0, 0, 0], [255, 160, 0]])
nuclei = dict(data_root=data_root, metainfo=metainfo, img_suffix=".png")
load, annotations = dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")
brighten = dict(type="AdjustGamma", gamma=2.0)  # many nuclei are dark
train_pipeline = [
    load,
    annotations,
    brighten,
    dict(type="RandomResize", scale=(384, 384), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(256, 256)),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PhotoMetricDistortion", brightness_delta=16, hue_delta=4),  # keep the hue of the stain
    dict(type="PackSegInputs"),
]
# Annotations are loaded after resizing, so predictions are compared at the original size.
test_pipeline = [
    load,
    brighten,
    dict(type="Resize", scale=(384, 384), keep_ratio=True),
    annotations,
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=4, dataset=dict(**nuclei, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**nuclei, pipeline=test_pipeline))
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=4)
