#!/usr/bin/env bash
# segmentation/dist_train.sh CONFIG PROCESSES [OPTIONS OF train.py...]     one process a GPU, or on a CPU over Gloo
set -euo pipefail
config=${1:?config} processes=${2:?number of processes}
shift 2
arguments=("$config" "$@")
exec "${PYTHON:-python}" -m torch.distributed.run "${PORT:+--master_port=}${PORT:---standalone}" --nproc_per_node="$processes" "$(dirname "$0")/train.py" "${arguments[@]}"
