# UPerNet, DiNAT-Mini: 50 M parameters, 900 GMACs at 2048x512 (arXiv:2209.15001).
# Published: ADE20K validation mIoU 45.8, multi-scale 47.2.
_base_ = ["./_base_/upernet.py", "./_base_/ade20k_160k.py"]

model = dict(
    backbone=dict(
        type="DiNAT",
        arch="dinat_mini",
        drop_path_rate=0.2,
        dilations=[[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_mini"),
    ),
)
