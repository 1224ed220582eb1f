# A small Mask R-CNN for nuclei in microscope images, trained on 128 images in half an hour on two cores.
_base_ = "./_base_/small_mask_rcnn.py"

# There may be hundreds of nuclei in an image.
model = dict(
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=300), rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300), rcnn=dict(max_per_img=200)),
)

data_root = "data/nuclei/"
nuclei = dict(data_root=data_root, metainfo=dict(classes=("nucleus",), palette=[(255, 160, 0)]))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomResize", scale=(320, 320), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(256, 256)),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(**nuclei, pipeline=train_pipeline))
val_dataloader = dict(dataset=nuclei)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "instances_validation.json")
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best="coco/segm_mAP_50"))
