# UPerNet with an auxiliary head. A config sets the backbone, and the heads' in_channels if they differ from NAT-Mini's.
_base_ = "mmseg::_base_/models/upernet_swin.py"

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type="NAT"),
    decode_head=dict(in_channels=[64, 128, 256, 512], num_classes=150),
    auxiliary_head=dict(in_channels=256, num_classes=150),
)
