# Mask R-CNN, DiNAT_s-Small: 69 M parameters, 350 GMACs at 1280x800 (arXiv:2209.15001).
# Published: COCO val2017 box AP 48.6, mask AP 43.5.
_base_ = ["./_base_/mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        type="DiNAT_s",
        arch="dinat_s_small",
        drop_path_rate=0.35,
        dilations=[[1, 28], [1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_s_small"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
