#!/usr/bin/env bash
# segmentation/dist_test.sh CONFIG CHECKPOINT PROCESSES [OPTIONS OF test.py...]     one process a GPU, or on a CPU over Gloo
set -euo pipefail
config=${1:?config} checkpoint=${2:?checkpoint} processes=${3:?number of processes}
shift 3
arguments=("$config" "$checkpoint" "$@")
exec "${PYTHON:-python}" -m torch.distributed.run "${PORT:+--master_port=}${PORT:---standalone}" --nproc_per_node="$processes" "$(dirname "$0")/test.py" "${arguments[@]}"
