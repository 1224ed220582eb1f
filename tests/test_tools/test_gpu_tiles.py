"""tools/gpu_tiles.py where there is no GPU: what it would time, and that all such tiles compute the same."""

from __future__ import annotations

import contextlib
import io
import unittest

import gpu_tiles
import pytest
import torch
from benchmarks import ops
from emulation.launcher import emulated_gpu

from natten.backends import cuda
from natten.backends.cuda.tiles import KINDS
from natten.profiler import find_gpu


def run(*arguments: str) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = gpu_tiles.main(list(arguments))
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), errors.getvalue()


class DryRunTest(unittest.TestCase):
    def test_the_chosen_tile_comes_first(self):
        status, out, _ = run("b128_56x56_h2_d32_k7", "--dry-run", "--most", "3")
        self.assertEqual((status, out.count("b128_56x56_h2_d32_k7")), (0, 3))
        query = torch.empty(128, 56, 56, 2, 32, dtype=torch.bfloat16, device="meta")
        (step,) = cuda.launches("attention", query, ops.parse("b128_56x56_h2_d32_k7").axes, True, find_gpu("9.0"))
        words = dict(text.split("=") for text in step.kernel.definitions)
        size = "x".join(words[f"TILE_{axis}"] for axis in "ZYX")
        self.assertIn(f"  cost 1.00: {size}, {words['WARPS']} warps x {words['MIN_BLOCKS']} blocks", out)

    def test_mistakes(self):
        for arguments, text in (
            (("b1_7x7", "--dry-run"), "b1_7x7"),
            (("b1_7x7_h1_d8_k3", "--dry-run", "--capability", "1"), "9.0"),
        ):
            with self.subTest(arguments):
                status, _, errors = run(*arguments)
                self.assertEqual(status, 2)
                self.assertIn(text, errors)


@pytest.mark.slow
class TilesTest(unittest.TestCase):
    def test_all_compute_the_same(self):
        torch.manual_seed(0)
        for name in ("b1_13x20_h1_d16_k5", "b1_5x6x9_h1_d8_k3", "b1_70_h1_d8_k9"):
            case = ops.parse(name)
            q, k, v, grad = (torch.randn(1, *case.space, 1, case.head_dim).bfloat16() for _ in range(4))
            rpb = torch.randn(1, *(2 * axis.kernel_size - 1 for axis in case.axes))
            with emulated_gpu():
                out, lse = cuda.attention(q, k, v, rpb, case.axes, 1.0)
                expected = (out, lse, *cuda.attention_backward(grad, None, q, k, v, rpb, out, lse, case.axes, 1.0))
            for kind in KINDS:
                for tile, _ in gpu_tiles.likely_tiles(case, kind, find_gpu("9.0"), 6):
                    with self.subTest(name, kind=kind, tile=gpu_tiles.describe(tile)), emulated_gpu():
                        with gpu_tiles.taking(kind, tile):
                            out, lse = cuda.attention(q, k, v, rpb, case.axes, 1.0)
                            grads = cuda.attention_backward(grad, None, q, k, v, rpb, out, lse, case.axes, 1.0)
                        for x, y in zip((out, lse, *grads), expected, strict=True):
                            torch.testing.assert_close(x, y, atol=0.05, rtol=0.05)


if __name__ == "__main__":
    unittest.main()
