# What --tta does with each size of a picture: it is segmented as it is and mirrored. A config adds the sizes.
each_size = [
    [dict(type="RandomFlip", prob=prob, direction="horizontal") for prob in (0.0, 1.0)],
    [dict(type="LoadAnnotations")],
    [dict(type="PackSegInputs")],
]
