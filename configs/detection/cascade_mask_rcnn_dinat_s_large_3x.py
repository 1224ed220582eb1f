# Cascade Mask R-CNN, DiNAT_s-Large: 253 M parameters, 1357 GMACs at 1280x800 (arXiv:2209.15001).
# Published: COCO val2017 box AP 54.8, mask AP 47.2.
_base_ = ["./_base_/cascade_mask_rcnn.py", "./_base_/coco_3x.py"]

model = dict(
    backbone=dict(
        type="DiNAT_s",
        arch="dinat_s_large_21k",
        drop_path_rate=0.6,
        dilations=[[1, 28], [1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_s_large_21k"),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
