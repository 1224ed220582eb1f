# A small UPerNet for COCO's supercategories in ADE20K's layout, to try training on a few photographs.
_base_ = "./_base_/upernet_small.py"

model = dict(decode_head=dict(num_classes=13), auxiliary_head=dict(num_classes=13))
data_root = "data/coco_ade"
metainfo = dict(
    classes=[
        *("other", "person", "vehicle", "outdoor", "animal", "accessory", "sports", "kitchen", "food", "furniture"),
        *("electronic", "appliance", "indoor"),
    ],
    palette=[[40 * (label % 6), 60 * (label // 6 % 4), 85 * (label % 4)] for label in range(13)],
)
photographs = dict(data_root=data_root, metainfo=metainfo, img_suffix=".jpg")
train_dataloader = dict(dataset=photographs)
val_dataloader = dict(dataset=photographs)
test_dataloader = val_dataloader
