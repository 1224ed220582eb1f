"""Unfused attention: additional tokens, dtypes, argument orders and forward-mode differentiation."""

from __future__ import annotations

import unittest
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

import natten
from test_natten.problems import RANKS, function
from test_natten.test_errors import ErrorTestCase

MAPS = {1: (9,), 2: (7, 8), 3: (6, 7, 8)}
KERNEL_SIZE = 3
TOKENS = 4
BACKENDS = (None, "reference")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def heads_first(rank: int, seed: int, channels: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return random(2, 3, *MAPS[rank], channels, seed=seed, dtype=dtype)


def causal(rank: int) -> tuple[bool, ...]:
    return (True, False, False)[:rank]


class AdditionalTokensTest(ErrorTestCase):
    """additional_keys of na*_qk and additional_values of na*_av."""

    def test_equal_fused_attention_with_additional_tokens(self):
        for rank in RANKS:
            query, key, value = (heads_first(rank, seed).requires_grad_() for seed in range(3))
            extra_key, extra_value = (random(2, 3, TOKENS, 4, seed=seed).requires_grad_() for seed in (3, 4))
            rpb = random(3, *(5,) * rank, seed=5).requires_grad_()
            inputs = query, key, value, extra_key, extra_value, rpb
            options = {"kernel_size": KERNEL_SIZE, "dilation": 2, "is_causal": causal(rank)}

            logits = function(rank, "_qk")(query * 0.5, key, additional_keys=extra_key, rpb=rpb, **options)
            self.assertEqual(logits.shape[-1], KERNEL_SIZE**rank + TOKENS)
            found = function(rank, "_av")(logits.softmax(-1), value, additional_values=extra_value, **options)

            fused = (x.movedim(1, -2) for x in (query, key, value))
            extra = {"additional_keys": extra_key.movedim(1, -2), "additional_values": extra_value.movedim(1, -2)}
            expected = function(rank)(*fused, scale=0.5, rpb=rpb, **extra, **options).movedim(-2, 1)
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
            cotangent = random(*found.shape, seed=6)
            grads = (torch.autograd.grad(x, inputs, cotangent) for x in (found, expected))
            for x, y in zip(*grads, strict=True):
                torch.testing.assert_close(x, y, atol=1e-10, rtol=0)

    def test_fifth_positional_argument(self):
        for rank in RANKS:
            x, extra = heads_first(rank, 0), random(2, 3, TOKENS, 4, seed=1)
            window = {"kernel_size": KERNEL_SIZE, "dilation": 1}
            logits = function(rank, "_qk")(x, x, 3, 1, extra)
            self.assertTrue(torch.equal(logits, function(rank, "_qk")(x, x, **window, additional_keys=extra)))
            out = function(rank, "_av")(logits, x, 3, 1, extra)
            self.assertTrue(torch.equal(out, function(rank, "_av")(logits, x, **window, additional_values=extra)))

    def test_autocast_does_not_touch_them(self):
        x, extra = heads_first(2, 0, dtype=torch.float32), random(2, 3, TOKENS, 4, dtype=torch.float32)
        expected = natten.na2d_qk(x, x, 3, additional_keys=extra)
        with torch.autocast("cpu", torch.bfloat16):
            self.assertTrue(torch.equal(natten.na2d_qk(x, x, 3, additional_keys=extra), expected))

    def test_errors(self):
        x, weights, extra = heads_first(2, 0), heads_first(2, 1, 9 + TOKENS), random(2, 3, TOKENS, 4)
        self.assert_error(("additional_keys", "True", "is_causal"), natten.na2d_qk, x, x, 3, 1, True)
        self.assert_error(("additional_keys", "(2, 3, 4, 3)"), natten.na2d_qk, x, x, 3, 1, extra[..., :3])
        self.assert_error(("additional_keys", "float32"), natten.na2d_qk, x, x, 3, 1, extra.float())
        self.assert_error(("attn", "(2, 3, 7, 8, 9)"), natten.na2d_av, weights, x, 3)
        self.assert_error(("attn", "12"), natten.na2d_av, weights, x, 3, 1, extra[:, :, :3])
        self.assert_error(("additional_values", "(1, 3, 4, 4)"), natten.na2d_av, weights, x, 3, 1, extra[:1])


class DtypesTest(ErrorTestCase):
    """Unfused attention computes in the dtype of its inputs, also under autocast."""

    def test_autocast_changes_no_dtype(self):
        for rank in RANKS:
            x = heads_first(rank, 0, dtype=torch.float32)
            expected = function(rank, "_qk")(x, x, 3)
            weights = expected.softmax(-1)
            out = function(rank, "_av")(weights, x, 3)
            with torch.autocast("cpu", torch.float16):
                self.assertTrue(torch.equal(function(rank, "_qk")(x, x, 3), expected))
                self.assertTrue(torch.equal(function(rank, "_av")(weights, x, 3), out))

    def test_large_values_stay_finite_under_autocast(self):
        x = torch.full((1, 1, 9, 4), 1e6)
        with torch.autocast("cpu", torch.float16):
            out = natten.na1d_av(torch.full((1, 1, 9, 3), 1 / 3), x, 3)
        torch.testing.assert_close(out, x)

    def test_weights_are_cast_to_the_value(self):
        for weight_dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for value_dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                value = heads_first(2, 0, dtype=value_dtype)
                weights = heads_first(2, 1, 9, dtype=weight_dtype).requires_grad_()
                with self.subTest(weights=weight_dtype, value=value_dtype):
                    out = natten.na2d_av(weights, value, 3)
                    self.assertTrue(torch.equal(out, natten.na2d_av(weights.to(value_dtype), value, 3)))
                    self.assertEqual(out.dtype, value_dtype)
                    (grad,) = torch.autograd.grad(out.sum(), weights)
                    self.assertEqual(grad.dtype, weight_dtype)

    def test_query_and_key_of_different_dtypes(self):
        query, key = heads_first(2, 0, dtype=torch.float32), heads_first(2, 1, dtype=torch.bfloat16)
        self.assert_error(("key", "bfloat16", "query", "float32"), natten.na2d_qk, query, key, 3)
        with torch.autocast("cpu", torch.bfloat16):
            self.assertTrue(torch.equal(natten.na2d_qk(query, key, 3), natten.na2d_qk(query.bfloat16(), key, 3)))


class OrderOf3dTest(ErrorTestCase):
    """NATTEN 0.15 took the first axis of 3-D windows as separate arguments."""

    def test_positional_and_named(self):
        window = {"kernel_size": (3, 2, 2), "dilation": (2, 1, 1)}
        x, weights = heads_first(3, 0), heads_first(3, 1, 12)
        extra, more_weights = random(2, 3, TOKENS, 4), heads_first(3, 2, 12 + TOKENS)
        named = {"kernel_size_d": 3, "kernel_size": 2, "dilation_d": 2, "dilation": 1}
        for qk in (natten.na3d_qk(x, x, 3, 2, 2, 1), natten.na3d_qk(x, x, **named)):
            self.assertTrue(torch.equal(qk, natten.na3d_qk(x, x, **window)))
        for av in (natten.na3d_av(weights, x, 3, 2, 2, 1), natten.na3d_av(weights, x, **named)):
            self.assertTrue(torch.equal(av, natten.na3d_av(weights, x, **window)))
        expected = natten.na3d_qk(x, x, **window, additional_keys=extra)
        self.assertTrue(torch.equal(natten.na3d_qk(x, x, 3, 2, 2, 1, extra), expected))
        expected = natten.na3d_av(more_weights, x, **window, additional_values=extra)
        self.assertTrue(torch.equal(natten.na3d_av(more_weights, x, 3, 2, 2, 1, extra), expected))

    def test_errors(self):
        x = heads_first(3, 0)
        self.assert_error("kernel_size_d", natten.na3d_qk, x, x, (3, 3, 3), kernel_size_d=3)
        self.assert_error("additional_keys", natten.na3d_qk, x, x, 3, 1, True)


class ForwardModeTest(unittest.TestCase):
    """Tangents, against finite differences in float64 and against the reference in float32."""

    def calls(self, rank: int, backend: str | None, dtype: torch.dtype) -> list[tuple[Callable, tuple[Tensor, ...]]]:
        """Return functions, and their inputs."""
        window = {"kernel_size": KERNEL_SIZE, "is_causal": causal(rank), "backend": backend}
        query, key = (heads_first(rank, seed, dtype=dtype) for seed in range(2))
        rpb = random(3, *(5,) * rank, seed=2, dtype=dtype)
        weights = heads_first(rank, 3, KERNEL_SIZE**rank, dtype=dtype)

        def qk(query: Tensor, key: Tensor, rpb: Tensor) -> Tensor:
            logits = function(rank, "_qk")(query, key, rpb=rpb, **window)
            return logits.masked_fill(logits.isinf(), 0.0)

        def av(weights: Tensor, value: Tensor) -> Tensor:
            return function(rank, "_av")(weights, value, **window)

        return [(qk, (query, key, rpb)), (av, (weights, key))]

    def tangents(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(random(*x.shape, seed=9 + i, dtype=x.dtype) for i, x in enumerate(inputs))

    def test_finite_differences(self):
        for rank in RANKS:
            for backend in BACKENDS:
                for call, inputs in self.calls(rank, backend, torch.float64):
                    tangents, step = self.tangents(inputs), 1e-4
                    with self.subTest(call.__name__, rank=rank, backend=backend):
                        _, found = torch.func.jvp(call, inputs, tangents)
                        ahead, behind = (
                            call(*(x + sign * step * t for x, t in zip(inputs, tangents, strict=True)))
                            for sign in (1, -1)
                        )
                        torch.testing.assert_close(found, (ahead - behind) / (2 * step), atol=1e-7, rtol=1e-7)

    def test_float32_of_every_backend(self):
        for rank in RANKS:
            calls = zip(
                self.calls(rank, None, torch.float32), self.calls(rank, "reference", torch.float64), strict=True
            )
            for (call, inputs), (reference, exact) in calls:
                _, found = torch.func.jvp(call, inputs, self.tangents(inputs))
                _, expected = torch.func.jvp(reference, exact, self.tangents(exact))
                torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)

    def test_tangents_of_some_inputs(self):
        for call, inputs in self.calls(2, None, torch.float32):
            for index, tangent in enumerate(self.tangents(inputs)):
                with forward_ad.dual_level():
                    duals = list(inputs)
                    duals[index] = forward_ad.make_dual(inputs[index], tangent)
                    found = forward_ad.unpack_dual(call(*duals)).tangent
                zeros = [torch.zeros_like(x) for x in inputs]
                zeros[index] = tangent
                _, expected = torch.func.jvp(call, inputs, tuple(zeros))
                torch.testing.assert_close(found, expected)

    def test_slots_before_the_map_have_no_tangent(self):
        query = heads_first(1, 0)
        _, tangent = torch.func.jvp(lambda x: natten.na1d_qk(x, x, 3, is_causal=True), (query,), (query,))
        self.assertTrue(tangent.isfinite().all())


class NoneTest(ErrorTestCase):
    """None where older code passes it, and where a tensor is required."""

    def test_window_arguments(self):
        none = {"dilation": None, "is_causal": None}
        for rank in RANKS:
            x = heads_first(rank, 0)
            fused = (x.movedim(1, -2),) * 3
            packed = torch.stack(fused, -3)
            logits = function(rank, "_qk")(x, x, 3)
            layer = getattr(natten, f"NeighborhoodAttention{rank}D")(8, 2, 3, stride=None, **none)
            self.assertEqual((layer.stride, layer.dilation), ((1,) * rank, (1,) * rank))
            self.assertEqual(layer.is_causal, (False,) * rank)
            self.assertTrue(torch.equal(function(rank, "_qk")(x, x, 3, **none), logits))
            expected = function(rank, "_av")(logits, x, 3)
            self.assertTrue(torch.equal(function(rank, "_av")(logits, x, 3, **none), expected))
            expected = function(rank)(*fused, 3)
            self.assertTrue(torch.equal(function(rank)(*fused, 3, stride=None, **none), expected))
            self.assertTrue(torch.equal(function(rank, "_qkvpacked")(packed, 3, stride=None, **none), expected))

    def test_scale(self):
        q, k, v = (heads_first(2, seed).movedim(1, -2) for seed in range(3))
        expected = natten.na2d(q, k, v, 3)
        for scale in (None, False, 0, 0.0):
            with self.subTest(scale=scale):
                self.assertTrue(torch.equal(natten.na2d(q, k, v, 3, scale=scale), expected))
                narrow = natten.na2d(q, k, v[..., :3], 3, scale=scale)
                torch.testing.assert_close(narrow, expected[..., :3], atol=1e-12, rtol=0)
                self.assertEqual(natten.NeighborhoodAttention2D(8, 2, 3, qk_scale=scale).scale, 0.5)

    def test_tensor_is_missing(self):
        x = heads_first(2, 0)
        fused = x.movedim(1, -2)
        self.assert_error(("query", "None"), natten.na2d, None, fused, fused, 3)
        self.assert_error(("key", "None"), natten.na2d, fused, None, fused, 3)
        self.assert_error(("value", "None"), natten.na2d, fused, fused, None, 3)
        self.assert_error(("query", "None"), natten.na2d, None, None, None, 3)
        self.assert_error(("value", "None"), natten.na2d, fused, fused, None, 3, window_padding="zeros")
        self.assert_error(("qkv", "None"), natten.na2d_qkvpacked, None, 3)
        self.assert_error(("qkv", "None"), natten.na2d_qkvpacked, None, 3, window_padding="valid")
        self.assert_error(("query", "None"), natten.na2d_qk, None, x, 3)
        self.assert_error(("key", "None"), natten.na2d_qk, x, None, 3)
        self.assert_error(("attn", "None"), natten.na2d_av, None, x, 3)
        self.assert_error(("value", "None"), natten.na2d_av, heads_first(2, 1, 9), None, 3)
        self.assert_error(("input", "None"), natten.NeighborhoodAttention2D(8, 2, 3), None)


class LayerArgumentsTest(ErrorTestCase):
    """Arguments of layers in older releases."""

    def test_first_axis_of_3d_layers(self):
        layer = natten.NeighborhoodAttention3D(8, 2, kernel_size=5, kernel_size_d=3, dilation=2, dilation_d=1)
        self.assertEqual((layer.kernel_size, layer.dilation), ((3, 5, 5), (1, 2, 2)))
        layer = natten.NeighborhoodAttention3D(8, 2, kernel_size=5, kernel_size_d=3, dilation_d=2)
        self.assertEqual((layer.kernel_size, layer.dilation), ((3, 5, 5), (2, 1, 1)))
        self.assert_error("kernel_size_d", natten.NeighborhoodAttention2D, 8, 2, 5, kernel_size_d=3)

    def test_use_experimental_ops(self):
        layer = natten.NeighborhoodAttention2D(8, 2, 3, use_experimental_ops=True)
        self.assertEqual(layer(torch.zeros(1, 5, 5, 8)).shape, (1, 5, 5, 8))
