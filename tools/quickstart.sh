#!/usr/bin/env bash
# The main job, small: sets up .venv, writes a data set of real scans, trains a NAT and a DiNAT on it, evaluates them,
# tries them on single images, and draws what came out. Minutes on two cores; safe to interrupt and run again.
set -euo pipefail
cd "$(dirname "$0")/.."

data=data/digits
output=output/quickstart
step() { printf '\n== %s\n' "$*"; }

step "1/5 setup"
bash tools/setup.sh train
python="${VENV:-.venv}/bin/python"

step "2/5 data: scikit-learn's digits"
"$python" tools/make_data.py digits "$data"

step "3/5 training"
start=$SECONDS
for name in nat dinat; do
    "$python" classification/train.py "$data" --config "configs/quickstart/$name.yml" --output "$output" --resume
done
trained=$((SECONDS - start))

step "4/5 evaluation"
for name in nat dinat; do
    echo "$name on held-out digits:"
    "$python" classification/validate.py "$data" --checkpoint "$output/$name/best.pth" | tee "$output/$name/top1.txt"
done
# The first held-out image of each class.
pictures=()
for folder in "$data"/val/*; do
    images=("$folder"/*.png)
    pictures+=("${images[0]}")
done
for name in nat dinat; do
    echo "$name says:"
    "$python" classification/predict.py "${pictures[@]}" --checkpoint "$output/$name/best.pth" --topk 2
done

step "5/5 pictures"
"$python" tools/visualize.py curves "$output/nat" "$output/dinat" --out "$output/curves.png"
for name in nat dinat; do
    "$python" tools/visualize.py attention "${pictures[@]:0:5}" --checkpoint "$output/$name/best.pth" \
        --out "$output/$name/attention.png"
done

step "done"
for name in nat dinat; do
    top1=$(grep -o 'top-1 [0-9.]*%' "$output/$name/top1.txt")
    printf '%-6s %s on held-out digits, at the best epoch\n' "$name" "$top1"
done
cat <<EOF
training took $trained s (less where an earlier run was gone on with)
checkpoints        $output/{nat,dinat}/best.pth
TensorBoard log    $output/{nat,dinat}/tensorboard   ($python -m tensorboard.main --logdir $output)
figures            $output/{nat,dinat}/summary.csv
learning curve     $output/curves.png
attention          $output/{nat,dinat}/attention.png
EOF
