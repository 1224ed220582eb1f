#!/usr/bin/env bash
# Run the goldens in Python and PyTorch for arm64, under emulation, with the library from a wheel.
#   bash tests/portable/arm64_python.sh FOLDER WHEEL     FOLDER is created, and takes 1.2 GB
# Needs debootstrap and qemu-user-static (Debian and Ubuntu: apt install), uv (pip install uv), and root.
set -euo pipefail
if [ $# -ne 2 ] || [ ! -f "$2" ]; then
    echo "error: pass a new folder and natten's wheel for manylinux_2_28_aarch64." >&2
    exit 2
fi
tests=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "$2")
mkdir "$1"
cd "$1"

# Debian's packages are unpacked, not installed: installing would start programs for arm64.
debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,libgomp1 bookworm root
for package in root/var/cache/apt/archives/*.deb; do
    dpkg-deb --extract "$package" root
done

# Later releases of PyTorch for arm64 need CUDA's libraries.
uv pip install --target packages --python-platform aarch64-manylinux_2_28 --python-version 3.11 --only-binary :all: \
    torch==2.10.0 torchvision==0.25.0 timm pytest
python3 -m zipfile --extract "$wheel" packages

# A copy of the tests, because Python would import natten from the checkout.
cp -r "$tests" tests
run() {
    env -i HOME="$PWD" PATH=/nowhere OMP_NUM_THREADS=1 PYTHONPATH="$PWD/packages" \
        "$(command -v qemu-aarch64-static)" -L "$PWD/root" "$PWD/root/usr/bin/python3.11" "$@"
}
run -m natten.check
run -m pytest -q -p no:cacheprovider tests/test_natten/test_goldens.py
