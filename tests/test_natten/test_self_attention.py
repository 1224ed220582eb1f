"""Properties that need no other implementation: self attention as a special case, and symmetries."""

from __future__ import annotations

import unittest

import torch
import torch.nn.functional as F
from torch import Tensor

import natten
from test_natten.problems import RANKS, function

MAPS = {1: (9,), 2: (5, 6), 3: (3, 4, 5)}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return a normally distributed float64 tensor."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv_of(space: tuple[int, ...], batch: int = 2, heads: int = 3, head_dim: int = 4) -> tuple[Tensor, ...]:
    """Return heads-last query, key and value."""
    return random(3, batch, *space, heads, head_dim).unbind()


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Assert equality up to float64 rounding."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def self_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Compute torch's attention between all tokens of a map, on heads-last tensors."""
    flat = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*flat, attn_mask=mask, is_causal=is_causal)
    return out.transpose(1, 2).reshape(q.shape)


class SelfAttentionTest(unittest.TestCase):
    """A window of the size of the map, without dilation, is self attention."""

    def compare(self, q: Tensor, k: Tensor, v: Tensor, is_causal=False, mask: Tensor | None = None) -> None:
        """Compare output and gradients of the default and the reference backend."""
        for x in (inputs := (q, k, v)):
            x.requires_grad_()
        space = q.shape[1:-2]
        expected = self_attention(q, k, v, mask)
        grad_out = random(*q.shape, seed=1)
        expected_grads = torch.autograd.grad(expected, inputs, grad_out)
        for backend in (None, "reference"):
            out = function(len(space))(q, k, v, tuple(space), is_causal=is_causal, backend=backend)
            assert_equal(out, expected)
            for found, grad in zip(torch.autograd.grad(out, inputs, grad_out), expected_grads, strict=True):
                assert_equal(found, grad)

    def test_window_of_the_whole_map(self):
        for rank in RANKS:
            with self.subTest(rank=rank):
                self.compare(*qkv_of(MAPS[rank]))

    def test_causal_axis(self):
        token = torch.arange(9)
        self.compare(*qkv_of(MAPS[1]), is_causal=True, mask=token[:, None] >= token)
        q, k, v = qkv_of(MAPS[1])
        assert_equal(natten.na1d(q, k, v, 9, is_causal=True), self_attention(q, k, v, is_causal=True))

    def test_causal_along_one_axis_of_two(self):
        height, width = MAPS[2]
        row = torch.arange(height * width) // width
        q, k, v = qkv_of(MAPS[2])
        self.compare(q, k, v, is_causal=(True, False), mask=row[:, None] >= row)

    def test_bias_table_as_a_mask(self):
        rpb = random(3, 17)
        position = torch.arange(9)
        mask = rpb[:, position - position[:, None] + 8]
        q, k, v = qkv_of(MAPS[1])
        assert_equal(natten.na1d(q, k, v, 9, rpb=rpb), self_attention(q, k, v, mask))

    def test_scale(self):
        q, k, v = qkv_of(MAPS[2])
        assert_equal(natten.na2d(q, k, v, 3, scale=0.3), natten.na2d(q * 0.6, k, v, 3, scale=0.5))
        assert_equal(natten.na2d(q, k, v, 3), natten.na2d(q, k, v, 3, scale=4**-0.5))

    def test_full_window_is_independent_of_token_order(self):
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
        q, k, v = qkv_of(MAPS[1])
        assert_equal(natten.na1d(q[:, order], k[:, order], v[:, order], 9), natten.na1d(q, k, v, 9)[:, order])


class DilationTest(unittest.TestCase):
    """Dilated attention is undilated attention on each residue class."""

    def check(self, space: tuple[int, ...], dilation: tuple[int, ...], **arguments) -> None:
        rank = len(space)
        attend = function(rank)
        q, k, v = qkv_of(space)
        rpb = random(3, *(5,) * rank)
        out, lse = attend(q, k, v, 3, dilation=dilation, rpb=rpb, return_lse=True, **arguments)
        for residues in torch.cartesian_prod(*(torch.arange(d) for d in dilation)).view(-1, rank).tolist():
            steps = tuple(slice(r, None, d) for r, d in zip(residues, dilation, strict=True))
            one = (slice(None), *steps)
            expected_out, expected_lse = attend(q[one], k[one], v[one], 3, rpb=rpb, return_lse=True, **arguments)
            assert_equal(out[one], expected_out)
            assert_equal(lse[one], expected_lse)

    def test_each_residue_class_is_a_separate_map(self):
        for space, dilation in (((14,), (4,)), ((9, 11), (3, 2)), ((7, 3, 9), (2, 1, 3))):
            for arguments in ({}, {"is_causal": True}, {"stride": 2}):
                with self.subTest(space=space, dilation=dilation, **arguments):
                    self.check(space, dilation, **arguments)


class SymmetryTest(unittest.TestCase):
    """Symmetries of the definition."""

    def test_crop_keeps_queries_whose_windows_are_inside(self):
        q, k, v = qkv_of((16, 17))
        whole = natten.na2d(q, k, v, (3, 5), dilation=(2, 1), rpb=random(3, 5, 9))
        q, k, v = (x[:, 2:15, 3:16] for x in (q, k, v))  # the first row is a multiple of the dilation
        part = natten.na2d(q, k, v, (3, 5), dilation=(2, 1), rpb=random(3, 5, 9))
        assert_equal(part[:, 2:-2, 2:-2], whole[:, 4:13, 5:14])

    def test_flipped_map_and_table_flip_the_output_of_odd_windows(self):
        for space, kernel_size, dilation in (
            ((17,), (5,), (3,)),
            ((9, 11), (3, 5), (3, 2)),
            ((7, 5, 4), (3, 5, 3), (2, 1, 1)),
        ):
            rank = len(space)
            with self.subTest(rank=rank):
                axes = tuple(range(1, rank + 1))
                q, k, v = qkv_of(space)
                rpb = random(3, *(2 * size - 1 for size in kernel_size))
                window = {"kernel_size": kernel_size, "dilation": dilation}
                out = function(rank)(q, k, v, **window, rpb=rpb)
                flipped = function(rank)(*(x.flip(axes) for x in (q, k, v)), **window, rpb=rpb.flip(axes))
                assert_equal(flipped.flip(axes), out)

    def test_permuted_axes_permute_the_output(self):
        q, k, v = qkv_of((6, 7, 8))
        window = {
            "kernel_size": (2, 3, 4),
            "stride": (1, 2, 3),
            "dilation": (3, 1, 2),
            "is_causal": (True, False, False),
        }
        rpb = random(3, 3, 5, 7)
        out = natten.na3d(q, k, v, **window, rpb=rpb)
        for order in ((1, 0, 2), (2, 0, 1), (0, 2, 1)):
            with self.subTest(order):
                moved = (0, *(1 + axis for axis in order), 4, 5)
                exchanged = natten.na3d(
                    *(x.permute(moved) for x in (q, k, v)),
                    **{name: tuple(values[axis] for axis in order) for name, values in window.items()},
                    rpb=rpb.permute(0, *(1 + axis for axis in order)),
                )
                assert_equal(exchanged, out.permute(moved))

    def test_batch_elements_and_heads_are_independent(self):
        q, k, v = qkv_of(MAPS[2])
        rpb = random(3, 5, 5)
        out = natten.na2d(q, k, v, 3, rpb=rpb)
        for b in range(2):
            for h in range(3):
                one = (slice(b, b + 1), slice(None), slice(None), slice(h, h + 1))
                assert_equal(natten.na2d(q[one], k[one], v[one], 3, rpb=rpb[h : h + 1]), out[one])

    def test_weights_of_a_window_sum_to_one(self):
        for rank in RANKS:
            q, k, _ = qkv_of(MAPS[rank])
            out = function(rank)(q, k, torch.ones_like(q), 3, is_causal=(True,) * rank)
            assert_equal(out, torch.ones_like(q))

    def test_constant_bias_only_shifts_the_logsumexp(self):
        q, k, v = qkv_of(MAPS[2])
        rpb = random(3, 5, 5)
        out, lse = natten.na2d(q, k, v, 3, rpb=rpb, return_lse=True)
        moved_out, moved_lse = natten.na2d(q, k, v, 3, rpb=rpb + 7.0, return_lse=True)
        assert_equal(moved_out, out)
        assert_equal(moved_lse, lse + 7.0)

    def test_causal_tokens_do_not_affect_earlier_tokens(self):
        q, k, v = qkv_of((12,))
        for stride in (1, 2, 3):
            with self.subTest(stride=stride):
                before = natten.na1d(q, k, v, 3, stride=stride, is_causal=True)
                later = torch.arange(12)[:, None, None] >= 7
                after = natten.na1d(*(x + later for x in (q, k, v)), 3, stride=stride, is_causal=True)
                assert_equal(after[:, :7], before[:, :7])

    def test_large_logits_stay_finite(self):
        q, k, v = (x.float() * 100 for x in qkv_of(MAPS[2]))
        for backend in (None, "reference"):
            self.assertTrue(natten.na2d(q, k, v, 3, scale=100.0, backend=backend).isfinite().all())
