"""Counts of MACs and FLOPs, against brute-force counts of query-key pairs and against torch's own counts."""

from __future__ import annotations

import subprocess
import sys
import unittest
from collections.abc import Callable
from math import prod
from typing import ClassVar
from unittest import mock

import torch
from brute_force import axis_window
from fvcore.nn import FlopCountAnalysis, flop_count
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten.flops import add_natten_handle, get_flops
from test_natten.problems import RANKS, Problem, function, make_qkv, make_rpb, random_problem

FVCORE_LOG = "fvcore.nn.jit_analysis"


def flops(call: Callable) -> int:
    """Return the count of FlopCounterMode."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def pairs(problem: Problem) -> int:
    """Count the pairs of a query and a key of its window, over batch and heads, by brute force along each axis."""
    along_axes = [
        sum(slot is not None for i in range(length) for slot in axis_window(i, length, *window))
        for length, *window in zip(problem.space, *problem.window, strict=True)
    ]
    return problem.batch * problem.heads * prod(along_axes)


def attend(problem: Problem, qkv: list[Tensor], rpb: Tensor | None) -> Tensor:
    """Call the fused function on a problem."""
    return function(problem.rank)(*qkv, *problem.window, rpb=rpb)


class Attention(nn.Module):
    """The fused function as a module, for fvcore."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.problem = problem
        rpb = make_rpb(problem, torch.float32)
        self.rpb = None if rpb is None else nn.Parameter(rpb.detach())

    def forward(self, *qkv: Tensor) -> Tensor:
        return attend(self.problem, qkv, self.rpb)


def macs(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """Return the count of fvcore with the natten handles, by operator."""
    counter = add_natten_handle(FlopCountAnalysis(model, inputs))
    return dict(counter.unsupported_ops_warnings(False).by_operator())


class FlopCounterModeTest(unittest.TestCase):
    """torch.utils.flop_counter, which counts FLOPs."""

    def test_forward_and_backward_of_random_problems(self):
        for rank in RANKS:
            for seed in range(20):
                problem = random_problem(rank, seed)
                qkv, rpb = make_qkv(problem, torch.float32), make_rpb(problem, torch.float32)
                with self.subTest(problem=problem):
                    unit = 2 * pairs(problem) * problem.head_dim
                    self.assertEqual(flops(lambda p=problem, x=qkv, b=rpb: attend(p, x, b)), 2 * unit)
                    out = attend(problem, qkv, rpb)
                    self.assertEqual(flops(lambda out=out: out.sum().backward()), 5 * unit)

    def test_causal_windows_have_fewer_keys(self):
        q = torch.zeros(1, 5, 1, 1)
        self.assertEqual(flops(lambda: natten.na1d(q, q, q, 3)), 4 * 15)
        self.assertEqual(flops(lambda: natten.na1d(q, q, q, 3, is_causal=True)), 4 * (1 + 2 + 3 + 3 + 3))

    def test_window_of_the_whole_map_counts_like_scaled_dot_product_attention(self):
        shape = 2, 3, 10, 8  # [B, heads, L, head_dim], the layout of torch
        q, k, v = (torch.randn(2, 10, 3, 8, requires_grad=True) for _ in range(3))
        out = natten.na1d(q, k, v, kernel_size=10)
        forward, backward = flops(lambda: natten.na1d(q, k, v, kernel_size=10)), flops(lambda: out.sum().backward())
        self.assertEqual(forward, flop_counter.sdpa_flop_count(shape, shape, shape))
        self.assertEqual(backward, flop_counter.sdpa_backward_flop_count(shape, shape, shape, shape))

    def test_packed(self):
        qkv = torch.zeros(1, 6, 7, 3, 2, 4)
        self.assertEqual(flops(lambda: natten.na2d_qkvpacked(qkv, 3)), 4 * 6 * 7 * 2 * 9 * 4)

    def test_unfused(self):
        q = torch.zeros(1, 2, 6, 7, 4, requires_grad=True)
        unit = 2 * 6 * 7 * 2 * 9 * 4
        logits = natten.na2d_qk(q, q, 3)
        self.assertEqual(flops(lambda: natten.na2d_qk(q, q, 3)), unit)
        self.assertEqual(flops(lambda: logits.sum().backward()), 2 * unit)
        attn = logits.detach().requires_grad_()
        out = natten.na2d_av(attn, q, 3)
        self.assertEqual(flops(lambda: natten.na2d_av(attn, q, 3)), unit)
        self.assertEqual(flops(lambda: out.sum().backward()), 2 * unit)

    def test_fake_and_meta_tensors_count_like_real_ones(self):

        def count() -> int:
            q = torch.zeros(1, 9, 8, 2, 4)
            return flops(lambda: natten.na2d(q, q, q, 3, dilation=2, is_causal=(True, False)))

        real = count()
        self.assertEqual(real, 4 * 2 * 4 * (1 + 1 + 2 + 2 + 3 * 5) * 8 * 3)
        with FakeTensorMode():
            self.assertEqual(count(), real)
        with torch.device("meta"):
            self.assertEqual(count(), real)

    def test_operator_called_with_keyword_arguments(self):
        q = torch.zeros(1, 5, 1, 2)
        window = {"kernel_size": [3], "stride": [1], "dilation": [1], "is_causal": [True], "scale": 1.0}
        call = torch.ops.natten.attention_forward
        count = flops(lambda: call(query=q, key=q, value=q, rpb=None, **window, backend=None))
        self.assertEqual(count, 4 * 12 * 2)


class FvcoreTest(unittest.TestCase):
    """fvcore, which counts MACs."""

    def test_random_problems(self):
        for rank in RANKS:
            for seed in range(5):
                problem = random_problem(rank, seed)
                with self.subTest(problem=problem):
                    expected = {"attention_forward": 2 * pairs(problem) * problem.head_dim}
                    if problem.has_rpb:
                        expected["rpb"] = pairs(problem)
                    self.assertEqual(macs(Attention(problem), *make_qkv(problem, torch.float32)), expected)

    def test_layer_in_every_gradient_mode(self):
        layer = natten.NeighborhoodAttention2D(8, 2, 3)
        tokens, x = 6 * 7, torch.randn(1, 6, 7, 8)
        expected = {
            "linear": tokens * (8 * 24 + 8 * 8),
            "attention_forward": 2 * tokens * 2 * 9 * 4,
            "rpb": tokens * 2 * 9,
        }
        self.assertEqual(macs(layer, x), expected)
        self.assertEqual(macs(layer, x.clone().requires_grad_()), expected)
        for without_gradients in (torch.no_grad, torch.inference_mode):
            with without_gradients():
                self.assertEqual(macs(layer, x.clone()), expected)
        self.assertEqual(get_flops(layer, x, disable_warnings=True), sum(expected.values()))
        self.assertEqual(
            get_flops(layer, (x.expand(3, -1, -1, -1),), disable_warnings=True), 3 * sum(expected.values())
        )

    def test_layer_without_bias(self):
        layer = natten.NeighborhoodAttention1D(8, 2, 3, rel_pos_bias=False)
        self.assertEqual(macs(layer, torch.zeros(1, 9, 8)), {"linear": 9 * 256, "attention_forward": 2 * 9 * 2 * 3 * 4})

    def test_operator_called_directly(self):
        class Operator(nn.Module):
            def forward(self, q: Tensor) -> Tensor:
                return torch.ops.natten.attention_forward(q, q, q, None, [3], [1], [1], [True], 1.0, None)[0]

        self.assertEqual(macs(Operator(), torch.zeros(1, 5, 1, 2)), {"attention_forward": 2 * 12 * 2})

    def test_flop_counter_mode_counts_twice_the_macs_without_the_bias(self):
        layer, x = natten.NeighborhoodAttention2D(8, 2, 3, dilation=2, is_causal=(True, False)), torch.zeros(1, 7, 8, 8)
        counted = macs(layer, x)
        self.assertEqual(flops(lambda: layer(x)), 2 * (counted["linear"] + counted["attention_forward"]))


class Halves(nn.Module):
    """Unfused attention as a module, with a bias or additional weights for the window."""

    def __init__(self, rank: int, has_rpb: bool):
        super().__init__()
        self.rank = rank
        self.rpb = nn.Parameter(torch.zeros(2, *(5,) * rank)) if has_rpb else None

    def forward(self, q: Tensor) -> Tensor:
        attn = function(self.rank, "_qk")(q, q, 3, rpb=self.rpb)
        return function(self.rank, "_av")(attn.softmax(-1), q, 3)


class OldHandlesTest(unittest.TestCase):
    """Counters that find unfused attention by the class names of autograd functions, as SegMAN and A2Mamba do."""

    SIZES: ClassVar = {1: (9,), 2: (6, 7), 3: (4, 5, 6)}

    def handles(self, rank: int) -> dict[str, Callable]:
        name = f"prim::PythonOp.NeighborhoodAttention{rank}D{{}}AutogradFunction"
        return {
            name.format("QK"): getattr(natten.flops, f"qk_{rank}d_rpb_flop"),
            name.format("AV"): getattr(natten.flops, f"av_{rank}d_flop"),
        }

    def test_counts_are_exact_with_and_without_gradients(self):
        for rank, space in self.SIZES.items():
            pairs = 2 * prod(space) * 3**rank
            for has_rpb in (False, True):
                for requires_grad in (False, True):
                    for grad_mode in (torch.enable_grad, torch.no_grad):
                        q = torch.zeros(1, 2, *space, 4, requires_grad=requires_grad)
                        with self.subTest(rank=rank, rpb=has_rpb, grad=requires_grad), grad_mode():
                            counts, _ = flop_count(Halves(rank, has_rpb), (q,), self.handles(rank))
                            gigas = (2 * pairs * 4 + has_rpb * pairs) / 1e9
                            self.assertAlmostEqual(sum(counts.values()), gigas, places=12)

    def test_tensors_come_first_for_handles_that_read_shapes(self):
        seen = {}

        def handle(inputs: list, outputs: list) -> int:
            seen[outputs[0].node().pyname()] = [x.type().sizes() for x in (*inputs, *outputs)]
            return 1

        names = dict.fromkeys(self.handles(2), handle)
        FlopCountAnalysis(Halves(2, True), torch.zeros(1, 2, 6, 7, 4)).set_op_handle(**names).total()
        q, attn, rpb = [1, 2, 6, 7, 4], [1, 2, 6, 7, 9], [2, 5, 5]
        self.assertEqual(seen["NeighborhoodAttention2DQKAutogradFunction"], [q, q, rpb, attn])
        self.assertEqual(seen["NeighborhoodAttention2DAVAutogradFunction"], [attn, q, q])

    def test_counts_of_shapes(self):
        window, pairs = {"kernel_size": 3, "dilation": 1, "is_causal": False}, 2 * 42 * 9
        first, last = (1, 2, 6, 7, 4), (1, 6, 7, 2, 4)
        for shape, is_heads_last in ((first, False), (last, True)):
            options = {**window, "is_heads_last": is_heads_last}
            self.assertEqual(natten.flops.fna_flop_count(shape, shape, shape, **options), 4 * pairs * 4)
            self.assertEqual(natten.flops.na_qk_flop_count(shape, shape, **options), 2 * pairs * 4)
            self.assertEqual(natten.flops.na_av_flop_count((), shape, **options, return_macs=True), pairs * 4)


class GetFlopsTest(unittest.TestCase):
    """get_flops."""

    def test_reference_backend_counts_like_the_others(self):
        x = torch.zeros(1, 20, 8)
        layer = natten.NeighborhoodAttention1D(8, 2, 3)
        plain = natten.NeighborhoodAttention1D(8, 2, 3, backend="reference")
        expected = get_flops(layer, x, disable_warnings=True)
        with natten.use_backend("reference"):
            self.assertEqual(get_flops(layer, x, disable_warnings=True), expected)
        self.assertEqual(get_flops(plain, x, disable_warnings=True), expected)
        self.assertEqual((layer.backend, plain.backend), (None, "reference"))

    def test_layers_are_restored_after_an_error(self):
        plain = natten.NeighborhoodAttention1D(8, 2, 3, backend="reference")
        with self.assertRaisesRegex(ValueError, "input"):
            get_flops(plain, torch.zeros(1, 20, 7))
        self.assertEqual(plain.backend, "reference")

    def test_warnings(self):
        model = nn.Sequential(natten.NeighborhoodAttention1D(8, 2, 3), nn.GELU())
        with self.assertLogs(FVCORE_LOG, "WARNING") as logged:
            get_flops(model, torch.zeros(1, 9, 8))
        self.assertIn("aten::gelu", "".join(logged.output))
        self.assertNotIn("natten", "".join(logged.output))
        self.assertNotIn("Attention", "".join(line for line in logged.output if "Unsupported" in line))
        with self.assertNoLogs(FVCORE_LOG, "WARNING"):
            get_flops(model, torch.zeros(1, 9, 8), disable_warnings=True)

    def test_without_fvcore(self):
        layer = natten.NeighborhoodAttention1D(8, 2, 3)
        missing = mock.patch.dict(sys.modules, {"fvcore": None, "fvcore.nn": None})
        with missing, self.assertRaisesRegex(ImportError, "fvcore"):
            get_flops(layer, torch.zeros(1, 9, 8))


class ImportTest(unittest.TestCase):
    """Imported modules, each statement in its own process."""

    def modules_after(self, statement: str) -> set[str]:
        code = f"import sys; {statement}; print(*sys.modules)"
        return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())

    def test_natten_imports_no_counter(self):
        modules = self.modules_after("import natten")
        self.assertIn("natten.functional", modules)
        self.assertFalse(modules & {"fvcore", "natten.flops", "torch.utils.flop_counter"})

    def test_flops_imports_no_fvcore(self):
        modules = self.modules_after("import natten.flops")
        self.assertIn("torch.utils.flop_counter", modules)
        self.assertNotIn("fvcore", modules)
