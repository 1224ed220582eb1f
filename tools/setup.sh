#!/usr/bin/env bash
# Makes .venv and installs the project into it.
#   bash tools/setup.sh [EXTRA...]     extras: train (default), hf, openmmlab, dev
# Safe to run again: what is installed already stays. PYTHON names the interpreter, VENV another place than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
extras=$(IFS=,; echo "${*:-train}")

fail() { echo "error: $*" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

check_disk() {
    # PyTorch with its CUDA libraries takes about 6 GB, and as much again for a moment while it is unpacked.
    local free_mb
    free_mb=$(df -Pm "$venv" | awk 'NR == 2 {print $4}')
    if [ "$free_mb" -lt 9000 ]; then
        fail "the disk has $free_mb MB free, but PyTorch needs about 9000: free some, or install a CPU build first (README)."
    fi
}

# A torch that is there already decides which torchvision fits; pip would rather replace it by the newest.
write_torch_constraints() {
    "$venv/bin/python" - <<'EOF' > "$venv/torch-constraints.txt"
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "torchvision"):
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        pass
EOF
}

explain_pip_failure() {
    if grep -q "No space left on device" "$1"; then
        fail "the disk became full: free some space and run this again."
    elif grep -qiE "connection ?error|connection broken|temporary failure|timed out|SSLError|ProxyError|from versions: none" "$1"; then
        fail "a download failed ($(grep -oE 'ERROR: .*' "$1" | head -n 1)): check the network and run this again."
    fi
    fail "pip could not install the packages: $1 tells why."
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    [ -n "$python" ] || fail "Python 3.11 or newer is needed, but ${PYTHON:-python3} is $(${PYTHON:-python3} --version 2>&1 | tail -n 1): install it, or name it with PYTHON=..."
    echo "making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || { rm -rf "$venv"; fail "$python could not make $venv: on Debian and Ubuntu install python3-venv, and check the disk."; }
fi

"$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$venv has $("$venv/bin/python" --version), but Python 3.11 or newer is needed: remove $venv and run this again."
"$venv/bin/python" -m pip --version > /dev/null 2>&1 || "$venv/bin/python" -m ensurepip --upgrade > /dev/null ||
    fail "$venv has no pip: remove $venv and run this again."

stamp="$venv/installed-$extras-$({ pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d ' ' -f 1)"
if [ -e "$stamp" ]; then
    echo "$venv is up to date ($extras)"
    exit 0
fi

"$venv/bin/python" -c 'import torch' 2>/dev/null || check_disk
write_torch_constraints
echo "installing into $venv: natten[$extras]"
log="$venv/install.log"
rm -f "$log"
"$venv/bin/python" -m pip install --log "$log" \
    --constraint constraints.txt --constraint "$venv/torch-constraints.txt" --editable ".[$extras]" ||
    explain_pip_failure "$log"
echo "CPU kernels: compiled once for this machine, in about 20 s"
"$venv/bin/python" -m natten.build || true # without a compiler a slower way serves, which natten says when it is used
touch "$stamp"
