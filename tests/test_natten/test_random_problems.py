"""The operator against the brute-force definition: 200 random problems per rank in float64, some in lower precision."""

from __future__ import annotations

import unittest

import brute_force
import torch
from torch import Tensor

import natten
from test_natten.problems import (
    RANKS,
    Problem,
    cotangents,
    function,
    gradients,
    make_qkv,
    make_rpb,
    random_problem,
)

PROBLEMS_PER_RANK = 200
TOLERANCE = 1e-10


def assert_near(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Compare shapes and values with an absolute tolerance; infinities must be in the same places."""
    torch.testing.assert_close(
        found.detach().double(), expected.detach().double(), atol=tolerance, rtol=0, msg=lambda text: f"{name}: {text}"
    )


def definition(problem: Problem, qkv: list[Tensor], rpb: Tensor | None) -> dict[str, Tensor]:
    """Compute the results of the brute-force definition in float64."""
    inputs = [None if x is None else x.detach().double().requires_grad_() for x in (*qkv, rpb)]
    outputs = brute_force.attention(*inputs[:3], problem.window, inputs[3])
    return name_results(outputs, gradients(outputs, inputs, cotangents(*outputs, problem.seed)))


def fused(problem: Problem, qkv: list[Tensor], rpb: Tensor | None, backend: str | None = None) -> dict[str, Tensor]:
    """Compute the results of na*d."""
    attend = function(problem.rank)
    outputs = attend(*qkv, *problem.window, rpb=rpb, return_lse=True, backend=backend)
    return name_results(outputs, gradients(outputs, [*qkv, rpb], cotangents(*outputs, problem.seed)))


def packed(problem: Problem, qkv: list[Tensor], rpb: Tensor | None, backend: str | None = None) -> dict[str, Tensor]:
    """Compute the results of na*d_qkvpacked, with its packed gradient split."""
    attend = function(problem.rank, "_qkvpacked")
    tensor = torch.stack([x.detach() for x in qkv], dim=-3).requires_grad_()
    outputs = attend(tensor, *problem.window, rpb=rpb, return_lse=True, backend=backend)
    grad_qkv, *others = gradients(outputs, [tensor, rpb], cotangents(*outputs, problem.seed))
    return name_results(outputs, [*grad_qkv.unbind(-3), *others])


def name_results(outputs: tuple[Tensor, Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """Return the results by name."""
    names = ("out", "lse", "dq", "dk", "dv", "drpb")
    return dict(zip(names, (*outputs, *grads), strict=False))


class FusedInFloat64Test(unittest.TestCase):
    """Output, logsumexp and all gradients, including gradients through the logsumexp."""

    def check_rank(self, rank: int) -> None:
        """Compare the fused and packed functions on all problems of a rank."""
        for seed in range(PROBLEMS_PER_RANK):
            problem = random_problem(rank, seed)
            qkv, rpb = make_qkv(problem), make_rpb(problem)
            expected = definition(problem, qkv, rpb)
            ways = {
                "fused": lambda p=problem, x=qkv, t=rpb: fused(p, x, t),
                "fused, reference": lambda p=problem, x=qkv, t=rpb: fused(p, x, t, "reference"),
                "packed": lambda p=problem, x=qkv, t=rpb: packed(p, x, t),
            }
            for way, compute in ways.items():
                with self.subTest(way, problem=problem):
                    self.compare(compute(), expected)

    def compare(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        self.assertEqual(set(found), set(expected))
        for name, x in expected.items():
            self.assertEqual(found[name].dtype, torch.float64)
            assert_near(found[name], x, TOLERANCE, name)

    def test_1d(self):
        self.check_rank(1)

    def test_2d(self):
        self.check_rank(2)

    def test_3d(self):
        self.check_rank(3)

    def test_problems_cover_all_features(self):
        for rank in RANKS:
            problems = [random_problem(rank, seed) for seed in range(PROBLEMS_PER_RANK)]
            features = {
                "even kernel": lambda p: any(k % 2 == 0 for k in p.window.kernel_size),
                "odd kernel": lambda p: any(k % 2 for k in p.window.kernel_size),
                "stride": lambda p: max(p.window.stride) > 1,
                "strided causal": lambda p: any(
                    s > 1 and c for s, c in zip(p.window.stride, p.window.is_causal, strict=True)
                ),
                "ragged": lambda p: any(n % d for n, d in zip(p.space, p.window.dilation, strict=True)),
                "dilation": lambda p: max(p.window.dilation) > 1,
                "window fills the axis": lambda p: any(
                    k * d == n for k, d, n in zip(p.window.kernel_size, p.window.dilation, p.space, strict=True)
                ),
                "causal": lambda p: any(p.window.is_causal),
                "not causal": lambda p: not any(p.window.is_causal),
                "rpb": lambda p: p.has_rpb,
                "no rpb": lambda p: not p.has_rpb,
                "several batches and heads": lambda p: p.batch > 1 and p.heads > 1,
                "strided memory": lambda p: p.layout != "contiguous",
            }
            for name, has in features.items():
                with self.subTest(name, rank=rank):
                    self.assertGreaterEqual(sum(map(has, problems)), 10)


class FusedInLowerPrecisionTest(unittest.TestCase):
    """Errors are close to one rounding of the result, because the arithmetic runs in float32.

    The bound is a multiple of the dtype's epsilon times the largest element of the exact result, which is computed in
    float64 from the same rounded inputs. The multiples allow for the rounded output that the backward pass reads.
    """

    MULTIPLES = {torch.float32: 32, torch.bfloat16: 4, torch.float16: 4}  # noqa: RUF012
    PROBLEMS_PER_RANK = 15

    def check(self, dtype: torch.dtype, rpb_dtype: torch.dtype) -> None:
        """Compare problems of all ranks in this precision with the definition."""
        for rank in RANKS:
            for seed in range(1000, 1000 + self.PROBLEMS_PER_RANK):
                problem = random_problem(rank, seed, max_dim=16)
                qkv, rpb = make_qkv(problem, dtype), make_rpb(problem, rpb_dtype)
                expected = definition(problem, qkv, rpb)
                for backend in (None, "reference"):
                    with self.subTest(problem=problem, backend=backend):
                        self.compare(fused(problem, qkv, rpb, backend), expected, dtype, rpb_dtype)

    def compare(self, found: dict, expected: dict, dtype: torch.dtype, rpb_dtype: torch.dtype) -> None:
        self.assertEqual(found["lse"].dtype, torch.float32)
        self.assertEqual(found["out"].dtype, dtype)
        if "drpb" in found:
            self.assertEqual(found["drpb"].dtype, rpb_dtype)
        for name, x in expected.items():
            precision = torch.float32 if name == "lse" else dtype
            bound = self.MULTIPLES[precision] * torch.finfo(precision).eps * max(1.0, x.abs().max().item())
            assert_near(found[name], x, bound, name)

    def test_float32(self):
        self.check(torch.float32, torch.float32)

    def test_bfloat16(self):
        self.check(torch.bfloat16, torch.bfloat16)

    def test_bfloat16_with_float32_rpb(self):
        self.check(torch.bfloat16, torch.float32)

    def test_float16(self):
        self.check(torch.float16, torch.float16)

    def test_float64_with_float32_rpb(self):
        problem = random_problem(2, 1, with_stride=False)._replace(has_rpb=True)
        qkv, rpb = make_qkv(problem), make_rpb(problem, torch.float32)
        found, expected = fused(problem, qkv, rpb), definition(problem, qkv, rpb)
        assert_near(found["out"], expected["out"], TOLERANCE, "out")
        self.assertEqual(found["drpb"].dtype, torch.float32)


class UnfusedInFloat64Test(unittest.TestCase):
    """Results and gradients of na*d_qk and na*d_av, which have no stride."""

    PROBLEMS_PER_RANK = 60

    def check_rank(self, rank: int) -> None:
        for seed in range(self.PROBLEMS_PER_RANK):
            problem = random_problem(rank, seed, with_stride=False)
            q, k, v = (x.detach().movedim(-2, 1).requires_grad_() for x in make_qkv(problem))
            with self.subTest(problem=problem):
                self.check_qk(problem, q, k, make_rpb(problem))
                self.check_av(problem, v)

    def check_qk(self, problem: Problem, q: Tensor, k: Tensor, rpb: Tensor | None) -> None:
        kernel_size, _, dilation, is_causal = problem.window
        found = function(problem.rank, "_qk")(q, k, kernel_size, dilation, is_causal=is_causal, rpb=rpb)
        expected = brute_force.qk(q, k, problem.window, rpb)
        assert_near(found, expected, TOLERANCE, "logits")
        grad_out = torch.randn(
            expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(problem.seed)
        )
        grad_out = grad_out.masked_fill(expected.isinf(), 0.0)  # as softmax does
        self.compare_gradients(found, expected, [q, k, rpb], grad_out)

    def check_av(self, problem: Problem, v: Tensor) -> None:
        kernel_size, _, dilation, is_causal = problem.window
        slots = brute_force.windows(problem.space, problem.window)[0].shape[1]
        generator = torch.Generator().manual_seed(problem.seed)
        weights = torch.randn(*v.shape[:-1], slots, dtype=torch.float64, generator=generator).requires_grad_()
        found = function(problem.rank, "_av")(weights, v, kernel_size, dilation, is_causal=is_causal)
        expected = brute_force.av(weights, v, problem.window)
        assert_near(found, expected, TOLERANCE, "output")
        grad_out = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
        self.compare_gradients(found, expected, [weights, v], grad_out)

    def compare_gradients(self, found: Tensor, expected: Tensor, inputs: list, grad_out: Tensor) -> None:
        pairs = zip(gradients((found,), inputs, (grad_out,)), gradients((expected,), inputs, (grad_out,)), strict=True)
        for index, (x, y) in enumerate(pairs):
            assert_near(x, y, TOLERANCE, f"gradient of input {index}")

    def test_1d(self):
        self.check_rank(1)

    def test_2d(self):
        self.check_rank(2)

    def test_3d(self):
        self.check_rank(3)

    def test_slots_before_the_map_pass_no_gradient(self):
        q, k = torch.randn(2, 1, 1, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        q.requires_grad_(), k.requires_grad_()
        logits = natten.na1d_qk(q, k, 3, is_causal=True)
        grad_out = logits.detach().isinf().double()
        for grad in torch.autograd.grad(logits, (q, k), grad_out):
            self.assertEqual(grad.abs().max().item(), 0.0)

    def test_weights_before_the_map_are_ignored(self):
        problem = random_problem(2, 0, with_stride=False)
        window = problem.window._replace(is_causal=(True, False))
        v = make_qkv(problem)[2].movedim(-2, 1)
        held = brute_force.windows(problem.space, window)[2].unflatten(0, problem.space)
        weights = torch.where(held, 0.5, float("nan")).double().expand(*v.shape[:-1], -1)
        found = function(2, "_av")(weights, v, window.kernel_size, window.dilation, is_causal=window.is_causal)
        assert_near(found, brute_force.av(weights, v, window), TOLERANCE, "output")


class BruteForceTest(unittest.TestCase):
    """The brute-force definition itself, on windows verified by hand."""

    def keys(self, i: int, length: int, kernel: int, **arguments) -> list[int | None]:
        arguments = {"stride": 1, "dilation": 1, "causal": False, **arguments}
        slots = brute_force.axis_window(i, length, kernel, **arguments)
        return [None if slot is None else slot.key for slot in slots]

    def test_windows(self):
        self.assertEqual(self.keys(4, 9, 3), [3, 4, 5])
        self.assertEqual(self.keys(0, 9, 3), [0, 1, 2])
        self.assertEqual(self.keys(8, 9, 3), [6, 7, 8])
        self.assertEqual(self.keys(4, 9, 4), [2, 3, 4, 5])
        self.assertEqual(self.keys(5, 10, 3, dilation=3), [2, 5, 8])
        self.assertEqual(self.keys(9, 10, 3, dilation=3), [3, 6, 9])
        self.assertEqual(self.keys(1, 9, 3, causal=True), [None, 0, 1])
        self.assertEqual(self.keys(7, 9, 3, causal=True), [5, 6, 7])
        self.assertEqual(self.keys(3, 9, 3, stride=3), [3, 4, 5])
        self.assertEqual(self.keys(4, 9, 3, stride=2, causal=True), [3, 4, None])

    def test_bias_entries(self):
        slots = brute_force.axis_window(0, 9, 3, stride=1, dilation=1, causal=False)
        self.assertEqual([slot.bias for slot in slots], [2, 3, 4])
        slots = brute_force.axis_window(8, 9, 3, stride=1, dilation=1, causal=False)
        self.assertEqual([slot.bias for slot in slots], [0, 1, 2])
