# Mask2Former, DiNAT-Large, Cityscapes panoptic: 220 M parameters, 522 GMACs (arXiv:2209.15001).
# Published: PQ 67.2, AP 44.5, mIoU 83.4.
_base_ = ["./_base_/mask2former_panoptic.py", "./_base_/mask2former_cityscapes.py"]

custom_imports = dict(imports=["natzoo.openmmlab", "natzoo.openmmlab.panoptic_data"])
things, stuff = 8, 11
counts = dict(num_things_classes=things, num_stuff_classes=stuff)
image_size = _base_.crop_size
model = dict(
    data_preprocessor=dict(batch_augments=[dict(**_base_.pad, size=image_size)]),
    panoptic_head=dict(**counts, loss_cls=dict(class_weight=[1.0] * (things + stuff) + [0.1])),
    panoptic_fusion_head=counts,
)

data_root = _base_.folder
train_pipeline = [_base_.load_image, _base_.load_annotations, *_base_.augment, *_base_.pack]
test_pipeline = [_base_.load_image, _base_.test_resize, _base_.load_annotations, _base_.test_pack]
train_dataloader = dict(
    dataset=dict(
        type="CityscapesPanopticDataset",
        data_root=data_root,
        ann_file="gtFine/cityscapes_panoptic_train.json",
        data_prefix=dict(img="leftImg8bit/train/", seg="gtFine/cityscapes_panoptic_train/"),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type="CityscapesPanopticDataset",
        data_root=data_root,
        ann_file="gtFine/cityscapes_panoptic_val.json",
        data_prefix=dict(img="leftImg8bit/val/", seg="gtFine/cityscapes_panoptic_val/"),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
val_evaluator = [
    dict(
        type="PanopticMetric",
        ann_file=data_root + "gtFine/cityscapes_panoptic_val.json",
        seg_prefix=data_root + "gtFine/cityscapes_panoptic_val/",
    )
]
test_evaluator = val_evaluator

param_scheduler, train_cfg = _base_.schedule, _base_.loop
