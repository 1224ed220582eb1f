#!/usr/bin/env bash
# detection/dist_train.sh CONFIG PROCESSES [OPTIONS OF train.py...]     one process a GPU, or on a CPU over Gloo
set -euo pipefail
config=${1:?config} processes=${2:?number of processes}
shift 2
arguments=("$config" "$@")
exec "${PYTHON:-python}" -m torch.distributed.run --nproc_per_node="$processes" --master_port="${PORT:-29500}" "$(dirname "$0")/train.py" "${arguments[@]}"
