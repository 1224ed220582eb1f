# UPerNet, DiNAT-Base: 123 M parameters, 1137 GMACs at 2048x512 (arXiv:2209.15001).
# Published: ADE20K validation mIoU 49.6, multi-scale 50.4.
_base_ = ["./_base_/upernet.py", "./_base_/ade20k_160k.py"]

model = dict(
    backbone=dict(
        type="DiNAT",
        arch="dinat_base",
        drop_path_rate=0.5,
        dilations=[[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_base"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
