#!/usr/bin/env bash
# Trains on N GPUs of this machine, or on N of each of several machines.
#
#   bash classification/dist_train.sh N CONFIG [DATA] [options of train.py]
#   bash classification/dist_train.sh 8 configs/classification/nat_mini.yml IMAGENET --amp bf16
#
#   MAX_RESTARTS=3      start again after a process died, from the last checkpoint: implies --resume
#   NNODES=4            several machines; the same command on each, with one of them, and a free port, as meeting point:
#   RDZV_ENDPOINT=host:29500
#   RDZV_ID=name        tells jobs apart that meet at the same place
#   PYTHON=python3      the interpreter
#
# SIGTERM, SIGUSR1 and Ctrl-C make the run save and leave, within PET_SHUTDOWN_TIMEOUT seconds (60). The exit status is
# that of the process that failed first, 2 for a mistake, or 128 + the signal's number.
set -euo pipefail
usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; }
if [ "${1:-}" = --help ]; then
    usage
    exit 0
elif [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    usage >&2
    exit 2
fi
n=$1 config=$2
shift 2
python=${PYTHON:-python}

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
where='import importlib.util as util; print(util.find_spec("torch").submodule_search_locations[0])'
if ! torch=$("$python" -c "$where" 2>/dev/null); then
    echo "error: $python has no PyTorch: activate the environment that tools/setup.sh made, or set PYTHON." >&2
    exit 2
fi
# Older ones do not read the timeout.
if ! grep -q shutdown-timeout "$torch/distributed/run.py"; then
    echo "note: torchrun of this PyTorch gives a run 30 seconds to save after a signal, not $PET_SHUTDOWN_TIMEOUT." >&2
fi
# Processes that are started again must not find the addresses of those that died in the store that torchrun keeps.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "$python" "$(dirname "$0")/launch.py" "${meeting[@]}" --nproc-per-node "$n" --max-restarts "$restarts" \
    "$(dirname "$0")/train.py" "$@" --config "$config"
