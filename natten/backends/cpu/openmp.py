"""PyTorch's OpenMP runtime, whose threads the CPU kernels use.

A second runtime would bring a second pool of threads, and both would compete for the cores. The kernels are
therefore linked against none, and get the addresses of PyTorch's functions. Where PyTorch has no OpenMP, the library
keeps its own threads; see csrc/cpu/threads.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

# The arguments of natten_use_openmp. Runtimes for Windows lack the first; GCC's has only the first.
FUNCTIONS = ("GOMP_parallel", "__kmpc_fork_call", "__kmpc_push_num_threads", "__kmpc_global_thread_num")


class Runtime(NamedTuple):
    """An OpenMP runtime.

    Attributes:
        path: its file.
        functions: the addresses of `FUNCTIONS`; None for those that it does not have.
    """

    path: Path
    functions: tuple[int | None, ...]


@functools.cache
def find_runtime() -> Runtime | None:
    """Return PyTorch's OpenMP runtime, or None if PyTorch has none whose functions can be called."""
    try:
        # A lookup also searches the libraries that a library depends on, but not on Windows.
        in_torch = Path(torch.__file__).with_name("lib") / "libiomp5md.dll"
        library = ctypes.CDLL(str(in_torch) if sys.platform == "win32" else torch._C.__file__)
        functions = tuple(_address(library, name) for name in FUNCTIONS)
        if functions[0] is None and None in functions[1:]:
            return None
        return Runtime(in_torch if sys.platform == "win32" else _file_of(functions[0] or functions[1]), functions)
    except OSError:
        return None


def _address(library: ctypes.CDLL, name: str) -> int | None:
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except AttributeError:
        return None


class _SymbolInfo(ctypes.Structure):
    """The result of dladdr (struct Dl_info)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _file_of(address: int | None) -> Path:
    """Return the library that contains a function.

    Raises:
        OSError: if there is none.
    """
    info = _SymbolInfo()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(info)):
        raise OSError("the address is in no library")
    return Path(os.fsdecode(info.file))
