# UPerNet, DiNAT_s-Large: 234 M parameters, 2466 GMACs at 2560x640 (arXiv:2209.15001).
# Published: ADE20K validation mIoU 53.4, multi-scale 54.6.
# Crops of 640x640, as in the paper; the configuration published with the code uses 512x512.
_base_ = ["./_base_/upernet.py", "./_base_/ade20k_640_160k.py"]

model = dict(
    backbone=dict(
        type="DiNAT_s",
        arch="dinat_s_large_21k",
        drop_path_rate=0.3,
        dilations=[[1, 20], [1, 10], [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5], [1, 2]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_s_large_21k"),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
    data_preprocessor=dict(size=(640, 640)),
)
