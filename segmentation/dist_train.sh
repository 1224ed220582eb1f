#!/usr/bin/env bash
# Train on several GPUs of this machine, or with several processes on its CPUs.
#
#   bash segmentation/dist_train.sh CONFIG GPUS [options of train.py]
#   bash segmentation/dist_train.sh configs/segmentation/upernet_nat_mini_160k.py 8 --resume
#
# GPUS is the number of processes, one per GPU.
#
# Environment variables:
#   PORT=29500        Port through which the processes connect; any free port if unset.
#   PYTHON=python3    The interpreter.
set -euo pipefail
if [ $# -lt 2 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
config=$1 gpus=$2
shift 2
if [ -n "${PORT:-}" ]; then rendezvous=(--master-port "$PORT"); else rendezvous=(--standalone); fi
exec "${PYTHON:-python}" -m natzoo.launch "${rendezvous[@]}" --nproc-per-node "$gpus" \
    "$(dirname "$0")/train.py" "$config" "$@"
