"""Train a segmentation model; the same as the console command natzoo-segmentation-train.

python segmentation/train.py configs/quickstart/upernet.py
python segmentation/train.py configs/quickstart/upernet.py --resume
"""

from natzoo_commands import segmentation_train

if __name__ == "__main__":
    segmentation_train()
