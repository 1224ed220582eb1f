"""CUDA kernels as Python calls them: loaded into a device once, launched on PyTorch's current stream.

Nothing here runs before the first launch. Nothing waits for the device, and nothing is allocated on it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from natten.backends.cuda import nvrtc

_DEFAULT_SHARED_BYTES = 48 << 10  # what a block may have unasked


class Kernel(NamedTuple):
    """A kernel to be.

    Attributes:
        source: file of natten/csrc/cuda.
        name: of the function.
        definitions: macros, as "NAME=VALUE".
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
    """

    source: str
    name: str
    definitions: tuple[str, ...]
    threads: int
    shared_bytes: int = 0


@functools.cache
def bindings():
    """The module cuda.bindings.driver."""
    from cuda.bindings import driver

    return driver


def launch(kernel: Kernel, blocks: int, parameters: ctypes.Array, device: int) -> None:
    """Enqueues a kernel with one parameter, a structure, on the current stream of a device.

    Raises:
        RuntimeError: if the kernel must be compiled or loaded while a CUDA graph is captured, or the driver fails.
        nvrtc.Unavailable: if it cannot be compiled.
    """
    driver = bindings()
    addresses = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
    with _Context(device):
        function = _functions.get((device, kernel)) or _load(kernel, device)
        stream = torch._C._cuda_getCurrentRawStream(device)
        threads, shared_bytes = kernel.threads, kernel.shared_bytes
        result = driver.cuLaunchKernel(
            function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, ctypes.addressof(addresses), 0
        )
        _check(result)


def prepare(kernels: Sequence[Kernel], device: int) -> None:
    """Compiles all kernels of a problem at a time that are not loaded yet, rather than one after another.

    Raises:
        nvrtc.Unavailable: if one cannot be compiled.
    """
    missing = [kernel for kernel in kernels if (device, kernel) not in _functions]
    if len(missing) < 2 or torch.cuda.is_current_stream_capturing():
        return
    codes = machine_codes(missing, torch.cuda.get_device_capability(device))
    with _Context(device):
        for kernel, code in zip(missing, codes, strict=True):
            _load(kernel, device, code)


def machine_codes(kernels: Iterable[Kernel], capability: tuple[int, int]) -> list[bytes]:
    """What the driver loads for kernels, kept or compiled now, on all cores.

    Raises:
        nvrtc.Unavailable: if one cannot be compiled.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda k: nvrtc.machine_code(k.source, k.definitions, capability), kernels))


def _check(result: tuple):
    status, *values = result
    if int(status):
        _, text = bindings().cuGetErrorString(status)
        raise RuntimeError(f"the CUDA driver failed: {(text or b'').decode() or status.name}.")
    return values[0] if values else None


# ---------------------------------------------------------------------------------------------------------------------
# Modules, one for each kernel and device
# ---------------------------------------------------------------------------------------------------------------------

_functions: dict[tuple[int, Kernel], object] = {}
_lock = threading.Lock()


def _load(kernel: Kernel, device: int, code: bytes | None = None):
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA kernel of natten must be compiled or loaded, which cannot be captured in a graph: run once before "
            "capture, with the same shapes and dtypes."
        )
    with _lock:
        found = _functions.get((device, kernel))
        if found is None:
            if code is None:
                capability = torch.cuda.get_device_capability(device)
                code = nvrtc.machine_code(kernel.source, kernel.definitions, capability)
            module = _check(bindings().cuModuleLoadData(code))
            found = _check(bindings().cuModuleGetFunction(module, kernel.name.encode()))
            if kernel.shared_bytes > _DEFAULT_SHARED_BYTES:
                attributes = bindings().CUfunction_attribute
                limit = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _check(bindings().cuFuncSetAttribute(found, limit, kernel.shared_bytes))
                carveout = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                _check(bindings().cuFuncSetAttribute(found, carveout, 100))  # percent: several blocks beside each other
            _functions[device, kernel] = found
        return found


def _forget() -> None:
    """A forked child has another lock, and none of its parent's modules."""
    global _lock
    _lock = threading.Lock()
    _functions.clear()
    _primary_context.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# ---------------------------------------------------------------------------------------------------------------------
# The device's context
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _primary_context(device: int):
    """The context that PyTorch uses too."""
    return _check(bindings().cuDevicePrimaryCtxRetain(_check(bindings().cuDeviceGet(device))))


class _Context:
    """Makes a device's context current; a thread of autograd may have none yet, or another device's."""

    __slots__ = ("context", "is_pushed")

    def __init__(self, device: int):
        self.context = _primary_context(device)

    def __enter__(self) -> None:
        self.is_pushed = int(_check(bindings().cuCtxGetCurrent())) != int(self.context)
        if self.is_pushed:
            _check(bindings().cuCtxPushCurrent(self.context))

    def __exit__(self, *error) -> None:
        if self.is_pushed:
            _check(bindings().cuCtxPopCurrent())
