"""The cuda backend against the reference in float64, with kernels run by tests/emulation; and unsupported calls.

Error limits are those of test_cpu.py: twice the error of the reference in the same dtype over a sweep, and eight
times for a single problem. The reference has no TF32 on a CPU; there the limit is the rounding of TF32.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import unittest
import warnings
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from brute_force import Window
from emulation.launcher import emulated_gpu, gpu_properties

import natten
from natten import backends
from natten.backends import cuda
from natten.backends.cuda import driver, nvrtc, tiles
from natten.backends.kernels import Unsupported, warn_fallback
from natten.checks import make_axes
from natten.geometry import Axis
from test_natten import test_goldens
from test_natten.guarded import GuardedProblem, has_read_beyond_tensors
from test_natten.problems import RANKS, Problem, Recorder, make_qkv, make_rpb
from test_natten.test_cpu import fused, mixed_qkv, problem_of, to_double, unfused

TURING, HOPPER = (7, 5), (9, 0)
TF32_EPS = 2.0**-10


def window(rank: int, kernel_size, stride=1, dilation=1, is_causal=False) -> Window:
    return Window(
        *(
            tuple(getattr(axis, field) for axis in _axes(rank, kernel_size, stride, dilation, is_causal))
            for field in ("kernel_size", "stride", "dilation", "is_causal")
        )
    )


def _axes(rank: int, *arguments) -> tuple[Axis, ...]:
    return make_axes((1 << 20,) * rank, *arguments)


def problem(space, *window_arguments, dim=16, heads=2, batch=1, has_rpb=True, layout="packed", seed=0) -> Problem:
    return Problem(batch, space, heads, dim, window(len(space), *window_arguments), has_rpb, layout, seed)


@contextlib.contextmanager
def tile_limits(
    has_fragments: bool, table_bytes: int, has_gradient_fragments: bool, gradient_bytes: int
) -> Iterator[None]:
    """Change how tiles may store the bias and its gradient in shared memory."""
    with (
        mock.patch.object(tiles, "_MAY_HAVE_FRAGMENTS", has_fragments),
        mock.patch.object(tiles, "_MAX_TABLE_BYTES", table_bytes),
        mock.patch.object(tiles, "_MAY_HAVE_GRADIENT_FRAGMENTS", has_gradient_fragments),
        mock.patch.object(tiles, "_MAX_GRADIENT_BYTES", gradient_bytes),
    ):
        tiles._choose.cache_clear()
        try:
            yield
        finally:
            tiles._choose.cache_clear()


@contextlib.contextmanager
def few_warps(count: int) -> Iterator[None]:
    """Limit the warps of a block, so that a warp has several units."""
    with mock.patch.object(tiles, "_MAX_WARPS", count):
        tiles._choose.cache_clear()
        try:
            yield
        finally:
            tiles._choose.cache_clear()


class EmulatedTestCase(unittest.TestCase):
    def setUp(self):
        self.errors: list[tuple[float, float]] = []
        self.definitions: list[dict[str, str]] = []  # those of the kernels in the last check

    def check(
        self, given: Problem, dtype: torch.dtype, compute=fused, eps: float | None = None, qkv=None, rpb=None, **gpu
    ) -> list[str]:
        """Compare all results of a problem. Return the names of the kernels that ran.

        Args:
            eps: rounding of the kernels, if it is not that of the dtype.
            qkv, rpb: inputs, if they are not those of the problem.
        """
        if qkv is None:
            qkv, rpb = make_qkv(given, dtype), make_rpb(given, torch.float32)
        with emulated_gpu(seed=given.seed, **gpu) as emulator:
            found = compute(given, qkv, rpb, "cuda")
        peers = compute(given, qkv, rpb, "reference")
        exact = compute(given, [to_double(x) for x in qkv], to_double(rpb), "reference")
        for index, (x, peer, expected) in enumerate(zip(found, peers, exact, strict=True)):
            self.assertEqual((x.shape, x.dtype), (peer.shape, peer.dtype))
            is_finite = expected.isfinite()
            self.assertTrue(torch.equal(x.isfinite(), is_finite), f"result {index}")
            x, peer, expected = (y.detach().double()[is_finite] for y in (x, peer, expected))
            rounding = (eps or torch.finfo(dtype).eps) * max([1.0, *expected.abs().flatten().tolist()])
            error, peer_error = ((y - expected).square().mean().sqrt().item() / rounding for y in (x, peer))
            self.assertLessEqual(error, max(8 * peer_error, 1.0), f"result {index}")
            self.errors.append((error, peer_error))
        self.definitions = [dict(text.split("=") for text in kernel.definitions) for kernel in emulator.kernels]
        return emulator.launched

    def check_sweep(self) -> None:
        error, peer_error = torch.tensor(self.errors).square().mean(0).sqrt().tolist()
        self.assertLessEqual(error, 2 * peer_error)


class EmulatedKernelsTest(EmulatedTestCase):
    """Each kernel, with all features at once."""

    def test_matrix_kernels(self):
        given = problem((9, 20), (4, 5), (1, 2), (2, 1), (False, True))
        kernels = ["natten_attention_tiles", "natten_grad_query_tiles", "natten_grad_key_value_tiles"]
        self.assertEqual(self.check(given, torch.bfloat16), [*kernels, "natten_sum_parts"])

    def test_windows_of_the_whole_map(self):
        """The last row of columns contributes to the gradient of the bias for all lines of a unit."""
        self.check(problem((7, 7), 7), torch.bfloat16)

    def test_units_whose_windows_are_complete(self):
        """Matrix kernels process them in an unrolled loop."""
        for given in (
            problem((19, 11), 5, dim=32),
            problem((15, 9), (6, 3), 1, 1, (True, False), has_rpb=False),
            problem((3, 13, 9), (2, 3, 3), dim=8, heads=1),
        ):
            with self.subTest(given=given):
                self.check(given, torch.bfloat16)

    def test_logits_that_grow_from_row_to_row(self):
        q, k, v = make_qkv(problem((17, 9), 7), torch.bfloat16)
        with torch.no_grad():
            q.abs_(), k.copy_(torch.linspace(-20, 20, 17)[:, None, None, None].expand_as(k))
        results = []
        for backend in ("cuda", "reference"):
            with emulated_gpu():
                out = natten.na2d(q, k, v, 7, backend=backend)
                results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
        for x, expected in zip(*results, strict=True):
            torch.testing.assert_close(x, expected, atol=0.05, rtol=0.05)

    def test_matrix_kernels_in_tf32(self):
        given = problem((9, 20), (4, 5), (1, 2), (2, 1), (False, True), dim=24)
        with mock.patch.object(cuda, "allows_tf32", lambda: True):
            ran = self.check(given, torch.float32, eps=TF32_EPS)
            self.assertIn("natten_attention_tiles", ran)
            ran = self.check(given, torch.float32, capability=TURING)
            self.assertNotIn("natten_attention_tiles", ran)

    def test_group_kernels(self):
        given = problem((9, 20), (4, 5), (1, 2), (2, 1), (False, True), dim=24)
        kernels = ["natten_attention", "natten_grad_query", "natten_grad_key_value", "natten_sum_parts"]
        self.assertEqual(self.check(given, torch.float32), kernels)

    def test_unfused(self):
        self.check(problem((9, 11), (4, 5), 1, (2, 1), (False, True), dim=8), torch.float16, unfused)

    def test_head_dims_that_are_no_multiples_of_8(self):
        for dim, dtype, compute in (
            *((1, torch.float32, fused), (12, torch.float32, fused), (28, torch.bfloat16, fused)),
            *((10, torch.float16, fused), (13, torch.bfloat16, fused)),
            *((7, torch.float16, unfused), (12, torch.bfloat16, unfused)),
        ):
            with self.subTest(dim=dim, dtype=dtype):
                self.check(problem((9, 11), 3, 1, 1, dim=dim, layout="packed"), dtype, compute)
        with self.subTest("tf32"), mock.patch.object(cuda, "allows_tf32", lambda: True):
            self.check(problem((9, 11), 3, dim=7), torch.float32, eps=TF32_EPS)

    def test_fewer_key_heads_and_another_value_head_dim(self):
        """With and without matrix instructions."""
        generator = torch.Generator().manual_seed(0)
        for (heads, kv_heads, dim, value_dim), dtype in (
            ((4, 2, 12, 20), torch.float32),
            ((3, 1, 20, 5), torch.float32),
            ((1, 1, 5, 8), torch.float32),  # the gradients of values begin in the middle of 16 bytes
            ((4, 2, 16, 8), torch.bfloat16),
            ((1, 1, 5, 24), torch.bfloat16),
        ):
            shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
            qkv = [torch.randn(1, 9, 11, *shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
            rpb = torch.randn(heads, 5, 5, generator=generator, requires_grad=True)
            with self.subTest(shapes=shapes, dtype=dtype):
                self.check(problem((9, 11), 3, heads=heads), dtype, fused, qkv=qkv, rpb=rpb)

    def test_nothing_is_copied(self):
        axes = make_axes((9, 11), 3)
        for (heads, kv_heads, dim, value_dim), dtype in (
            ((4, 2, 12, 20), torch.float32),
            ((4, 2, 12, 20), torch.bfloat16),
        ):
            q, k, v = (
                torch.randn(1, 9, 11, *shape).to(dtype)
                for shape in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
            )
            with emulated_gpu(), Recorder() as recorder:
                cuda.attention(q, k, v, None, axes, 0.5)
            self.assertEqual({name for name in recorder.names if "empty" not in name}, set())

    def test_float16_on_turing_uses_no_matrix_instructions(self):
        given = problem((12,), 5, 1, 2, dim=8, has_rpb=False)
        self.assertNotIn("natten_attention_tiles", self.check(given, torch.float16, capability=TURING))

    def test_no_images_or_no_heads(self):
        for batch, heads in ((0, 2), (2, 0)):
            q = torch.zeros(batch, 9, heads, 8, requires_grad=True)
            rpb = torch.zeros(heads, 5, requires_grad=True)
            with emulated_gpu() as emulator:
                natten.na1d(q, q, q, 3, rpb=rpb, backend="cuda").sum().backward()
            self.assertEqual((q.grad.shape, rpb.grad.abs().sum().item(), emulator.launched), (q.shape, 0.0, []))


@pytest.mark.slow
class EmulatedSweepTest(EmulatedTestCase):
    """Random problems of all ranks, and the less common kinds of tiles."""

    def check_problems(self, count: int, dtype: torch.dtype, compute=fused, **gpu) -> None:
        for rank in RANKS:
            for seed in range(count):
                given = problem_of(rank, seed)
                if compute is unfused:  # larger ones are refused before they reach the kernels
                    given = given._replace(head_dim=min(given.head_dim, cuda.MAX_DIM))
                if given.head_dim > 64:
                    given = given._replace(heads=1, batch=1)
                with self.subTest(given=given):
                    self.check(given, dtype, compute, **gpu)
        self.check_sweep()

    def test_bfloat16(self):
        self.check_problems(12, torch.bfloat16)

    def test_float16(self):
        self.check_problems(4, torch.float16)

    def test_float32(self):
        self.check_problems(8, torch.float32)

    def test_tf32(self):
        with mock.patch.object(cuda, "allows_tf32", lambda: True):
            for rank in RANKS:
                for seed in range(8):
                    given = problem_of(rank, seed)
                    with self.subTest(given=given):
                        self.check(given._replace(heads=1, batch=1), torch.float32, eps=TF32_EPS)

    def test_float16_on_turing(self):
        self.check_problems(3, torch.float16, capability=TURING)

    def test_fewer_key_heads_and_other_value_head_dims(self):
        for rank, seed, dtype in itertools.product(RANKS, range(8), (torch.float32, torch.bfloat16)):
            given = problem_of(rank, seed)._replace(batch=1)
            if given.head_dim > 64:
                continue
            with self.subTest(given=given, dtype=dtype):
                self.check(given, dtype, fused, qkv=mixed_qkv(given, dtype), rpb=make_rpb(given, torch.float32))

    def test_unfused(self):
        self.check_problems(6, torch.float32, unfused)
        self.check_problems(2, torch.bfloat16, unfused)

    def test_staged_columns(self):
        for given, kib, processors in (
            (problem((18, 17), 7, dim=32), 20, 132),
            (problem((18, 17), 7, dim=31), 20, 132),  # copied without cp.async
            (problem((22, 35), 9, dim=64), 40, 1),  # several warps
            (problem((5, 20, 20), 5, dim=32), 40, 1),  # several warps, some of them without a unit
        ):
            with self.subTest(given=given):
                self.check(given, torch.bfloat16, shared_bytes=kib << 10, processors=processors)
                tiled = [definitions for definitions in self.definitions if "TILE_X" in definitions]
                self.assertEqual({definitions["IS_STAGED"] for definitions in tiled}, {"1"})
                if kib == 40:
                    self.assertTrue(any(int(definitions["WARPS"]) > 1 for definitions in tiled))

    def test_blocks_with_several_pieces(self):
        """Large batches have such blocks, for the gradients of queries and bias."""
        for given in (problem((20, 19), 5, 1, 2), problem((40,), 5, 1, 3), problem((5, 6, 20), 3, dim=8)):
            for has_fragments in (True, False):
                with (
                    self.subTest(given=given, has_fragments=has_fragments),
                    mock.patch.object(cuda._Planner, "_parts", lambda *arguments: 1),
                    tile_limits(has_fragments, 1 << 14, has_fragments, 1 << 14),
                ):
                    self.check(given, torch.bfloat16)

    def test_no_read_beyond_tensors(self):
        cases = (
            ((5, 20, 20), 5, 1, 32),
            ((11, 21), 5, 2, 32),
            ((37,), 7, 1, 32),
            ((11, 21), 5, 2, 13),
            ((37,), 7, 1, 20),
        )
        problems = [GuardedProblem(*case, is_fused=True, shared_kib=40) for case in cases]
        self.assertFalse(has_read_beyond_tensors(problems))

    def test_published_shapes(self):
        """One image of each stage of NAT and DiNAT, with the tiles that a large batch has on a large GPU."""
        stages = ((56, 2, 1), (56, 2, 8), (28, 4, 1), (28, 4, 4), (14, 8, 1), (14, 8, 2), (7, 16, 1))
        for side, heads, dilation in stages:
            with self.subTest(side=side, dilation=dilation):
                given = problem((side, side), 7, 1, dilation, dim=32, heads=heads)
                self.check(given, torch.bfloat16, processors=1)

    def test_long_windows(self):
        for given in (problem((300,), 151, dim=32), problem((300,), 100, 3, 2, True), problem((7, 150), (3, 141))):
            with self.subTest(given=given):
                self.check(given, torch.bfloat16)

    def test_tables_too_large_for_shared_memory(self):
        for given in (problem((12, 13), (5, 4), 2, dim=24), problem((5, 6, 9), 3, dim=8), problem((40,), 9, dim=16)):
            for table_bytes, gradient_bytes in ((0, 0), (0, 700), (1 << 16, 0), (1 << 16, 1 << 15)):
                with (
                    self.subTest(given=given, table_bytes=table_bytes, gradient_bytes=gradient_bytes),
                    tile_limits(False, table_bytes, False, gradient_bytes),
                ):
                    self.check(given, torch.bfloat16)

    def test_windows_wider_than_a_unit(self):
        for given in (
            problem((27, 40), (5, 21), dim=16),
            problem((3, 45), (3, 17), 1, 1, True),
            problem((9, 26), (4, 25)),
        ):
            with self.subTest(given=given):
                self.check(given, torch.bfloat16)

    def test_steps_of_more_than_32_bits(self):
        for given in (problem((11, 20), 5, 1, 2), problem((4, 5, 9), 3)):
            with self.subTest(given=given), mock.patch.object(cuda, "_MAX_SHORT_STEP", 0):
                self.check(given, torch.bfloat16)

    def test_scales_that_the_bias_cannot_be_divided_by(self):
        given = problem((9, 11), 5, dim=8)
        for scale in (0.0, -0.5, 1e-35):
            with self.subTest(scale=scale):
                qkv, rpb = make_qkv(given, torch.bfloat16), make_rpb(given, torch.float32)
                results = []
                for backend in ("cuda", "reference"):
                    with emulated_gpu():
                        out = natten.na2d(*qkv, 5, rpb=rpb, scale=scale, backend=backend)
                        results.append([out, *torch.autograd.grad(out.float().square().sum(), (*qkv, rpb))])
                for x, expected in zip(*results, strict=True):
                    torch.testing.assert_close(x, expected, atol=0.05, rtol=0.05)

    def test_large_head_dims(self):
        for dim in (72, 96, 128, 136, 256):
            with self.subTest(dim=dim):
                self.check(problem((9, 10), 4, dim=dim, heads=1), torch.bfloat16)
            with self.subTest(dim=dim, dtype="tf32"), mock.patch.object(cuda, "allows_tf32", lambda: True):
                self.check(problem((9, 10), 4, dim=dim, heads=1), torch.float32, eps=TF32_EPS)

    def test_goldens(self):
        for case in test_goldens.CASES:
            with self.subTest(case["tag"]), emulated_gpu():
                qkv, rpb, dout = test_goldens.make_inputs(case)
                out, lse = test_goldens.fused(case, qkv, rpb, "cuda")
                inputs = dict(zip(("dq", "dk", "dv", "drpb"), (*qkv, rpb), strict=True))
                inputs = {name: x for name, x in inputs.items() if x is not None}
                found = dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), dout), strict=True))
                test_goldens.GoldensTest.compare(
                    self, {"out": out, "lse": lse, **found}, test_goldens.load(case["tag"])
                )

    def test_goldens_with_matrix_instructions(self):
        """The error is that of rounded operands: of TF32, or of inputs and results in bfloat16."""
        for dtype, eps in ((torch.float32, TF32_EPS), (torch.bfloat16, torch.finfo(torch.bfloat16).eps)):
            for case in test_goldens.CASES:
                if case["d"] % 8:
                    continue
                with (
                    self.subTest(case["tag"], dtype=dtype),
                    mock.patch.object(cuda, "allows_tf32", lambda: True),
                    emulated_gpu() as emulator,
                ):
                    qkv, rpb, dout = test_goldens.make_inputs(case)
                    qkv = [x.detach().to(dtype).requires_grad_() for x in qkv]
                    out, lse = test_goldens.fused(case, qkv, rpb, "cuda")
                    inputs = [x for x in (*qkv, rpb) if x is not None]
                    gradients = torch.autograd.grad(out, inputs, dout.to(dtype))
                    found = dict(zip(("out", "lse", "dq", "dk", "dv", "drpb"), (out, lse, *gradients), strict=False))
                    self.assertTrue(all("tiles" in name or "sum_parts" in name for name in emulator.launched))
                    golden = test_goldens.load(case["tag"])
                    self.assertEqual(found.keys(), golden.keys())
                    for name, expected in golden.items():
                        error = (found[name].detach().double() - expected).square().mean().sqrt().item()
                        self.assertLess(error, eps * max(1.0, expected.abs().max().item()), name)

    def test_results_do_not_depend_on_the_order_of_threads(self):
        given = problem((12, 17), 5, dim=16)
        for has_fragments, gradient_bytes, is_deterministic in (
            (True, 0, False),
            (False, 1 << 15, False),
            (False, 1400, True),
        ):
            torch.use_deterministic_algorithms(is_deterministic)
            self.addCleanup(torch.use_deterministic_algorithms, False)
            with tile_limits(True, 0, has_fragments, gradient_bytes):
                runs = []
                for seed in range(2):
                    qkv, rpb = make_qkv(given, torch.bfloat16), make_rpb(given, torch.float32)
                    with emulated_gpu(seed=seed):
                        runs.append(fused(given, qkv, rpb, "cuda"))
            for one, other in zip(*runs, strict=True):
                self.assertTrue(torch.equal(one, other))


# ---------------------------------------------------------------------------------------------------------------------
# Tests that run no kernel
# ---------------------------------------------------------------------------------------------------------------------


class UnsupportedTest(unittest.TestCase):
    """`unsupported_reason` for mock tensors on devices that are not present."""

    def setUp(self):
        cuda._unsupported_device.cache_clear()
        warn_fallback.cache_clear()
        self.addCleanup(cuda._unsupported_device.cache_clear)
        self.addCleanup(warn_fallback.cache_clear)

    def query(self, device: str, dtype=torch.float32, dim: int = 32):
        return mock.Mock(device=torch.device(device), dtype=dtype, shape=torch.Size((1, 9, 2, dim)))

    def reason(self, query, capability=HOPPER) -> str | None:
        with mock.patch.object(cuda, "_properties", lambda device: gpu_properties(capability)):
            return cuda.unsupported_reason(query)

    def test_supported_calls(self):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for dim in (1, 12, 256):
                with mock.patch.object(nvrtc, "architecture"), mock.patch.object(driver, "bindings"):
                    self.assertIsNone(self.reason(self.query("cuda:0", dtype, dim=dim)))

    def test_unsupported_calls(self):
        self.assertIn("cpu", self.reason(self.query("cpu")))
        self.assertIn("float64", self.reason(self.query("cuda:0", torch.float64)))
        self.assertIn("head_dim 264", self.reason(self.query("cuda:0", dim=264)))

    def test_fallback_warns_once(self):
        cases = {
            "mps": (self.query("mps"), HOPPER, None),
            "7.0": (self.query("cuda:0"), (7, 0), None),
            "ROCm": (self.query("cuda:0"), HOPPER, "6.0"),
        }
        for word, (query, capability, hip) in cases.items():
            cuda._unsupported_device.cache_clear()
            with self.subTest(word), mock.patch.object(torch.version, "hip", hip):
                with self.assertWarnsRegex(RuntimeWarning, word):
                    self.assertIn(word, self.reason(query, capability))
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    self.reason(query, capability)

    def test_without_nvrtc(self):
        error = nvrtc.Unavailable("NVRTC is missing")
        with mock.patch.object(nvrtc, "bindings", side_effect=error), self.assertWarnsRegex(RuntimeWarning, "NVRTC"):
            self.assertIn("NVRTC", self.reason(self.query("cuda:0")))

    def test_without_cuda_bindings_the_error_names_the_package(self):
        for version, words in (("12.8", '"cuda-bindings==12.*"'), (None, "cuda-bindings")):
            with (
                self.subTest(version),
                mock.patch.dict(sys.modules, {"cuda.bindings": None}),
                mock.patch.object(torch.version, "cuda", version),
                self.assertRaises(nvrtc.Unavailable) as caught,
            ):
                nvrtc.bindings.__wrapped__()
            self.assertIn(f"pip install {words}", str(caught.exception))

    def test_order_of_backends(self):
        self.assertEqual(backends.NAMES, ("cpu", "cuda", "reference"))


class PlanTest(unittest.TestCase):
    """Plans of problems that are too large to run."""

    def plan(self, shape, kernel_size, op="attention"):
        query = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        axes = make_axes(shape[1:-2], kernel_size)
        rpb = torch.empty(shape[-2], *(2 * axis.kernel_size - 1 for axis in axes), device="meta")
        names = {"QUERY": query, "KEY": query, "VALUE": query}
        with mock.patch.object(cuda, "_properties", lambda device: gpu_properties(HOPPER)):
            return inspect.unwrap(cuda._plan)(op, query, axes, 1.0, rpb, False, tuple(names), *names.values())

    def test_strides_beyond_32_bits(self):
        shape = (40000, 56, 56, 4, 32)
        (step,) = self.plan(shape, 7).steps
        self.assertIn((56 * 56 * 4 * 32).to_bytes(8, "little"), step.parameters)
        self.assertGreaterEqual(step.blocks, 40000 * 4)

    def test_too_many_blocks(self):
        for op in ("attention", "attention_backward"):  # too many blocks; too many tiles, shared by fewer blocks
            with self.subTest(op), self.assertRaisesRegex(Unsupported, "query.*blocks"):
                self.plan((1 << 30, 600, 2, 8), 3, op)

    def test_too_long_an_axis_and_too_large_a_table(self):
        with self.assertRaisesRegex(Unsupported, "axis"):
            self.plan((1, (1 << 30) + 1, 2, 8), 3)
        with self.assertRaisesRegex(Unsupported, "table"):
            self.plan((1, 600, 600, 600, 2, 8), 401)

    def test_the_reference_takes_over_beyond_a_limit(self):
        x = torch.randn(1, 9, 2, 8)
        with (
            emulated_gpu() as emulator,
            mock.patch.object(cuda, "_MAX_LENGTH", 8),
            self.assertWarnsRegex(RuntimeWarning, "axis has 9 tokens"),
        ):
            found = natten.na1d(x, x, x, 3, backend="cuda")
        torch.testing.assert_close(found, natten.na1d(x, x, x, 3, backend="reference"))
        self.assertEqual(emulator.launched, [])

    def test_every_published_shape_has_a_tile_on_each_gpu(self):
        shapes = [((56, 56), 7, 32), ((28, 28), 7, 32), ((14, 14), 7, 32), ((7, 7), 7, 32), ((24, 24), 11, 32)]
        shapes += [((16, 32, 32), 7, 128), ((200, 304), 13, 256), ((4096,), 2047, 128), ((64, 64), 63, 64)]
        for space, kernel_size, dim in shapes:
            axes = make_axes(space, kernel_size)
            axes = (*(cuda._NO_AXIS,) * (3 - len(axes)), *axes)
            limits = (99 << 10, 163 << 10, 227 << 10)
            for kernel, shared_bytes, item_bytes in itertools.product(tiles.KERNELS, limits, (2, 4)):
                tile = tiles.choose_tile(kernel, axes, dim, 64, True, 108, shared_bytes, item_bytes)
                self.assertLessEqual(tile.shared_bytes, shared_bytes)
                self.assertLessEqual(tile.threads, 1024)


class AlignedRowsTest(unittest.TestCase):
    def test_only_unaligned_rows_are_copied(self):
        x = torch.zeros(2, 9, 3, 16)
        self.assertIs(cuda._with_aligned_rows(x), x)
        for y in (x[..., 4:12], x[..., 2:12], x[..., 1:8]):  # the rows of 8, 10 and 7 elements
            self.assertIs(cuda._with_aligned_rows(y), y)
        for y in (x[..., 1:9], x[..., ::2], x.flatten()[3:291].view(2, 9, 2, 8)):
            copy = cuda._with_aligned_rows(y)
            self.assertIsNot(copy, y)
            self.assertTrue(torch.equal(copy, y))


if __name__ == "__main__":
    unittest.main()
