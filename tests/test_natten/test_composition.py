"""Composed features: grouped heads, a different value head_dim, additional keys and values, window_padding, merging.

They are compared with a brute-force definition, query by query, on random problems that combine them.
"""

from __future__ import annotations

import random
import unittest
import warnings
from collections.abc import Callable
from typing import NamedTuple

import brute_force
import pytest
import torch
from brute_force import Window
from emulation.launcher import emulated_gpu
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import natten
import natten.flops
from natten import backends, checks
from natten.ops import merge_attentions
from test_natten.problems import RANKS, cotangents, function, gradients
from test_natten.test_errors import ErrorTestCase, qkv_of
from test_natten.test_random_problems import TOLERANCE, assert_near

# By rank: largest kernel_size, dilation and number of tokens beyond the shortest possible axis.
_LIMITS = {1: (5, 3, 6), 2: (4, 2, 2), 3: (3, 2, 1)}


class Problem(NamedTuple):
    """One call, without its data."""

    space: tuple[int, ...]
    window: Window
    window_padding: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    tokens: int | None  # number of additional keys and values
    has_rpb: bool
    seed: int

    @property
    def rank(self) -> int:
        return len(self.space)


def random_problem(rank: int, seed: int, unit: int = 1) -> Problem:
    """Return the random problem with this seed; head dims are multiples of `unit`."""
    rng = random.Random(f"composed-{rank}-{seed}")
    window_padding = ("shift", "zeros", "valid")[seed % 3]
    max_kernel, max_dilation, max_spare = _LIMITS[rank]
    kernel_size = tuple(rng.randint(2, max_kernel) for _ in range(rank))
    dilation = tuple(rng.randint(1, max_dilation) for _ in range(rank))
    is_strided = window_padding == "shift" and rng.random() < 0.3
    stride = tuple(rng.randint(1, k) if is_strided else 1 for k in kernel_size)
    causal = tuple(rng.random() < 0.3 for _ in range(rank))
    shortest = {
        "shift": [k * d for k, d in zip(kernel_size, dilation, strict=True)],
        "zeros": [1] * rank,
        "valid": [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)],
    }[window_padding]
    kv_heads = rng.randint(1, 2)
    return Problem(
        space=tuple(length + rng.randint(0, max_spare) for length in shortest),
        window=Window(kernel_size, stride, dilation, causal),
        window_padding=window_padding,
        heads=kv_heads * rng.randint(1, 2),
        kv_heads=kv_heads,
        head_dim=unit * rng.randint(1, 3),
        value_dim=unit * rng.randint(1, 3),
        tokens=rng.choice((None, 0, 1, 3)),
        has_rpb=rng.random() < 0.5,
        seed=seed,
    )


def make_inputs(problem: Problem, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return query, key and value, then additional keys and values if any, then the bias table if any."""
    generator = torch.Generator().manual_seed(problem.seed)
    p, batch = problem, 1 + problem.seed % 2
    shapes = [(batch, *p.space, p.heads, p.head_dim)]
    shapes += [(batch, *p.space, p.kv_heads, dim) for dim in (p.head_dim, p.value_dim)]
    if p.tokens is not None:
        shapes += [(batch, p.tokens, p.kv_heads, dim) for dim in (p.head_dim, p.value_dim)]
    if p.has_rpb:
        shapes.append((p.heads, *(2 * k - 1 for k in p.window.kernel_size)))
    numbers = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype).requires_grad_() for x in numbers]


def split_inputs(problem: Problem, inputs: tuple[Tensor, ...]) -> tuple[tuple, tuple | None, Tensor | None]:
    """Split inputs into (query, key, value), additional keys and values, and the bias table."""
    *others, rpb = inputs if problem.has_rpb else (*inputs, None)
    return tuple(others[:3]), None if problem.tokens is None else tuple(others[3:]), rpb


def attend(problem: Problem, backend: str | None = None) -> Callable:
    """Return na*d as a function of the problem's tensors that returns output and logsumexp."""

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        qkv, additional, rpb = split_inputs(problem, inputs)
        named = (
            {} if additional is None else dict(zip(("additional_keys", "additional_values"), additional, strict=True))
        )
        named |= {"window_padding": problem.window_padding, "backend": backend}
        return function(problem.rank)(*qkv, *problem.window, rpb=rpb, return_lse=True, **named)

    return call


def define(problem: Problem) -> Callable:
    """Return the brute-force definition as a function like `attend`."""

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        qkv, additional, rpb = split_inputs(problem, inputs)
        window_padding = problem.window_padding
        return brute_force.attention_by_query(*qkv, problem.window, rpb, additional, window_padding)

    return call


def results(call: Callable, inputs: list[Tensor], seed: int) -> list[Tensor]:
    """Return output, logsumexp and the gradients of all non-empty inputs."""
    outputs = call(*inputs)
    return [*outputs, *gradients(outputs, [x for x in inputs if x.numel()], cotangents(*outputs, seed))]


class DefinitionTest(unittest.TestCase):
    """Random problems against the brute-force definition."""

    def test_float64(self):
        for rank, count in {1: 75, 2: 24, 3: 9}.items():
            for seed in range(count):
                problem = random_problem(rank, seed)
                inputs = make_inputs(problem)
                expected = results(define(problem), inputs, seed)
                for backend in (None, "reference"):
                    with self.subTest(problem=problem, backend=backend):
                        found = results(attend(problem, backend), inputs, seed)
                        self.compare(found, expected, [TOLERANCE] * len(expected))

    def compare(self, found: list[Tensor], expected: list[Tensor], tolerances: list[float]) -> None:
        for index, (x, y, tolerance) in enumerate(zip(found, expected, tolerances, strict=True)):
            self.assertTrue(x.is_contiguous() or index > 1)
            assert_near(x, y, tolerance * max(1.0, y.abs().max().item()), f"result {index}")

    def check_backend(self, backend: str, dtype: torch.dtype, multiple: float, count: int) -> None:
        """Compare in units of rounding of the largest element, as in test_random_problems.py."""
        for rank in RANKS:
            for seed in range(count):
                problem = random_problem(rank, 1000 + seed, unit=8)
                inputs = make_inputs(problem, dtype)
                exact = [x.detach().double().requires_grad_() for x in inputs]
                expected = results(define(problem), exact, seed)
                with self.subTest(problem=problem):
                    found = results(attend(problem, backend), inputs, seed)
                    self.assertEqual((found[0].dtype, found[1].dtype), (dtype, torch.float32))
                    bounds = [multiple * torch.finfo(dtype).eps] * len(found)
                    bounds[1] = 32 * torch.finfo(torch.float32).eps
                    self.compare(found, expected, bounds)

    def test_cpu_in_float32(self):
        self.check_backend("cpu", torch.float32, 32, 6)

    def test_cpu_in_bfloat16(self):
        self.check_backend("cpu", torch.bfloat16, 6, 6)

    def test_cuda_emulated(self):
        """All features in one problem, on the kernels with matrix instructions."""
        window = Window((3, 4), (1, 1), (2, 1), (False, True))
        problem = Problem((5, 6), window, "zeros", 2, 1, 8, 16, 3, True, 0)
        inputs = make_inputs(problem, torch.bfloat16)
        expected = results(define(problem), [x.detach().double().requires_grad_() for x in inputs], 0)
        with emulated_gpu() as emulator:
            found = results(attend(problem, "cuda"), inputs, 0)
        self.compare(found, expected, [6 * torch.finfo(torch.bfloat16).eps] * len(found))
        self.assertIn("natten_grad_query_tiles", emulator.launched)

    @pytest.mark.slow
    def test_cuda_emulated_on_random_problems(self):
        for dtype, multiple in ((torch.float32, 32), (torch.bfloat16, 6)):
            with emulated_gpu():
                self.check_backend("cuda", dtype, multiple, 6)

    def test_scale(self):
        """A scale applies to windows and additional tokens."""
        problem = random_problem(1, 1)._replace(tokens=3, head_dim=4, has_rpb=True)
        (q, k, v), additional, rpb = split_inputs(problem, tuple(make_inputs(problem)))
        options = dict(zip(("additional_keys", "additional_values"), additional, strict=True))
        options |= {"rpb": rpb, "window_padding": problem.window_padding}
        found = natten.na1d(q, k, v, *problem.window, scale=0.3, **options)
        expected = natten.na1d(q * 0.3, k, v, *problem.window, scale=1.0, **options)
        torch.testing.assert_close(found, expected)
        self.assertFalse(torch.allclose(found, natten.na1d(q, k, v, *problem.window, **options)))

    def test_random_problems_cover_all_features(self):
        problems = [random_problem(rank, seed) for rank, count in {1: 75, 2: 24, 3: 9}.items() for seed in range(count)]
        for padding in ("shift", "zeros", "valid"):
            chosen = [p for p in problems if p.window_padding == padding]
            features = {
                "fewer heads": lambda p: p.kv_heads < p.heads,
                "smaller values": lambda p: p.value_dim < p.head_dim,
                "larger values": lambda p: p.value_dim > p.head_dim,
                "additional": lambda p: p.tokens,
                "no additional token": lambda p: p.tokens == 0,
                "rpb": lambda p: p.has_rpb,
                "causal": lambda p: any(p.window.is_causal),
                "even kernel": lambda p: any(k % 2 == 0 for k in p.window.kernel_size),
                "dilation": lambda p: max(p.window.dilation) > 1,
            }
            if padding != "shift":
                features["map smaller than kernel_size * dilation"] = lambda p: any(
                    k * d > n for k, d, n in zip(p.window.kernel_size, p.window.dilation, p.space, strict=True)
                )
            for name, has in features.items():
                with self.subTest(name, window_padding=padding):
                    self.assertGreaterEqual(sum(map(bool, map(has, chosen))), 5)


class GradcheckTest(unittest.TestCase):
    """Gradients against finite differences."""

    def test_first_and_second_derivatives(self):
        for rank in RANKS:
            for seed in range(6):
                problem = random_problem(rank, 2000 + seed)
                inputs = make_inputs(problem)
                with self.subTest(problem=problem):
                    self.assertTrue(gradcheck(attend(problem), inputs, fast_mode=True))
                    if rank == 1:
                        self.assertTrue(gradgradcheck(attend(problem, "reference"), inputs, fast_mode=True))


class PackedTest(unittest.TestCase):
    """The packed functions equal the others."""

    def test_window_padding_and_additional_tokens(self):
        for rank in RANKS:
            for seed in range(6):
                problem = random_problem(rank, seed)._replace(tokens=2)
                problem = problem._replace(heads=problem.kv_heads, value_dim=problem.head_dim)
                qkv, additional, rpb = split_inputs(problem, tuple(make_inputs(problem)))
                named = dict(zip(("additional_keys", "additional_values"), additional, strict=True))
                named |= {"window_padding": problem.window_padding, "rpb": rpb, "return_lse": True}
                expected = function(rank)(*qkv, *problem.window, **named)
                packed = torch.stack(qkv, -3)
                with self.subTest(problem=problem):
                    found = function(rank, "_qkvpacked")(packed, *problem.window, **named)
                    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class MergeTest(ErrorTestCase):
    """merge_attentions equals attention to all sets of keys at once."""

    def setUp(self):
        generator = torch.Generator().manual_seed(0)
        self.q, self.k, self.v = torch.randn(3, 2, 12, 2, 4, dtype=torch.float64, generator=generator)

    def attend_to(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.einsum("bqhd,bkhd->bqhk", q, k)
        return torch.einsum("bqhk,bkhd->bqhd", logits.softmax(-1), v), logits.logsumexp(-1)

    def merged(self, q: Tensor, k: Tensor, v: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        parts = [self.attend_to(q, *part) for part in zip(k.split(sizes, 1), v.split(sizes, 1), strict=True)]
        return merge_attentions(*map(list, zip(*parts, strict=True)))

    def test_parts_of_one_set_of_keys(self):
        for sizes in ((6, 6), (1, 4, 7), (3, 3, 3, 3)):
            inputs = [x.clone().requires_grad_() for x in (self.q, self.k, self.v)]
            found = results(lambda *x, sizes=sizes: self.merged(*x, sizes), inputs, 0)
            torch.testing.assert_close(found, results(self.attend_to, inputs, 0), rtol=0, atol=TOLERANCE)

    def test_overlapping_windows_of_natten(self):
        """Keys that are in two merged windows count twice."""
        once = natten.na1d(self.q, self.k, self.v, 3, return_lse=True)
        out, lse = natten.merge_attentions(*zip(once, once, strict=True), torch_compile=False, use_autograd_fix=False)
        torch.testing.assert_close(out, once[0])
        torch.testing.assert_close(lse, once[1] + torch.tensor(2.0).log())

    def test_set_without_keys(self):
        out, lse = self.attend_to(self.q, self.k, self.v)
        nothing = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
        found = merge_attentions((out.requires_grad_(), nothing[0]), (lse.requires_grad_(), nothing[1]))
        torch.testing.assert_close(found, (out, lse))
        self.assertTrue(
            all(x.isfinite().all() for x in torch.autograd.grad(found[0].sum() + found[1].sum(), (out, lse)))
        )

    def test_large_logsumexps(self):
        """exp() of these logsumexps would overflow."""
        out, lse = (x.float() for x in self.attend_to(self.q, self.k, self.v))
        for shift in (500.0, -500.0):
            merged, merged_lse = merge_attentions((out, 3 * out), (lse + shift, lse + shift))
            torch.testing.assert_close(merged, 2 * out)
            torch.testing.assert_close(merged_lse, lse + shift + torch.tensor(2.0).log())

    def test_dtypes(self):
        out, lse = self.attend_to(self.q, self.k, self.v)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            with torch.autocast("cpu", torch.bfloat16):
                merged, merged_lse = merge_attentions((out.to(dtype),) * 2, (lse.float(),) * 2)
            self.assertEqual((merged.dtype, merged_lse.dtype), (dtype, torch.float32))
            self.assertTrue(torch.equal(merged, out.to(dtype)))

    def test_errors(self):
        out, lse = self.attend_to(self.q, self.k, self.v)
        self.assert_error(("outputs", "lse_tensors", "1"), merge_attentions, [out], [lse])
        self.assert_error(("outputs", "lse_tensors", "2", "1"), merge_attentions, [out, out], [lse])
        self.assert_error(("outputs[1]", "(2, 11, 2, 4)"), merge_attentions, [out, out[:, 1:]], [lse, lse])
        self.assert_error(("outputs[1]", "float32"), merge_attentions, [out, out.float()], [lse, lse])
        self.assert_error(("lse_tensors[1]", "(2, 12)", "(2, 12, 2)"), merge_attentions, [out, out], [lse, lse[..., 0]])
        self.assert_error(("lse_tensors[0]", "meta"), merge_attentions, [out, out], [lse.to("meta"), lse])


class CompileTest(unittest.TestCase):
    """torch.compile(fullgraph=True), torch.export, autocast and FLOP counts with all features combined."""

    def setUp(self):
        self.addCleanup(torch.compiler.reset)

    def problems(self) -> list[Problem]:
        base = random_problem(2, 1)._replace(heads=4, kv_heads=2, head_dim=8, value_dim=16, tokens=3, has_rpb=True)
        window = Window((3, 4), (1, 1), (2, 1), (False, True))
        return [base._replace(space=(9, 8), window=window, window_padding=p) for p in ("shift", "zeros", "valid")]

    def test_compiled(self):
        for problem, backend in zip(self.problems()[1:], (None, "reference"), strict=True):
            inputs = make_inputs(problem, torch.float32)
            torch.compiler.reset()
            with self.subTest(problem=problem, backend=backend):
                compiled = torch.compile(attend(problem, backend), fullgraph=True, backend="aot_eager")
                found, expected = (results(call, inputs, 0) for call in (compiled, attend(problem, backend)))
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_exported(self):
        class Call(torch.nn.Module):
            def __init__(self, problem: Problem):
                super().__init__()
                self.forward = attend(problem)

        for problem in self.problems()[1:]:
            inputs = tuple(x.detach() for x in make_inputs(problem, torch.float32))
            program = torch.export.export(Call(problem), inputs)
            self.assertNotIn("natten", str(program.graph))
            torch.testing.assert_close(program.module()(*inputs), attend(problem)(*inputs), rtol=1e-5, atol=1e-5)

    def test_autocast(self):
        for problem in self.problems():
            inputs = make_inputs(problem, torch.float32)
            expected, _ = attend(problem)(*inputs)
            with self.subTest(problem=problem), torch.autocast("cpu", torch.bfloat16):
                out, lse = attend(problem)(*inputs)
                self.assertEqual((out.dtype, lse.dtype), (torch.bfloat16, torch.float32))
                assert_near(out, expected, 2**-5, "out")

    def test_flops(self):
        """Windows are counted by natten, additional tokens as matrix products by torch."""
        q, k, v = torch.zeros(2, 9, 4, 8), *torch.zeros(2, 2, 9, 2, 8)
        tokens = dict.fromkeys(("additional_keys", "additional_values"), torch.zeros(2, 5, 2, 8))
        with FlopCounterMode(display=False) as counter:
            natten.na1d(q, k, v, 3, **tokens)
        self.assertEqual(counter.get_total_flops(), 2 * 2 * (2 * 9 * 4) * (3 + 5) * 8)
        with FlopCounterMode(display=False) as counter:  # of the padded map
            natten.na1d(q, k, v, 3, window_padding="zeros")
        self.assertEqual(counter.get_total_flops(), 2 * 2 * (2 * 11 * 4) * 3 * 8)
        layer = natten.NeighborhoodAttention1D(8, 2, 3, window_padding="zeros")
        macs = natten.flops.get_flops(layer, torch.zeros(1, 9, 8), disable_warnings=True)
        self.assertEqual(macs, 9 * 8 * (24 + 8) + 2 * 11 * 3 * (2 * 4 + 1))


class InvalidArgumentsTest(ErrorTestCase):
    """Arguments that do not fit together."""

    def test_heads(self):
        q, (_, k, v) = qkv_of(heads=4)[0], qkv_of(heads=3)
        self.assert_error(("key", "3", "query", "4"), natten.na2d, q, k, v, 3)
        self.assert_error(("value", "4", "key", "3"), natten.na2d, q, k, q, 3)
        self.assert_error(("key", "0", "query", "4"), natten.na2d, q, k[..., :0, :], v[..., :0, :], 3)

    def test_head_dims(self):
        q, k, _ = qkv_of(head_dim=8)
        self.assert_error(("key", "4", "query", "8"), natten.na2d, q, k[..., :4], k[..., :4], 3)

    def test_rpb_has_the_heads_of_the_query(self):
        q, (_, k, v) = qkv_of(heads=4)[0], qkv_of(heads=2)
        self.assert_error(("rpb", "(4, 5, 5)"), natten.na2d, q, k, v, 3, rpb=torch.zeros(2, 5, 5))

    def test_additional_tokens(self):
        q, k, v = qkv_of(heads=4)[0], *qkv_of(heads=2, head_dim=4)[:1], qkv_of(heads=2, head_dim=6)[0]
        keys, values = torch.zeros(1, 5, 2, 4), torch.zeros(1, 5, 2, 6)
        natten.na2d(q, k, v, 3, additional_keys=keys, additional_values=values)
        for names, keys_given, values_given in (
            (("additional_values",), keys, None),
            (("additional_keys",), None, values),
            (("additional_keys", "(1, 5, 4, 4)", "(1, 5, 2, 4)"), keys.repeat(1, 1, 2, 1), values),
            (("additional_values", "(1, 4, 2, 6)", "(1, 5, 2, 6)"), keys, values[:, 1:]),
            (("additional_values", "(1, 5, 2, 4)", "(1, 5, 2, 6)"), keys, keys),
            (("additional_keys", "(2, 5, 2, 4)", "(1, 5, 2, 4)"), keys.repeat(2, 1, 1, 1), values),
            (("additional_keys", "(5,)"), keys[0, :, 0, 0], values),
            (("additional_keys", "float64", "float32"), keys.double(), values),
            (("additional_values", "meta", "cpu"), keys, values.to("meta")),
        ):
            with self.subTest(names):
                self.assert_error(
                    names, natten.na2d, q, k, v, 3, additional_keys=keys_given, additional_values=values_given
                )

    def test_window_padding(self):
        q, k, v = qkv_of()
        packed = torch.stack((q, k, v), -3)
        for call in (lambda **named: natten.na2d(q, k, v, **named), lambda **n: natten.na2d_qkvpacked(packed, **n)):
            names = ("window_padding", "'reflect'", "'shift'", "'zeros'", "'valid'")
            self.assert_error(names, call, kernel_size=3, window_padding="reflect")
            for padding in ("zeros", "valid"):
                names = ("stride", "2", "axis 1", "window_padding", padding)
                self.assert_error(names, call, kernel_size=3, stride=(1, 2), window_padding=padding)
                self.assert_error(("kernel_size", "1", "axis 0"), call, kernel_size=1, window_padding=padding)
            names = ("window_padding", "'valid'", "axis 1", "11", "10")
            self.assert_error(names, call, kernel_size=(3, 6), dilation=2, window_padding="valid")
        self.assert_error(("qkv",), natten.na2d_qkvpacked, q, 3, window_padding="zeros")


class LayerTest(ErrorTestCase):
    """Layers with window_padding."""

    def test_against_the_functions(self):
        for rank in RANKS:
            for window_padding in ("zeros", "valid"):
                options = {"kernel_size": 3, "dilation": 2, "window_padding": window_padding}
                layer = getattr(natten, f"NeighborhoodAttention{rank}D")(8, 2, **options)
                x = torch.randn(2, *(6, 5, 7)[:rank], 8, generator=torch.Generator().manual_seed(0))
                qkv = layer.qkv(x).unflatten(-1, (3, 2, 4))
                out = function(rank, "_qkvpacked")(qkv, 3, 1, 2, rpb=layer.rpb, window_padding=window_padding)
                torch.testing.assert_close(layer(x), layer.proj(out.flatten(-2)))
                short = [length - 4 for length in x.shape[1:-1]] if window_padding == "valid" else x.shape[1:-1]
                self.assertEqual(layer(x).shape, (2, *short, 8))
                self.assertIn(f"window_padding={window_padding}", str(layer))

    def test_errors(self):
        make = natten.NeighborhoodAttention2D
        self.assert_error(("window_padding", "'reflect'"), make, 8, 2, 3, window_padding="reflect")
        for options in ({"stride": 2}, {"attn_drop": 0.1}):
            names = ("window_padding", "'zeros'", "stride", "attn_drop")
            self.assert_error(names, make, 8, 2, 3, window_padding="zeros", **options)
        layer = make(8, 2, 3, window_padding="valid")
        self.assert_error(("window_padding", "'valid'"), layer.attention_weights, torch.zeros(1, 5, 5, 8))
        self.assert_error("axis 0", layer, torch.zeros(1, 2, 5, 8))


class OtherReleasesTest(ErrorTestCase):
    """Arguments of NATTEN 0.17.5 and 0.20 that have no effect here."""

    def setUp(self):
        self.qkv = [x + 1 for x in qkv_of()]
        for warn_once in (checks._warn_ignored, backends._warn_ignored):
            warn_once.cache_clear()
            self.addCleanup(warn_once.cache_clear)

    def test_tuning_warns_once_and_changes_nothing(self):
        tuning = {
            "attention_kwargs": {"backend": "cutlass-fmha"},
            "q_tile_shape": (8, 8),
            "kv_tile_shape": (8, 8),
            "backward_kv_splits": (1, 1),
            "run_persistent_kernel": True,
            "torch_compile": False,
            "kernel_schedule": None,
        }
        with self.assertWarns(UserWarning) as caught:
            found = natten.na2d(*self.qkv, 3, backend="cutlass-fna", **tuning)
        messages = " ".join(str(warning.message) for warning in caught.warnings)
        self.assertEqual(len(caught.warnings), len(tuning) + 1)
        for name in (*tuning, "cutlass-fna"):
            self.assertIn(name, messages)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(natten.na2d(*self.qkv, 3, backend="cutlass-fna", **tuning), found)
        torch.testing.assert_close(natten.na2d(*self.qkv, 3), found)

    def test_unknown_keyword_argument(self):
        names = ("na2d()", "'windowpadding'")
        self.assert_error(names, natten.na2d, *self.qkv, 3, windowpadding="zeros", error=TypeError)

    def test_names_of_backends(self):
        layer = natten.NeighborhoodAttention2D(embed_dim=8, num_heads=2, kernel_size=3, backend="hopper-fna")
        with self.assertWarnsRegex(UserWarning, "'hopper-fna'"):
            layer(torch.zeros(1, 5, 5, 8))
        with self.assertWarnsRegex(UserWarning, "'flex-fna'"), natten.use_backend("reference"):
            natten.na2d(*self.qkv, 3, backend="flex-fna")

    def test_compiled(self):
        self.addCleanup(torch.compiler.reset)
        call = torch.compile(lambda *qkv: natten.na2d(*qkv, 3, torch_compile=True), fullgraph=True, backend="eager")
        torch.testing.assert_close(call(*self.qkv), natten.na2d(*self.qkv, 3))
