# A small Faster R-CNN, which needs boxes only, to start from: copy this file, then set the folder and the classes of
# your data. tools/make_data.py converts VOC, YOLO and COCO to the layout that it reads.
_base_ = ["./_base_/faster_rcnn.py", "./_base_/small_data.py"]

data_root = "data/shapes/"
classes = ("circle", "square", "triangle")

dataset = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "instances_validation.json", metric="bbox")
test_evaluator = val_evaluator
_base_.train_dataloader.dataset.pipeline[1].with_mask = False
_base_.val_dataloader.dataset.pipeline[2].with_mask = False
_base_.test_dataloader.dataset.pipeline[2].with_mask = False

model = dict(
    backbone=dict(depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), embed_dim=32, mlp_ratio=3.0, drop_path_rate=0.1),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=len(classes)),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=100), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=100)),
)
