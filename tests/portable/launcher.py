"""Compile the kernels and the harness for this machine or another architecture, and run them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from natten.backends.cpu import build
from natten.backends.cpu.compiler import Compiler, find_compilers, query
from natten.backends.cpu.openmp import find_runtime

FOLDER = Path(__file__).parent
HARNESS, FAULTS = FOLDER / "harness.cpp", FOLDER / "faults.cpp"


class MissingTool(Exception):
    """A program is not installed. The message says which, and how to install it."""


class Target(NamedTuple):
    """A machine, real or emulated.

    Attributes:
        compiler: compiles for it.
        emulator: the command that runs its programs; empty for this machine.
        openmp: an OpenMP runtime, as its loader finds it; empty if it has none.
        linking: what programs are linked with.
    """

    compiler: Compiler
    emulator: tuple[str, ...]
    openmp: tuple[str, ...]
    linking: tuple[str, ...] = ("-ldl",)

    def compile(self, source: Path, out: Path, *flags: str) -> None:
        """Compile one file that includes plan.h.

        Raises:
            AssertionError: if the compiler fails, with its messages.
        """
        command = [*self.compiler.command, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{build.SOURCES}"]
        done = subprocess.run([*command, *flags, source, "-o", out, *self.linking], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    def run(
        self, harness: Path, problems: Path, *libraries: Path, environment: Mapping[str, str] | None = None
    ) -> Outcome:
        """Run the harness; see harness.cpp for the arguments."""
        command = [*self.emulator, harness, problems, *self.openmp, *libraries]
        # Wine 8 lacks what Intel's OpenMP calls to bind threads to cores.
        quiet = {"WINEDEBUG": "-all", "KMP_AFFINITY": "disabled"}
        environment = {**quiet, **(os.environ if environment is None else environment)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
        return Outcome(done.returncode, done.stdout, done.stderr)


class Outcome(NamedTuple):
    """What the harness reports."""

    status: int
    output: str
    errors: str

    @property
    def totals(self) -> dict[str, int]:
        """The numbers of "cases" and "failed" cases; empty if the harness did not finish."""
        found = re.search(r"^(\d+) cases, (\d+) failed", self.output, re.MULTILINE)
        return dict(zip(("cases", "failed"), map(int, found.groups()), strict=True)) if found else {}

    @property
    def table(self) -> dict[tuple[str, str], int]:
        """The number of cases that ran, by op and dtype."""
        rows = re.findall(r"^(\w+) +(float\d+|bfloat16) +(\d+) ", self.output, re.MULTILINE)
        return {(op, dtype): int(cases) for op, dtype, cases in rows}

    def lines(self, word: str) -> list[str]:
        """Return the lines that begin with a word, such as FAILED."""
        return [line for line in self.output.splitlines() if line.startswith(word)]


def native() -> Target:
    """Return this machine, with PyTorch's OpenMP runtime.

    Raises:
        MissingTool: if there is no compiler.
    """
    compilers = find_compilers()
    if not compilers:
        raise MissingTool("no C++ compiler found; install g++")
    runtime = find_runtime()
    return Target(compilers[0], (), (str(runtime.path),) if runtime else ())


@functools.cache
def arm64() -> Target:
    """Return an emulated arm64 machine.

    Raises:
        MissingTool: if the cross compiler or the emulator is not installed.
    """
    compiler = query([_find("aarch64-linux-gnu-g++", install="g++-aarch64-linux-gnu")])
    emulator = _find("qemu-aarch64-static", "qemu-aarch64", install="qemu-user-static")
    root = str(_file_of(compiler, "libc.so.6").parents[1])
    return Target(compiler, (emulator, "-L", root), ("libgomp.so.1",))


@functools.cache
def windows() -> Target:
    """Return an emulated Windows. Its OpenMP runtime is the DLL that NATTEN_TEST_OPENMP_DLL names, if it is set.

    Raises:
        MissingTool: if the cross compiler or the emulator is not installed.
    """
    compiler = _find("x86_64-w64-mingw32-g++-posix", "x86_64-w64-mingw32-g++", install="mingw-w64")
    emulator = _find("wine", "wine64", install="wine")
    openmp = os.environ.get("NATTEN_TEST_OPENMP_DLL")
    return Target(query([compiler]), (emulator,), (openmp,) if openmp else (), ("-static",))


def clang_cl(mingw: Compiler, folder: Path) -> Compiler:
    """Return clang-cl for Windows with MinGW's headers and libraries, because Microsoft's are not free.

    Args:
        mingw: MinGW's GCC.
        folder: where links to its files are made, under names that Clang finds.

    Raises:
        MissingTool: if clang-cl is not installed.
    """
    versions = (f"clang-cl-{version}" for version in range(30, 13, -1))
    compiler = _find("clang-cl", *versions, install="clang-tools")
    (folder / "lib" / "gcc" / "x86_64-w64-mingw32").mkdir(parents=True)
    (folder / "lib" / "gcc" / "x86_64-w64-mingw32" / "1.0.0").symlink_to(_file_of(mingw, "libgcc.a").parent)
    (folder / "x86_64-w64-mingw32").symlink_to(_file_of(mingw, "libkernel32.a").parents[1])
    return query([compiler, "--target=x86_64-w64-mingw32", f"--sysroot={folder}"])


def _file_of(compiler: Compiler, name: str) -> Path:
    """Return a file that the compiler links."""
    command = [*compiler.command, f"-print-file-name={name}"]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()).resolve()


def _find(*names: str, install: str) -> str:
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    raise MissingTool(f"{names[0]} not found; on Debian and Ubuntu: apt install {install}")
