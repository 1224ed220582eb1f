"""Evaluate a detector; the same as the console command natzoo-detection-test.

python detection/test.py configs/detection/mask_rcnn_nat_mini_3x.py nat_mini_maskrcnn
python detection/test.py configs/quickstart/mask_rcnn.py output/mask_rcnn/CHECKPOINT.pth --show-dir output/detected
"""

from natzoo_commands import detection_test

if __name__ == "__main__":
    detection_test()
