# Mask2Former, DiNAT-Large, COCO instances: 220 M parameters, 522 GMACs (arXiv:2209.15001).
# Published: val2017 AP 50.8.
_base_ = "./_base_/mask2former_instance.py"
