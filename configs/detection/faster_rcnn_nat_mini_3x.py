# Faster R-CNN (boxes only), NAT-Mini, with the settings of Mask R-CNN. There is no published result.
_base_ = ["./_base_/faster_rcnn.py", "./_base_/coco_3x_boxes.py"]

model = dict(
    backbone=dict(
        arch="nat_mini",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="nat_mini"),
    ),
)
