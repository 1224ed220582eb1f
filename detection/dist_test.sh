#!/usr/bin/env bash
# Evaluate on several GPUs of this machine, or with several processes on its CPUs.
#
#   bash detection/dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]
#   bash detection/dist_test.sh configs/detection/mask_rcnn_nat_mini_3x.py nat_mini_maskrcnn 8
#
# GPUS is the number of processes, one per GPU.
#
# Environment variables:
#   PORT=29500        Port through which the processes connect; any free port if unset.
#   PYTHON=python3    The interpreter.
set -euo pipefail
if [ $# -lt 3 ] || ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
config=$1 checkpoint=$2 gpus=$3
shift 3
if [ -n "${PORT:-}" ]; then rendezvous=(--master-port "$PORT"); else rendezvous=(--standalone); fi
exec "${PYTHON:-python}" -m natzoo.launch "${rendezvous[@]}" --nproc-per-node "$gpus" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" "$@"
