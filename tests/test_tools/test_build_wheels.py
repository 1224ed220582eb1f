"""tools/build_wheels.py: wheels work in an environment without the checkout, and libraries need only the system's."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import build_wheels
import pytest

from natten.backends.cpu.compiler import ziglang

ROOT = Path(__file__).parents[2]
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


EXPORTED = {
    f"natten_{name}"
    for name in (
        "abi",
        "use_openmp",
        "attention",
        "attention_backward",
        "query_key",
        "query_key_backward",
        "weight_value",
        "weight_value_backward",
    )
}
ZIG = f"{importlib.util.find_spec('ziglang').submodule_search_locations[0]}/zig c++" if ziglang() else ""
needs_ziglang = pytest.mark.skipif(not ziglang(), reason="no package ziglang; pip install ziglang")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Return a function that builds the wheel with a tag."""

    def run(tag):
        out, copy = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("copy")
        return build_wheels.build_wheel(tag, copy, out)

    return run


def compile_lowest_level(tag, folder):
    """Compile the library for the lowest level of a platform."""
    platform = build_wheels.PLATFORMS[tag]
    level, cpu = list(platform.cpus.items())[-1]
    build_wheels.build_libraries(platform._replace(cpus={level: cpu}), folder)
    (library,) = folder.iterdir()
    return library


def output_of(*command):
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


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
def test_pure_wheel_compiles(build, use, tmp_path):
    wheel = build(build_wheels.PURE)
    assert wheel.name.endswith("-py3-none-any.whl")
    library, _ = use(wheel, NATTEN_CACHE_DIR=str(tmp_path / "cache"))
    assert library.parent == tmp_path / "cache"


@pytest.mark.slow
@needs_ziglang
@pytest.mark.parametrize("variable", [("PATH", "/nowhere"), ("CXX", f"{sys.executable} -m ziglang c++"), ("CXX", ZIG)])
def test_pure_wheel_compiles_with_ziglang(build, use, tmp_path, variable):
    """Without another compiler, or named by CXX."""
    wheel = build(build_wheels.PURE)
    library, warnings = use(wheel, NATTEN_CACHE_DIR=str(tmp_path / "cache"), **dict([variable]))
    assert library.parent == tmp_path / "cache"
    (line,) = warnings.splitlines()
    assert "compiling" in line
    assert b"GCC: (" not in library.read_bytes()


@pytest.mark.slow
@needs_ziglang
@pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="the wheel is for Linux on x86-64")
def test_platform_wheel_needs_no_compiler_and_no_cache(build, use, tmp_path):
    wheel = build("manylinux_2_28_x86_64")
    (tmp_path / "empty").mkdir(mode=0o500)
    folders = {name: str(tmp_path / "empty") for name in ("PATH", "NATTEN_CACHE_DIR", "XDG_CACHE_HOME", "HOME")}
    library, warnings = use(wheel, **folders)
    assert library.parts[-3:-1] == ("natten", "lib")
    assert warnings == ""
    assert list((tmp_path / "empty").iterdir()) == []
    assert wheel.stat().st_size < 3e6
    with zipfile.ZipFile(wheel) as content:
        levels = {Path(name).name for name in content.namelist() if name.startswith("natten/lib/")}
    assert levels == {f"libnatten_cpu-x86-64-v{level}.so" for level in (2, 3, 4)}
    pytest.importorskip("auditwheel", reason="the extra wheels is not installed")
    report = output_of(sys.executable, "-m", "auditwheel", "show", str(wheel))
    (version,) = re.findall(r'following\s+platform\s+tag:\s+"manylinux_2_(\d+)_x86_64"', report)
    assert int(version) <= 28


@pytest.mark.slow
@needs_ziglang
def test_macos(tmp_path):
    """The oldest system, the libraries it needs, the exported functions, and vector instructions."""
    for tag, product in (("macosx_11_0_arm64", r"fmla(\.4s|\s+v\d+\.4s)"), ("macosx_11_0_x86_64", "mulps")):
        (tmp_path / tag).mkdir()
        library = str(compile_lowest_level(tag, tmp_path / tag))
        commands = output_of("llvm-objdump", "--macho", "--private-headers", library)
        assert re.search(r"minos 11\.0", commands)
        needed = re.findall(r"cmd LC_LOAD_DYLIB\n.*\n\s*name (\S+)", commands)
        assert needed == ["/usr/lib/libSystem.B.dylib"]
        exported = output_of("llvm-nm", "--defined-only", "--extern-only", library)
        assert {name for name in re.findall(r" T _(\w+)", exported) if name.startswith("natten_")} == EXPORTED
        assert re.search(product, output_of("llvm-objdump", "--disassemble", library))


@pytest.mark.slow
@needs_ziglang
def test_windows(tmp_path):
    """The libraries it needs are parts of Windows 10, and it exports the same functions."""
    headers = output_of("objdump", "-p", str(compile_lowest_level("win_amd64", tmp_path)))
    needed = {name.lower() for name in re.findall(r"DLL Name: (\S+)", headers)}
    assert needed
    assert all(name in ("kernel32.dll", "ntdll.dll") or name.startswith("api-ms-win-crt-") for name in needed), needed
    assert set(re.findall(r"\bnatten_\w+", headers)) == EXPORTED


@pytest.mark.slow
def test_the_checkout_is_unchanged(build):
    before = set(ROOT.rglob("*"))
    build(build_wheels.PURE)
    assert {path for path in set(ROOT.rglob("*")) - before if "__pycache__" not in path.parts} == set()


def test_mistakes_end_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    for arguments, named in (
        (["--platform", "amiga"], "amiga"),
        (["--platform", "any", "--out", str(tmp_path / "file" / "x")], str(tmp_path / "file" / "x")),
        (["--platform", "win_amd64", "--out", str(tmp_path)], "ziglang"),
    ):
        if named == "ziglang":
            monkeypatch.setattr(build_wheels, "ziglang", lambda: ())
        with pytest.raises(SystemExit) as stop:
            build_wheels.main(arguments)
        assert stop.value.code == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert named in line
