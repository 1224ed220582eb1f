#!/usr/bin/env bash
# Trains on N GPUs of this machine, or on N of each of several machines.
#
#   bash classification/dist_train.sh N CONFIG DATA [options of train.py]
#   bash classification/dist_train.sh 8 configs/classification/nat_mini.yml IMAGENET --amp bf16
#
#   MAX_RESTARTS=3      start again after a process died, from the last checkpoint: implies --resume
#   NNODES=4            several machines; the same command on each, with one of them, and a free port, as meeting point:
#   RDZV_ENDPOINT=host:29500
#   RDZV_ID=name        tells jobs apart that meet at the same place
#   PYTHON=python3      the interpreter
#
# SIGTERM and SIGUSR1 make the run save and leave, within PET_SHUTDOWN_TIMEOUT seconds (60).
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
n=$1 config=$2 data=$3
shift 3

restarts=${MAX_RESTARTS:-0}
if [ "$restarts" -gt 0 ] && [[ " $* " != *" --resume"* ]]; then
    set -- "$@" --resume
fi
if [ -n "${RDZV_ENDPOINT:-}" ]; then
    meeting=(--nnodes "${NNODES:-1}" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT"
        --rdzv-id "${RDZV_ID:-${SLURM_JOB_ID:-natten}}")
elif [ "${NNODES:-1}" = 1 ]; then
    meeting=(--standalone)
else
    echo "error: NNODES is $NNODES: name one of the machines and a free port, RDZV_ENDPOINT=host:29500." >&2
    exit 2
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-60}
# Processes that are started again must not find the addresses of those that died in the store that torchrun keeps.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python}" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$n" --max-restarts "$restarts" \
    "$(dirname "$0")/train.py" "$data" --config "$config" "$@"
