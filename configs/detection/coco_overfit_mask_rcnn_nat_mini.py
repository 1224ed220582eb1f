# Overfit Mask R-CNN with NAT-Mini on four images, to check the whole pipeline from annotations to masks:
# python detection/train.py configs/detection/coco_overfit_mask_rcnn_nat_mini.py --data COCO_DIR
_base_ = "./mask_rcnn_nat_mini_3x.py"

# Few proposals, so that an iteration takes seconds on two cores.
model = dict(
    backbone=dict(drop_path_rate=0.0, init_cfg=None),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
load, annotations = dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
resize = dict(type="Resize", scale=(320, 320), keep_ratio=True)
four = [1, 3, 7, 14]  # images without tiny objects, in a small subset of COCO
pack = dict(
    type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "instances")
)
train_pipeline = [load, annotations, resize, pack]
test_pipeline = [load, resize, annotations, pack]  # compare boxes at the original size
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    sampler=dict(type="InfiniteSampler"),
    batch_sampler=None,
    dataset=dict(indices=four, pipeline=train_pipeline),
)
# The same four images: indices refer to the images that remain after the filter of the training set.
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        test_mode=False,
        indices=four,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=None, metric=["bbox", "segm"])
test_evaluator = val_evaluator

train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=200, val_interval=50)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=2e-4), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type="MultiStepLR", by_epoch=False, milestones=[150], gamma=0.1),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(by_epoch=False, interval=50))
log_processor = dict(by_epoch=False, window_size=10)
