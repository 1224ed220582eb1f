"""Encoder blocks in the manner of public projects, against dense attention with a mask in float64."""

from __future__ import annotations

import copy
import unittest

import torch
from deterministic import fill
from torch import Tensor, nn

import natten
from test_compat import dense
from test_compat.projects import PROJECTS, Block

SPARE = 1e-6  # float32: room for blocks with tiny errors


def results(block: Block, x: Tensor, attend) -> list[Tensor]:
    """Return the output, and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    out = block(x, attend)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape).cos()
    used = [x, *block.parameters()]
    grads = torch.autograd.grad(out, used, cotangent, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if grad is None else grad for x, grad in zip(used, grads, strict=True))]


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest error, each tensor relative to its largest value."""
    pairs = zip(found, expected, strict=True)
    return max(float((x.double() - y).abs().max() / y.abs().max().clamp(min=1e-3)) for x, y in pairs)


class ProjectsTest(unittest.TestCase):
    """All projects."""

    def setUp(self):
        self.addCleanup(natten.context.NattenContext.reset)

    def test_output_and_gradients(self):
        for name, make in PROJECTS.items():
            with self.subTest(name):
                block = make()
                fill(block)
                x = torch.randn(2, *block.space, block.dim, generator=torch.Generator().manual_seed(0))
                exact = copy.deepcopy(block).double()
                expected = results(exact, x.double(), exact.expected)
                with natten.use_backend("reference"):
                    self.assertLess(largest_error(results(exact, x.double(), exact.attend), expected), 1e-10)
                    reference = largest_error(results(block, x, block.attend), expected)
                found = largest_error(results(block, x, block.attend), expected)
                self.assertLess(found, 2 * reference + SPARE)


class LayersTest(unittest.TestCase):
    """Projects that use the layers."""

    def compare(self, layer: nn.Module, x: Tensor, window: dict, space: tuple[int, ...] | None = None) -> None:
        """Compare a layer with dense attention on the map, or on a larger map to which the layer pads it."""
        fill(layer)
        layer, x = layer.double(), x.double()
        padded, space = x, x.shape[1:-1] if space is None else space
        for axis, length in enumerate(space, start=1):
            missing = length - x.shape[axis]
            zeros = padded.new_zeros(*padded.shape[:axis], missing, *padded.shape[axis + 1 :])
            padded = torch.cat((padded, zeros), axis)
        qkv = layer.qkv(padded).unflatten(-1, (3, layer.num_heads, -1)).unbind(-3)
        bias = dense.bias(space, **window, rpb=layer.rpb)
        out = dense.attend(*qkv, layer.scale, bias).flatten(-2)
        for axis, length in enumerate(x.shape[1:-1], start=1):
            out = out.narrow(axis, 0, length)
        torch.testing.assert_close(layer(x), layer.proj(out), atol=1e-10, rtol=0)

    def test_oneformer(self):
        """Kernel size times dilation exceeds the map, which the layer pads."""
        from natten import NeighborhoodAttention2D as NeighborhoodAttention

        layer = NeighborhoodAttention(64, kernel_size=3, dilation=4, num_heads=2, qkv_bias=True, qk_scale=None)
        self.compare(layer, torch.randn(1, 10, 13, 64), {"kernel_size": 3, "dilation": 4}, (12, 13))

    def test_agileformer(self):
        """The release is recognized by natten.context; its layers took rel_pos_bias."""
        self.assertTrue(hasattr(natten, "context"))
        options = {"rel_pos_bias": True, "qkv_bias": True, "qk_scale": None, "attn_drop": 0.0, "proj_drop": 0.0}
        layer = natten.NeighborhoodAttention2D(24, num_heads=2, kernel_size=5, dilation=None, **options)
        self.compare(layer, torch.randn(1, 7, 8, 24), {"kernel_size": 5})

    def test_weathermesh(self):
        layer = natten.NeighborhoodAttention3D(dim=28, num_heads=2, kernel_size=(3, 5, 5), rel_pos_bias=False)
        self.compare(layer, torch.randn(1, 4, 6, 7, 28), {"kernel_size": (3, 5, 5)})

    def test_layers_of_0_20(self):
        from natten.modules import NeighborhoodAttentionGeneric

        window = {"kernel_size": (3, 4), "stride": (1, 2), "dilation": (2, 1), "is_causal": (True, False)}
        layer = NeighborhoodAttentionGeneric(na_dim=2, embed_dim=24, num_heads=2, **window)
        self.compare(layer, torch.randn(1, 7, 8, 24), window)
        self.assertIsNone(layer.rpb)
        other = natten.NeighborhoodAttention2D(embed_dim=24, num_heads=2, **window)
        other.load_state_dict(layer.state_dict())
        x = torch.randn(1, 7, 8, 24)
        torch.testing.assert_close(copy.deepcopy(layer).float()(x), other(x))


class CrossAttentionTest(unittest.TestCase):
    """natten.attention of 0.20 and later."""

    def test_output_logsumexp_and_gradients(self):
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        for is_causal in (False, True):
            query, key, value = random(2, 5, 4, 6), random(2, 7, 2, 6), random(2, 7, 2, 3)
            mask = torch.zeros(5, 7, dtype=torch.float64)
            if is_causal:
                mask = mask.masked_fill(torch.ones(5, 7, dtype=torch.bool).triu(1), float("-inf"))
            q, k, v = (x.movedim(1, 2) for x in (query, key.repeat_interleave(2, 2), value.repeat_interleave(2, 2)))
            logits = 0.3 * q @ k.mT + mask
            expected = (logits.softmax(-1) @ v).movedim(1, 2)
            out, lse = natten.attention(query, key, value, is_causal=is_causal, scale=0.3, return_lse=True)
            torch.testing.assert_close(lse, logits.logsumexp(-1).movedim(1, 2), atol=1e-10, rtol=0)
            for found in (out, natten.functional.attention(query, key, value, is_causal, 0.3)):
                torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
                grads = (
                    torch.autograd.grad(x.square().sum(), (query, key, value), retain_graph=True)
                    for x in (found, expected)
                )
                for x, y in zip(*grads, strict=True):
                    torch.testing.assert_close(x, y, atol=1e-10, rtol=0)

    def test_scale_in_the_fourth_place_as_in_0_20(self):
        q = torch.randn(1, 5, 2, 4)
        torch.testing.assert_close(natten.attention(q, q, q, 0.3), natten.attention(q, q, q, scale=0.3))
        torch.testing.assert_close(natten.attention(q, q, q), natten.attention(q, q, q, scale=0.5))

    def test_errors(self):
        q, k = torch.randn(1, 5, 2, 4), torch.randn(1, 6, 2, 4)
        for name, arguments, options in (
            ("value", (q, k, q), {}),
            ("key", (q, k[..., :3], k), {}),
            ("seqlens_Q", (q, k, k), {"seqlens_Q": torch.tensor([5]), "seqlens_KV": torch.tensor([6])}),
            ("query", (None, k, k), {}),
        ):
            with self.subTest(name), self.assertRaisesRegex(ValueError, name):
                natten.attention(*arguments, **options)
