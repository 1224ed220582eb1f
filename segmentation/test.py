"""Evaluate a segmentation model; the same as the console command natzoo-segmentation-test.

python segmentation/test.py configs/segmentation/upernet_nat_mini_160k.py nat_mini_upernet
python segmentation/test.py configs/quickstart/upernet.py output/upernet/CHECKPOINT.pth --show-dir output/segmented
"""

from natzoo_commands import segmentation_test

if __name__ == "__main__":
    segmentation_test()
