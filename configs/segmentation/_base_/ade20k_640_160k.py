# ADE20K in crops of 640x640. --tta evaluates six scales with horizontal flips.
_base_ = ["mmseg::_base_/datasets/ade20k_640x640.py", "./schedule_160k.py"]

train_dataloader = dict(batch_size=2)
sizes = [(int(2560 * ratio), int(640 * ratio)) for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)]
# Replace only the scales in the base's pipeline for --tta.
_base_.tta_pipeline[1].transforms[0] = [dict(type="Resize", scale=size, keep_ratio=True) for size in sizes]
# Read label maps with the reduce_zero_label of the dataset, which a config for other data changes in one place.
_base_.train_dataloader.dataset.pipeline[1].reduce_zero_label = None
_base_.val_dataloader.dataset.pipeline[2].reduce_zero_label = None
_base_.test_dataloader.dataset.pipeline[2].reduce_zero_label = None
