"""Classify images with a trained model; the same as the console command natzoo-predict.

python classification/predict.py cat.jpg holiday/ --checkpoint output/nat/best.pth
python classification/predict.py holiday/ --model nat_mini --pretrained --grid holiday.png --json holiday.json
"""

from natzoo_commands import predict

if __name__ == "__main__":
    predict()
