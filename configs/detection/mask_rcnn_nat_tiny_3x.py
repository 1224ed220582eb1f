# Mask R-CNN, NAT-Tiny: 48 M parameters, 258 GMACs at 1280x800 (arXiv:2204.07143).
# Published: COCO val2017 box AP 47.7, mask AP 42.6.
_base_ = ["./_base_/mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        arch="nat_tiny",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="nat_tiny"),
    ),
)
