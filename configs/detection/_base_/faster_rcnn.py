# Faster R-CNN with FPN, which needs boxes only. A config sets the backbone, and neck.in_channels if it differs.
_base_ = "mmdet::_base_/models/faster-rcnn_r50_fpn.py"

model = dict(backbone=dict(_delete_=True, type="NAT"), neck=dict(in_channels=[64, 128, 256, 512]))
