# Cascade Mask R-CNN, DiNAT-Base: 147 M parameters, 931 GMACs at 1280x800 (arXiv:2209.15001).
# Published: COCO val2017 box AP 53.4, mask AP 46.2.
_base_ = ["./_base_/cascade_mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        type="DiNAT",
        arch="dinat_base",
        drop_path_rate=0.6,
        dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_base"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=7.5e-5))
