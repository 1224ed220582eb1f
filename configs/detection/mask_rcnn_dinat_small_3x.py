# Mask R-CNN, DiNAT-Small: 70 M parameters, 330 GMACs at 1280x800 (arXiv:2209.15001).
# Published: COCO val2017 box AP 49.3, mask AP 44.0.
_base_ = ["./_base_/mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        type="DiNAT",
        arch="dinat_small",
        drop_path_rate=0.35,
        dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_small"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
