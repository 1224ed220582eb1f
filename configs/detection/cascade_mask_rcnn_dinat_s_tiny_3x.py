# Cascade Mask R-CNN, DiNAT_s-Tiny: 86 M parameters, 742 GMACs at 1280x800 (arXiv:2209.15001).
# Published: COCO val2017 box AP 51.0, mask AP 44.1.
_base_ = ["./_base_/cascade_mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        type="DiNAT_s",
        arch="dinat_s_tiny",
        drop_path_rate=0.3,
        dilations=[[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_s_tiny"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
