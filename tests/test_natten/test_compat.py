"""Functions and layers of older NATTEN releases: import locations, argument orders and results."""

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
from test_natten.test_errors import ErrorTestCase
from test_natten.test_goldens import CASES, TOLERANCE, load, make_inputs

FUNCTIONS = [f"natten{rank}d{suffix}" for rank in RANKS for suffix in ("qk", "qkrpb", "av")]
LEGACY = {1: natten.LegacyNeighborhoodAttention1D, 2: natten.LegacyNeighborhoodAttention2D}
LAYERS = {1: natten.NeighborhoodAttention1D, 2: natten.NeighborhoodAttention2D}
MAPS = {1: (11,), 2: (7, 9), 3: (7, 8, 9)}


def old(rank: int, suffix: str) -> Callable:
    """Return the older function natten{rank}d{suffix}."""
    return getattr(functional, f"natten{rank}d{suffix}")


def inputs(rank: int, kernel_size: int | tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return heads-first query and key, a bias table and attention weights, in float64 and requiring gradients."""
    sizes = (kernel_size,) * rank if isinstance(kernel_size, int) else kernel_size
    generator = torch.Generator().manual_seed(rank)
    shapes = (
        (2, 3, *MAPS[rank], 4),
        (2, 3, *MAPS[rank], 4),
        (3, *(2 * k - 1 for k in sizes)),
        (2, 3, *MAPS[rank], torch.tensor(sizes).prod().item()),
    )
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)


# Public names by module, which must stay importable from there.
PUBLIC_NAMES = {
    "natten": """
        NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D __version__ compat context functional
        merge_attentions modules na1d na1d_av na1d_qk na1d_qkvpacked na2d na2d_av na2d_qk na2d_qkvpacked na3d na3d_av
        na3d_qk na3d_qkvpacked use_backend version
    """,
    "natten.functional": """
        merge_attentions na1d na1d_av na1d_qk na1d_qkvpacked na2d na2d_av na2d_qk na2d_qkvpacked na3d na3d_av na3d_qk
        na3d_qkvpacked
    """,
    "natten.modules": "NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D",
    "natten.flops": "add_natten_handle get_flops",
    "natten.version": "__version__",
}
_OLD_FUNCTIONS = """
    HAS_LIBNATTEN LegacyNeighborhoodAttention1D LegacyNeighborhoodAttention2D NeighborhoodAttention na1d_qk_with_bias
    na2d_qk_with_bias na3d_qk_with_bias natten1dav natten1dqk natten1dqkrpb natten2dav natten2dqk natten2dqkrpb
    natten3dav natten3dqk natten3dqkrpb
"""
_OLD_SWITCHES = """
    AutotunerContext MemoryUsagePreference NattenContext allow_flex_compile allow_flex_compile_backprop
    are_deterministic_algorithms_enabled disable_autotuner disable_flex_compile disable_flex_compile_backprop
    disable_gemm_na disable_tf32 disable_tiled_na enable_gemm_na enable_tf32 enable_tiled_na force_flex_attention
    get_memory_usage_preference has_bfloat has_cuda has_fna has_fp32_gemm has_fp64_gemm has_fused_na has_gemm has_half
    has_tf32_gemm is_autotuner_enabled is_autotuner_enabled_for_backward is_autotuner_enabled_for_forward
    is_autotuner_thorough_for_backward is_autotuner_thorough_for_forward is_flex_compile_allowed
    is_flex_compile_backprop_allowed is_fna_enabled is_fused_na_enabled is_gemm_na_enabled
    is_kv_parallelism_in_fused_na_enabled is_memory_usage_default is_memory_usage_strict is_memory_usage_unrestricted
    is_tf32_in_gemm_na_enabled is_tiled_na_enabled set_memory_usage_preference should_force_flex_attention
    should_use_flex_attention use_autotuner use_deterministic_algorithms use_flex_attention use_fna use_fused_na
    use_gemm_na use_kv_parallelism_in_fused_na use_tf32_in_gemm_na use_tiled_na
"""
for module in ("natten", "natten.functional", "natten.compat"):
    PUBLIC_NAMES[module] = PUBLIC_NAMES.get(module, "") + _OLD_FUNCTIONS + _OLD_SWITCHES
PUBLIC_NAMES["natten.context"] = _OLD_SWITCHES


class ImportTest(unittest.TestCase):
    """Names can be imported from where they were."""

    def test_every_public_name(self):
        for module, names in PUBLIC_NAMES.items():
            for name in names.split():
                with self.subTest(f"from {module} import {name}"):
                    exec(f"from {module} import {name}", {})

    def test_every_public_name_in_a_new_process(self):
        """Each module is imported first, without a prior `import natten`."""
        for module, names in PUBLIC_NAMES.items():
            with self.subTest(module):
                code = f"from {module} import {', '.join(names.split())}"
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
                self.assertEqual(done.returncode, 0, done.stderr)

    def test_functions_have_their_names_and_documentation(self):
        for name in FUNCTIONS:
            with self.subTest(name):
                self.assertEqual(getattr(functional, name).__name__, name)
                self.assertTrue(getattr(functional, name).__doc__)

    def test_import_from_functional_in_a_new_process(self):
        code = "from natten.functional import natten2dav, natten2dqkrpb; print(natten2dav.__name__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout.strip()), (0, "natten2dav"), done.stderr)

    def test_old_names_are_hidden_in_natten(self):
        for name in (*FUNCTIONS, "LegacyNeighborhoodAttention2D", "has_cuda"):
            self.assertNotIn(name, natten.__all__)
            self.assertNotIn(name, functional.__all__)
            self.assertNotIn(name, dir(natten))

    def test_unknown_names(self):
        for module in (natten, functional):
            with self.assertRaisesRegex(AttributeError, "natten4dqk"):
                module.natten4dqk  # noqa: B018
        with self.assertRaises(ImportError):
            from natten import natten4dqk  # noqa: F401

    def test_distribution_is_named_natten_for_transformers(self):
        self.assertEqual(importlib.metadata.version("natten"), natten.__version__)


class OrdersTest(ErrorTestCase):
    """All argument orders are the same call."""

    def windows(self) -> Iterator[tuple[int, int, int]]:
        """Yield rank, kernel size and dilation."""
        for rank in RANKS:
            yield from ((rank, 3, 2), (rank, 5, 1), (rank, 2, 3))
        yield from ((1, 9, 1), (2, 7, 1))

    def check(self, expected: Tensor, calls: list[tuple[str, tuple, dict]], leaves: tuple[Tensor, ...]) -> None:
        """Assert that calls of functions in natten.functional return `expected`, with the same gradients."""
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

    def test_3d_with_a_separate_first_axis(self):
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

    def test_non_square_kernel_size_is_inferred_from_the_bias_table(self):
        query, key, rpb, _ = inputs(2, (3, 5))
        expected = natten.na2d_qk(query, key, (3, 5), 1, rpb=rpb)
        self.assertTrue(torch.equal(functional.natten2dqkrpb(query, key, rpb, 1), expected))

    def test_unknown_argument_order(self):
        query, key, rpb, attn = inputs(2, 3)
        for call in (
            lambda: functional.natten2dqkrpb(query, key, rpb),
            lambda: functional.natten2dqkrpb(query, key, rpb, kernel_size=3),
            lambda: functional.natten2dqkrpb(query, key, rpb, 3, 1, 1),
            lambda: functional.natten2dqkrpb(query, key, rpb, 3, 1, dilation=1),
            lambda: functional.natten2dqkrpb(query, key, rpb, 3, stride=1),
        ):
            self.assert_error(("natten2dqkrpb", "query, key, rpb, kernel_size, dilation"), call, error=TypeError)
        self.assert_error("natten2dav", functional.natten2dav, attn, error=TypeError)
        self.assert_error("natten2dqk", functional.natten2dqk, query, key, 1, error=TypeError)

    def test_kernel_size_cannot_be_inferred(self):
        query, key, rpb, attn = inputs(2, 3)
        qkrpb = functional.natten2dqkrpb
        self.assert_error(("kernel_size", "None"), qkrpb, query, key, None, 1)
        self.assert_error(("kernel_size", "3"), qkrpb, query, key, 3, 1)
        self.assert_error(("kernel_size", "(3, 5)"), qkrpb, query, key, rpb[..., 0], 1)
        self.assert_error(("(3, 5, 4)", "odd"), qkrpb, query, key, rpb[..., :-1], 1)
        self.assert_error(("kernel_size", "attn", "8"), functional.natten2dav, attn[..., :8], key, 1)

    def test_checks_of_the_new_functions_apply(self):
        query, key, rpb, attn = inputs(2, 3)
        self.assert_error(("kernel_size", "9", "axis 0"), functional.natten2dqkrpb, query, key, rpb, 3)
        self.assert_error(("kernel_size", "3.0"), functional.natten2dav, attn, key, 3.0, 1)


class ResultsTest(unittest.TestCase):
    """Attention as older code computes it, against goldens of the original kernels."""

    def attend(self, case: dict, qkv: list[Tensor], rpb: Tensor | None) -> Tensor:
        """Return the heads-first output."""
        rank, (q, k, v) = len(case["shape"]), qkv
        window = case["kernel"][0], case["dilation"][0]
        scaled = q * case["d"] ** -0.5
        suffix, tensors = ("qk", (scaled, k)) if rpb is None else ("qkrpb", (scaled, k, rpb))
        logits = old(rank, suffix)(*tensors, *window)
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

    def test_torch_compile_without_graph_breaks(self):
        query, key, rpb, _ = (x.detach() for x in inputs(2, 3))

        def attend(query: Tensor, key: Tensor, rpb: Tensor) -> Tensor:
            logits = functional.natten2dqkrpb(query, key, rpb, 2)
            return functional.natten2dav(logits.softmax(-1), key, 3, dilation=2)

        compiled = torch.compile(attend, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(query, key, rpb), attend(query, key, rpb))


class LayersTest(ErrorTestCase):
    """Layers of older releases."""

    def filled(self, module: nn.Module) -> nn.Module:
        fill(module)
        return module

    def test_neighborhood_attention_is_two_dimensional(self):
        self.assertIs(natten.NeighborhoodAttention, natten.NeighborhoodAttention2D)

    def test_legacy_layer_equals_the_layer(self):
        for rank, make in LEGACY.items():
            for space in (MAPS[rank], (3,) * rank):  # the second is padded
                for options in ({}, {"dilation": 1, "qkv_bias": False, "qk_scale": 0.3}):
                    with self.subTest(rank=rank, space=space, **options):
                        layer = self.filled(LAYERS[rank](8, 2, 5, **options))
                        legacy = make(8, 5, 2, **options)
                        legacy.load_state_dict(layer.state_dict())
                        x = torch.randn(2, *space, 8, generator=torch.Generator().manual_seed(0))
                        torch.testing.assert_close(legacy(x), layer(x))

    def test_legacy_layer_uses_the_reference_backend(self):
        for rank, make in LEGACY.items():
            legacy, x = make(8, 3, 2), torch.zeros(1, *MAPS[rank], 8)
            self.assertFalse(runs_fused_operator(lambda legacy=legacy, x=x: legacy(x)))
            self.assertTrue(runs_fused_operator(lambda x=x, rank=rank: LAYERS[rank](8, 2, 3)(x)))

    def test_legacy_argument_order(self):
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

    def test_legacy_layer_can_be_copied_and_pickled(self):
        for make in LEGACY.values():
            layer = make(8, 3, 2)
            for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                self.assertIs(type(other), make)
                self.assertEqual(str(other), str(layer))

    def test_legacy_errors(self):
        for make in LEGACY.values():
            self.assert_error(("num_heads", "7", "64", "(dim, kernel_size, num_heads)"), make, 64, 2, 7)
            self.assert_error(("mode", "2"), make, 8, 3, 2, mode=2)
            self.assert_error(("kernel_size", "1"), make, 8, 1, 2)
