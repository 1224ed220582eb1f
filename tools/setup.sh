#!/usr/bin/env bash
# Create .venv and install the project into it, in editable mode.
#   bash tools/setup.sh [EXTRA...]     extras: train (default), hf, openmmlab, wheels, dev
# Run it again to update: installed packages are kept.
# Environment: PYTHON, the interpreter (3.11 to 3.14; default: the first one found); VENV, a folder other than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
extras=$(IFS=,; echo "${*:-train}")
is_supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'

fail() { echo "error: $*" >&2; exit 2; }

version_of() { "$1" --version 2>&1 | tail -n 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.14 python3.12 python3.11}; do
        if "$candidate" -c "$is_supported" 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
}

check_disk() {
    # PyTorch with its CUDA libraries takes about 6 GB, plus temporary space while it is unpacked.
    local free_mb
    free_mb=$(df -Pm "$venv" | awk 'NR == 2 {print $4}')
    if [ "$free_mb" -lt 9000 ]; then
        fail "$venv has $free_mb MB of free disk space, but PyTorch needs 9000; free some, or install a CPU build first (README)."
    fi
}

# An installed torch decides which torchvision fits; without constraints pip would replace it by the newest.
write_torch_constraints() {
    "$venv/bin/python" - <<'PYTHON' > "$venv/torch-constraints.txt"
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "torchvision"):
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        pass
PYTHON
}

explain_pip_failure() {
    if grep -q "No space left on device" "$1"; then
        fail "the disk is full; free some space and run this again."
    elif grep -qiE "connection ?error|connection broken|temporary failure|timed out|SSLError|ProxyError|from versions: none" "$1"; then
        fail "a download failed ($(grep -oE 'ERROR: .*' "$1" | head -n 1)); check the network and run this again."
    fi
    fail "pip failed; see $1."
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    [ -n "$python" ] || fail "Python 3.11 to 3.14 is required, but ${PYTHON:-python3} is $(version_of "${PYTHON:-python3}"); install one, or set PYTHON to its path."
    echo "Creating $venv with $(version_of "$python")"
    "$python" -m venv "$venv" || { rm -rf "$venv"; fail "$python cannot create $venv; install python3-venv (Debian, Ubuntu), and check the disk space."; }
fi

"$venv/bin/python" -c "$is_supported" ||
    fail "$venv has $(version_of "$venv/bin/python"), but Python 3.11 to 3.14 is required; remove $venv and run this again."
"$venv/bin/python" -m pip --version > /dev/null 2>&1 || "$venv/bin/python" -m ensurepip --upgrade > /dev/null ||
    fail "$venv has no pip; remove $venv and run this again."

stamp="$venv/installed-$extras-$({ pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d ' ' -f 1)"
if [ -e "$stamp" ]; then
    echo "$venv is up to date ($extras)"
    exit 0
fi

if ! "$venv/bin/python" -c 'import torch' 2> /dev/null; then
    check_disk
    if [ "$(uname)" = Linux ] && ! command -v nvidia-smi > /dev/null; then
        echo "note: no NVIDIA driver found, but pip will download PyTorch with CUDA (6 GB on disk); for a CPU build, stop and run"
        echo "      $venv/bin/python -m pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu"
    fi
fi
write_torch_constraints
echo "Installing natten[$extras] into $venv"
log="$venv/install.log"
rm -f "$log"
"$venv/bin/python" -m pip install --log "$log" \
    --constraint constraints.txt --constraint "$venv/torch-constraints.txt" --editable ".[$extras]" ||
    explain_pip_failure "$log"
echo "CPU kernels:"
"$venv/bin/python" -m natten.build || true # without a compiler natten falls back to PyTorch, with a warning
touch "$stamp"
