# Mask2Former, DiNAT-Large, COCO panoptic: 220 M parameters, 522 GMACs (arXiv:2209.15001).
# Published: val2017 PQ 58.5, AP 49.2, mIoU 68.3.
_base_ = "./_base_/mask2former_panoptic.py"
