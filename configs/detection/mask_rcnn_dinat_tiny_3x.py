# Mask R-CNN, DiNAT-Tiny: 48 M parameters, 258 GMACs at 1280x800 (arXiv:2209.15001).
# Published: COCO val2017 box AP 48.6, mask AP 43.5.
_base_ = ["./_base_/mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        type="DiNAT",
        arch="dinat_tiny",
        drop_path_rate=0.2,
        dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_tiny"),
    ),
)
