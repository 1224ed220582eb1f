"""Load CUDA kernels once per device, and launch them on PyTorch's current stream.

The driver is not touched before the first launch. Only `synchronize` waits for the device, and nothing here allocates
memory on it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from natten.backends.cuda import nvrtc

_DEFAULT_SHARED_BYTES = 48 << 10  # the shared memory that a block may use without setting an attribute
_PATIENCE_S = 20.0  # after which kernels are considered to hang


class ContextLost(RuntimeError):
    """A kernel failed in a way after which this process cannot use the GPU any more."""


class Kernel(NamedTuple):
    """A kernel: its source, definitions and launch configuration.

    Attributes:
        source: name of a file in natten/csrc/cuda.
        name: name of the function.
        definitions: macros, as "NAME=VALUE".
        threads: threads per block.
        shared_bytes: dynamic shared memory per block.
    """

    source: str
    name: str
    definitions: tuple[str, ...]
    threads: int
    shared_bytes: int = 0


@functools.cache
def bindings():
    """Return the module cuda.bindings.driver."""
    from cuda.bindings import driver

    return driver


def launch(kernel: Kernel, blocks: int, parameters: ctypes.Array, device: int) -> None:
    """Enqueue a kernel on the current stream of a device.

    Args:
        parameters: the kernel's only parameter, a structure.

    Raises:
        RuntimeError: if the driver fails, or if a CUDA graph is being captured and the kernel is not loaded yet.
        nvrtc.Unavailable: if the kernel cannot be compiled.
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
    """Compile and load the kernels of a problem in parallel. Those that are already loaded are skipped.

    Raises:
        nvrtc.Unavailable: if one cannot be compiled.
    """
    missing = [kernel for kernel in kernels if (device, kernel) not in _functions]
    if len(missing) < 2 or is_capturing():
        return
    codes = machine_codes(missing, torch.cuda.get_device_capability(device))
    with _Context(device):
        for kernel, code in zip(missing, codes, strict=True):
            _load(kernel, device, code)


def synchronize(device: torch.device) -> None:
    """Wait for the current stream of a device.

    Raises:
        RuntimeError: if earlier work on the device failed, or does not end within 20 s.
    """
    with _Context(device.index):
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        started = time.monotonic()
        while True:
            (status,) = bindings().cuStreamQuery(stream)
            if status != bindings().CUresult.CUDA_ERROR_NOT_READY:
                _check((status,))
                return
            if time.monotonic() > started + _PATIENCE_S:
                raise RuntimeError(f"the kernels do not end within {_PATIENCE_S:.0f} s")
            time.sleep(0.0005)


def require_context(device: torch.device, reason: str) -> None:
    """Check that the device can still be used after a failure.

    Raises:
        ContextLost: with the reason, if it cannot.
    """
    try:
        synchronize(device)
    except RuntimeError as error:
        raise ContextLost(
            f"{reason}. Restart this process, since it cannot use the GPU any more; natten will then compute without "
            "these kernels."
        ) from error


def is_capturing() -> bool:
    """Return whether a CUDA graph is being captured."""
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def version() -> int:
    """Return the version of CUDA that the driver supports, such as 13000."""
    return _check(bindings().cuDriverGetVersion())


@functools.cache
def device_name(device: torch.device) -> str:
    """Return the name of a GPU, such as "NVIDIA H200"."""
    return torch.cuda.get_device_name(device)


def machine_codes(kernels: Iterable[Kernel], capability: tuple[int, int]) -> list[bytes]:
    """Return the machine code of several kernels, from the cache or compiled now, in parallel.

    Raises:
        nvrtc.Unavailable: if one cannot be compiled.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda k: nvrtc.machine_code(k.source, k.definitions, capability), kernels))


def _check(result: tuple):
    """Return the value of a driver call, or None if it has none.

    Raises:
        RuntimeError: if the call failed.
    """
    status, *values = result
    if int(status):
        _, text = bindings().cuGetErrorString(status)
        raise RuntimeError(f"the CUDA driver failed: {(text or b'').decode() or status.name}.")
    return values[0] if values else None


# ---------------------------------------------------------------------------------------------------------------------
# Loaded functions, one per kernel and device
# ---------------------------------------------------------------------------------------------------------------------

_functions: dict[tuple[int, Kernel], object] = {}
_lock = threading.Lock()


def _load(kernel: Kernel, device: int, code: bytes | None = None):
    """Return the function of a kernel on a device. Compile (unless `code` is given) and load it if necessary."""
    if is_capturing():
        raise RuntimeError(
            "natten cannot compile or load kernels during CUDA graph capture; run the model once before the capture, "
            "with the same shapes and dtypes."
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
                # Percent of the L1 cache to use as shared memory, so that several blocks fit on a multiprocessor.
                carveout = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                _check(bindings().cuFuncSetAttribute(found, carveout, 100))
            _functions[device, kernel] = found
        return found


def _reset() -> None:
    """Forget all loaded modules. A forked child cannot use those of its parent, nor a lock that was held."""
    global _lock
    _lock = threading.Lock()
    _functions.clear()
    _primary_context.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)


# ---------------------------------------------------------------------------------------------------------------------
# The device's context
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _primary_context(device: int):
    """Return the context that PyTorch uses too."""
    return _check(bindings().cuDevicePrimaryCtxRetain(_check(bindings().cuDeviceGet(device))))


class _Context:
    """Make a device's context current. Autograd threads may have none, or that of another device."""

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
