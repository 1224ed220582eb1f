# Mask R-CNN, NAT-Mini: 40 M parameters, 225 GMACs at 1280x800 (arXiv:2204.07143).
# Published: COCO val2017 box AP 46.5, mask AP 41.7.
_base_ = ["./_base_/mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        arch="nat_mini",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="nat_mini"),
    ),
)
