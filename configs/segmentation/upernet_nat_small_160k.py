# UPerNet, NAT-Small: 82 M parameters, 1010 GMACs at 2048x512 (arXiv:2204.07143).
# Published: ADE20K validation mIoU 48.0, multi-scale 49.5.
_base_ = ["./_base_/upernet.py", "./_base_/ade20k_160k.py"]

model = dict(
    backbone=dict(
        arch="nat_small",
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="nat_small"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
