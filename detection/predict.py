"""Detect objects in pictures, folders, videos and URLs; the same as the console command natzoo-detection-predict.

python detection/predict.py configs/detection/mask_rcnn_nat_mini_3x.py nat_mini_maskrcnn street.jpg holiday/
python detection/predict.py configs/quickstart/mask_rcnn.py output/mask_rcnn/CHECKPOINT.pth film.mp4 --every 25
"""

from natzoo_commands import detection_predict

if __name__ == "__main__":
    detection_predict()
