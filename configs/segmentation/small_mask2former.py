# A small Mask2Former for instance segmentation to start from: copy this file, then set the folder and the classes of
# your data. tools/make_data.py converts VOC, YOLO and COCO to the layout that it reads.
_base_ = "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py"

data_root = "data/shapes/"
classes = ("circle", "square", "triangle")

custom_imports = dict(imports=["natzoo.openmmlab"])
counts = dict(num_things_classes=len(classes), num_stuff_classes=0)
pad = dict(type="BatchFixedSizePad", size=(256, 256), img_pad_value=0, pad_mask=True, mask_pad_value=0, pad_seg=False)
model = dict(
    data_preprocessor=dict(batch_augments=[pad]),
    backbone=dict(
        _delete_=True,
        type="NAT",
        depths=(2, 2, 4, 2),
        num_heads=(1, 2, 4, 8),
        embed_dim=32,
        mlp_ratio=3.0,
        drop_path_rate=0.1,
    ),
    panoptic_head=dict(
        in_channels=[32, 64, 128, 256],
        feat_channels=64,
        out_channels=64,
        num_queries=30,
        **counts,
        pixel_decoder=dict(
            encoder=dict(
                num_layers=2,
                layer_cfg=dict(
                    self_attn_cfg=dict(embed_dims=64, num_heads=4),
                    ffn_cfg=dict(embed_dims=64, feedforward_channels=128),
                ),
            ),
            positional_encoding=dict(num_feats=32),
        ),
        positional_encoding=dict(num_feats=32),
        transformer_decoder=dict(
            num_layers=3,
            layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=64, num_heads=4),
                cross_attn_cfg=dict(embed_dims=64, num_heads=4),
                ffn_cfg=dict(embed_dims=64, feedforward_channels=128),
            ),
        ),
        loss_cls=dict(class_weight=[1.0] * len(classes) + [0.1]),
    ),
    panoptic_fusion_head=counts,
    train_cfg=dict(num_points=1024),
    test_cfg=dict(max_per_image=30),
)

load_annotations = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    load_annotations,
    dict(type="RandomResize", scale=(320, 320), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(256, 256), crop_type="absolute", recompute_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-5, 1e-5), by_mask=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(320, 320), keep_ratio=True),
    load_annotations,
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
dataset = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    sampler=dict(type="InfiniteSampler"),
    batch_sampler=None,
    dataset=dict(
        **dataset,
        ann_file="instances_training.json",
        data_prefix=dict(img="images/training/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        **dataset,
        ann_file="instances_validation.json",
        data_prefix=dict(img="images/validation/"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "instances_validation.json", metric=["bbox", "segm"])
test_evaluator = val_evaluator

train_cfg = dict(max_iters=1000, val_interval=250, dynamic_intervals=None)
optim_wrapper = dict(
    optimizer=dict(lr=5e-4),
    paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0), backbone=dict(lr_mult=1.0, decay_mult=1.0))),
)
param_scheduler = dict(_delete_=True, type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=1000, by_epoch=False)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=250, max_keep_ckpts=2))
log_processor = dict(window_size=20)
auto_scale_lr = dict(base_batch_size=4)
visualizer = dict(vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
