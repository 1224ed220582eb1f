# Instance and panoptic Mask2Former on ADE20K, with mmdet: crops of 640x640, scales 0.5 to 2, 160 000 iterations.
folder = "data/ade/ADEChallengeData2016/"
crop_size = (640, 640)
augment = [
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoiceResize",
        scales=[64 * tenths for tenths in range(5, 21)],
        resize_type="ResizeShortestEdge",
        max_size=2560,
    ),
    dict(type="RandomCrop", crop_size=crop_size, crop_type="absolute", recompute_bbox=True, allow_negative_crop=True),
]
test_resize = dict(type="Resize", scale=(2560, 640), keep_ratio=True)
iterations = 160000
schedule = dict(_delete_=True, type="PolyLR", power=0.9, eta_min=0.0, begin=0, end=iterations, by_epoch=False)
loop = dict(max_iters=iterations, dynamic_intervals=[(1, 5000)])
