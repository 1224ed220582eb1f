"""Evaluate image classifiers: top-1 and top-5 accuracy; the same as the console command natzoo-validate.

python classification/validate.py DATA --checkpoint output/nat/best.pth
python classification/validate.py IMAGENET --model nat_mini --pretrained --amp bf16
python classification/validate.py IMAGENET --models 'nat_*' 'dinat_*' --pretrained --results-file results.csv
torchrun --standalone --nproc-per-node 8 classification/validate.py IMAGENET --model nat_mini --pretrained
"""

from natzoo_commands import validate

if __name__ == "__main__":
    validate()
