# Mask R-CNN, DiNAT-Mini: 40 M parameters, 225 GMACs at 1280x800 (arXiv:2209.15001).
# Published: COCO val2017 box AP 47.2, mask AP 42.5.
_base_ = ["./_base_/mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        type="DiNAT",
        arch="dinat_mini",
        drop_path_rate=0.2,
        dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_mini"),
    ),
)
