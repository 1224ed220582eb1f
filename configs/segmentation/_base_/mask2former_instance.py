# Mask2Former for instance segmentation, with mmdet: COCO, large-scale jittering, 100 epochs, total batch size 16.
_base_ = ["./mask2former.py", "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py"]

custom_imports = dict(imports=["natzoo.openmmlab"])
model = dict(backbone=_base_.backbone, panoptic_head=dict(in_channels=[192, 384, 768, 1536], num_queries=200))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.custom_keys))
param_scheduler = dict(end=737500, milestones=[655556, 710184])
train_cfg = dict(max_iters=737500, dynamic_intervals=[(735001, 737500)])
default_hooks, visualizer = _base_.two_checkpoints, _base_.tensorboard
train_dataloader = _base_.endless

# Pipeline steps for other datasets, combined with those of mask2former_ade20k.py or mask2former_cityscapes.py.
pad = dict(type="BatchFixedSizePad", img_pad_value=0, pad_mask=True, mask_pad_value=0, pad_seg=False)
load_image = dict(type="LoadImageFromFile", to_float32=True)
load_annotations = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
pack = [dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-5, 1e-5), by_mask=True), dict(type="PackDetInputs")]
test_pack = dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"))
