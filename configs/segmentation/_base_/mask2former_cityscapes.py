# Instance and panoptic Mask2Former on Cityscapes, with mmdet: crops of 512x1024, scales 0.5 to 2, 90 000 iterations.
folder = "data/cityscapes/"
crop_size = (512, 1024)
augment = [
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoiceResize",
        scales=[int(1024 * tenths / 10) for tenths in range(5, 21)],
        resize_type="ResizeShortestEdge",
        max_size=4096,
    ),
    dict(type="RandomCrop", crop_size=crop_size, crop_type="absolute", recompute_bbox=True, allow_negative_crop=True),
]
test_resize = dict(type="Resize", scale=(2048, 1024), keep_ratio=True)
iterations = 90000
schedule = dict(_delete_=True, type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=iterations, by_epoch=False)
loop = dict(max_iters=iterations, dynamic_intervals=[(1, 5000)])
