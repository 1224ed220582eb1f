"""Tiles of the CUDA kernels: their columns, and how many kernels the maps of a model need."""

from __future__ import annotations

import itertools
import unittest
from collections.abc import Iterator

import torch
from emulation.launcher import gpu_properties

from natten.backends import cuda
from natten.backends.cuda import columns, tiles
from natten.backends.cuda.columns import Lengths, place_row, span, widest
from natten.checks import make_axes
from natten.geometry import Axis, first_key

H200 = gpu_properties((9, 0))
STAGES = ((4, 2), (8, 4), (16, 8), (32, 16))  # of NAT-Mini: pixels per token, and heads
KERNEL_SIZE, HEAD_DIM = 7, 32


def classes() -> Iterator[Lengths]:
    """Yield classes of a single axis, of all kinds of windows."""
    for k, stride, is_causal, unit in itertools.product((3, 7, 8, 13, 20), (1, 2, 5), (False, True), (1, 2, 8, 16)):
        if stride > k:
            continue
        for longest, remainders in ((None, range(unit)), (k + 9, range(unit)), (None, (0, unit // 2))):
            yield Lengths(k, stride, is_causal, k, longest, unit, frozenset(remainders))


class ColumnsTest(unittest.TestCase):
    def test_spans_are_those_of_windows(self):
        for k, stride, is_causal in itertools.product((3, 7, 8), (1, 2, 3), (False, True)):
            axis = Lengths(k, stride, is_causal, k, None, 1, frozenset((0,)))
            for n in range(k, 3 * k):
                first = first_key(Axis(n, k, stride, 1, is_causal), torch.arange(n), torch.tensor(n))
                end = torch.arange(1, n + 1) if is_causal else first + k
                sees = (first[:, None] <= torch.arange(n)) & (torch.arange(n) < end[:, None])
                for is_inverse, s in itertools.product((False, True), range(n)):
                    found = (sees.T if is_inverse else sees)[s].nonzero()
                    with self.subTest(axis=axis, n=n, s=s, is_inverse=is_inverse):
                        self.assertEqual(span(axis, is_inverse, s, n), (found.min().item(), found.max().item() + 1))

    def test_all_tiles_of_all_maps_of_a_class_fit(self):
        for axis, is_inverse, count in itertools.product(classes(), (False, True), (1, 2, 3)):
            size = count * axis.unit
            for n in filter(axis.holds, range(axis.kernel_size, 4 * axis.kernel_size + 2 * size + 40)):
                for tile_x in range(0, n, size):
                    self.check_tile(axis, is_inverse, size, n, tile_x)

    def check_tile(self, axis: Lengths, is_inverse: bool, size: int, n: int, tile_x: int) -> None:
        tile_end = min(tile_x + size, n)
        width = span(axis, is_inverse, tile_end - 1, n)[1] - span(axis, is_inverse, tile_x, n)[0]
        self.assertLessEqual(width, widest(axis, is_inverse, size), (axis, is_inverse, size, n, tile_x))
        if axis.unit < 8:  # the last axis has units of 8 or 16
            return
        for has_fragments in (False, True):
            row = place_row(axis, is_inverse, size, has_fragments)
            for x in range(tile_x, tile_end, axis.unit):
                first = span(axis, is_inverse, x, n)[0] - tile_x + row.reach
                end = span(axis, is_inverse, min(x + axis.unit, n) - 1, n)[1] - tile_x + row.reach
                first_column = x - tile_x if has_fragments else first // 8 * 8  # as in tiles.h
                is_inside = 0 <= first_column <= first and end <= first_column + row.unit_columns <= row.columns
                self.assertTrue(is_inside, (axis, is_inverse, size, n, x, row, has_fragments))

    def test_published_maps_have_the_fewest_columns(self):
        """A window of 7 and a unit of 8 need 14 columns."""
        for kernel in tiles.KERNELS:
            for side in (14, 28, 56):
                axes = (cuda._NO_AXIS, *make_axes((side, side), 7))
                tile = tiles.choose_tile(kernel, axes, 32, 1024, True, 132, 227 << 10)
                self.assertEqual(tile.unit_columns, 16, (kernel, side))


class KernelCountTest(unittest.TestCase):
    """Pictures of many sizes share kernels."""

    def kernels(self, pictures, batch: int, dtype=torch.bfloat16, dilation=1) -> set:
        """Return the kernels of all stages of NAT-Mini, forward and backward, on pictures [height, width]."""
        found = set()
        maps = {
            (max(7 * dilation, -(-height // pixels)), max(7 * dilation, -(-width // pixels)), heads)
            for (height, width), (pixels, heads) in itertools.product(pictures, STAGES)
        }
        for *space, heads in maps:
            query = torch.empty(batch, *space, heads, HEAD_DIM, dtype=dtype, device="meta")
            for op in ("attention", "attention_backward"):
                steps = cuda.launches(op, query, make_axes(tuple(space), KERNEL_SIZE, 1, dilation), True, H200)
                found |= {step.kernel for step in steps}
        return found

    def test_detection(self):
        """Mask R-CNN with pictures of all sizes that fit into 1333 x 800 or 800 x 1333, padded to multiples of 32."""
        sides = range(32, 1345, 32)
        pictures = [sizes for sizes in itertools.product(sides, sides) if min(sizes) <= 800]
        for batch in (1, 2, 8):
            found = self.kernels(pictures, batch)
            self.assertLessEqual(len(found), 24)
            self.assertEqual(sum(kernel.name == "natten_sum_parts" for kernel in found), 1)

    def test_dilation_and_batch_size_share_kernels(self):
        few, many = (self.kernels([(height, 800) for height in range(800, 801 + 32 * n, 32)], 2) for n in (1, 12))
        self.assertLessEqual(len(many), len(few) + 9)
        self.assertEqual(self.kernels([(512, 512)], 64), self.kernels([(512, 512)], 128))

    def test_the_sum_of_parts_depends_on_the_window_alone(self):
        found = set()
        for dim, dtype, stride in ((32, torch.bfloat16, 1), (64, torch.float16, 2), (24, torch.float32, 1)):
            query = torch.empty(2, 56, 56, 2, dim, dtype=dtype, device="meta")
            axes = make_axes((56, 56), 7, stride)
            found.add(cuda.launches("attention_backward", query, axes, True, H200)[-1].kernel)
        (kernel,) = found
        self.assertEqual(kernel.name, "natten_sum_parts")

    def test_few_tiles_are_compared(self):
        """The search takes less than 20 us per tile, on a core from 2020 or later."""
        for kernel, side in itertools.product(tiles.KERNELS, (7, 14, 28, 56, 200)):
            axes = (cuda._NO_AXIS, *make_axes((side, side), 7))
            found = list(tiles.tiles_and_costs(kernel, axes, 32, 1024, True, 132, 227 << 10))
            self.assertLessEqual(len(found), 1000, (kernel, side))
        columns.place_row.cache_clear()


if __name__ == "__main__":
    unittest.main()
