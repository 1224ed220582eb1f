"""Judge the frozen features of a model with k-nearest neighbors and a linear classifier; natzoo-probe does the same.

python classification/probe.py DATA --model nat_mini --pretrained
python classification/probe.py DATA --checkpoint output/nat/best.pth --results-file probe.csv
python classification/probe.py DATA --model nat_mini --random
"""

from natzoo_commands import probe

if __name__ == "__main__":
    probe()
