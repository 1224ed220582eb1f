# UPerNet, DiNAT_s-Tiny: 60 M parameters, 941 GMACs at 2048x512 (arXiv:2209.15001).
# Published: ADE20K validation mIoU 46.0, multi-scale 47.4.
_base_ = ["./_base_/upernet.py", "./_base_/ade20k_160k.py"]

model = dict(
    backbone=dict(
        type="DiNAT_s",
        arch="dinat_s_tiny",
        drop_path_rate=0.3,
        dilations=[[1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_s_tiny"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
