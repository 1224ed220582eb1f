#!/usr/bin/env bash
# Sets up .venv and runs every check: lint, format, tests.
#   bash tools/test.sh [--all] [PYTEST ARGUMENTS...]     --all: the tests marked slow too
# Files of tests run side by side, a process a core and four at most, each computing on one thread; -n 0: one by one.
set -euo pipefail
cd "$(dirname "$0")/.."

marker=(-m "not slow")
if [ "${1:-}" = "--all" ]; then
    marker=()
    shift
fi

bash tools/setup.sh dev openmmlab
venv=${VENV:-.venv}
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
export OMP_NUM_THREADS=1
exec "$venv/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile "${marker[@]}" "$@"
