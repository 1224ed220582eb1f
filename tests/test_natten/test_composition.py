"""Fewer key/value heads, another value head_dim, additional keys and values, windows that reach over the map; merging.

Judged by a definition that goes query by query, on random problems that mix all of it.
"""

from __future__ import annotations

import random
import re
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
from natten import context
from natten.ops import merge_attentions
from test_natten.problems import RANKS, cotangents, function, gradients
from test_natten.test_errors import RefusalTestCase, qkv_of
from test_natten.test_random_problems import TOLERANCE, assert_near

_MOST = {1: (5, 3, 6), 2: (4, 2, 2), 3: (3, 2, 1)}  # kernel_size, dilation, tokens beyond; by rank


class Problem(NamedTuple):
    """Everything but the numbers of one call."""

    space: tuple[int, ...]
    window: Window
    window_padding: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    tokens: int | None  # additional ones
    has_rpb: bool
    seed: int

    @property
    def rank(self) -> int:
        return len(self.space)


def random_problem(rank: int, seed: int, unit: int = 1) -> Problem:
    """The problem of that number; head dims are multiples of `unit`."""
    rng = random.Random(f"composed-{rank}-{seed}")
    window_padding = ("shift", "zeros", "valid")[seed % 3]
    most_kernel, most_dilation, most_spare = _MOST[rank]
    kernel_size = tuple(rng.randint(2, most_kernel) for _ in range(rank))
    dilation = tuple(rng.randint(1, most_dilation) for _ in range(rank))
    is_strided = window_padding == "shift" and rng.random() < 0.3
    stride = tuple(rng.randint(1, k) if is_strided else 1 for k in kernel_size)
    causal = tuple(rng.random() < 0.3 for _ in range(rank))
    least = {
        "shift": [k * d for k, d in zip(kernel_size, dilation, strict=True)],
        "zeros": [1] * rank,
        "valid": [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)],
    }[window_padding]
    kv_heads = rng.randint(1, 2)
    return Problem(
        space=tuple(length + rng.randint(0, most_spare) for length in least),
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
    """Query, key, value, then additional keys and values, then the bias table, as far as there are any."""
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


def sort_out(problem: Problem, inputs: tuple[Tensor, ...]) -> tuple[tuple, tuple | None, Tensor | None]:
    """Inputs as (query, key, value), additional keys and values, and the bias table."""
    *others, rpb = inputs if problem.has_rpb else (*inputs, None)
    return tuple(others[:3]), None if problem.tokens is None else tuple(others[3:]), rpb


def attend(problem: Problem, backend: str | None = None) -> Callable:
    """na*d as a function of the problem's tensors, returning output and logsumexp."""

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        qkv, additional, rpb = sort_out(problem, inputs)
        named = (
            {} if additional is None else dict(zip(("additional_keys", "additional_values"), additional, strict=True))
        )
        named |= {"window_padding": problem.window_padding, "backend": backend}
        return function(problem.rank)(*qkv, *problem.window, rpb=rpb, return_lse=True, **named)

    return call


def define(problem: Problem) -> Callable:
    """The same by definition."""

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        qkv, additional, rpb = sort_out(problem, inputs)
        window_padding = problem.window_padding
        return brute_force.attention_by_query(*qkv, problem.window, rpb, additional, window_padding)

    return call


def results(call: Callable, inputs: list[Tensor], seed: int) -> list[Tensor]:
    """Output, logsumexp and the gradients of all inputs that have numbers."""
    outputs = call(*inputs)
    return [*outputs, *gradients(outputs, [x for x in inputs if x.numel()], cotangents(*outputs, seed))]


class DefinitionTest(unittest.TestCase):
    """Random problems against the definition."""

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
        """Errors are judged in roundings of the largest number, as in test_random_problems.py."""
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
        """All abilities in one problem on the kernels with matrix instructions."""
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
        """A scale that is given serves windows and additional tokens alike."""
        problem = random_problem(1, 1)._replace(tokens=3, head_dim=4, has_rpb=True)
        (q, k, v), additional, rpb = sort_out(problem, tuple(make_inputs(problem)))
        options = dict(zip(("additional_keys", "additional_values"), additional, strict=True))
        options |= {"rpb": rpb, "window_padding": problem.window_padding}
        found = natten.na1d(q, k, v, *problem.window, scale=0.3, **options)
        expected = natten.na1d(q * 0.3, k, v, *problem.window, scale=1.0, **options)
        torch.testing.assert_close(found, expected)
        self.assertFalse(torch.allclose(found, natten.na1d(q, k, v, *problem.window, **options)))

    def test_the_problems_cover_what_they_should(self):
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

    def test_once_and_twice(self):
        for rank in RANKS:
            for seed in range(6):
                problem = random_problem(rank, 2000 + seed)
                inputs = make_inputs(problem)
                with self.subTest(problem=problem):
                    self.assertTrue(gradcheck(attend(problem), inputs, fast_mode=True))
                    if rank == 1:
                        self.assertTrue(gradgradcheck(attend(problem, "reference"), inputs, fast_mode=True))


class PackedTest(unittest.TestCase):
    """The packed functions give what the others do."""

    def test_window_padding_and_additional_tokens(self):
        for rank in RANKS:
            for seed in range(6):
                problem = random_problem(rank, seed)._replace(tokens=2)
                problem = problem._replace(heads=problem.kv_heads, value_dim=problem.head_dim)
                qkv, additional, rpb = sort_out(problem, tuple(make_inputs(problem)))
                named = dict(zip(("additional_keys", "additional_values"), additional, strict=True))
                named |= {"window_padding": problem.window_padding, "rpb": rpb, "return_lse": True}
                expected = function(rank)(*qkv, *problem.window, **named)
                packed = torch.stack(qkv, -3)
                with self.subTest(problem=problem):
                    found = function(rank, "_qkvpacked")(packed, *problem.window, **named)
                    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class MergeTest(RefusalTestCase):
    """merge_attentions: several sets of keys as if they were one."""

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
        """Two windows of one map, merged: keys that are in both count twice."""
        once = natten.na1d(self.q, self.k, self.v, 3, return_lse=True)
        out, lse = natten.merge_attentions(*zip(once, once, strict=True), torch_compile=False, use_autograd_fix=False)
        torch.testing.assert_close(out, once[0])
        torch.testing.assert_close(lse, once[1] + torch.tensor(2.0).log())

    def test_a_part_without_keys(self):
        out, lse = self.attend_to(self.q, self.k, self.v)
        nothing = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
        found = merge_attentions((out.requires_grad_(), nothing[0]), (lse.requires_grad_(), nothing[1]))
        torch.testing.assert_close(found, (out, lse))
        self.assertTrue(
            all(x.isfinite().all() for x in torch.autograd.grad(found[0].sum() + found[1].sum(), (out, lse)))
        )

    def test_large_logsumexps(self):
        """exp() of them would not be finite."""
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

    def test_what_it_refuses(self):
        out, lse = self.attend_to(self.q, self.k, self.v)
        self.refuses(("1 outputs and 1 lse_tensors", "two or more"), merge_attentions, [out], [lse])
        self.refuses(("2 outputs and 1 lse_tensors", "as many"), merge_attentions, [out, out], [lse])
        self.refuses(("outputs[1]", "(2, 11, 2, 4)", "must agree"), merge_attentions, [out, out[:, 1:]], [lse, lse])
        self.refuses(("outputs[1]", "float32", "must agree"), merge_attentions, [out, out.float()], [lse, lse])
        self.refuses(("lse_tensors[1]", "(2, 12)", "(2, 12, 2)"), merge_attentions, [out, out], [lse, lse[..., 0]])
        self.refuses(("lse_tensors[0]", "on meta"), merge_attentions, [out, out], [lse.to("meta"), lse])


class CompileTest(unittest.TestCase):
    """torch.compile(fullgraph=True), torch.export, autocast and counts of FLOPs, on all abilities at once."""

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
        """Windows and additional tokens count, the latter as torch's own matrix products."""
        q, k, v = torch.zeros(2, 9, 4, 8), *torch.zeros(2, 2, 9, 2, 8)
        tokens = dict.fromkeys(("additional_keys", "additional_values"), torch.zeros(2, 5, 2, 8))
        with FlopCounterMode(display=False) as counter:
            natten.na1d(q, k, v, 3, **tokens)
        self.assertEqual(counter.get_total_flops(), 2 * 2 * (2 * 9 * 4) * (3 + 5) * 8)
        with FlopCounterMode(display=False) as counter:  # of the map with its margins
            natten.na1d(q, k, v, 3, window_padding="zeros")
        self.assertEqual(counter.get_total_flops(), 2 * 2 * (2 * 11 * 4) * 3 * 8)
        layer = natten.NeighborhoodAttention1D(8, 2, 3, window_padding="zeros")
        macs = natten.flops.get_flops(layer, torch.zeros(1, 9, 8), disable_warnings=True)
        self.assertEqual(macs, 9 * 8 * (24 + 8) + 2 * 11 * 3 * (2 * 4 + 1))


class RefusalTest(RefusalTestCase):
    """What does not go together."""

    def test_heads(self):
        q, (_, k, v) = qkv_of(heads=4)[0], qkv_of(heads=3)
        self.refuses(("3 heads", "query has 4", "multiple"), natten.na2d, q, k, v, 3)
        self.refuses(("value has 4 heads", "key has 3"), natten.na2d, q, k, q, 3)
        self.refuses(("0 heads", "query has 4"), natten.na2d, q, k[..., :0, :], v[..., :0, :], 3)

    def test_head_dims(self):
        q, k, _ = qkv_of(head_dim=8)
        self.refuses(("key has head_dim 4", "query has 8"), natten.na2d, q, k[..., :4], k[..., :4], 3)

    def test_rpb_is_of_the_querys_heads(self):
        q, (_, k, v) = qkv_of(heads=4)[0], qkv_of(heads=2)
        self.refuses(("rpb", "4 heads", "(4, 5, 5)"), natten.na2d, q, k, v, 3, rpb=torch.zeros(2, 5, 5))

    def test_additional_tokens(self):
        q, k, v = qkv_of(heads=4)[0], *qkv_of(heads=2, head_dim=4)[:1], qkv_of(heads=2, head_dim=6)[0]
        keys, values = torch.zeros(1, 5, 2, 4), torch.zeros(1, 5, 2, 6)
        natten.na2d(q, k, v, 3, additional_keys=keys, additional_values=values)
        for words, keys_given, values_given in (
            (("additional_keys is given without additional_values", "both"), keys, None),
            (("additional_values is given without additional_keys", "both"), None, values),
            (("additional_keys", "(1, 5, 4, 4)", "(1, 5, 2, 4)"), keys.repeat(1, 1, 2, 1), values),
            (("additional_values", "(1, 4, 2, 6)", "(1, 5, 2, 6)"), keys, values[:, 1:]),
            (("additional_values", "(1, 5, 2, 4)", "(1, 5, 2, 6)"), keys, keys),
            (("additional_keys", "(2, 5, 2, 4)", "(1, 5, 2, 4)"), keys.repeat(2, 1, 1, 1), values),
            (("additional_keys", "(5,)", "batch, tokens"), keys[0, :, 0, 0], values),
            (("additional_keys", "float64", "float32", "convert"), keys.double(), values),
            (("additional_values", "meta", "cpu", "convert"), keys, values.to("meta")),
        ):
            with self.subTest(words):
                self.refuses(words, natten.na2d, q, k, v, 3, additional_keys=keys_given, additional_values=values_given)

    def test_window_padding(self):
        q, k, v = qkv_of()
        packed = torch.stack((q, k, v), -3)
        for call in (lambda **named: natten.na2d(q, k, v, **named), lambda **n: natten.na2d_qkvpacked(packed, **n)):
            words = ("window_padding", "'reflect'", "'shift'", "'zeros'", "'valid'")
            self.refuses(words, call, kernel_size=3, window_padding="reflect")
            for padding in ("zeros", "valid"):
                words = ("stride is 2", "axis 1", f"window_padding='{padding}'", "'shift'")
                self.refuses(words, call, kernel_size=3, stride=(1, 2), window_padding=padding)
                self.refuses(("kernel_size is 1", "axis 0"), call, kernel_size=1, window_padding=padding)
            words = ("'valid' leaves no query on axis 1", "11 tokens", "only 10")
            self.refuses(words, call, kernel_size=(3, 6), dilation=2, window_padding="valid")
        self.refuses(("qkv", "3 (query, key and value)"), natten.na2d_qkvpacked, q, 3, window_padding="zeros")


class LayerTest(RefusalTestCase):
    """window_padding of the layers."""

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

    def test_what_it_refuses(self):
        make = natten.NeighborhoodAttention2D
        self.refuses(("window_padding", "'reflect'"), make, 8, 2, 3, window_padding="reflect")
        for options in ({"stride": 2}, {"attn_drop": 0.1}):
            words = ("'zeros'", "neither a stride nor attn_drop")
            self.refuses(words, make, 8, 2, 3, window_padding="zeros", **options)
        layer = make(8, 2, 3, window_padding="valid")
        self.refuses("window_padding='valid'", layer.attention_weights, torch.zeros(1, 5, 5, 8))
        self.refuses("no query on axis 0", layer, torch.zeros(1, 2, 5, 8))


class OtherReleasesTest(RefusalTestCase):
    """Arguments of NATTEN 0.17.5 and 0.20."""

    def setUp(self):
        self.qkv = [x + 1 for x in qkv_of()]
        for cached in (context._tell, natten.backends._warn_ignored):
            cached.cache_clear()
            self.addCleanup(cached.cache_clear)

    def test_tuning_is_told_of_once_and_changes_nothing(self):
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
        told = sorted(re.split("[, ]", str(warning.message))[0] for warning in caught.warnings)
        self.assertEqual(
            told,
            sorted([*tuning, "backend='cutlass-fna'"]),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(natten.na2d(*self.qkv, 3, backend="cutlass-fna", **tuning), found)
        torch.testing.assert_close(natten.na2d(*self.qkv, 3), found)

    def test_a_name_of_no_release(self):
        words = ("na2d()", "unexpected keyword argument 'windowpadding'")
        self.refuses(words, natten.na2d, *self.qkv, 3, windowpadding="zeros", error=TypeError)

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
