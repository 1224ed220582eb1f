# Cascade Mask R-CNN, NAT-Base: 147 M parameters, 931 GMACs at 1280x800 (arXiv:2204.07143).
# Published: COCO val2017 box AP 52.3, mask AP 45.1.
_base_ = ["./_base_/cascade_mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        arch="nat_base",
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="nat_base"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
