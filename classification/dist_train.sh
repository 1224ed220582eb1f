#!/usr/bin/env bash
# Train on several GPUs of this machine, or of several machines.
#
#   bash classification/dist_train.sh CONFIG GPUS [DATA] [options of train.py]
#   bash classification/dist_train.sh configs/classification/nat_mini.yml 8 IMAGENET --amp bf16
#
# GPUS is the number of processes per machine, one per GPU. The former order, GPUS CONFIG, also works.
#
# Environment variables:
#   MAX_RESTARTS=3                Restart up to 3 times from the last checkpoint if a process dies; implies --resume.
#   NNODES=4                      Number of machines. Run the same command on each of them.
#   RDZV_ENDPOINT=host:29500      One of the machines and a free port; required if NNODES > 1.
#   RDZV_ID=name                  Distinguishes jobs that use the same endpoint.
#   PYTHON=python3                The Python interpreter.
#   PET_SHUTDOWN_TIMEOUT=60       Seconds in which a run must save and exit after a signal; then it is killed.
#
# On SIGTERM, SIGUSR1 or Ctrl-C the run saves a checkpoint and exits. The exit status is that of the first process that
# failed: 2 for a user error, 128 + the number of the signal after a signal.
set -euo pipefail
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; }
is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }
if [ "${1:-}" = --help ]; then
    usage
    exit 0
elif [ $# -ge 2 ] && is_count "$2"; then
    config=$1 gpus=$2
elif [ $# -ge 2 ] && is_count "$1"; then
    gpus=$1 config=$2
else
    usage >&2
    exit 2
fi
shift 2
python=${PYTHON:-python}

restarts=${MAX_RESTARTS:-0}
if [ "$restarts" -gt 0 ] && [[ " $* " != *" --resume"* ]]; then
    set -- "$@" --resume
fi
if [ -n "${RDZV_ENDPOINT:-}" ]; then
    rendezvous=(--nnodes "${NNODES:-1}" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT"
        --rdzv-id "${RDZV_ID:-${SLURM_JOB_ID:-natten}}")
elif [ "${NNODES:-1}" = 1 ]; then
    rendezvous=(--standalone)
else
    echo "error: NNODES is $NNODES but RDZV_ENDPOINT is not set; set it to one of the machines and a free port, host:29500" >&2
    exit 2
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-60}
find_torch='import importlib.util as util; print(util.find_spec("torch").submodule_search_locations[0])'
if ! torch=$("$python" -c "$find_torch" 2>/dev/null); then
    echo "error: $python has no PyTorch; activate the environment created by tools/setup.sh, or set PYTHON" >&2
    exit 2
fi
if ! grep -q shutdown-timeout "$torch/distributed/run.py"; then
    echo "note: torchrun of this PyTorch ignores PET_SHUTDOWN_TIMEOUT; a run has 30 seconds to save after a signal" >&2
fi
# Restarted processes must not find the addresses of dead ones in torchrun's store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "$python" -m natzoo.launch "${rendezvous[@]}" --nproc-per-node "$gpus" --max-restarts "$restarts" \
    "$(dirname "$0")/train.py" "$@" --config "$config"
