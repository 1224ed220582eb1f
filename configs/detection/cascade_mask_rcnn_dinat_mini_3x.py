# Cascade Mask R-CNN, DiNAT-Mini: 77 M parameters, 704 GMACs at 1280x800 (arXiv:2209.15001).
# Published: COCO val2017 box AP 51.2, mask AP 44.4.
_base_ = ["./_base_/cascade_mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        type="DiNAT",
        arch="dinat_mini",
        drop_path_rate=0.2,
        dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_mini"),
    ),
)
