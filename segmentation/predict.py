"""Segment pictures, folders, videos and URLs; the same as the console command natzoo-segmentation-predict.

python segmentation/predict.py configs/segmentation/upernet_nat_mini_160k.py nat_mini_upernet street.jpg holiday/
python segmentation/predict.py configs/quickstart/upernet.py output/upernet/CHECKPOINT.pth film.mp4 --every 25
"""

from natzoo_commands import segmentation_predict

if __name__ == "__main__":
    segmentation_predict()
