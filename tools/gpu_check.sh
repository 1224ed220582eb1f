#!/usr/bin/env bash
# Check and measure the CUDA kernels on the GPU of this machine, in at most 540 s. Options: bash tools/gpu_check.sh --help
# Needs PyTorch for CUDA and timm; compute-sanitizer, ncu and flex_attention are used if they are there.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/tools${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m gpu_checks "$@"
