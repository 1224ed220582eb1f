# A small Mask R-CNN to start from: copy this file, then set the folder and the classes of your data.
# tools/make_data.py converts VOC, YOLO and COCO to the layout that it reads.
_base_ = "./_base_/small_mask_rcnn.py"

data_root = "data/shapes/"
classes = ("circle", "square", "triangle")

dataset = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "instances_validation.json")
test_evaluator = val_evaluator

model = dict(roi_head=dict(bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))))
