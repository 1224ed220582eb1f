# Cascade Mask R-CNN, NAT-Small: 108 M parameters, 809 GMACs at 1280x800 (arXiv:2204.07143).
# Published: COCO val2017 box AP 52.0, mask AP 44.9.
_base_ = ["./_base_/cascade_mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        arch="nat_small",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="nat_small"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
