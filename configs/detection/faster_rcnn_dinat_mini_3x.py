# Faster R-CNN (boxes only), DiNAT-Mini, with the settings of Mask R-CNN. There is no published result.
_base_ = ["./_base_/faster_rcnn.py", "./_base_/coco_3x_boxes.py"]

model = dict(
    backbone=dict(
        type="DiNAT",
        arch="dinat_mini",
        drop_path_rate=0.2,
        dilations=[[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]],
        init_cfg=dict(type="Pretrained", checkpoint="dinat_mini"),
    ),
)
