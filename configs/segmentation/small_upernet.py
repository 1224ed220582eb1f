# A small UPerNet to start from: copy this file, then set the folder and the classes of your data.
# tools/make_data.py converts VOC, YOLO and COCO to the layout that it reads.
_base_ = "./_base_/upernet_small.py"

data_root = "data/shapes"
classes = ["background", "circle", "square", "triangle"]

dataset = dict(data_root=data_root, metainfo=dict(classes=classes), img_suffix=".png")
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader

model = dict(decode_head=dict(num_classes=len(classes)), auxiliary_head=dict(num_classes=len(classes)))
