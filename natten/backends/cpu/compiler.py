"""Compile a folder of C++ sources into a shared library: find compilers, choose flags, share PyTorch's OpenMP.

OpenMP code must run on the OpenMP runtime that PyTorch has loaded. A second runtime would bring a second thread pool,
and both would compete for the cores. The library is therefore linked against no runtime, and its symbols resolve to
PyTorch's when it is loaded. If PyTorch has no runtime that the compiler's code can call, the sources are compiled
without OpenMP.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden")
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
_TIMEOUT_S = 900
_PROCESSES = 2

log = logging.getLogger("natten")


class CompileError(Exception):
    """The compiler failed. The message is the first line of its output that reports an error."""


class Compiler(NamedTuple):
    """A C++ compiler: its command, with the full path, and the output of `--version`."""

    command: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        return f"{shlex.join(self.command)} ({self.version.splitlines()[0]})"


def find_compilers() -> list[Compiler]:
    """Return the compilers of this machine in the order of preference: $CXX, c++, g++, clang++."""
    found = []
    for name in ("CXX", "c++", "g++", "clang++"):
        text = os.environ.get("CXX", "") if name == "CXX" else name
        try:
            command = shlex.split(text)
            if not command:
                log.debug("CXX is not set")
                continue
            found.append(_query_version(command))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            level = logging.WARNING if name == "CXX" else logging.DEBUG
            log.log(level, "%s is not a working compiler: %s", f"CXX={text}" if name == "CXX" else name, error)
    return list(dict.fromkeys(found))


def _query_version(command: Sequence[str]) -> Compiler:
    path = shutil.which(command[0])
    if path is None:
        raise FileNotFoundError("program not found")
    command = (path, *command[1:])
    version = _run([*command, "--version"], timeout=60).stdout.strip()
    if not version:
        raise ValueError("--version prints nothing")
    return Compiler(command, version)


def compile_library(compiler: Compiler, sources: Path, target: Path, cpu: str = NATIVE) -> None:
    """Compile every *.cpp of a folder and link them into a shared library. Object files stay next to it.

    Args:
        compiler: the compiler.
        sources: folder with the sources and their headers.
        target: path of the library, in an existing folder.
        cpu: the flag that selects the CPU, such as "-march=x86-64-v3".

    Raises:
        CompileError: if the compiler fails both with and without OpenMP.
    """
    for threads in (("-fopenmp", "-pthread"), ("-pthread",)):
        if "-fopenmp" in threads and not supports_openmp(compiler):
            log.debug("PyTorch's OpenMP does not support %s; the CPU kernels start their own threads", compiler)
            continue
        try:
            _compile_and_link(compiler, sources, target, [*FLAGS, cpu, *threads])
            return
        except subprocess.CalledProcessError as error:
            reason = _first_error_line(error.stderr) or f"exit status {error.returncode}"
        except (OSError, subprocess.SubprocessError) as error:
            reason = str(error)
        log.debug("%s %s failed: %s", shlex.join(compiler.command), " ".join(threads), reason)
    raise CompileError(reason)


def _compile_and_link(compiler: Compiler, sources: Path, target: Path, flags: Sequence[str]) -> None:
    def to_object(source: Path) -> Path:
        out = target.with_name(f"{target.stem}-{source.stem}.o")
        _run([*compiler.command, *flags, "-c", source, "-o", out])
        return out

    with ThreadPoolExecutor(_PROCESSES) as pool:
        objects = list(pool.map(to_object, sorted(sources.glob("*.cpp"))))
    _run([*compiler.command, "-shared", "-pthread", *objects, "-o", target])  # no -fopenmp, which would link a runtime


def _run(command: Sequence[str | Path], timeout: float = _TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, errors="replace", timeout=timeout
    )


def _first_error_line(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line.lower()), lines[0] if lines else None)


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's OpenMP runtime
# ---------------------------------------------------------------------------------------------------------------------


class _SymbolInfo(ctypes.Structure):
    """The result of dladdr (struct Dl_info)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


@functools.cache
def share_openmp() -> ctypes.CDLL | None:
    """Make PyTorch's OpenMP runtime visible to all libraries loaded later. Return it, or None if PyTorch has none."""
    info = _SymbolInfo()
    try:
        # The lookup finds the runtime whatever its file name is.
        symbol = ctypes.CDLL(torch._C.__file__).omp_get_max_threads
        if not ctypes.CDLL(None).dladdr(ctypes.cast(symbol, ctypes.c_void_p), ctypes.byref(info)):
            return None
        return ctypes.CDLL(os.fsdecode(info.file), mode=ctypes.RTLD_GLOBAL)
    except (AttributeError, OSError):
        return None


def supports_openmp(compiler: Compiler) -> bool:
    """Return whether PyTorch's OpenMP runtime has the functions that this compiler's -fopenmp calls."""
    entry = "__kmpc_fork_call" if "clang" in compiler.version else "GOMP_parallel"
    return hasattr(share_openmp(), entry)
