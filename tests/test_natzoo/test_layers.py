"""LeanMlp, compared with timm's Mlp."""

from __future__ import annotations

import copy
import unittest

import torch
from timm.layers import Mlp
from torch import Tensor

from natzoo.models._layers import LeanMlp


def gradients(mlp: Mlp, x: Tensor) -> list[Tensor]:
    """Return the output and the gradients of x and all parameters."""
    x = x.clone().requires_grad_()
    out = mlp(x)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *mlp.parameters()])]


class LeanMlpTest(unittest.TestCase):
    """LeanMlp computes the same as timm's Mlp and saves less memory."""

    def setUp(self):
        torch.manual_seed(0)
        self.lean = LeanMlp(16, 48)
        self.plain = Mlp(16, 48)
        self.plain.load_state_dict(self.lean.state_dict())
        self.x = torch.randn(2, 5, 7, 16)

    def assert_close(self, found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
        for x, y in zip(found, expected, strict=True):
            self.assertEqual(x.dtype, y.dtype)
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)

    def test_gradients(self):
        self.assert_close(gradients(self.lean, self.x), gradients(self.plain, self.x))
        second = torch.autograd.functional.hessian(lambda x: self.lean(x).square().sum(), self.x[0, 0])
        torch.testing.assert_close(
            second, torch.autograd.functional.hessian(lambda x: self.plain(x).square().sum(), self.x[0, 0])
        )

    def test_autocast(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            self.assert_close(gradients(self.lean, self.x), gradients(self.plain, self.x), tolerance=0.05)

    def test_frozen_parameters_and_dropout(self):
        for mlp in (self.lean, self.plain):
            mlp.fc2.requires_grad_(False)
        x = self.x.clone().requires_grad_()
        for grads in zip(
            *(torch.autograd.grad(mlp(x).sum(), [x, mlp.fc1.weight]) for mlp in (self.lean, self.plain)), strict=True
        ):
            torch.testing.assert_close(*grads)
        with_dropout = LeanMlp(16, 48, drop=0.5)
        self.assertFalse(torch.equal(with_dropout(self.x), with_dropout(self.x)))

    def test_functional_transforms_and_compile(self):
        loss = lambda mlp: lambda x: mlp(x).square().sum()  # noqa: E731
        expected = torch.func.grad(loss(self.plain))(self.x)
        torch.testing.assert_close(torch.func.grad(loss(self.lean))(self.x), expected)
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss(self.lean)))(self.x), expected)
        compiled = torch.compile(copy.deepcopy(self.lean), fullgraph=True, backend="aot_eager")
        self.assert_close(gradients(compiled, self.x), gradients(self.plain, self.x))

    def test_hidden_features_are_saved_once(self):
        def saved_elements(mlp: Mlp) -> int:
            tensors = {}  # keeps the tensors alive, so that addresses stay unique
            with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.setdefault(t.data_ptr(), t), lambda t: t):
                out = mlp(self.x.clone().requires_grad_())
            del out
            return sum(t.numel() for t in tensors.values())

        hidden = self.x.numel() * 3
        self.assertEqual(saved_elements(self.plain) - saved_elements(self.lean), hidden)
