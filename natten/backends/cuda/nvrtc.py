"""Compile CUDA C++ to machine code with NVRTC, which PyTorch's CUDA wheels include, and cache the result.

Code is compiled once per set of definitions and GPU architecture. It is stored in the cache of the CPU kernels
(natten/backends/cache.py), under a hash of all sources, the options and the version of NVRTC. It does not depend on the
version of Python or PyTorch.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from natten.backends import cache

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = ("--std=c++17", "--extra-device-vectorization")

log = logging.getLogger("natten")


class Unavailable(RuntimeError):
    """NVRTC is missing or cannot compile. The message says why and what to do."""


@functools.cache
def bindings():
    """Return the module cuda.bindings.nvrtc.

    Raises:
        Unavailable: if the module, or the library that it loads, is missing.
    """
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        raise Unavailable(f"NVRTC is not available ({text}); run {_install_command()}") from error
    return nvrtc


def _install_command() -> str:
    """Return the command that installs the bindings with the major version of PyTorch's CUDA libraries."""
    major = (torch.version.cuda or "").partition(".")[0]
    return f'pip install "cuda-bindings=={major}.*"' if major else "pip install cuda-bindings"


@functools.cache
def version() -> tuple[int, int]:
    """Return the version of NVRTC."""
    return tuple(_check(bindings().nvrtcVersion()))


def _check(result: tuple):
    """Return the value of an NVRTC call, or the tuple of its values if it does not have exactly one.

    Raises:
        Unavailable: if the call failed.
    """
    status, *values = result
    if int(status):
        raise Unavailable(f"NVRTC failed with {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def machine_code(source: str, definitions: Sequence[str], capability: tuple[int, int]) -> bytes:
    """Return the code that the driver loads on GPUs of a compute capability, from the cache or compiled now.

    Args:
        source: name of a file in natten/csrc/cuda.
        definitions: macros, as "NAME=VALUE".
        capability: the compute capability, such as (9, 0).

    Raises:
        Unavailable: if NVRTC is missing or fails.
    """
    options = (*FLAGS, architecture(capability), *(f"--define-macro={text}" for text in definitions))
    name = f"natten_{Path(source).stem}-{_key(source, options)}.cubin"
    for folder in cache.folders():
        try:
            cache.check(folder)
            code = cache.read(folder / name)
            return _compile_into(source, options, folder / name) if code is None else code
        except OSError as error:
            log.warning("%s cannot hold CUDA kernels: %s", folder, error.strerror or error)
    return compile_source(source, options)


def architecture(capability: tuple[int, int]) -> str:
    """Return the option that selects the architecture of a GPU.

    The result of the compilation is machine code for this GPU. If the GPU is newer than NVRTC, it is PTX, which the
    driver translates.

    Raises:
        Unavailable: if NVRTC no longer supports the GPU.
    """
    known = _check(bindings().nvrtcGetSupportedArchs())
    number = 10 * capability[0] + capability[1]
    if number in known:
        return f"--gpu-architecture=sm_{number}"
    older = [arch for arch in known if arch < number]
    if not older:
        raise Unavailable(f"this version of NVRTC does not support compute capability {capability[0]}.{capability[1]}")
    return f"--gpu-architecture=compute_{max(older)}"


def _key(source: str, options: Sequence[str]) -> str:
    key = hashlib.sha256()
    for part in (hash_of_sources(), source.encode(), " ".join(options).encode(), str(version()).encode()):
        key.update(hashlib.sha256(part).digest())
    return key.hexdigest()[:24]


@functools.cache
def hash_of_sources() -> bytes:
    """Return a hash of all sources of CUDA kernels."""
    return b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sorted(SOURCES.iterdir()))


def _compile_into(source: str, options: Sequence[str], path: Path) -> bytes:
    # No lock: compiling takes about a second, and several threads compile the kernels of one problem in parallel.
    cache.make(path.parent)
    code = compile_source(source, options)
    with cache.scratch() as folder:
        (folder / path.name).write_bytes(code)
        cache.store(folder / path.name, path)
    return code


def compile_source(source: str, options: Sequence[str]) -> bytes:
    """Compile a file of natten/csrc/cuda to machine code, or to PTX if the options select a `compute_` architecture.

    Raises:
        Unavailable: with NVRTC's first error, if it fails.
    """
    nvrtc = bindings()
    path = SOURCES / source
    log.debug("compiling %s %s", source, " ".join(options))
    program = _check(nvrtc.nvrtcCreateProgram(path.read_bytes(), str(path).encode(), 0, None, None))
    try:
        arguments = [option.encode() for option in (*options, f"--include-path={SOURCES}")]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise Unavailable(f"NVRTC cannot compile {source}: {_first_error(nvrtc, program)}")
        if any("=sm_" in option for option in options):
            code = bytes(_check(nvrtc.nvrtcGetCUBINSize(program)))
            _check(nvrtc.nvrtcGetCUBIN(program, code))
        else:
            code = bytes(_check(nvrtc.nvrtcGetPTXSize(program)))
            _check(nvrtc.nvrtcGetPTX(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _first_error(nvrtc, program) -> str:
    text = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
    _check(nvrtc.nvrtcGetProgramLog(program, text))
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip(" \0")]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no reason given")
