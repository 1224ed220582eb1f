# Mask R-CNN with FPN. A config sets the backbone, and neck.in_channels if it differs from NAT-Mini's.
_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"

model = dict(backbone=dict(_delete_=True, type="NAT"), neck=dict(in_channels=[64, 128, 256, 512]))
