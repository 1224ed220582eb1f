#!/usr/bin/env bash
# A small end-to-end example: set up .venv, write a data set of scanned digits, train a NAT and a DiNAT on it, evaluate
# them, classify single images, and draw learning curves and attention. Takes minutes on two CPU cores.
#   bash tools/quickstart.sh
# If it is interrupted, run it again: it resumes.
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
    "$python" classification/train.py "$data" --config "configs/quickstart/$name.yml" --work-dir "$output/$name" --resume
done
trained=$((SECONDS - start))

step "4/5 evaluation"
for name in nat dinat; do
    echo "$name on the validation digits:"
    "$python" classification/validate.py "$data" --checkpoint "$output/$name/best.pth" | tee "$output/$name/top1.txt"
done
# The first validation image of each class.
first_images=()
for folder in "$data"/val/*; do
    images=("$folder"/*.png)
    first_images+=("${images[0]}")
done
for name in nat dinat; do
    echo "predictions of $name:"
    "$python" classification/predict.py "${first_images[@]}" --checkpoint "$output/$name/best.pth" --topk 2
done

step "5/5 figures"
"$python" tools/visualize.py curves "$output/nat" "$output/dinat" --out "$output/curves.png"
for name in nat dinat; do
    "$python" tools/visualize.py attention "${first_images[@]:0:5}" --checkpoint "$output/$name/best.pth" \
        --out "$output/$name/attention.png"
done

step "done"
for name in nat dinat; do
    top1=$(grep -o 'top-1 [0-9.]*%' "$output/$name/top1.txt")
    printf '%-6s %s on the validation digits (best epoch)\n' "$name" "$top1"
done
cat <<EOF
training time      $trained s (of this run)
checkpoints        $output/{nat,dinat}/best.pth
TensorBoard log    $output/{nat,dinat}/tensorboard   ($python -m tensorboard.main --logdir $output)
metrics            $output/{nat,dinat}/summary.csv
learning curves    $output/curves.png
attention          $output/{nat,dinat}/attention.png
EOF
