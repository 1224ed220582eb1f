"""Train a detector; the same as the console command natzoo-detection-train.

python detection/train.py configs/quickstart/mask_rcnn.py
python detection/train.py configs/quickstart/mask_rcnn.py --resume
"""

from natzoo_commands import detection_train

if __name__ == "__main__":
    detection_train()
