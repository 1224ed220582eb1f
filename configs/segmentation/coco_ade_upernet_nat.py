# A small UPerNet for photographs with COCO's super-categories in ADE20K's layout: too few to learn from, enough to try.
_base_ = "./nuclei_upernet_nat.py"

model = dict(decode_head=dict(num_classes=13), auxiliary_head=dict(num_classes=13))
data_root = "data/coco_ade"
metainfo = dict(
    _delete_=True,
    classes=[
        *("other", "person", "vehicle", "outdoor", "animal", "accessory", "sports", "kitchen", "food", "furniture"),
        *("electronic", "appliance", "indoor"),
    ],
    palette=[[40 * (label % 6), 60 * (label // 6 % 4), 85 * (label % 4)] for label in range(13)],
)
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, img_suffix=".jpg"))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, img_suffix=".jpg"))
test_dataloader = val_dataloader
