"""The CUDA kernels compiled with NVRTC, which users have, and with nvcc, which reports registers and spills.

python tests/test_natten/test_cuda_compile.py    # print a table for the published models, for sm_80 and sm_90
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
from emulation.launcher import gpu_properties

from natten.backends import cuda
from natten.backends.cuda import nvrtc
from natten.backends.cuda.driver import Kernel
from natten.checks import make_axes

# Map, heads, head_dim, kernel_size and dilation, at batch 128. TUNED: problems of the published models; OTHERS: further
# problems that users may have.
TUNED = {
    "stage 1": ((56, 56), 2, 32, 7, 1),
    "stage 2": ((28, 28), 4, 32, 7, 1),
    "stage 3": ((14, 14), 8, 32, 7, 1),
    "stage 4": ((7, 7), 16, 32, 7, 1),
    "stage 1, dilation 8": ((56, 56), 2, 32, 7, 8),
    "stage 2, dilation 4": ((28, 28), 4, 32, 7, 4),
    "200x304": ((200, 304), 2, 32, 7, 1),
    "k 11": ((24, 24), 24, 32, 11, 1),
    "k 13": ((56, 56), 2, 32, 13, 1),
    "d 64": ((56, 56), 2, 64, 7, 1),
}
OTHERS = {
    "d 16": ((56, 56), 2, 16, 7, 1),
    "d 24": ((56, 56), 2, 24, 7, 1),
    "d 128": ((56, 56), 2, 128, 7, 1),
    "d 256": ((56, 56), 2, 256, 7, 1),
    "1-D": ((32768,), 4, 64, 2047, 1),
    "3-D": ((16, 32, 32), 4, 32, (5, 7, 7), 1),
}
CAPABILITIES = ((8, 0), (9, 0))
FUSED = ("attention", "attention_backward")
UNFUSED = ("query_key", "query_key_backward", "weight_value", "weight_value_backward")


class Report(NamedTuple):
    """The report of ptxas about a kernel. Bytes are per thread, shared memory per block."""

    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int


def kernels(
    space,
    heads,
    dim,
    kernel_size,
    dilation,
    capability,
    dtype=torch.bfloat16,
    has_rpb=True,
    uses_tf32=False,
    ops=FUSED,
    value_dim=None,
) -> list[Kernel]:
    """Return the kernels of all `ops`, by default of a fused forward and backward pass. weight_value has no bias."""
    query = torch.empty(128 if len(space) == 2 else 1, *space, heads, dim, dtype=dtype, device="meta")
    axes = make_axes(space, kernel_size, 1, dilation)
    found = []
    for op in ops:
        with mock.patch.object(cuda, "allows_tf32", lambda: uses_tf32):
            has_bias = has_rpb and "value" not in op
            steps = cuda.launches(op, query, axes, has_bias, gpu_properties(capability), value_dim)
        found += [step.kernel for step in steps]
    return found


def compile_with_nvcc(kernel: Kernel, capability: tuple[int, int]) -> Report:
    """Compile a kernel with nvcc.

    Raises:
        AssertionError: with the output of nvcc, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", f"-arch=sm_{capability[0]}{capability[1]}", "-cubin", "-Xptxas", "-v"]
        command += [*(f"-D{text}" for text in kernel.definitions), "-o", str(Path(folder, "kernel.cubin"))]
        done = subprocess.run([*command, str(nvrtc.SOURCES / kernel.source)], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{kernel}:\n{done.stderr[:3000]}")
    _, output = re.split(rf"Compiling entry function '{kernel.name}'", done.stderr, maxsplit=1)
    stack, stored, loaded = map(int, re.search(r"(\d+) bytes stack.*?(\d+) bytes.*?(\d+) bytes", output).groups())
    static = re.search(r"(\d+) bytes smem", output)
    registers = int(re.search(r"Used (\d+) registers", output)[1])
    return Report(registers, stored + loaded, stack, kernel.shared_bytes + (int(static[1]) if static else 0))


def table(cases: dict, capabilities=CAPABILITIES) -> Iterator[tuple[str, tuple[int, int], Kernel, Report]]:
    jobs = [(name, c, kernel) for name, case in cases.items() for c in capabilities for kernel in kernels(*case, c)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(lambda job: compile_with_nvcc(job[2], job[1]), jobs)
        for job, report in zip(jobs, reports, strict=True):
            yield *job, report


def has_nvrtc() -> bool:
    try:
        nvrtc.bindings()
    except nvrtc.Unavailable:
        return False
    return True


@unittest.skipUnless(has_nvrtc(), "NVRTC is not installed; it comes with PyTorch for CUDA")
class NvrtcTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name, "cache")
        patcher = mock.patch.dict(os.environ, {"NATTEN_CACHE_DIR": str(self.folder)})
        patcher.start()
        self.addCleanup(patcher.stop)

    def compile(self, kernel: Kernel, capability: tuple[int, int]) -> bytes:
        return nvrtc.machine_code(kernel.source, kernel.definitions, capability)

    def test_kernels_with_matrix_instructions(self):
        for kernel in kernels(*TUNED["stage 4"], (9, 0)):
            self.assertTrue(self.compile(kernel, (9, 0)).startswith(b"\x7fELF"))

    def test_float16_on_turing(self):
        case = ((9, 9), 1, 8, 3, 1)
        for kernel in kernels(*case, (7, 5), torch.float16)[:1]:
            self.assertTrue(self.compile(kernel, (7, 5)).startswith(b"\x7fELF"))

    def test_code_is_cached_and_a_damaged_file_is_replaced(self):
        kernel = kernels(*TUNED["stage 4"], (9, 0), torch.float32)[-1]
        code = self.compile(kernel, (9, 0))
        (file,) = self.folder.glob("*.cubin")
        with mock.patch.object(nvrtc, "compile_source", side_effect=AssertionError):
            self.assertEqual(self.compile(kernel, (9, 0)), code)
        file.write_bytes(file.read_bytes()[:-40])
        self.assertEqual(self.compile(kernel, (9, 0)), code)

    def test_a_gpu_newer_than_nvrtc_gets_ptx(self):
        self.assertRegex(nvrtc.architecture((99, 0)), "^--gpu-architecture=compute_")
        kernel = kernels(*TUNED["stage 4"], (9, 0), torch.float32)[-1]
        self.assertIn(b".target", self.compile(kernel, (99, 0)))

    def test_the_first_compiler_error_is_reported(self):
        with self.assertRaisesRegex(nvrtc.Unavailable, "attention.cu.*error"):
            nvrtc.machine_code("attention.cu", ("HEAD_DIM=7",), (9, 0))

    def test_without_a_usable_cache_folder(self):
        self.folder.parent.joinpath("cache").write_text("a file")
        home = {"XDG_CACHE_HOME": str(self.folder / "also not")}
        kernel = kernels(*TUNED["stage 4"], (9, 0), torch.float32)[-1]
        with mock.patch.dict(os.environ, home), self.assertLogs("natten", "WARNING"):
            self.assertTrue(self.compile(kernel, (9, 0)).startswith(b"\x7fELF"))


@pytest.mark.slow
@unittest.skipUnless(shutil.which("nvcc"), "nvcc is not installed")
class NvccTest(unittest.TestCase):
    def test_tuned_kernels_do_not_spill(self):
        for name, capability, kernel, report in table(TUNED):
            with self.subTest(name, capability=capability, kernel=kernel.name):
                self.assertEqual(report.spilled_bytes, 0, report)

    def test_other_kernels_compile(self):
        for name, capability, kernel, report in table(OTHERS):
            with self.subTest(name, capability=capability, kernel=kernel.name):
                self.assertLessEqual(report.registers, 255)

    def test_kernels_for_every_architecture_compile(self):
        case = ((14, 14), 8, 32, 7, 1)
        for capability in ((7, 5), *CAPABILITIES):
            for dtype in (torch.float32, torch.float16):
                for kernel in kernels(*case, capability, dtype, has_rpb=False):
                    self.assertLessEqual(compile_with_nvcc(kernel, capability).registers, 255)

    def test_tf32_kernels_do_not_spill(self):
        for name in ("stage 1", "stage 3", "stage 4", "k 13"):  # head_dim 32, like all published models
            for capability in CAPABILITIES:
                for kernel in kernels(*TUNED[name], capability, torch.float32, uses_tf32=True):
                    with self.subTest(name, capability=capability, kernel=kernel.name):
                        self.assertEqual(compile_with_nvcc(kernel, capability).spilled_bytes, 0)


def main() -> None:
    print("| problem | GPU | kernel | registers | spilled bytes | shared memory, KB |")
    print("|---|---|---|---|---|---|")
    for name, capability, kernel, report in table(TUNED | OTHERS):
        words = (name, f"sm_{capability[0]}{capability[1]}", kernel.name.removeprefix("natten_"), report.registers)
        print("|", " | ".join(map(str, (*words, report.spilled_bytes, f"{report.shared_bytes / 1024:.1f}"))), "|")


if __name__ == "__main__":
    main()
