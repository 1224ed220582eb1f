"""Functions and layers of older releases: where they are found, the orders of arguments, and the numbers."""

from __future__ import annotations

import copy
import importlib.metadata
import pickle
import subprocess
import sys
import unittest
from collections.abc import Callable, Iterator

import torch
from deterministic import fill
from torch import Tensor, nn

import natten
from natten import functional
from test_natten.problems import RANKS, function, runs_fused_operator
from test_natten.test_errors import RefusalTestCase
from test_natten.test_goldens import CASES, TOLERANCE, load, make_inputs

FUNCTIONS = [f"natten{rank}d{kind}" for rank in RANKS for kind in ("qk", "qkrpb", "av")]
LEGACY = {1: natten.LegacyNeighborhoodAttention1D, 2: natten.LegacyNeighborhoodAttention2D}
LAYERS = {1: natten.NeighborhoodAttention1D, 2: natten.NeighborhoodAttention2D}
MAPS = {1: (11,), 2: (7, 9), 3: (7, 8, 9)}


def old(rank: int, kind: str) -> Callable:
    """The older function natten{rank}d{kind}."""
    return getattr(functional, f"natten{rank}d{kind}")


def inputs(rank: int, kernel_size: int | tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads-first query and key, a bias table, and attention weights, in float64 and with gradients."""
    sizes = (kernel_size,) * rank if isinstance(kernel_size, int) else kernel_size
    generator = torch.Generator().manual_seed(rank)
    shapes = (
        (2, 3, *MAPS[rank], 4),
        (2, 3, *MAPS[rank], 4),
        (3, *(2 * k - 1 for k in sizes)),
        (2, 3, *MAPS[rank], torch.tensor(sizes).prod().item()),
    )
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)


class PlacesTest(unittest.TestCase):
    """Where older code looks."""

    def test_the_functions_are_in_natten_functional(self):
        for name in FUNCTIONS:
            with self.subTest(name):
                self.assertEqual(getattr(functional, name).__name__, name)
                self.assertIn(name, getattr(functional, name).__doc__)

    def test_in_a_fresh_process_without_importing_natten_first(self):
        code = "from natten.functional import natten2dav, natten2dqkrpb; print(natten2dav.__name__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout.strip()), (0, "natten2dav"), done.stderr)

    def test_new_code_does_not_see_them(self):
        for name in (*FUNCTIONS, "LegacyNeighborhoodAttention2D", "has_cuda"):
            self.assertNotIn(name, natten.__all__)
            self.assertNotIn(name, dir(natten))
            self.assertNotIn(name, dir(functional))

    def test_unknown_names_are_still_unknown(self):
        for module in (natten, functional):
            with self.assertRaisesRegex(AttributeError, f"module '{module.__name__}' has no attribute 'natten4dqk'"):
                module.natten4dqk  # noqa: B018
        with self.assertRaises(ImportError):
            from natten import natten4dqk  # noqa: F401

    def test_the_distribution_is_named_as_transformers_asks(self):
        self.assertEqual(importlib.metadata.version("natten"), natten.__version__)


class OrdersTest(RefusalTestCase):
    """Every order of arguments means the same call."""

    def windows(self) -> Iterator[tuple[int, int, int]]:
        """Rank, kernel size and dilation."""
        for rank in RANKS:
            yield from ((rank, 3, 2), (rank, 5, 1), (rank, 2, 3))
        yield from ((1, 9, 1), (2, 7, 1))

    def check(self, expected: Tensor, calls: list[tuple[str, tuple, dict]], leaves: tuple[Tensor, ...]) -> None:
        """Calls of functions of natten.functional give the result, and the same gradients of all leaves."""
        expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
        for name, args, kwargs in calls:
            with self.subTest(name, positional=len(args), named=list(kwargs)):
                found = getattr(functional, name)(*args, **kwargs)
                self.assertTrue(torch.equal(found, expected))
                for x, y in zip(torch.autograd.grad(found.square().sum(), leaves), expected_grads, strict=True):
                    self.assertTrue(torch.equal(x, y))

    def test_qkrpb(self):
        for rank, k, d in self.windows():
            query, key, rpb, _ = inputs(rank, k)
            tensors, name = {"query": query, "key": key, "rpb": rpb}, f"natten{rank}dqkrpb"
            calls = [
                (name, (query, key, rpb, k, d), {}),
                (name, (query, key, rpb, k), {"dilation": d}),
                (name, (query, key, rpb), {"dilation": d, "kernel_size": k}),
                (name, (), {**tensors, "kernel_size": k, "dilation": d}),
                (name, (query, key, rpb, d), {}),
                (name, (query, key, rpb), {"dilation": d}),
                (name, (), {**tensors, "dilation": d}),
                (f"na{rank}d_qk_with_bias", (query, key, rpb, k, d), {}),
                (f"na{rank}d_qk_with_bias", (query, key), {"bias": rpb, "kernel_size": k, "dilation": d}),
            ]
            self.check(function(rank, "_qk")(query, key, k, d, rpb=rpb), calls, (query, key, rpb))

    def test_qk(self):
        for rank, k, d in self.windows():
            query, key, *_ = inputs(rank, k)
            calls = [
                (f"natten{rank}dqk", (query, key, k, d), {}),
                (f"natten{rank}dqk", (query, key), {"kernel_size": k, "dilation": d}),
                (f"natten{rank}dqkrpb", (query, key, None, k, d), {}),
            ]
            self.check(function(rank, "_qk")(query, key, k, d), calls, (query, key))

    def test_av(self):
        for rank, k, d in self.windows():
            value, *_, attn = inputs(rank, k)
            calls = [
                (f"natten{rank}dav", (attn, value, k, d), {}),
                (f"natten{rank}dav", (attn, value, k), {"dilation": d}),
                (f"natten{rank}dav", (), {"attn": attn, "value": value, "kernel_size": k, "dilation": d}),
                (f"natten{rank}dav", (attn, value, d), {}),
                (f"natten{rank}dav", (attn, value), {"dilation": d}),
            ]
            self.check(function(rank, "_av")(attn, value, k, d), calls, (attn, value))

    def test_3d_with_the_first_axis_apart(self):
        window = (3, 5, 5), (2, 1, 1)
        query, key, rpb, attn = inputs(3, window[0])
        named = {"kernel_size_d": 3, "kernel_size": 5, "dilation_d": 2, "dilation": 1}
        for name, tensors, expected in (
            ("natten3dqk", (query, key), natten.na3d_qk(query, key, *window)),
            ("natten3dqkrpb", (query, key, rpb), natten.na3d_qk(query, key, *window, rpb=rpb)),
            ("na3d_qk_with_bias", (query, key, rpb), natten.na3d_qk(query, key, *window, rpb=rpb)),
            ("natten3dav", (attn, key), natten.na3d_av(attn, key, *window)),
        ):
            some = {"dilation_d": 2, "dilation": 1}
            calls = [(name, (*tensors, 3, 5, 2, 1), {}), (name, (*tensors, 3, 5), some), (name, tensors, named)]
            self.check(expected, calls, tensors)

    def test_kernel_that_is_not_square_follows_from_the_bias_table(self):
        query, key, rpb, _ = inputs(2, (3, 5))
        expected = natten.na2d_qk(query, key, (3, 5), 1, rpb=rpb)
        self.assertTrue(torch.equal(functional.natten2dqkrpb(query, key, rpb, 1), expected))

    def test_calls_of_no_release(self):
        query, key, rpb, attn = inputs(2, 3)
        orders = "(query, key, rpb, kernel_size, dilation) or natten2dqkrpb(query, key, rpb, dilation)"
        for call in (
            lambda: functional.natten2dqkrpb(query, key, rpb),
            lambda: functional.natten2dqkrpb(query, key, rpb, kernel_size=3),
            lambda: functional.natten2dqkrpb(query, key, rpb, 3, 1, 1),
            lambda: functional.natten2dqkrpb(query, key, rpb, 3, 1, dilation=1),
            lambda: functional.natten2dqkrpb(query, key, rpb, 3, stride=1),
        ):
            self.refuses(("natten2dqkrpb", orders), call, error=TypeError)
        self.refuses("natten2dav(attn, value, kernel_size, dilation)", functional.natten2dav, attn, error=TypeError)
        self.refuses(
            "natten2dqk(query, key, kernel_size, dilation)", functional.natten2dqk, query, key, 1, error=TypeError
        )

    def test_kernel_size_that_does_not_follow(self):
        query, key, rpb, attn = inputs(2, 3)
        qkrpb = functional.natten2dqkrpb
        words = ("natten2dqkrpb", "without kernel_size", "[heads, 2K-1, 2K-1]", "before dilation")
        self.refuses((*words, "is None"), qkrpb, query, key, None, 1)
        self.refuses((*words, "is 3"), qkrpb, query, key, 3, 1)
        self.refuses((*words, "has shape (3, 5)"), qkrpb, query, key, rpb[..., 0], 1)
        words = ("natten2dav", "without kernel_size", "8 weights", "2 equal sides")
        self.refuses(words, functional.natten2dav, attn[..., :8], key, 1)

    def test_the_operators_own_checks(self):
        query, key, rpb, attn = inputs(2, 3)
        self.refuses(("3 * 3 = 9", "axis 0"), functional.natten2dqkrpb, query, key, rpb, 3)
        self.refuses(("kernel_size", "3.0"), functional.natten2dav, attn, key, 3.0, 1)


class NumbersTest(unittest.TestCase):
    """As older code put the pieces together, against the original kernels."""

    def attend(self, case: dict, qkv: list[Tensor], rpb: Tensor | None) -> Tensor:
        """Heads-first output."""
        rank, (q, k, v) = len(case["shape"]), qkv
        window = case["kernel"][0], case["dilation"][0]
        scaled = q * case["d"] ** -0.5
        kind, tensors = ("qk", (scaled, k)) if rpb is None else ("qkrpb", (scaled, k, rpb))
        logits = old(rank, kind)(*tensors, *window)
        return old(rank, "av")(logits.softmax(-1), v, *window)

    def test_output_and_gradients(self):
        ranks = set()
        for case in CASES:
            is_square = len(set(case["kernel"])) == len(set(case["dilation"])) == 1
            if not is_square or any(case["causal"]):
                continue
            ranks.add(len(case["shape"]))
            with self.subTest(case["tag"]):
                qkv, rpb, dout = make_inputs(case)
                leaves = dict(zip(("dq", "dk", "dv", "drpb"), (*qkv, rpb), strict=True))
                leaves = {name: x for name, x in leaves.items() if x is not None}
                out = self.attend(case, qkv, rpb)
                grads = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))
                golden = load(case["tag"])
                for name, x in {"out": out.detach(), **grads}.items():
                    torch.testing.assert_close(x, golden[name], atol=TOLERANCE, rtol=0)
        self.assertEqual(ranks, set(RANKS))

    def test_autocast(self):
        query, key, rpb, _ = (x.detach().float() for x in inputs(2, 3))
        with torch.autocast("cpu", torch.bfloat16):
            logits = functional.natten2dqkrpb(query, key, rpb, 3, 1)
            out = functional.natten2dav(logits.softmax(-1), key, 3, 1)
        self.assertEqual((logits.dtype, out.dtype), (torch.bfloat16, torch.bfloat16))

    def test_torch_compile_without_a_graph_break(self):
        query, key, rpb, _ = (x.detach() for x in inputs(2, 3))

        def attend(query: Tensor, key: Tensor, rpb: Tensor) -> Tensor:
            logits = functional.natten2dqkrpb(query, key, rpb, 2)
            return functional.natten2dav(logits.softmax(-1), key, 3, dilation=2)

        compiled = torch.compile(attend, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(query, key, rpb), attend(query, key, rpb))


class LayersTest(RefusalTestCase):
    """The layers of older releases."""

    def filled(self, module: nn.Module) -> nn.Module:
        fill(module)
        return module

    def test_neighborhood_attention_is_the_one_of_two_dimensions(self):
        self.assertIs(natten.NeighborhoodAttention, natten.NeighborhoodAttention2D)

    def test_legacy_computes_what_the_layer_does(self):
        for rank, make in LEGACY.items():
            for space in (MAPS[rank], (3,) * rank):  # the second is padded
                for options in ({}, {"dilation": 1, "qkv_bias": False, "qk_scale": 0.3}):
                    with self.subTest(rank=rank, space=space, **options):
                        layer = self.filled(LAYERS[rank](8, 2, 5, **options))
                        legacy = make(8, 5, 2, **options)
                        legacy.load_state_dict(layer.state_dict())
                        x = torch.randn(2, *space, 8, generator=torch.Generator().manual_seed(0))
                        torch.testing.assert_close(legacy(x), layer(x))

    def test_legacy_is_plain_pytorch_whatever_is_asked_for(self):
        for rank, make in LEGACY.items():
            legacy, x = make(8, 3, 2), torch.zeros(1, *MAPS[rank], 8)
            self.assertFalse(runs_fused_operator(lambda legacy=legacy, x=x: legacy(x)))
            self.assertTrue(runs_fused_operator(lambda x=x, rank=rank: LAYERS[rank](8, 2, 3)(x)))

    def test_legacy_order_of_arguments(self):
        layer = natten.LegacyNeighborhoodAttention2D(12, 5, 3, False, 0.5, 0.1, 0.2, 0)
        self.assertEqual((layer.num_heads, layer.kernel_size, layer.scale), (3, (5, 5), 0.5))
        self.assertEqual((layer.qkv.bias, layer.attn_drop.p, layer.proj_drop.p), (None, 0.1, 0.2))
        named = natten.LegacyNeighborhoodAttention1D(dim=12, kernel_size=5, num_heads=3, mode=1, dilation=2)
        self.assertEqual((named.num_heads, named.kernel_size, named.dilation), (3, (5,), (2,)))
        self.assertEqual(tuple(named.rpb.shape), (3, 9))

    def test_legacy_trains_with_dropout(self):
        for rank, make in LEGACY.items():
            layer = make(8, 3, 2, attn_drop=0.5).train()
            layer(torch.ones(2, *MAPS[rank], 8)).square().sum().backward()
            self.assertTrue(all(x.grad is not None and x.grad.isfinite().all() for x in layer.parameters()))

    def test_legacy_can_be_copied_and_pickled(self):
        for make in LEGACY.values():
            layer = make(8, 3, 2)
            for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                self.assertIs(type(other), make)
                self.assertEqual(str(other), str(layer))

    def test_legacy_refuses(self):
        for make in LEGACY.values():
            self.refuses(("num_heads is 7", "dim 64", make.__name__, "(dim, kernel_size, num_heads)"), make, 64, 2, 7)
            self.refuses(("mode is 2", "0 or 1"), make, 8, 3, 2, mode=2)
            self.refuses(("kernel_size is 1", "at least 2"), make, 8, 1, 2)
