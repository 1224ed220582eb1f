"""Operators registered with torch.library: torch's checks of schema, fake tensors and tracing, and direct calls."""

from __future__ import annotations

import math
import unittest
from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import natten

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return a normally distributed tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def window(rank: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1, is_causal: bool = False) -> tuple:
    """Return the window arguments, scale and backend of a fused operator."""
    return [kernel_size] * rank, [stride] * rank, [dilation] * rank, [is_causal] * rank, 0.5, None


def attention_inputs() -> dict[str, tuple]:
    """Return arguments of attention_forward by a description."""
    rpb = random(2, 5, 5)
    packed = random(2, 5, 6, 3, 2, 4)
    heads_first = random(3, 2, 2, 5, 6, 4).movedim(2, -2)
    half = random(3, 1, 6, 2, 8, dtype=torch.bfloat16)
    return {
        "plain": (*random(3, 2, 5, 6, 2, 4), None, *window(2)),
        "with rpb": (*random(3, 2, 5, 6, 2, 4), rpb, *window(2)),
        "causal": (*random(3, 1, 7, 2, 4), None, *window(1, is_causal=True)),
        "stride": (*random(3, 1, 7, 2, 4), None, *window(1, stride=2)),
        "dilation": (*random(3, 1, 6, 7, 8, 2, 4), random(2, 3, 3, 3), *window(3, kernel_size=2, dilation=3)),
        "packed": (*packed.unbind(-3), rpb, *window(2)),
        "heads first in memory": (*heads_first.unbind(), rpb, *window(2)),
        "bfloat16": (*half, random(2, 5, dtype=torch.bfloat16), *window(1)),
        "bfloat16 with float32 rpb": (*half, random(2, 5), *window(1)),
        "float64": (*random(3, 1, 6, 2, 4, dtype=torch.float64), None, *window(1)),
        "backend by name": (*random(3, 2, 5, 6, 2, 4), None, *window(2)[:-1], "reference"),
        "head_dim of the kernels": (*random(3, 2, 5, 6, 2, 8), rpb, *window(2)),
        "no batch": (*random(3, 0, 5, 6, 2, 4), rpb, *window(2)),
    }


def attention_backward_inputs() -> dict[str, tuple]:
    """Return arguments of attention_backward for each of the above, with and without a gradient of the logsumexp."""
    samples = {}
    for name, (query, key, value, rpb, *rest) in attention_inputs().items():
        out, lse = torch.ops.natten.attention_forward(query, key, value, rpb, *rest)
        grad_out, grad_lse = torch.ones_like(out), torch.ones_like(lse)
        samples[name] = (grad_out, None, query, key, value, rpb, out, lse, *rest)
        samples[f"{name}, gradient of lse"] = (grad_out, grad_lse, query, key, value, rpb, out, lse, *rest)
    return samples


def unfused_window(rank: int, kernel_size: int = 3, dilation: int = 1, is_causal: bool = False) -> tuple:
    """Return the window arguments and backend of an unfused operator."""
    return [kernel_size] * rank, [dilation] * rank, [is_causal] * rank, None


def unfused_inputs() -> dict[str, tuple]:
    """Return query or value, rpb and window of the unfused operators by a description."""
    packed = random(2, 5, 6, 2, 2, 8).movedim(-2, 1)
    return {
        "plain": (random(2, 2, 5, 6, 4), None, *unfused_window(2)),
        "with rpb": (random(2, 2, 5, 6, 8), random(2, 5, 5), *unfused_window(2)),
        "causal": (random(1, 2, 7, 8), random(2, 5), *unfused_window(1, is_causal=True)),
        "dilation": (random(1, 2, 6, 7, 8, 8), None, *unfused_window(3, kernel_size=2, dilation=3)),
        "heads last in memory": (packed.select(-2, 1), None, *unfused_window(2)),
        "bfloat16": (random(1, 2, 6, 8, dtype=torch.bfloat16), random(2, 5), *unfused_window(1)),
        "float64": (random(1, 2, 6, 8, dtype=torch.float64), None, *unfused_window(1)),
        "no batch": (random(0, 2, 5, 6, 8), random(2, 5, 5), *unfused_window(2)),
    }


def weights_for(x: Tensor, kernel_size: list[int]) -> Tensor:
    """Return a weight for each query and key of its window."""
    return random(*x.shape[:-1], math.prod(kernel_size), dtype=x.dtype)


def query_key_inputs() -> dict[str, tuple]:
    return {name: (x, x.flip(0), rpb, *window) for name, (x, rpb, *window) in unfused_inputs().items()}


def query_key_backward_inputs() -> dict[str, tuple]:
    return {
        name: (weights_for(x, window[0]), x, x.flip(0), rpb, *window)
        for name, (x, rpb, *window) in unfused_inputs().items()
    }


def weight_value_inputs() -> dict[str, tuple]:
    return {name: (weights_for(x, window[0]), x, *window) for name, (x, _, *window) in unfused_inputs().items()}


def weight_value_backward_inputs() -> dict[str, tuple]:
    return {
        name: (torch.ones_like(x), weights_for(x, window[0]), x, *window)
        for name, (x, _, *window) in unfused_inputs().items()
    }


SAMPLES: dict[str, Callable[[], dict[str, tuple]]] = {
    "natten::attention_forward": attention_inputs,
    "natten::attention_backward": attention_backward_inputs,
    "natten::query_key_forward": query_key_inputs,
    "natten::query_key_backward": query_key_backward_inputs,
    "natten::weight_value_forward": weight_value_inputs,
    "natten::weight_value_backward": weight_value_backward_inputs,
}


def registered() -> set[str]:
    """Return the names of all registered natten operators."""
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("natten::")}


class OpcheckTest(unittest.TestCase):
    """All operators, on all sample inputs."""

    def test_every_operator_has_sample_inputs(self):
        names = {name.removesuffix(".default") for name in registered()}
        self.assertEqual(names, set(SAMPLES), "add sample inputs of the operator to SAMPLES")

    def test_opcheck(self):
        for name, make_samples in SAMPLES.items():
            operator = getattr(torch.ops.natten, name.split("::")[1]).default
            for sample, arguments in make_samples().items():
                with self.subTest(name, sample=sample):
                    results = opcheck(operator, arguments, test_utils=UTILITIES)
                    self.assertEqual(set(results.values()), {"SUCCESS"})
                    self.assertEqual(set(results), set(UTILITIES))

    def test_outputs_are_contiguous_and_match_fake_tensors(self):
        for name, make_samples in SAMPLES.items():
            operator = getattr(torch.ops.natten, name.split("::")[1])
            for sample, arguments in make_samples().items():
                with self.subTest(name, sample=sample):
                    on_meta = (x.to("meta") if isinstance(x, Tensor) else x for x in arguments)
                    reals, fakes = operator(*arguments), operator(*on_meta)
                    if isinstance(reals, Tensor):
                        reals, fakes = (reals,), (fakes,)
                    for real, fake in zip(reals, fakes, strict=True):
                        self.assertTrue(real.is_contiguous())
                        self.assertEqual((real.shape, real.dtype), (fake.shape, fake.dtype))


class DirectCallTest(unittest.TestCase):
    """Eager calls bypass the dispatcher, unless a profiler, mode or transform must see the operators."""

    def setUp(self):
        self.x = random(1, 6, 7, 3, 2, 8)
        self.rpb = random(2, 5, 5)
        self.weight = random(1, 6, 7, 2, 8, seed=1)

    def loss(self, x: Tensor) -> Tensor:
        return (natten.na2d_qkvpacked(x, 3, rpb=self.rpb) * self.weight).sum()

    def unfused_loss(self, x: Tensor) -> Tensor:
        query, key, value = x.movedim(-2, 1).unbind(-2)
        attn = natten.na2d_qk(query, key, 3, rpb=self.rpb).softmax(-1)
        return (natten.na2d_av(attn, value, 3) * self.weight.movedim(-2, 1)).sum()

    def test_profiler_sees_the_operators(self):
        for loss, operators in (
            (self.loss, ["attention"]),
            (self.unfused_loss, ["query_key", "weight_value"]),
        ):
            x = self.x.clone().requires_grad_()
            with torch.autograd.profiler.profile() as profile:
                loss(x).backward()
            names = {event.name for event in profile.function_events}
            expected = {f"natten::{name}_{direction}" for name in operators for direction in ("forward", "backward")}
            self.assertLessEqual(expected, names)

    def test_unfused_gradients_equal_those_of_the_operators(self):
        direct, profiled = self.x.clone().requires_grad_(), self.x.clone().requires_grad_()
        self.unfused_loss(direct).backward()
        with torch.autograd.profiler.profile():
            self.unfused_loss(profiled).backward()
        self.assertTrue(torch.equal(direct.grad, profiled.grad))

    def test_dispatch_mode_sees_the_operators(self):
        names = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                names.append(function.name())
                return function(*args, **(kwargs or {}))

        with Recorder():
            self.loss(self.x)
        self.assertIn("natten::attention_forward", names)

    def test_results_equal_those_of_the_operators(self):
        query, key, value = self.x.unbind(-3)
        direct = natten.na2d(query, key, value, 3, rpb=self.rpb, return_lse=True, scale=0.5)
        for x, y in zip(
            direct, torch.ops.natten.attention_forward(*self.x.unbind(-3), self.rpb, *window(2)), strict=True
        ):
            self.assertTrue(torch.equal(x, y))

    def test_transforms(self):
        x = self.x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(self.loss(x), x)
        torch.testing.assert_close(torch.func.grad(self.loss)(self.x), expected)
        # x is differentiated outside of a transform over another input.
        inside = torch.func.grad(lambda factor, x: self.loss(x) * factor)
        torch.testing.assert_close(
            torch.func.grad(lambda x: inside(torch.tensor(2.0), x))(self.x), expected, rtol=1e-4, atol=1e-5
        )
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(self.x, torch.ones_like(self.x))
            tangent = torch.autograd.forward_ad.unpack_dual(self.loss(dual)).tangent
            torch.testing.assert_close(tangent, expected.sum(), rtol=1e-4, atol=1e-4)


class MetaTest(unittest.TestCase):
    """The functions on meta tensors."""

    def test_shapes(self):
        q = torch.empty(2, 5, 6, 3, 4, device="meta", dtype=torch.bfloat16)
        out, lse = natten.na2d(q, q, q, 3, return_lse=True)
        self.assertEqual((out.shape, out.dtype, out.device.type), (q.shape, torch.bfloat16, "meta"))
        self.assertEqual((lse.shape, lse.dtype), (q.shape[:-1], torch.float32))
        out, lse = natten.na2d_qkvpacked(torch.stack((q, q, q), -3), 3, return_lse=True)
        self.assertEqual((out.shape, lse.shape), (q.shape, q.shape[:-1]))
