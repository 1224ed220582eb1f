"""The self-check of the compiled kernels, on the CPU and on an emulated GPU."""

from __future__ import annotations

import os
import tempfile
import unittest
from unittest import mock

import pytest
import torch
from emulation.launcher import emulated_gpu

from natten.backends import cpu, cuda, self_check
from natten.backends.cpu import build
from natten.backends.families import Family
from natten.backends.kernels import warn_fallback
from natten.backends.self_check import CheckRow, run_self_check


class RunSelfCheckTest(unittest.TestCase):
    def test_cpu(self):
        rows = run_self_check("cpu")
        self.assertEqual({row.verdict for row in rows}, {"passed"}, rows)
        self.assertEqual(len(rows), 9)
        self.assertTrue(all(0 < row.largest_error < 0.02 and row.seconds > 0 for row in rows), rows)

    def test_a_wrong_result_fails(self):
        launch = cpu.KERNELS._launch

        def broken(op, *arguments, **tensors):
            grad_rpb = launch(op, *arguments, **tensors)
            if op == "attention":
                tensors["OUT"][..., 0, 0] += 0.5
            return grad_rpb

        with mock.patch.object(cpu.KERNELS, "_launch", broken):
            rows = run_self_check("cpu")
        failed = [row for row in rows if row.verdict == "failed"]
        self.assertEqual(len(failed), 3)
        for row in failed:
            self.assertTrue(row.name.startswith("forward"))
            self.assertGreater(row.largest_error, 0.1)
            self.assertIn("reference", row.detail)

    def test_an_error_fails(self):
        with mock.patch.object(cpu.KERNELS, "_launch", side_effect=RuntimeError("an illegal address")):
            rows = run_self_check("cpu")
        self.assertEqual(
            {(row.verdict, row.detail, row.largest_error) for row in rows}, {("failed", "an illegal address", None)}
        )

    def test_unavailable(self):
        warn_fallback.cache_clear()
        self.addCleanup(warn_fallback.cache_clear)
        with (
            mock.patch.object(build, "cpu_library", side_effect=build.Unavailable("no compiler")),
            self.assertWarns(RuntimeWarning),
        ):
            (row,) = run_self_check("cpu")
        self.assertEqual((row.verdict, row.detail), ("unavailable", "no compiler"))
        with mock.patch.object(torch.cuda, "is_available", lambda: False):
            (row,) = run_self_check("cuda")
        self.assertEqual(row.verdict, "unavailable")

    def test_unknown_backend(self):
        with self.assertRaisesRegex(ValueError, "^backend"):
            run_self_check("reference")

    def check_emulated_gpu(self) -> tuple[list[CheckRow], list[str]]:
        """Return the rows and the names of the launched kernels."""
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.dict(os.environ, NATTEN_CACHE_DIR=folder),
            emulated_gpu() as emulator,
        ):
            rows = run_self_check("cuda", "cpu")
        self.assertEqual({row.verdict for row in rows}, {"passed"}, rows)
        return rows, emulator.launched

    def test_a_family_on_an_emulated_gpu(self):
        family = Family("forward", "tf32", True)
        with (
            mock.patch.object(self_check, "families", list),
            mock.patch.object(cuda, "matrix_families", lambda device: [family]),
        ):
            self.assertEqual(self.check_emulated_gpu()[1], ["natten_attention_tiles"])

    @pytest.mark.slow
    def test_all_families_on_an_emulated_gpu(self):
        rows, launched = self.check_emulated_gpu()
        self.assertEqual(len(rows), 9 + 8)
        self.assertEqual(sum(name == "natten_attention_tiles" for name in launched), 3)


if __name__ == "__main__":
    unittest.main()
