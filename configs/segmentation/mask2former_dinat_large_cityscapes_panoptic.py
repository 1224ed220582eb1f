# Mask2Former, DiNAT-Large, Cityscapes panoptic: 220 M parameters, 522 GMACs (arXiv:2209.15001).
# Published: PQ 67.2, AP 44.5, mIoU 83.4.
_base_ = "./_base_/mask2former_panoptic.py"

custom_imports = dict(imports=["natzoo.openmmlab", "natzoo.openmmlab.cityscapes"])

things, stuff = 8, 11
image_size = (512, 1024)
model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(
                type="BatchFixedSizePad",
                size=image_size,
                img_pad_value=0,
                pad_mask=True,
                mask_pad_value=0,
                pad_seg=True,
                seg_pad_value=255,
            )
        ]
    ),
    panoptic_head=dict(
        num_things_classes=things,
        num_stuff_classes=stuff,
        loss_cls=dict(class_weight=[1.0] * (things + stuff) + [0.1]),
    ),
    panoptic_fusion_head=dict(num_things_classes=things, num_stuff_classes=stuff),
)

data_root = "data/cityscapes/"
train_pipeline = [
    dict(type="LoadImageFromFile", to_float32=True),
    dict(type="LoadPanopticAnnotations", with_bbox=True, with_mask=True, with_seg=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoiceResize",
        scales=[int(1024 * tenths / 10) for tenths in range(5, 21)],
        resize_type="ResizeShortestEdge",
        max_size=4096,
    ),
    dict(type="RandomCrop", crop_size=image_size, crop_type="absolute", recompute_bbox=True, allow_negative_crop=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile", to_float32=True),
    dict(type="Resize", scale=(2048, 1024), keep_ratio=True),
    dict(type="LoadPanopticAnnotations", with_bbox=True, with_mask=True, with_seg=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
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
        type="CocoPanopticMetric",
        ann_file=data_root + "gtFine/cityscapes_panoptic_val.json",
        seg_prefix=data_root + "gtFine/cityscapes_panoptic_val/",
    )
]
test_evaluator = val_evaluator

param_scheduler = dict(_delete_=True, type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=90000, by_epoch=False)
max_iters = 90000
train_cfg = dict(max_iters=90000, dynamic_intervals=[(1, 5000)])
