# A small Mask R-CNN that trains in minutes on two cores. A config sets the classes and the dataset.
_base_ = ["./mask_rcnn.py", "./small_data.py"]

model = dict(
    backbone=dict(depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), embed_dim=32, mlp_ratio=3.0, drop_path_rate=0.1),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=100), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=100)),
)
