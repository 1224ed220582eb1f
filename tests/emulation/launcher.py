"""An emulated GPU: run the kernels of natten/csrc/cuda on the CPU, on CPU tensors.

    with emulated_gpu():
        out = natten.na2d(q, k, v, kernel_size=7, backend="cuda")

Plans, launches and autograd run as on a GPU; only the driver is replaced. Each set of definitions is compiled once, by
the system's C++ compiler. It instruments the accesses to memory as for ThreadSanitizer, and memory.cpp checks them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import inspect
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

from natten.backends import cuda
from natten.backends.cpu.compiler import find_compilers
from natten.backends.cuda import driver, first_use, nvrtc

FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++17", "-fPIC", "-w", "-fvisibility=hidden", "-fno-strict-aliasing")
# The line tables (-g1) name the places of mistakes.
_KERNEL_FLAGS = ("-O1", "-g1", "-fsanitize=thread", "-DNATTEN_EMULATION", "-fno-gnu-unique")

# Shared memory per block, by compute capability.
SHARED_KIB = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}

_folder = tempfile.TemporaryDirectory(prefix="natten-emulation-")
_libraries: dict[str, ctypes.CDLL] = {}


class EmulationError(AssertionError):
    """A kernel made a mistake that the emulation detects, such as a deadlock, a race or an invalid write."""


class Access(NamedTuple):
    """How warps accessed shared memory at one place in the code, during one launch.

    Attributes:
        kernel: name of the kernel.
        place: the innermost source line, as "tiles.h:320".
        function: the functions around the place, from the innermost.
        kind: "load", "store", "atomic", "matrix" (ldmatrix) or "copy" (cp.async).
        bytes: per lane.
        instructions: that warps executed.
        wavefronts: that they took: each delivers 32 banks of 4 bytes.
        fewest: wavefronts without bank conflicts, for as many bytes per lane.
    """

    kernel: str
    place: str
    function: str
    kind: str
    bytes: int
    instructions: int
    wavefronts: int
    fewest: int


class _Total(ctypes.Structure):
    """`Total` in memory.cpp."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("code", "kind", "bytes", "instructions", "wavefronts", "fewest")]


def _compile(command: Sequence[str], name: str) -> None:
    done = subprocess.run([*find_compilers()[0].command, *command], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{name}:\n{done.stderr[:4000]}")


@functools.cache
def _machine() -> tuple[str, ...]:
    """Compile the machine. Return its object files."""
    paths = []
    for name in ("machine", "memory"):
        paths.append(str(Path(_folder.name, f"{name}-{os.getpid()}.o")))
        _compile((*_FLAGS, "-O2", "-c", str(FOLDER / f"{name}.cpp"), "-o", paths[-1]), name)
    return tuple(paths)


def library(source: Path, definitions: tuple[str, ...]) -> ctypes.CDLL:
    """Compile a CUDA C++ file for the CPU, once. Each library has its own machine."""
    name = hashlib.sha256(repr((_with_headers(source), definitions)).encode()).hexdigest()[:24]
    if name not in _libraries:
        _libraries[name] = _compile_library(source, definitions, name)
    return _libraries[name]


def _with_headers(source: Path) -> dict[str, str]:
    """Return the text of a file and of the headers in its folder that it includes."""
    texts, names = {}, [source.name]
    while names:
        name = names.pop()
        if name not in texts and (source.parent / name).exists():
            texts[name] = (source.parent / name).read_text()
            names += re.findall(r'^#include "(.+)"', texts[name], re.MULTILINE)
    return texts


def _compile_library(source: Path, definitions: tuple[str, ...], name: str) -> ctypes.CDLL:
    path = Path(_folder.name, f"{name}-{os.getpid()}.so")
    command = (*_FLAGS, *_KERNEL_FLAGS, *(f"-D{text}" for text in definitions), f"-I{source.parent}")
    command += (f"-I{nvrtc.SOURCES}", f"-I{FOLDER}", "-x", "c++", "-c", str(source), "-o", f"{path}.o")
    _compile(command, f"{source.name} with {' '.join(definitions)}")
    # Without -fsanitize=thread, since memory.cpp replaces its library.
    _compile(("-shared", f"{path}.o", *_machine(), "-o", str(path)), source.name)
    return ctypes.CDLL(str(path))


def run(source: Path, kernel: driver.Kernel, blocks: int, parameters: ctypes.Array, seed: int) -> None:
    """Run a kernel. The seed determines the order of threads and blocks.

    Raises:
        EmulationError: if the emulation detects a mistake.
    """
    loaded = library(source, kernel.definitions)
    function = loaded[f"emulate_{kernel.name}"]
    function.restype = ctypes.c_char_p
    grid = (ctypes.c_uint * 3)(blocks, 1, 1)
    shared_bytes, seed = ctypes.c_size_t(kernel.shared_bytes), ctypes.c_uint64(seed)
    error = function(parameters, grid, ctypes.c_uint(kernel.threads), shared_bytes, seed)
    if error:
        text = re.sub(r"{(0x[0-9a-f]+)}", lambda found: _places(loaded, (int(found[1], 16),))[0][0], error.decode())
        raise EmulationError(f"{text} ({kernel})")


def run_and_count(
    source: Path, kernel: driver.Kernel, blocks: int, parameters: ctypes.Array, seed: int
) -> list[Access]:
    """Run a kernel like `run`, and return its accesses to shared memory."""
    loaded = library(source, kernel.definitions)
    loaded.emulation_count(1)
    try:
        run(source, kernel, blocks, parameters, seed)
    finally:
        loaded.emulation_count(0)
    totals = ctypes.POINTER(_Total)()
    loaded.emulation_counts.restype = ctypes.c_size_t
    found = totals[: loaded.emulation_counts(ctypes.byref(totals))]
    kinds = ("load", "store", "atomic", "matrix", "copy")
    sums: dict[tuple, list[int]] = {}
    for place, x in zip(_places(loaded, [x.code for x in found]), found, strict=True):
        numbers = sums.setdefault((kernel.name, *place, kinds[x.kind], x.bytes), [0, 0, 0])
        numbers[:] = numbers[0] + x.instructions, numbers[1] + x.wavefronts, numbers[2] + x.fewest
    return [Access(*key, *numbers) for key, numbers in sums.items()]


def _places(loaded: ctypes.CDLL, code: Sequence[int]) -> list[tuple[str, str]]:
    """Return the source line, and the functions around it, of return addresses in a library."""
    tool = shutil.which("addr2line")
    if tool is None or not code:
        return [(hex(address), "") for address in code]
    command = [tool, "-e", loaded._name, "-f", "-i", "-s", "-C", "-a", *(hex(address - 1) for address in code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    places = []
    for text in re.split(r"^0x[0-9a-f]+\n", done.stdout, flags=re.MULTILINE)[1:]:
        lines = text.splitlines()
        names = (re.split(r"[<(]", name)[0].split("::")[-1] for name in lines[::2])
        frames = list(zip(names, lines[1::2], strict=True))
        frames = [frame for frame in frames if not frame[1].startswith("emulation.h")] or frames
        places.append((frames[0][1].split(" ")[0], " < ".join(name for name, _ in frames)))
    return places


class Emulator:
    """Launches kernels on the CPU and records them and, if it counts, their accesses to shared memory."""

    def __init__(self, seed: int = 0, counts: bool = False):
        self.seed, self.counts = seed, counts
        self.kernels: list[driver.Kernel] = []
        self.accesses: list[Access] = []

    @property
    def launched(self) -> list[str]:
        """Return the names of the launched kernels."""
        return [kernel.name for kernel in self.kernels]

    def launch(self, kernel: driver.Kernel, blocks: int, parameters: ctypes.Array, device: int | None) -> None:
        self.kernels.append(kernel)
        self.seed += 1
        arguments = nvrtc.SOURCES / kernel.source, kernel, blocks, parameters, self.seed
        if self.counts:
            self.accesses += run_and_count(*arguments)
        else:
            run(*arguments)


def gpu_properties(
    capability: tuple[int, int], shared_bytes: int | None = None, processors: int = 132
) -> SimpleNamespace:
    """Return the properties of a GPU that the backend uses, by default with as many processors as an H200."""
    shared_bytes = shared_bytes or SHARED_KIB.get(capability, 64) << 10
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
    counts: bool = False,
    has_self_check: bool = False,
) -> Iterator[Emulator]:
    """Let backend="cuda" accept CPU tensors, as if they were on a GPU with these properties.

    Args:
        counts: whether `Emulator.accesses` lists the accesses to shared memory.
        has_self_check: whether kernels are checked on first use, as on a GPU.
    """
    emulator = Emulator(seed, counts)
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
