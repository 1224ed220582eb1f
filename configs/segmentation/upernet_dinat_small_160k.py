# UPerNet, DiNAT-Small: 82 M parameters, 1010 GMACs at 2048x512 (arXiv:2209.15001).
# Published: ADE20K validation mIoU 48.9, multi-scale 49.9.
_base_ = ["./_base_/upernet.py", "./_base_/ade20k_160k.py"]

model = dict(
    backbone=dict(
        type="DiNAT",
        arch="dinat_small",
        drop_path_rate=0.5,
        dilations=[[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_small"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
