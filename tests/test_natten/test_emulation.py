"""tests/emulation, which runs CUDA C++ on the CPU: its instructions match the PTX manual, and it detects mistakes."""

from __future__ import annotations

import ctypes
import unittest
from pathlib import Path

import torch
from emulation import launcher
from torch import Tensor

from natten.backends.cuda.driver import Kernel

PROBE = Path(launcher.__file__).with_name("probe.cu")


def run(name: str, threads: int, x: Tensor, out: Tensor, *, mistake: int = 0, blocks: int = 1, seed: int = 0) -> Tensor:
    kernel = Kernel("probe.cu", name, (f"MISTAKE={mistake}",), threads, shared_bytes=512)
    launcher.run(PROBE, kernel, blocks, (ctypes.c_int64 * 2)(x.data_ptr(), out.data_ptr()), seed)
    return out


class EmulationTest(unittest.TestCase):
    def setUp(self):
        generator = torch.Generator().manual_seed(0)
        self.numbers = torch.randn(64, generator=generator)
        self.matrix = torch.randn(16, 16, generator=generator).half()

    def test_shuffles_and_barriers(self):
        for seed in range(5):
            sums = run("probe_sum", 64, self.numbers, torch.zeros(3), blocks=3, seed=seed)
            torch.testing.assert_close(sums, self.numbers.sum().expand(3))

    def test_a_missing_barrier_changes_results(self):
        found = [run("probe_sum", 64, self.numbers, torch.zeros(3), blocks=3, mistake=1, seed=s) for s in range(5)]
        expected = self.numbers.sum().expand(3)
        self.assertTrue(any(not torch.allclose(sums, expected) for sums in found))

    def test_atomics(self):
        self.assertEqual(run("probe_barrier", 64, self.numbers, torch.zeros(1)).item(), 64.0)

    def test_a_barrier_that_some_threads_skip_is_a_deadlock(self):
        with self.assertRaisesRegex(launcher.EmulationError, "deadlock"):
            run("probe_barrier", 64, self.numbers, torch.zeros(1), mistake=2)

    def test_matrix_instructions(self):
        out = run("probe_matrix", 32, self.matrix, torch.zeros(640))
        exact = self.matrix.double()
        plain, transposed = (out[i : i + 256].view(2, 16, 8).movedim(0, 1).reshape(16, 16) for i in (0, 256))
        torch.testing.assert_close(plain.double(), exact @ exact, atol=1e-4, rtol=0)
        torch.testing.assert_close(transposed.double(), exact @ exact.T, atol=1e-4, rtol=0)
        half_depth = out[512:].view(16, 8).double()
        torch.testing.assert_close(half_depth, exact[:, :8] @ exact[:8, :8].T, atol=1e-4, rtol=0)

    def test_a_copy_without_a_wait_is_detected(self):
        with self.assertRaisesRegex(launcher.EmulationError, "copies"):
            run("probe_matrix", 32, self.matrix, torch.zeros(640), mistake=3)

    def test_a_write_beyond_shared_memory_is_detected(self):
        with self.assertRaisesRegex(launcher.EmulationError, "shared memory"):
            run("probe_matrix", 32, self.matrix, torch.zeros(640), mistake=4)

    def test_matrix_instructions_of_tfloat(self):
        numbers = self.matrix.float()[:, :8] + 1e-4
        out = run("probe_tfloat", 32, numbers, torch.zeros(128)).view(16, 8).double()
        bits = (numbers.view(torch.int32) + 0x1000) & ~0x1FFF
        exact = bits.view(torch.float32).double()
        torch.testing.assert_close(out, exact @ exact[:8].T, atol=1e-4, rtol=0)

    def test_operands_that_are_not_rounded_are_detected(self):
        with self.assertRaisesRegex(launcher.EmulationError, "rounded"):
            run("probe_tfloat", 32, self.matrix.float()[:, :8] + 1e-4, torch.zeros(128), mistake=5)
