# Mask R-CNN with FPN; a config adds the backbone's size, and the channels of its four maps where they are not Mini's.
_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"

model = dict(backbone=dict(_delete_=True, type="NAT"), neck=dict(in_channels=[64, 128, 256, 512]))
