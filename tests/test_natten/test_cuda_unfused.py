"""Unfused attention with matrix instructions against the reference, with kernels run by tests/emulation.

The limits of errors are those of test_cuda.py.
"""

from __future__ import annotations

import unittest
from unittest import mock

import pytest
import torch
from emulation.launcher import emulated_gpu
from torch import Tensor

from natten import backends
from natten.backends import cuda
from natten.backends.cuda import tiles
from natten.checks import make_axes
from natten.geometry import Axis
from test_natten.guarded import GuardedProblem, has_read_beyond_tensors
from test_natten.problems import RANKS, make_qkv, make_rpb
from test_natten.test_cpu import problem_of, unfused
from test_natten.test_cuda import TURING, EmulatedTestCase, few_warps, problem, tile_limits

QUERY_KEY, WEIGHT_VALUE = ["natten_logits_tiles"], ["natten_gather_tiles"]
BACKWARD = ["natten_logits_tiles", "natten_scatter_tiles", "natten_gather_tiles", "natten_scatter_tiles"]
ALL = [*QUERY_KEY, *WEIGHT_VALUE, *BACKWARD]


def results(backend: str, axes: tuple[Axis, ...], query, key, rpb, weights, grad_out) -> list[Tensor]:
    """Return the results of all unfused operators; `weights` are also the gradients of logits, the key the value."""
    module = backends.choose(query, backend)
    with torch.no_grad():
        found = [
            module.query_key(query, key, rpb, axes),
            *module.query_key_backward(weights, query, key, rpb, axes),
            module.weight_value(weights, key, axes),
            *module.weight_value_backward(grad_out, weights, key, axes),
        ]
    return [x for x in found if x is not None]


class UnfusedTestCase(EmulatedTestCase):
    def check_weights(self, weights: Tensor, space, kernel_size, dilation=1, is_causal=False, dim: int = 8) -> None:
        """Check all operators with weights [B, H, *space, W] of any layout, in bfloat16."""
        generator = torch.Generator().manual_seed(0)
        shape = (*weights.shape[:-1], dim)
        query, key, grad_out = torch.randn(3, *shape, generator=generator).bfloat16()
        axes = make_axes(space, kernel_size, 1, dilation, is_causal)
        inputs = query, key, None, weights, grad_out
        with emulated_gpu() as emulator:
            found = results("cuda", axes, *inputs)
        self.assertTrue(all("tiles" in name for name in emulator.launched))
        expected = results("reference", axes, *(x if x is None else x.double() for x in inputs))
        for x, y in zip(found, expected, strict=True):
            self.assertTrue(torch.equal(x.isfinite(), y.isfinite()))
            x, y = x[y.isfinite()], y[y.isfinite()]
            torch.testing.assert_close(x.double(), y, atol=0.03 * y.abs().max().item(), rtol=0)


class UnfusedTest(UnfusedTestCase):
    def test_all_features_at_once(self):
        given = problem((9, 20), (4, 5), 1, (2, 1), (False, True))
        for dtype in (torch.bfloat16, torch.float16):
            self.assertEqual(self.check(given, dtype, unfused), [*ALL, "natten_sum_parts"])

    def test_units_whose_windows_are_complete(self):
        """They are processed in an unrolled loop."""
        for given in (problem((19, 11), 5, dim=32, has_rpb=False), problem((3, 13, 9), (2, 3, 3), dim=8, heads=1)):
            with self.subTest(given=given):
                self.check(given, torch.bfloat16, unfused)

    def test_a_single_axis(self):
        for given in (problem((37,), 7, 1, 2, True, dim=24), problem((150,), 63, dim=8)):
            with self.subTest(given=given):
                self.check(given, torch.bfloat16, unfused)

    def test_layouts_of_weights(self):
        """Weights whose tokens are not adjacent, whose heads are last, and that begin at any multiple of 2 bytes."""
        generator = torch.Generator().manual_seed(1)
        space, kernel_size = (9, 12), (3, 5)
        shape = (1, 2, *space, 15)
        plain = torch.randn(shape, generator=generator).bfloat16()
        padded, last = torch.zeros(*shape[:-1], 22).bfloat16(), plain.movedim(1, -2).contiguous().movedim(-2, 1)
        padded[..., 3:18] = plain
        for weights in (padded[..., 3:18], last):
            self.check_weights(weights, space, kernel_size)
        for offset in (1, 2, 7):
            moved = torch.zeros(plain.numel() + 8).bfloat16()[offset : offset + plain.numel()].view(shape)
            self.check_weights(moved.copy_(plain), space, kernel_size, (1, 2))

    def test_slots_before_the_map_have_no_influence(self):
        for space, is_causal in (((9, 12), (True, False)), ((8, 9), (False, True)), ((40,), True)):
            rank, width = len(space), 3 ** len(space)
            axes = make_axes(space, 3, 1, 1, is_causal)
            q, k, grad = torch.randn(3, 1, 1, *space, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
            missing = backends.choose(q, "reference").query_key(q, k, None, axes).isinf()
            self.assertEqual((missing.shape[-1], missing.any().item()), (width, True))
            weights = torch.randn(missing.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
            found = []
            for filling in (0.0, float("nan")):
                with emulated_gpu():
                    found.append(results("cuda", axes, q, k, None, weights.masked_fill(missing, filling), grad))
            for zero, nan in zip(*found, strict=True):
                self.assertTrue(torch.equal(zero, nan), rank)

    def test_no_read_beyond_tensors(self):
        """Tiles that are larger than the map, with tokens that do not exist after the last one."""
        self.assertFalse(has_read_beyond_tensors([GuardedProblem((11, 21), 5, 2, dim=8)]))

    def test_kernels_without_matrix_instructions(self):
        given = problem((9, 11), 3, dim=8, heads=1)
        self.assertNotIn(ALL[0], self.check(given, torch.float16, unfused, capability=TURING))
        self.assertNotIn(ALL[0], self.check(given._replace(head_dim=12), torch.float16, unfused))
        self.assertNotIn(ALL[0], self.check(given, torch.bfloat16, unfused, shared_bytes=2 << 10))
        with mock.patch.object(cuda, "allows_tf32", lambda: True):
            self.assertNotIn(ALL[0], self.check(given, torch.float32, unfused))


@pytest.mark.slow
class UnfusedSweepTest(UnfusedTestCase):
    def check_problems(self, count: int, dtype: torch.dtype) -> None:
        for rank in RANKS:
            for seed in range(count):
                given = problem_of(rank, seed)
                window = given.window._replace(stride=(1,) * rank)
                given = given._replace(head_dim=min(256, -(-given.head_dim // 8) * 8), window=window)
                if given.head_dim > 64:
                    given = given._replace(heads=1, batch=1)
                with self.subTest(given=given):
                    self.assertEqual(self.check(given, dtype, unfused)[: len(ALL)], ALL)
        self.check_sweep()

    def test_bfloat16(self):
        self.check_problems(10, torch.bfloat16)

    def test_float16(self):
        self.check_problems(3, torch.float16)

    def test_staged_columns(self):
        for given, kib, processors in (
            (problem((18, 17), 7, dim=32), 36, 132),
            (problem((22, 35), 9, dim=64), 64, 1),  # several warps
            (problem((5, 20, 20), 5, dim=32), 72, 1),  # several warps, some of them without a unit
        ):
            with self.subTest(given=given):
                self.check(given, torch.bfloat16, unfused, shared_bytes=kib << 10, processors=processors)
                staged = {found["IS_STAGED"] for found in self.definitions if "TILE_X" in found}
                self.assertIn("1", staged)

    def test_blocks_with_several_pieces(self):
        for given in (problem((20, 19), 5, 1, 2), problem((40,), 5, 1, 3), problem((5, 6, 20), 3, dim=8)):
            for has_fragments in (True, False):
                with (
                    self.subTest(given=given, has_fragments=has_fragments),
                    mock.patch.object(cuda._Planner, "_parts", lambda *arguments: 1),
                    tile_limits(has_fragments, 1 << 14, has_fragments, 1 << 14),
                ):
                    self.check(given, torch.bfloat16, unfused)

    def test_several_units_per_warp(self):
        given = problem((40, 40), 3, dim=8, heads=1)
        with few_warps(2):
            self.check(given, torch.bfloat16, unfused, processors=1)
            units = [int(d["TILE_Y"]) * int(d["TILE_X"]) // 32 for d in self.definitions if "TILE_X" in d]
            self.assertGreater(max(units), 2)

    def test_no_read_beyond_tensors(self):
        problems = [GuardedProblem((5, 20, 20), 3), GuardedProblem((11, 21), 5, 2)]
        problems += [GuardedProblem((37,), 7), GuardedProblem((64,), 31)]
        self.assertFalse(has_read_beyond_tensors(problems))

    def test_published_shapes(self):
        for side, heads, dilation in ((56, 1, 1), (56, 1, 8), (14, 2, 1), (14, 2, 2), (7, 4, 1)):
            with self.subTest(side=side, dilation=dilation):
                given = problem((side, side), 7, 1, dilation, dim=32, heads=heads)
                self.check(given, torch.bfloat16, unfused, processors=1)

    def test_long_windows(self):
        for given in (problem((300,), 151, dim=32), problem((300,), 100, 1, 2, True), problem((7, 150), (3, 141))):
            with self.subTest(given=given):
                self.check(given, torch.bfloat16, unfused)

    def test_tables_too_large_for_shared_memory(self):
        for given in (problem((12, 13), (5, 4), dim=24), problem((5, 6, 9), 3, dim=8), problem((40,), 9, dim=16)):
            for table_bytes, gradient_bytes in ((0, 0), (1 << 16, 1 << 15)):
                with (
                    self.subTest(given=given, table_bytes=table_bytes),
                    tile_limits(False, table_bytes, False, gradient_bytes),
                ):
                    self.check(given, torch.bfloat16, unfused)

    def test_windows_wider_than_a_unit(self):
        for given in (problem((27, 40), (5, 21)), problem((3, 45), (3, 17), 1, 1, True), problem((9, 26), (4, 25))):
            with self.subTest(given=given):
                self.check(given, torch.bfloat16, unfused)

    def test_steps_of_more_than_32_bits(self):
        for given in (problem((11, 20), 5, 1, 2), problem((4, 5, 9), 3)):
            with self.subTest(given=given), mock.patch.object(cuda, "_MAX_SHORT_STEP", 0):
                self.check(given, torch.bfloat16, unfused)

    def test_large_head_dims(self):
        for dim in (72, 128, 136, 256):
            with self.subTest(dim=dim):
                self.check(problem((9, 10), 4, dim=dim, heads=1), torch.bfloat16, unfused)

    def test_results_do_not_depend_on_the_order_of_threads(self):
        given = problem((12, 17), 5, dim=16)
        runs = []
        for seed in range(2):
            qkv, rpb = make_qkv(given, torch.bfloat16), make_rpb(given, torch.float32)
            with emulated_gpu(seed=seed):
                runs.append(unfused(given, qkv, rpb, "cuda"))
        for one, other in zip(*runs, strict=True):
            self.assertTrue(torch.equal(one, other))


class UnfusedTileTest(unittest.TestCase):
    def test_problems_of_many_sizes_have_a_tile_on_each_gpu(self):
        shapes = (((56, 56), 7, 32), ((24, 24), 13, 256), ((16, 32, 32), 7, 128), ((4096,), 1023, 64))
        for space, kernel_size, dim in shapes:
            axes = make_axes(space, kernel_size)
            axes = (*(cuda._NO_AXIS,) * (3 - len(axes)), *axes)
            for kernel in tiles.UNFUSED_KERNELS:
                for shared_bytes in (99 << 10, 227 << 10):
                    tile = tiles.choose_tile(kernel, axes, dim, 64, True, 108, shared_bytes)
                    self.assertIsNotNone(tile)
                    self.assertLessEqual(tile.shared_bytes, shared_bytes)

    def test_a_window_too_large_for_shared_memory_has_no_tile(self):
        axes = (cuda._NO_AXIS, *make_axes((200, 200), 99))
        self.assertIsNone(tiles.choose_tile("gather", axes, 8, 64, True, 132, 227 << 10))


if __name__ == "__main__":
    unittest.main()
