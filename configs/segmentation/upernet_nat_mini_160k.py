# UPerNet, NAT-Mini: 50 M parameters, 900 GMACs at 2048x512 (arXiv:2204.07143).
# Published: ADE20K validation mIoU 45.1, multi-scale 46.4.
_base_ = ["./_base_/upernet.py", "./_base_/ade20k_160k.py"]

model = dict(
    backbone=dict(
        arch="nat_mini",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="nat_mini"),
    ),
)
