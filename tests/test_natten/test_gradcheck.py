"""Gradients against finite differences in float64, and second derivatives.

Only the 1-D function is checked for each element. The others use gradcheck's fast mode, which checks random directions
and is a hundred times faster.
"""

from __future__ import annotations

import unittest
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import natten
from test_natten.problems import RANKS, Problem, function, make_qkv, make_rpb, random_problem

CASES_PER_RANK = {1: 30, 2: 24, 3: 12}
MAX_ELEMENTS = 80  # of a query, to limit the time


def small_problems(rank: int, count: int, with_stride: bool = True) -> Iterator[Problem]:
    """Yield random problems with few elements: batch size 1, small heads."""
    seed = 0
    while count:
        problem = random_problem(rank, seed, with_stride=with_stride, max_dim=2, spare=1)
        problem = problem._replace(batch=1, heads=1 + seed % 2)
        tokens = torch.Size(problem.space).numel()
        if tokens * problem.heads * problem.head_dim <= MAX_ELEMENTS:
            count -= 1
            yield problem
        seed += 1


def inputs_of(problem: Problem) -> list[Tensor]:
    """Return query, key and value, and the bias table if the problem has one."""
    rpb = make_rpb(problem)
    return [*make_qkv(problem), *([] if rpb is None else [rpb])]


def fused(problem: Problem, backend: str | None = None) -> Callable:
    """Return na*d as a function of its tensors that returns output and logsumexp."""

    def call(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        attend = function(problem.rank)
        return attend(query, key, value, *problem.window, rpb=rpb, return_lse=True, backend=backend)

    return call


def packed(problem: Problem) -> Callable:
    """Return na*d_qkvpacked as a function of its tensors."""

    def call(qkv: Tensor, rpb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return function(problem.rank, "_qkvpacked")(qkv, *problem.window, rpb=rpb, return_lse=True)

    return call


def qk(problem: Problem) -> Callable:
    """Return na*d_qk as a function of its tensors, with 0 instead of -inf."""
    kernel_size, _, dilation, is_causal = problem.window

    def call(query: Tensor, key: Tensor, rpb: Tensor | None = None) -> Tensor:
        logits = function(problem.rank, "_qk")(query, key, kernel_size, dilation, is_causal=is_causal, rpb=rpb)
        return logits.masked_fill(logits.isinf(), 0.0)

    return call


def av(problem: Problem) -> Callable:
    """Return na*d_av as a function of its tensors."""
    kernel_size, _, dilation, is_causal = problem.window

    def call(attn: Tensor, value: Tensor) -> Tensor:
        return function(problem.rank, "_av")(attn, value, kernel_size, dilation, is_causal=is_causal)

    return call


class GradcheckTest(unittest.TestCase):
    """First derivatives of all functions."""

    def check(
        self, rank: int, make: Callable, pack: Callable = inputs_of, with_stride: bool = True, fast: bool = True
    ) -> None:
        """Check a function on all cases of a rank."""
        for problem in small_problems(rank, CASES_PER_RANK[rank], with_stride):
            with self.subTest(problem=problem):
                self.assertTrue(gradcheck(make(problem), pack(problem), fast_mode=fast))

    def test_fused_1d(self):
        self.check(1, fused, fast=False)

    def test_fused_2d(self):
        self.check(2, fused)

    def test_fused_3d(self):
        self.check(3, fused)

    def test_fused_on_the_reference_backend(self):
        for rank in RANKS:
            self.check(rank, lambda problem: fused(problem, "reference"))

    def test_packed(self):
        def pack(problem: Problem) -> list[Tensor]:
            query, key, value, *rpb = inputs_of(problem)
            return [torch.stack((query, key, value), dim=-3).detach().requires_grad_(), *rpb]

        for rank in RANKS:
            self.check(rank, packed, pack)

    def test_qk(self):
        def pack(problem: Problem) -> list[Tensor]:
            query, key, _, *rpb = inputs_of(problem)
            return [*heads_first(query, key), *rpb]

        for rank in RANKS:
            self.check(rank, qk, pack, with_stride=False)

    def test_av(self):
        def pack(problem: Problem) -> list[Tensor]:
            (value,) = heads_first(inputs_of(problem)[2])
            slots = torch.Size(problem.window.kernel_size).numel()
            generator = torch.Generator().manual_seed(problem.seed)
            weights = torch.rand(*value.shape[:-1], slots, dtype=torch.float64, generator=generator)
            return [weights.requires_grad_(), value]

        for rank in RANKS:
            self.check(rank, av, pack, with_stride=False)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """Return heads-first copies of heads-last tensors, requiring gradients."""
    return [x.detach().movedim(-2, 1).requires_grad_() for x in tensors]


class PartialGradientsTest(unittest.TestCase):
    """Only some inputs require a gradient, or only some outputs are used."""

    def setUp(self):
        generator = torch.Generator().manual_seed(0)
        self.qkv = list(torch.randn(3, 1, 5, 6, 2, 3, dtype=torch.float64, generator=generator))
        self.rpb = torch.randn(2, 5, 5, dtype=torch.float64, generator=generator)

    def attend(self, backend: str | None) -> tuple[Tensor, Tensor]:
        return natten.na2d(*self.qkv, 3, rpb=self.rpb, return_lse=True, backend=backend)

    def compare(self, wanted: list[Tensor], loss: Callable) -> None:
        """Compare the gradients of the default backend with those of the reference backend."""
        for x in wanted:
            x.requires_grad_()
        found = torch.autograd.grad(loss(*self.attend(None)), wanted)
        expected = torch.autograd.grad(loss(*self.attend("reference")), wanted)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    def test_one_input_at_a_time(self):
        for index, name in enumerate(("query", "key", "value", "rpb")):
            with self.subTest(name):
                self.setUp()
                self.compare([[*self.qkv, self.rpb][index]], lambda out, lse: (out**2).sum() + lse.sum())

    def test_only_the_output(self):
        self.compare([*self.qkv, self.rpb], lambda out, lse: (out**2).sum())

    def test_only_the_logsumexp(self):
        self.compare([*self.qkv[:2], self.rpb], lambda out, lse: (lse**2).sum())

    def test_no_input_requires_a_gradient(self):
        for backend in (None, "reference"):
            out, lse = self.attend(backend)
            self.assertFalse(out.requires_grad or lse.requires_grad)

    def test_inference_mode(self):
        expected = self.attend(None)
        self.rpb.requires_grad_()
        for backend in (None, "reference"):
            with torch.inference_mode():
                torch.testing.assert_close(self.attend(backend), expected)

    def test_the_same_tensor_as_query_key_and_value(self):
        x = self.qkv[0].requires_grad_()
        self.qkv = [x, x, x]
        self.compare([x], lambda out, lse: (out**2).sum())

    def test_inputs_are_not_modified(self):
        before = [x.clone() for x in (*self.qkv, self.rpb)]
        for backend in (None, "reference"):
            for x in (*self.qkv, self.rpb):
                x.requires_grad_()
            (self.attend(backend)[0] ** 2).sum().backward()
            torch.testing.assert_close([*self.qkv, self.rpb], before, rtol=0, atol=0)


class DoubleBackwardTest(unittest.TestCase):
    """The reference backend has second derivatives; the other backends raise."""

    def test_gradgradcheck_of_the_reference_backend(self):
        for rank in RANKS:
            for problem in small_problems(rank, 3):
                with self.subTest(problem=problem):
                    call, inputs = fused(problem, "reference"), inputs_of(problem)
                    self.assertTrue(gradgradcheck(call, inputs, fast_mode=True))

    def test_other_backends_raise(self):
        for problem in small_problems(2, 3):
            for make, pack in ((fused, lambda qkv: qkv), (packed, lambda qkv: [torch.stack(qkv, dim=-3)])):
                with self.subTest(make.__name__, problem=problem):
                    qkv, rpb = make_qkv(problem), make_rpb(problem)
                    out, _ = make(problem)(*pack(qkv), *([] if rpb is None else [rpb]))
                    (grad,) = torch.autograd.grad((out**2).sum(), qkv[:1], create_graph=True)
                    with self.assertRaisesRegex(RuntimeError, "backend=.*reference"):
                        grad.sum().backward()
