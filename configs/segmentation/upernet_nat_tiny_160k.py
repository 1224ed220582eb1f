# UPerNet, NAT-Tiny: 58 M parameters, 934 GMACs at 2048x512 (arXiv:2204.07143).
# Published: ADE20K validation mIoU 47.1, multi-scale 48.4.
_base_ = ["./_base_/upernet.py", "./_base_/ade20k_160k.py"]

model = dict(
    backbone=dict(
        arch="nat_tiny",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="nat_tiny"),
    ),
)
