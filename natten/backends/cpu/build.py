"""The compiled kernels: found where they were shipped or kept, or compiled once for this very machine.

    python -m natten.build                                            # for this machine, into the cache
    python -m natten.build --list                                     # what is used here, and why not the others
    python -m natten.build --cpu x86-64-v3 --cpu x86-64-v4 --out DIR  # ahead, for other machines

The library of the CPU kernels has a plain C interface, so one file serves every version of Python and PyTorch. It is
the first of these that is there:

1. shipped: natten/lib/libnatten_cpu-LEVEL.so in a platform wheel, of the best level that this CPU supports;
2. kept: libnatten_cpu-KEY.so in a folder of natten/cache.py, KEY standing for sources, flags, compiler and CPU;
3. compiled now, and kept in the first of these folders that can; where none can, for this process alone.

Linux and macOS; on Windows the reference backend serves. NATTEN_LOG_LEVEL=DEBUG tells each step.
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from natten.backends import cache
from natten.backends.cpu.compiler import (
    FLAGS,
    NATIVE,
    CompileError,
    Compiler,
    compile_library,
    find_compilers,
    has_openmp_of,
    share_openmp,
)

_PACKAGE = Path(__file__).parents[2]
ABI = 1  # as natten_abi() of the library returns
SOURCES = _PACKAGE / "csrc" / "cpu"
SHIPPED = _PACKAGE / "lib"

_V2 = frozenset(("cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"))
_V3 = _V2.union(("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"))
_V4 = _V3.union(("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"))
_X86 = {"x86-64-v4": _V4, "x86-64-v3": _V3, "x86-64-v2": _V2}
_ARM = {"armv8-a": frozenset()}
# CPU levels of this machine's architecture, the best first, with the flags that /proc/cpuinfo must name.
LEVELS: Mapping[str, frozenset[str]] = {"x86_64": _X86, "aarch64": _ARM, "arm64": _ARM}.get(platform.machine(), {})

_SECONDS = 15  # about what compiling the CPU kernels takes

log = logging.getLogger("natten")


class Unavailable(RuntimeError):
    """There are no compiled kernels for this machine; the text says in one sentence why, and what to do."""


class Found(NamedTuple):
    """A loaded library.

    Attributes:
        library: the library.
        path: where it is kept; None if it ends with this process.
        origin: how it came about, in words.
    """

    library: ctypes.CDLL
    path: Path | None
    origin: str


# ---------------------------------------------------------------------------------------------------------------------
# The library of this process
# ---------------------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_reason: str | None = None


def cpu_library() -> ctypes.CDLL:
    """The library of the CPU kernels, found or compiled at the first call and the same ever after.

    Raises:
        Unavailable: if there is none, and none can be made; also remembered.
    """
    global _library, _reason
    if _library is None:
        with _lock:
            if _library is None and _reason is None:
                try:
                    _library = find().library
                except Unavailable as error:
                    _reason = str(error)
        if _library is None:
            raise Unavailable(_reason)
    return _library


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # another thread may have held it


# ---------------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------------


def find(sources: Path | None = None, may_compile: bool = True) -> Found:
    """Looks for the library, and compiles it if there is none; what is found is not remembered.

    Args:
        sources: folder of *.cpp and headers that export `int natten_abi(void)`; `SOURCES` if None.
        may_compile: False only to look; no folder is then made or written.

    Raises:
        Unavailable: if there is none, and none can be made.
    """
    if os.name != "posix":
        raise Unavailable("the CPU kernels are compiled on Linux and macOS only: on Windows the reference serves.")
    found = _shipped()
    if found is not None:
        return found
    try:
        return _kept_or_compiled(sources or SOURCES, may_compile)
    except OSError as error:
        raise Unavailable(f"the CPU kernels could not be compiled or loaded: {_text(error)}.") from error


def _shipped() -> Found | None:
    for level, needed in LEVELS.items():
        path = SHIPPED / f"libnatten_cpu-{level}.so"
        missing = sorted(needed - cpu_flags())
        if missing:
            log.debug("no library for %s: this CPU lacks %s", level, " ".join(missing))
        elif not path.exists():
            log.debug("no library for %s was shipped, though this CPU supports it", level)
        else:
            try:
                found = Found(_load(path), path, f"shipped for {level}")
                log.debug("the CPU kernels are %s, %s; compiled for this very CPU they may be faster", *found[1:])
                return found
            except OSError as error:
                log.warning("%s was shipped but cannot be used: %s", path, _text(error))
    return None


def _kept_or_compiled(sources: Path, may_compile: bool) -> Found:
    names = {compiler: _file_name(compiler, sources) for compiler in _compilers()}
    with ExitStack() as stack:
        made = functools.cache(lambda: _compile(sources, names, _scratch(stack)))
        for folder in cache.folders():
            try:
                found = _look(folder, names)
                if found is None and may_compile:
                    found = _look_again_or_make(folder, names, made)
            except OSError as error:
                log.warning("%s cannot keep the CPU kernels: %s", folder, _text(error))
            else:
                if found is not None:
                    log.debug("the CPU kernels are %s, %s", found.path, found.origin)
                    return found
        if not may_compile:
            raise Unavailable(f"the CPU kernels are not compiled yet: {next(iter(names))} would do so.")
        path, origin = made()
        log.warning(
            "no folder can keep the CPU kernels, so each process compiles them again: set NATTEN_CACHE_DIR to a folder "
            "of yours."
        )
        return Found(_load(path), None, origin)


def _scratch(stack: ExitStack) -> Path:
    try:
        return stack.enter_context(cache.scratch())
    except OSError as error:  # not the fault of a cache folder
        raise Unavailable(f"the CPU kernels need a temporary folder: {_text(error)}; set TMPDIR to another.") from error


def _look(folder: Path, names: Mapping[Compiler, str]) -> Found | None:
    cache.check(folder)
    for compiler, name in names.items():
        path = folder / name
        if not path.exists():
            log.debug("%s holds no library of %s for this CPU", folder, compiler)
        elif not cache.is_whole(path):
            log.info("%s is damaged, so it is compiled again", path)
        else:
            try:
                return Found(_load(path), path, f"compiled by {compiler}")
            except OSError as error:
                log.info("%s cannot be used, so it is compiled again: %s", path, _text(error))
    return None


def _look_again_or_make(folder: Path, names: Mapping[Compiler, str], made: Callable[[], tuple[Path, str]]) -> Found:
    cache.make(folder)
    with cache.lock(folder):
        found = _look(folder, names)  # another process may just have made it
        if found is None:
            file, origin = made()
            path = folder / file.name
            cache.store(file, path)
            found = Found(_load(path), path, origin)
        return found


def _compilers() -> list[Compiler]:
    compilers = find_compilers()
    if not compilers:
        raise Unavailable(
            "no C++ compiler was found and no library was shipped for this CPU: install g++ (Debian and Ubuntu: apt "
            "install g++, Fedora: dnf install gcc-c++, macOS: xcode-select --install), or name a compiler with CXX."
        )
    return compilers


def _compile(sources: Path, names: Mapping[Compiler, str], folder: Path, cpu: str = NATIVE) -> tuple[Path, str]:
    """Path and origin of the library that the first compiler which can has made in a folder, under its name."""
    if not any(sources.glob("*.cpp")):
        raise Unavailable(f"the sources of the CPU kernels are not in {sources}: install natten again.")
    log.info("compiling CPU kernels, once for %s (about %d s)", "this machine" if cpu == NATIVE else cpu, _SECONDS)
    failures = []
    for compiler, name in names.items():
        try:
            compile_library(compiler, sources, folder / name, cpu)
        except CompileError as error:
            failures.append(f"{compiler} could not compile the CPU kernels: {error}")
        else:
            for failure in failures:
                log.warning(failure)
            return folder / name, f"compiled by {compiler}"
    raise Unavailable(f"{failures[0]}; update it, or name another compiler with CXX.")


def _load(path: Path) -> ctypes.CDLL:
    """Loads a library.

    Raises:
        OSError: if it does not load, or has not our ABI.
    """
    share_openmp()
    library = ctypes.CDLL(str(path))
    abi = library.natten_abi() if hasattr(library, "natten_abi") else None
    if abi != ABI:
        _ctypes.dlclose(library._handle)  # else a new file of this name would not be loaded
        raise OSError(f"its ABI is {abi}, but must be {ABI}")
    return library


def _text(error: OSError) -> str:
    return error.strerror or str(error)


# ---------------------------------------------------------------------------------------------------------------------
# The key of a library: sources, flags, compiler, CPU
# ---------------------------------------------------------------------------------------------------------------------


def _file_name(compiler: Compiler, sources: Path) -> str:
    key = hashlib.sha256()
    for part in _key_parts(compiler, sources):
        key.update(hashlib.sha256(part).digest())
    return f"libnatten_cpu-{key.hexdigest()[:16]}.so"


def _key_parts(compiler: Compiler, sources: Path) -> Iterator[bytes]:
    for path in sorted(path for path in sources.rglob("*") if path.is_file()):
        yield os.fsencode(path.relative_to(sources))
        yield path.read_bytes()
    yield " ".join((*FLAGS, NATIVE, *compiler.command, compiler.version)).encode()
    yield b"OpenMP" if has_openmp_of(compiler) else b""
    yield " ".join((platform.machine(), *sorted(cpu_flags()))).encode()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The features of this CPU, named as in /proc/cpuinfo; none if the system does not tell."""
    try:
        if sys.platform == "darwin":
            told = subprocess.run(["sysctl", "hw.optional"], capture_output=True, text=True).stdout
            return frozenset(re.findall(r"^hw\.optional\.(?:arm\.)?(\w+?)(?:_0)?: 1$", told, re.MULTILINE))
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", told, re.MULTILINE)
    return frozenset(flags[1].split()) if flags else frozenset()


# ---------------------------------------------------------------------------------------------------------------------
# Building ahead of time
# ---------------------------------------------------------------------------------------------------------------------


def build_ahead(level: str, out: Path) -> Path:
    """Compiles the library for a CPU level into a folder, named as in natten/lib; returns its path.

    Args:
        level: one of `LEVELS`.

    Raises:
        Unavailable: if no compiler can.
        OSError: if the folder cannot be made or written.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"libnatten_cpu-{level}.so"
    with cache.scratch() as folder:
        file, _ = _compile(SOURCES, dict.fromkeys(_compilers(), path.name), folder, f"-march={level}")
        partial = path.with_suffix(".partial")
        shutil.copyfile(file, partial)
        os.replace(partial, path)
    return path
