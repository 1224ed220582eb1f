# Cascade Mask R-CNN, NAT-Mini: 77 M parameters, 704 GMACs at 1280x800 (arXiv:2204.07143).
# Published: COCO val2017 box AP 50.3, mask AP 43.6.
_base_ = ["./_base_/cascade_mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        arch="nat_mini",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="nat_mini"),
    ),
)
