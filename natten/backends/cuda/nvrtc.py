"""CUDA C++ to machine code: compiled by NVRTC, which PyTorch brings along, once for a GPU architecture, and kept.

The code is kept where the CPU kernels are (natten/cache.py), under a name that is a hash of all sources, the options
and NVRTC's version. It does not depend on the version of Python or PyTorch.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from natten.backends import cache

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = ("--std=c++17", "--extra-device-vectorization")

log = logging.getLogger("natten")


class Unavailable(RuntimeError):
    """NVRTC is not there, or cannot compile; the text says in one sentence why, and what to do."""


@functools.cache
def bindings():
    """The module cuda.bindings.nvrtc.

    Raises:
        Unavailable: if it or the library behind it is missing.
    """
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split())
        raise Unavailable(f"NVRTC cannot be used ({text}): run {_installation()}") from error
    return nvrtc


def _installation() -> str:
    """What brings the bindings; their major version must be that of the CUDA libraries that PyTorch brings."""
    major = (torch.version.cuda or "").partition(".")[0]
    return f'pip install "cuda-bindings=={major}.*"' if major else "pip install cuda-bindings"


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's version."""
    return tuple(_check(bindings().nvrtcVersion()))


def _check(result: tuple):
    """What a function of NVRTC returns besides its status: nothing, one value or several."""
    status, *values = result
    if int(status):
        raise Unavailable(f"NVRTC failed with {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def machine_code(source: str, definitions: Sequence[str], capability: tuple[int, int]) -> bytes:
    """What the driver loads for a GPU of that compute capability: kept, or compiled now and kept.

    Args:
        source: name of a file in natten/csrc/cuda.
        definitions: macros, as "NAME=VALUE".
        capability: such as (9, 0).

    Raises:
        Unavailable: if there is no NVRTC, or if it fails.
    """
    options = (*FLAGS, architecture(capability), *(f"--define-macro={text}" for text in definitions))
    name = f"natten_{Path(source).stem}-{_key(source, options)}.cubin"
    for folder in cache.folders() if os.name == "posix" else ():
        try:
            cache.check(folder)
            code = cache.read(folder / name)
            return _compile_and_keep(source, options, folder / name) if code is None else code
        except OSError as error:
            log.warning("%s cannot keep CUDA kernels: %s", folder, error.strerror or error)
    return compile_source(source, options)


def architecture(capability: tuple[int, int]) -> str:
    """The option that names a GPU: its machine code, or code that the driver translates where NVRTC is the older."""
    known = _check(bindings().nvrtcGetSupportedArchs())
    number = 10 * capability[0] + capability[1]
    if number in known:
        return f"--gpu-architecture=sm_{number}"
    older = [arch for arch in known if arch < number]
    if not older:
        raise Unavailable(f"this NVRTC does not know GPUs of compute capability {capability[0]}.{capability[1]}")
    return f"--gpu-architecture=compute_{max(older)}"


def _key(source: str, options: Sequence[str]) -> str:
    key = hashlib.sha256()
    for part in (_content_of_sources(), source.encode(), " ".join(options).encode(), str(version()).encode()):
        key.update(hashlib.sha256(part).digest())
    return key.hexdigest()[:24]


@functools.cache
def _content_of_sources() -> bytes:
    return b"".join(hashlib.sha256(path.read_bytes()).digest() for path in sorted(SOURCES.iterdir()))


def _compile_and_keep(source: str, options: Sequence[str], path: Path) -> bytes:
    # Without a lock: compiling takes about a second, and several threads compile the kernels of a problem at a time.
    cache.make(path.parent)
    code = compile_source(source, options)
    with cache.scratch() as folder:
        (folder / path.name).write_bytes(code)
        cache.store(folder / path.name, path)
    return code


def compile_source(source: str, options: Sequence[str]) -> bytes:
    """Machine code of a file in natten/csrc/cuda.

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
            raise Unavailable(f"NVRTC could not compile {source}: {_first_error(nvrtc, program)}")
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
