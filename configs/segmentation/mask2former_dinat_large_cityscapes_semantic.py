# Mask2Former, DiNAT-Large, Cityscapes semantic: 220 M parameters, 509 GMACs (arXiv:2209.15001).
# Published: mIoU 84.5 (multi-scale).
_base_ = [
    "./_base_/mask2former.py",
    "mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py",
]

custom_imports = dict(imports=["natzoo.openmmlab", "mmdet.models"])
model = dict(
    backbone=_base_.backbone,
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
)

sizes = [(4096, side) for side in (512, 768, 1024, 1280, 1536, 1792)]
# Replace only the scales in the base's pipeline for --tta.
_base_.tta_pipeline[1].transforms[0] = [dict(type="Resize", scale=size, keep_ratio=True) for size in sizes]
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.custom_keys))
default_hooks, visualizer = _base_.two_checkpoints, _base_.tensorboard
