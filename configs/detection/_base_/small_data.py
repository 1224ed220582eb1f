# A dataset in the layout that tools/make_data.py writes, and a short run. A config sets data_root and the classes.
_base_ = ["./runtime.py", "../../_base_/short_run.py"]

dataset_type = "CocoDataset"
load_annotations = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    load_annotations,
    dict(type="RandomResize", scale=(320, 320), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(256, 256)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(320, 320), keep_ratio=True),
    load_annotations,
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        type=dataset_type,
        ann_file="instances_training.json",
        data_prefix=dict(img="images/training/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        type=dataset_type,
        ann_file="instances_validation.json",
        data_prefix=dict(img="images/validation/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", metric=["bbox", "segm"])
test_evaluator = val_evaluator

train_cfg = dict(max_iters=600, val_interval=150)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=100, end=600),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(by_epoch=False, interval=150))
log_processor = dict(by_epoch=False, window_size=20)
auto_scale_lr = dict(base_batch_size=4)
