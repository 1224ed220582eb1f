"""tools/build_wheel.sh: both wheels work in an environment without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "build_wheel.sh"
USE = """
import torch
import natten
from natten.backends.cpu import build
library = build.cpu_library()
assert library.natten_abi() == build.ABI
qkv = torch.randn(2, 9, 9, 3, 2, 32, generator=torch.Generator().manual_seed(0))
out, expected = (natten.na2d_qkvpacked(qkv, 3, backend=name) for name in (None, "reference"))
torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
print(natten.__file__)
print(library._name)
"""


def build_wheels(*arguments, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Build both wheels and return their folder."""
    folder = tmp_path_factory.mktemp("wheels")
    done = build_wheels(str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def use(tmp_path):
    """Return a function that installs a wheel into a new environment with this one's PyTorch and runs USE there.

    It returns the path of the CPU library and the warnings.
    """

    def run(wheel, **environment):
        venv.create(tmp_path / "venv", with_pip=False)
        python = str(tmp_path / "venv" / "bin" / "python")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*pip, str(wheel)], check=True)
        (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
        (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        environment = {**os.environ, "CXX": "", "PYTHONPATH": "", **environment}
        done = subprocess.run([python, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        package, library = done.stdout.splitlines()
        assert Path(package).parent == site_packages / "natten"
        return Path(library), done.stderr

    return run


@pytest.mark.slow
def test_pure_wheel_compiles(wheels, use, tmp_path):
    (wheel,) = wheels.glob("natten-*-py3-none-any.whl")
    library, _ = use(wheel, NATTEN_CACHE_DIR=str(tmp_path / "cache"))
    assert library.parent == tmp_path / "cache"


@pytest.mark.slow
def test_platform_wheel_needs_no_compiler_and_no_cache(wheels, use, tmp_path):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    (wheel,) = wheels.glob(f"natten-*-py3-none-{platform}.whl")
    (tmp_path / "empty").mkdir(mode=0o500)
    folders = {name: str(tmp_path / "empty") for name in ("PATH", "NATTEN_CACHE_DIR", "XDG_CACHE_HOME", "HOME")}
    library, warnings = use(wheel, **folders)
    assert library.parts[-3:-1] == ("natten", "lib")
    assert warnings == ""
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.slow
def test_the_checkout_is_unchanged(wheels):
    assert not (SCRIPT.parents[1] / "natten" / "lib").exists()
    assert len(list(wheels.iterdir())) == 2


def test_mistakes_end_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    blocked, false = str(tmp_path / "file" / "x"), shutil.which("false")
    for arguments, environment, named in (
        (("a", "b"), {}, "OUT"),
        ((blocked,), {}, blocked),
        ((str(tmp_path / "out"),), {"PYTHON": false}, false),
    ):
        done = build_wheels(*arguments, **environment)
        assert done.returncode == 2
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert named in line
