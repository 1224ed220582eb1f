"""Compile the kernels and the harness for this machine or another architecture, and run them."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from natten.backends.cpu import build
from natten.backends.cpu.compiler import Compiler, find_compilers, share_openmp

FOLDER = Path(__file__).parent
HARNESS, FAULTS = FOLDER / "harness.cpp", FOLDER / "faults.cpp"


class MissingTool(Exception):
    """A program is not installed. The message says which, and how to install it."""


class Target(NamedTuple):
    """A machine, real or emulated.

    Attributes:
        compiler: compiles for it.
        emulator: the command that runs its programs; empty for this machine.
        openmp: the OpenMP runtime for its compiler, as its loader finds it.
    """

    compiler: Compiler
    emulator: tuple[str, ...]
    openmp: tuple[str, ...]

    def compile(self, source: Path, out: Path, *flags: str) -> None:
        """Compile one file that includes plan.h.

        Raises:
            AssertionError: if the compiler fails, with its messages.
        """
        command = [*self.compiler.command, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{build.SOURCES}"]
        done = subprocess.run([*command, *flags, source, "-o", out, "-ldl"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    def run(
        self, harness: Path, problems: Path, *libraries: Path, environment: Mapping[str, str] | None = None
    ) -> Outcome:
        """Run the harness; see harness.cpp for the arguments."""
        command = [*self.emulator, harness, problems, *self.openmp, *libraries]
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
    runtime = share_openmp()
    return Target(compilers[0], (), (runtime._name,) if runtime else ())


@functools.cache
def arm64() -> Target:
    """Return an emulated arm64 machine.

    Raises:
        MissingTool: if the cross compiler or the emulator is not installed.
    """
    compiler = _find("aarch64-linux-gnu-g++", install="g++-aarch64-linux-gnu")
    emulator = _find("qemu-aarch64-static", "qemu-aarch64", install="qemu-user-static")
    version, libc = (
        subprocess.run([compiler, option], check=True, capture_output=True, text=True).stdout.strip()
        for option in ("--version", "-print-file-name=libc.so.6")
    )
    root = str(Path(libc).resolve().parents[1])
    return Target(Compiler((compiler,), version), (emulator, "-L", root), ("libgomp.so.1",))


def _find(*names: str, install: str) -> str:
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    raise MissingTool(f"{names[0]} not found; on Debian and Ubuntu: apt install {install}")
