# UPerNet, NAT-Base: 123 M parameters, 1137 GMACs at 2048x512 (arXiv:2204.07143).
# Published: ADE20K validation mIoU 48.5, multi-scale 49.7.
_base_ = ["./_base_/upernet.py", "./_base_/ade20k_160k.py"]

model = dict(
    backbone=dict(
        arch="nat_base",
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="nat_base"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
