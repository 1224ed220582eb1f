# Cascade Mask R-CNN, NAT-Tiny: 85 M parameters, 737 GMACs at 1280x800 (arXiv:2204.07143).
# Published: COCO val2017 box AP 51.4, mask AP 44.5.
_base_ = ["./_base_/cascade_mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        arch="nat_tiny",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="nat_tiny"),
    ),
)
