#!/usr/bin/env bash
# Sets up .venv and runs every check: lint, format, tests.
#   bash tools/test.sh [--all] [PYTEST ARGUMENTS...]     --all: the tests marked slow too
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
exec "$venv/bin/python" -m pytest "${marker[@]}" "$@"
