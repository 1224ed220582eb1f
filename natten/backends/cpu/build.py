"""The library of the CPU kernels: find it in the wheel or the cache, or compile it.

The library has a plain C interface, so one file works with every version of Python and PyTorch. `find` returns the
first of these:

1. shipped: natten/lib/libnatten_cpu-LEVEL.so from a platform wheel, for the highest level that this CPU supports;
2. cached: libnatten_cpu-KEY.so in a folder of natten/backends/cache.py; KEY is a hash of sources, flags, compiler, CPU;
3. compiled now, and stored in the first cache folder that accepts it, or else used by this process alone.

The suffix is .dylib on macOS and .dll on Windows. Compiling is announced by a warning. The command line is in
natten/build.py. Set NATTEN_LOG_LEVEL=DEBUG to log each step.
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
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from natten.backends import cache
from natten.backends.cpu.compiler import (
    FLAGS,
    NATIVE,
    SUFFIX,
    CompileError,
    Compiler,
    compile_library,
    find_compilers,
    is_zig,
)
from natten.backends.cpu.openmp import FUNCTIONS, find_runtime

ABI = 3  # the number that natten_abi() in csrc/cpu/abi.cpp returns
_PACKAGE = Path(__file__).parents[2]
SOURCES = _PACKAGE / "csrc" / "cpu"
SHIPPED = _PACKAGE / "lib"

_V2 = frozenset(("cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"))
_V3 = _V2.union(("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"))
_V4 = _V3.union(("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"))
# The levels of CPUs, highest first, by machine, with the flags that /proc/cpuinfo must list.
LEVELS_OF: Mapping[str, Mapping[str, frozenset[str]]] = {
    "x86_64": {"x86-64-v4": _V4, "x86-64-v3": _V3, "x86-64-v2": _V2},
    "aarch64": {"armv8-a": frozenset()},
}
_MACHINES = {"AMD64": "x86_64", "ARM64": "aarch64", "arm64": "aarch64"}  # other names
_MACHINE = _MACHINES.get(platform.machine(), platform.machine())
LEVELS = LEVELS_OF.get(_MACHINE, {})

log = logging.getLogger("natten")


class Unavailable(RuntimeError):
    """There is no library for this machine, and none can be compiled. The message says why and what to do."""


class Found(NamedTuple):
    """A loaded library.

    Attributes:
        library: the library.
        path: its file; None if the file was temporary.
        origin: where it comes from, for messages.
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
    """Return the library of the CPU kernels. The first call finds or compiles it.

    Raises:
        Unavailable: if no library can be found or compiled; later calls raise the same error without a new attempt.
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
    os.register_at_fork(after_in_child=_renew_lock)  # another thread of the parent may have held the lock


# ---------------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------------


def find(sources: Path | None = None, may_compile: bool = True) -> Found:
    """Find the library, or compile it if there is none. Each call searches again.

    Args:
        sources: folder of *.cpp and headers that export `int natten_abi(void)`; `SOURCES` by default.
        may_compile: pass False to search only; then no folder is created or written.

    Raises:
        Unavailable: if there is no library, and none can be compiled.
    """
    found = _find_shipped()
    if found is not None:
        return found
    try:
        return _find_or_compile(sources or SOURCES, may_compile)
    except OSError as error:
        raise Unavailable(f"the CPU kernels cannot be compiled or loaded: {_text(error)}") from error


def _find_shipped() -> Found | None:
    for level, needed in LEVELS.items():
        path = SHIPPED / f"libnatten_cpu-{level}{SUFFIX}"
        missing = sorted(needed - cpu_flags())
        if missing:
            log.debug("no shipped library for %s: this CPU lacks %s", level, " ".join(missing))
        elif not path.exists():
            log.debug(
                "no shipped library for %s: this CPU supports it, but this installation does not include it", level
            )
        else:
            try:
                found = Found(_load(path), path, f"shipped for {level}")
                log.debug("using the CPU kernels %s, %s; kernels compiled for this CPU may be faster", *found[1:])
                return found
            except OSError as error:
                log.warning("%s cannot be used: %s", path, _text(error))
    return None


def _find_or_compile(sources: Path, may_compile: bool) -> Found:
    names = {compiler: _file_name(compiler, sources) for compiler in _compilers()}
    with ExitStack() as stack:
        compile_once = functools.cache(lambda: _compile(sources, names, _scratch(stack)))
        for folder in cache.folders():
            try:
                found = _find_cached(folder, names)
                if found is None and may_compile:
                    found = _compile_into(folder, names, compile_once)
            except OSError as error:
                log.warning("%s cannot hold the CPU kernels: %s", folder, _text(error))
            else:
                if found is not None:
                    log.debug("using the CPU kernels %s, %s", found.path, found.origin)
                    return found
        if not may_compile:
            raise Unavailable(f"the CPU kernels are not compiled yet; {next(iter(names))} would compile them")
        path, origin = compile_once()
        log.warning(
            "no folder can hold the CPU kernels, so each process compiles them again; set NATTEN_CACHE_DIR to a folder "
            "that you own"
        )
        return Found(_load(path), None, origin)


def _scratch(stack: ExitStack) -> Path:
    try:
        return stack.enter_context(cache.scratch())
    except OSError as error:  # not caused by a cache folder, so do not try the next one
        raise Unavailable(f"no temporary folder to compile the CPU kernels: {_text(error)}; set TMPDIR") from error


def _find_cached(folder: Path, names: Mapping[Compiler, str]) -> Found | None:
    cache.check(folder)
    for compiler, name in names.items():
        path = folder / name
        try:
            descriptor = cache.open_checked(path)
        except FileNotFoundError:
            log.debug("%s contains no library by %s for this CPU", folder, compiler)
            continue
        if cache.content(descriptor) is None:
            log.info("%s is damaged; compiling it again", path)
        else:
            try:
                return Found(_load(path, descriptor), path, f"already compiled by {compiler}")
            except OSError as error:
                log.info("%s cannot be used; compiling it again: %s", path, _text(error))
        os.close(descriptor)  # unless its library is loaded
    return None


def _compile_into(folder: Path, names: Mapping[Compiler, str], compile_once: Callable[[], tuple[Path, str]]) -> Found:
    cache.make(folder)
    with cache.lock(folder):
        found = _find_cached(folder, names)  # another process may have compiled it in the meantime
        if found is None:
            file, origin = compile_once()
            path = folder / file.name
            cache.store(file, path)
            found = Found(_load(path, cache.open_checked(path)), path, origin)
        return found


def _compilers() -> list[Compiler]:
    compilers = find_compilers()
    if not compilers:
        raise Unavailable(
            "no C++ compiler found, and this installation includes no library for this CPU; install g++ (Debian and "
            "Ubuntu: apt install g++, Fedora: dnf install gcc-c++, macOS: xcode-select --install, Windows: pip install "
            "ziglang), or set CXX"
        )
    return compilers


def _compile(sources: Path, names: Mapping[Compiler, str], folder: Path, cpu: str = NATIVE) -> tuple[Path, str]:
    """Compile the library with the first compiler that succeeds.

    Args:
        names: the file name of the library for each compiler.
        folder: folder for the library.

    Returns:
        The path of the library, and its origin for messages.

    Raises:
        Unavailable: if all compilers fail.
    """
    if not any(sources.glob("*.cpp")):
        raise Unavailable(f"{sources} does not contain the sources of the CPU kernels; install natten again")
    # A warning, because Python prints no lower level by default, and the first call would seem to hang.
    duration = "minutes if Zig does so for the first time" if is_zig(next(iter(names)).command) else "10 to 60 s"
    log.warning("compiling natten's CPU kernels for %s (%s)", "this machine" if cpu == NATIVE else cpu, duration)
    failures = []
    for compiler, name in names.items():
        try:
            compile_library(compiler, sources, folder / name, cpu)
        except CompileError as error:
            failures.append(f"{compiler} cannot compile the CPU kernels: {error}")
        else:
            for failure in failures:
                log.warning(failure)
            return folder / name, f"compiled by {compiler}"
    raise Unavailable(f"{failures[0]}; update it, or set CXX to another compiler")


def _load(path: Path, descriptor: int | None = None) -> ctypes.CDLL:
    """Load a library.

    Args:
        path: its path.
        descriptor: its open file, which is loaded in place of whatever the path names now. It stays open with the
            library, because the dynamic loader recognizes libraries by name.

    Raises:
        OSError: if it does not load, or has another ABI.
    """
    opened = f"/proc/self/fd/{descriptor}"
    library = ctypes.CDLL(opened if descriptor is not None and os.path.exists(opened) else str(path))
    library._name = str(path)  # for messages
    abi = library.natten_abi() if hasattr(library, "natten_abi") else None
    if abi != ABI:
        _unload(library)  # otherwise a new file with this name would not be loaded
        raise OSError(f"its ABI is {abi}, expected {ABI}")
    runtime = find_runtime()
    if runtime is not None:
        library.natten_use_openmp.argtypes = (ctypes.c_void_p,) * len(FUNCTIONS)
        library.natten_use_openmp.restype = None
        library.natten_use_openmp(*runtime.functions)
    return library


def _unload(library: ctypes.CDLL) -> None:
    if sys.platform == "win32":
        _ctypes.FreeLibrary(library._handle)
    else:
        _ctypes.dlclose(library._handle)


def _text(error: OSError) -> str:
    return error.strerror or str(error)


# ---------------------------------------------------------------------------------------------------------------------
# The key of a library: sources, flags, compiler, CPU
# ---------------------------------------------------------------------------------------------------------------------


def _file_name(compiler: Compiler, sources: Path) -> str:
    key = hashlib.sha256()
    for part in _key_parts(compiler, sources):
        key.update(hashlib.sha256(part).digest())
    return f"libnatten_cpu-{key.hexdigest()[:16]}{SUFFIX}"


def _key_parts(compiler: Compiler, sources: Path) -> Iterator[bytes]:
    for path in sorted(path for path in sources.rglob("*") if path.is_file()):
        yield os.fsencode(path.relative_to(sources))
        yield path.read_bytes()
    yield " ".join((*FLAGS, NATIVE, *compiler.command, compiler.version)).encode()
    yield " ".join((platform.machine(), *sorted(cpu_flags()))).encode()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the features of this CPU, named as in /proc/cpuinfo; empty if the system does not list them."""
    named: list[str] = []
    with suppress(OSError):
        if sys.platform == "linux":
            output = Path("/proc/cpuinfo").read_text()
            flags = re.search(r"^(?:flags|Features)\s*:(.*)$", output, re.MULTILINE)
            return frozenset(flags[1].split()) if flags else frozenset()
        if sys.platform == "darwin":
            output = subprocess.run(["sysctl", "hw.optional"], capture_output=True, text=True).stdout
            named = re.findall(r"^hw\.optional\.(?:arm\.)?(\w+?)(?:_0)?: 1$", output, re.MULTILINE)
        else:
            named = platform.processor().split()
    # All x86-64 CPUs since 2009 support the lowest level. PyTorch knows whether CPU and system support the others.
    level = {"AVX512": _V4, "AVX2": _V3}.get(torch.backends.cpu.get_cpu_capability(), _V2)
    return frozenset(named) | (level if _MACHINE == "x86_64" else frozenset())


# ---------------------------------------------------------------------------------------------------------------------
# Building ahead of time
# ---------------------------------------------------------------------------------------------------------------------


def build_ahead(level: str, out: Path) -> Path:
    """Compile the library for a CPU level into a folder, named as in natten/lib.

    Args:
        level: one of `LEVELS`.
        out: the folder; created if missing.

    Returns:
        The path of the library.

    Raises:
        Unavailable: if no compiler succeeds.
        OSError: if the folder cannot be created or written.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"libnatten_cpu-{level}{SUFFIX}"
    with cache.scratch() as folder:
        file, _ = _compile(SOURCES, dict.fromkeys(_compilers(), path.name), folder, f"-march={level}")
        partial = path.with_suffix(".partial")
        shutil.copyfile(file, partial)
        os.replace(partial, path)
    return path
