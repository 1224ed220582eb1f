#!/usr/bin/env bash
# Set up .venv and run every check: lint, format, types, tests.
#   bash tools/test.sh [--all] [PYTEST ARGUMENTS...]     --all: include the tests marked slow
# Test files run in parallel, with one process per core, at most four, and one thread each. Disable this with -n 0.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n== %s\n' "$*"; }

marker=(-m "not slow")
if [ "${1:-}" = "--all" ]; then
    marker=()
    shift
fi

# pytest-xdist does not report paths that do not exist.
previous=""
for word in "$@"; do
    path=${word%%::*}
    # A word after an option may be its value, except after flags such as -x and -q.
    if [[ $word != -* && ($previous != -* || $previous =~ ^-[xqvsl]+$) && ! -e $path ]]; then
        echo "error: $path does not exist; pass paths relative to $PWD." >&2
        exit 2
    fi
    previous=$word
done

step "setup: install the project with the extras dev and openmmlab"
bash tools/setup.sh dev openmmlab
venv=${VENV:-.venv}

step "lint: ruff check"
"$venv/bin/ruff" check .

step "format: ruff format --check"
"$venv/bin/ruff" format --check .

step "types: mypy"
"$venv/bin/python" -m mypy

export OMP_NUM_THREADS=1
pytest=("$venv/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile "${marker[@]}" "$@")
step "tests: ${pytest[*]}"
exec "${pytest[@]}"
