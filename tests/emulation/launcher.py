"""An emulated GPU: run the kernels of natten/csrc/cuda on the CPU, on CPU tensors.

    with emulated_gpu():
        out = natten.na2d(q, k, v, kernel_size=7, backend="cuda")

Plans, launches and autograd run as on a GPU; only the driver is replaced. Each set of definitions is compiled once, by
the system's C++ compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import inspect
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from natten.backends import cuda
from natten.backends.cpu.compiler import find_compilers
from natten.backends.cuda import driver, first_use, nvrtc

HEADER = Path(__file__).parent
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-DNATTEN_EMULATION"),
    # Each library has its own instance of `emulation::machine`.
    *("-fno-gnu-unique", "-fvisibility=hidden", "-fno-strict-aliasing"),
)

_folder = tempfile.TemporaryDirectory(prefix="natten-emulation-")


class EmulationError(AssertionError):
    """A kernel made a mistake that the emulation detects, such as a deadlock or an invalid write."""


@functools.cache
def library(source: Path, definitions: tuple[str, ...]) -> ctypes.CDLL:
    """Compile a CUDA C++ file for the CPU."""
    compiler = find_compilers()[0]
    name = hashlib.sha256(repr((source, definitions)).encode()).hexdigest()[:24]
    path = Path(_folder.name, f"{name}-{os.getpid()}.so")
    command = [*compiler.command, *FLAGS, *(f"-D{text}" for text in definitions)]
    command += [f"-I{nvrtc.SOURCES}", f"-I{HEADER}", "-x", "c++", str(source), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{source.name} with {' '.join(definitions)}:\n{done.stderr[:4000]}")
    return ctypes.CDLL(str(path))


def run(source: Path, kernel: driver.Kernel, blocks: int, parameters: ctypes.Array, seed: int) -> None:
    """Run a kernel. The seed determines the order of threads and blocks.

    Raises:
        EmulationError: if the emulation detects a mistake.
    """
    function = library(source, kernel.definitions)[f"emulate_{kernel.name}"]
    function.restype = ctypes.c_char_p
    grid = (ctypes.c_uint * 3)(blocks, 1, 1)
    shared_bytes, seed = ctypes.c_size_t(kernel.shared_bytes), ctypes.c_uint64(seed)
    error = function(parameters, grid, ctypes.c_uint(kernel.threads), shared_bytes, seed)
    if error:
        raise EmulationError(f"{kernel}: {error.decode()}")


class Emulator:
    """Launches kernels on the CPU and records them."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.kernels: list[driver.Kernel] = []

    @property
    def launched(self) -> list[str]:
        """Return the names of the launched kernels."""
        return [kernel.name for kernel in self.kernels]

    def launch(self, kernel: driver.Kernel, blocks: int, parameters: ctypes.Array, device: int | None) -> None:
        self.kernels.append(kernel)
        self.seed += 1
        run(nvrtc.SOURCES / kernel.source, kernel, blocks, parameters, self.seed)


def gpu_properties(
    capability: tuple[int, int], shared_bytes: int | None = None, processors: int = 132
) -> SimpleNamespace:
    """Return the properties of a GPU that the backend uses. The defaults are those of an H200."""
    shared_bytes = shared_bytes or {7: 64 << 10, 8: 163 << 10}.get(capability[0], 227 << 10)
    major, minor = capability
    return SimpleNamespace(
        major=major, minor=minor, multi_processor_count=processors, shared_memory_per_block_optin=shared_bytes
    )


@contextlib.contextmanager
def emulated_gpu(
    capability: tuple[int, int] = (9, 0),
    seed: int = 0,
    shared_bytes: int | None = None,
    processors: int = 132,
    has_self_check: bool = False,
) -> Iterator[Emulator]:
    """Let backend="cuda" accept CPU tensors, as if they were on a GPU with these properties.

    Args:
        has_self_check: whether kernels are checked on first use, as on a GPU.
    """
    emulator = Emulator(seed)
    with (
        contextlib.nullcontext()
        if has_self_check
        else mock.patch.object(first_use, "refusal", lambda *arguments: None),
        mock.patch.object(driver, "synchronize", lambda device: None),
        mock.patch.object(driver, "is_capturing", lambda: False),
        mock.patch.object(driver, "version", lambda: 13000),
        mock.patch.object(driver, "device_name", lambda device: "emulated GPU"),
        mock.patch.object(cuda, "unsupported_reason", lambda query: None),
        mock.patch.object(cuda, "_properties", lambda device: gpu_properties(capability, shared_bytes, processors)),
        mock.patch.object(driver, "launch", emulator.launch),
        mock.patch.object(driver, "prepare", lambda kernels, device: None),
        mock.patch.object(cuda, "_plan", inspect.unwrap(cuda._plan)),
    ):
        yield emulator
