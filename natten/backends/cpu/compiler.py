"""Compile a folder of C++ sources into a shared library: find compilers, choose flags.

Compilers are GCC and Clang, for any system: g++, clang++, MinGW and clang-cl on Windows, Apple's Clang, and `zig c++`,
which the Python package ziglang contains. All take the same flags, apart from what depends on the system.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

# Clang contracts products and sums only within an expression by default, GCC everywhere.
FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
)  # fmt: skip
NATIVE = "-mcpu=native" if platform.machine().lower() in ("arm64", "aarch64") else "-march=native"
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")  # of a library of this system
_TIMEOUT_S = 900
_PROCESSES = 2

log = logging.getLogger("natten")


class CompileError(Exception):
    """The compiler failed. The message is the first line of its output that reports an error."""


class Compiler(NamedTuple):
    """A C++ compiler.

    Attributes:
        command: its command, with the full path.
        version: the output of `--version`.
        target: the machine for which it compiles, such as x86_64-linux-gnu, as the compiler prints it.
    """

    command: tuple[str, ...]
    version: str
    target: str

    def __str__(self) -> str:
        return f"{shlex.join(self.command)} ({self.version.splitlines()[0]})"


def find_compilers() -> list[Compiler]:
    """Return the compilers of this machine in the order of preference: $CXX, c++, g++, clang++, clang-cl.

    If there are none, return the one in the package ziglang, if it is installed. It starts slowly.
    """
    found: list[Compiler] = []
    for name in ("CXX", "c++", "g++", "clang++", "clang-cl", "ziglang"):
        text = os.environ.get("CXX", "") if name == "CXX" else name
        try:
            command = _words(text) if name != "ziglang" else () if found else ziglang()
            if not command:
                log.debug("%s is not %s", name, "set" if name == "CXX" else "needed or not installed")
                continue
            found.append(query(command))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            level = logging.WARNING if name == "CXX" else logging.DEBUG
            log.log(level, "%s is not a working compiler: %s", f"CXX={text}" if name == "CXX" else name, error)
    return list(dict.fromkeys(found))


def _words(text: str) -> tuple[str, ...]:
    """Split a command into words. On Windows a backslash is part of a path, which may contain spaces without quotes."""
    if sys.platform != "win32":
        return tuple(shlex.split(text))
    if shutil.which(text):
        return (text,)
    return tuple(word.strip('"') for word in shlex.split(text, posix=False))


def ziglang(target: str | None = None) -> tuple[str, ...]:
    """Return the command of the C++ compiler in the package ziglang; empty if it is not installed.

    Args:
        target: the machine to compile for, such as "aarch64-linux-gnu.2.28"; by default this one.
    """
    if importlib.util.find_spec("ziglang") is None:
        return ()
    return (sys.executable, "-m", "ziglang", "c++", *(("-target", target) if target else ()))


def query(command: Sequence[str]) -> Compiler:
    """Return the compiler with this command.

    Raises:
        FileNotFoundError: if the program does not exist.
        ValueError: if it is no compiler.
        subprocess.SubprocessError: if it fails.
    """
    path = shutil.which(command[0])
    if path is None:
        raise FileNotFoundError("program not found")
    command = (os.path.abspath(path), *command[1:])
    if re.match(r"clang-cl\b", Path(path).stem):
        command += ("--driver-mode=g++",)  # so that it takes the same flags
    if is_zig(command) and "-target" not in command and sys.platform == "linux":
        command += ("-target", f"{platform.machine()}-linux-gnu")  # else it may choose musl
    version = _ask(command, "--version")
    if not version:
        raise ValueError("--version prints nothing")
    named = re.search(r"^Target: (.+)$", version, re.MULTILINE)  # by Clang
    target = named[1] if named else _ask(command, "-dumpmachine")
    return Compiler(command, version, target)


def _ask(command: Sequence[str], option: str) -> str:
    with tempfile.TemporaryDirectory() if is_zig(command) else nullcontext() as folder:  # Zig may leave an a.o
        return _run([*command, option], timeout=60, folder=folder).stdout.strip()


def is_zig(command: Sequence[str]) -> bool:
    """Return whether a command is like `zig c++`, `python-zig c++` or `python -m ziglang c++`."""
    return any(Path(word).stem in ("zig", "python-zig", "ziglang") for word in command)


def compile_library(compiler: Compiler, sources: Path, target: Path, cpu: str = NATIVE) -> None:
    """Compile every *.cpp of a folder and link them into a shared library. Object files stay next to it.

    Args:
        compiler: the compiler.
        sources: folder with the sources and their headers.
        target: path of the library, in an existing folder.
        cpu: the flag that selects the CPU, such as "-march=x86-64-v3".

    Raises:
        CompileError: if the compiler fails.
    """
    try:
        _compile_and_link(compiler, sources, target, cpu)
    except subprocess.CalledProcessError as error:
        reason = _first_error_line(error.stderr) or f"exit status {error.returncode}"
        raise CompileError(reason) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(str(error)) from error


def _compile_and_link(compiler: Compiler, sources: Path, target: Path, cpu: str) -> None:
    compiling, linking = _system_flags(compiler.target)
    if is_zig(compiler.command):
        cpu = cpu.replace("x86-64-v", "x86_64_v").replace("-march=armv8-a", "-mcpu=generic")  # its names

    def to_object(source: Path) -> Path:
        out = target.with_name(f"{target.stem}-{source.stem}.o")
        _run([*compiler.command, *FLAGS, cpu, *compiling, "-c", source, "-o", out])
        return out

    with ThreadPoolExecutor(_PROCESSES) as pool:
        objects = list(pool.map(to_object, sorted(sources.glob("*.cpp"))))
    if re.search("darwin|macos", compiler.target):
        linking = [*linking, f"-Wl,-install_name,@rpath/{target.name}"]  # otherwise the path of this build
    _run([*compiler.command, "-shared", "-s", *linking, *objects, "-o", target])


def _system_flags(target: str) -> tuple[list[str], list[str]]:
    """Return what compiling and linking for a system needs."""
    if "mingw" in target:
        # GCC does not align the stack for AVX on Windows, see https://gcc.gnu.org/bugzilla/show_bug.cgi?id=54412.
        return ["-Wa,-muse-unaligned-vector-move"], ["-static"]
    if "windows" in target:
        # MinGW's threads are in a library. Zig needs no flags: -static would make a static library.
        return [], ["-static", "-pthread"] if "-w64-" in target else []
    return ["-fPIC", "-pthread"], ["-pthread"]


def _run(
    command: Sequence[str | Path], timeout: float = _TIMEOUT_S, folder: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
    )


def _first_error_line(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line.lower()), lines[0] if lines else None)
