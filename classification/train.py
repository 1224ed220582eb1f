"""Train an image classifier; the same as the console command natzoo-train.

python classification/train.py DATA --config configs/quickstart/nat.yml
python classification/train.py DATA --config configs/quickstart/nat.yml --lr 5e-4 --resume
bash classification/dist_train.sh configs/classification/nat_mini.yml 8 IMAGENET
"""

from natzoo_commands import train

if __name__ == "__main__":
    train()
