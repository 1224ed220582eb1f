#!/usr/bin/env bash
# Build two wheels into OUT (default: dist):
#   natten-*-py3-none-any.whl        contains the kernel sources, which are compiled on first use
#   natten-*-py3-none-PLATFORM.whl   also contains compiled CPU kernels for this kind of machine; needs no compiler
#   bash tools/build_wheel.sh [OUT]
# Environment: PYTHON, the interpreter (default: .venv/bin/python); CXX, the C++ compiler.
# The compiled kernels need a C++ runtime at least as new as this machine's, so the wheel has no manylinux tag.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

[ $# -le 1 ] || fail "OUT must be one folder, but there are $# arguments."
mkdir -p "${1:-dist}" || fail "${1:-dist} cannot be created; choose another folder."
out=$(cd "${1:-dist}" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import torch' 2> /dev/null || fail "$python has no PyTorch; run tools/setup.sh, or set PYTHON to another interpreter."

# Build from a clean copy, since setuptools packs leftovers of earlier builds.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r pyproject.toml README.md LICENSE natten natzoo natzoo_commands.py "$copy"
rm -rf "$copy/natten/lib"
find "$copy" -name __pycache__ -prune -exec rm -r {} +

isolation=()
if "$python" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2> /dev/null; then
    isolation=(--no-build-isolation)  # avoids a download
fi

build() {
    rm -rf "$copy/build"
    "$python" -m pip wheel --quiet --no-deps "${isolation[@]}" --wheel-dir "$out" "$@" "$copy" ||
        fail "pip could not build the wheel; see the messages above."
}

build
levels=$("$python" -c 'from natten.build import LEVELS; print(*(f"--cpu {level}" for level in LEVELS))')
# shellcheck disable=SC2086 # several words
"$python" -m natten.build $levels --out "$copy/natten/lib" || exit 2
platform=$("$python" -c 'import re, sysconfig; print(re.sub("[-.]", "_", sysconfig.get_platform()))')
build --config-settings="--build-option=--plat-name=$platform"
ls "$out"/natten-*.whl
