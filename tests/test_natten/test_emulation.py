"""tests/emulation, which runs CUDA C++ on the CPU: its instructions match the PTX manual, and it detects mistakes and
bank conflicts."""

from __future__ import annotations

import ctypes
import shutil
import unittest
from pathlib import Path

import torch
from emulation import launcher
from torch import Tensor

from natten.backends.cuda.driver import Kernel

PROBE = Path(launcher.__file__).with_name("probe.cu")


def arguments(name: str, threads: int, x: Tensor, out: Tensor, *, mistake: int = 0, blocks: int = 1, seed: int = 0):
    """Return the arguments of `launcher.run` for a probe."""
    shared_bytes = {"probe_stages": 1024, "probe_banks": 4096}.get(name, 512)
    kernel = Kernel("probe.cu", name, (f"MISTAKE={mistake}",), threads, shared_bytes)
    return PROBE, kernel, blocks, (ctypes.c_int64 * 2)(x.data_ptr(), out.data_ptr()), seed


def run(name: str, threads: int, x: Tensor, out: Tensor, **options: int) -> Tensor:
    launcher.run(*arguments(name, threads, x, out, **options))
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

    def check_mistake(self, words: str, name: str, threads: int, x: Tensor, out: Tensor, mistake: int) -> None:
        """Check that a mistake ends the run, whatever the order of threads."""
        for seed in range(5):
            with self.assertRaisesRegex(launcher.EmulationError, words):
                run(name, threads, x, out, mistake=mistake, seed=seed)

    def test_a_missing_barrier_is_a_race(self):
        self.check_mistake("race|nothing has written", "probe_sum", 64, self.numbers, torch.zeros(1), 1)

    @unittest.skipUnless(shutil.which("addr2line"), "addr2line is not installed")
    def test_a_mistake_is_reported_with_its_lines(self):
        self.check_mistake(r"probe\.cu:\d+", "probe_sum", 64, self.numbers, torch.zeros(1), 1)

    def test_copies_in_stages(self):
        numbers = torch.arange(3.0 * 64 * 4)
        out = run("probe_stages", 64, numbers, torch.zeros(64))
        torch.testing.assert_close(out, numbers[::4].view(3, 64).sum(0).flip(0))
        self.check_mistake("race|copy", "probe_stages", 64, numbers, torch.zeros(64), 6)

    def test_a_shuffle_does_not_order_memory(self):
        self.check_mistake("race|nothing has written", "probe_banks", 32, self.numbers, torch.zeros(32), 7)

    def test_a_read_of_memory_that_was_not_written(self):
        self.check_mistake("nothing has written", "probe_banks", 32, self.numbers, torch.zeros(32), 8)

    def test_wavefronts(self):
        out = torch.zeros(32)  # must live as long as the run
        accesses = launcher.run_and_count(*arguments("probe_banks", 32, self.numbers, out))
        found = sorted((a.kind, a.bytes, a.instructions, a.wavefronts, a.fewest) for a in accesses)
        loads = [(4, 1, 1, 1), (4, 1, 1, 1), (4, 1, 2, 1), (4, 1, 32, 1), (8, 1, 2, 2), (16, 1, 4, 4), (16, 1, 8, 4)]
        self.assertEqual(found, [*(("load", *numbers) for numbers in loads), ("store", 4, 32, 32, 32)])

    def test_atomics(self):
        self.assertEqual(run("probe_barrier", 64, self.numbers, torch.zeros(1)).item(), 64.0)

    def test_a_barrier_that_some_threads_skip_is_a_deadlock(self):
        with self.assertRaisesRegex(launcher.EmulationError, "deadlock"):
            run("probe_barrier", 64, self.numbers, torch.zeros(1), mistake=2)

    def test_misaligned_accesses_are_detected(self):
        for mistake in (9, 10):
            self.check_mistake("misaligned", "probe_barrier", 64, self.numbers, torch.zeros(4), mistake)

    def test_matrix_instructions(self):
        out = run("probe_matrix", 32, self.matrix, torch.zeros(640))
        exact = self.matrix.double()
        plain, transposed = (out[i : i + 256].view(2, 16, 8).movedim(0, 1).reshape(16, 16) for i in (0, 256))
        torch.testing.assert_close(plain.double(), exact @ exact, atol=1e-4, rtol=0)
        torch.testing.assert_close(transposed.double(), exact @ exact.T, atol=1e-4, rtol=0)
        half_depth = out[512:].view(16, 8).double()
        torch.testing.assert_close(half_depth, exact[:, :8] @ exact[:8, :8].T, atol=1e-4, rtol=0)

    def test_a_copy_without_a_wait_is_detected(self):
        self.check_mistake("copy", "probe_matrix", 32, self.matrix, torch.zeros(640), 3)

    def test_a_copy_of_more_bytes_than_its_size_is_detected(self):
        self.check_mistake("more bytes", "probe_matrix", 32, self.matrix, torch.zeros(640), 11)

    def test_a_write_beyond_shared_memory_is_detected(self):
        self.check_mistake("beyond", "probe_matrix", 32, self.matrix, torch.zeros(640), 4)

    def test_matrix_instructions_of_tfloat(self):
        numbers = self.matrix.float()[:, :8] + 1e-4
        out = run("probe_tfloat", 32, numbers, torch.zeros(128)).view(16, 8).double()
        bits = (numbers.view(torch.int32) + 0x1000) & ~0x1FFF
        exact = bits.view(torch.float32).double()
        torch.testing.assert_close(out, exact @ exact[:8].T, atol=1e-4, rtol=0)

    def test_operands_that_are_not_rounded_are_detected(self):
        with self.assertRaisesRegex(launcher.EmulationError, "rounded"):
            run("probe_tfloat", 32, self.matrix.float()[:, :8] + 1e-4, torch.zeros(128), mistake=5)
