"""Invalid arguments raise errors that name the argument, its value and the expected one."""

from __future__ import annotations

import os
import subprocess
import sys
import unittest
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import natten
from test_natten.problems import RANKS, function, runs_fused_operator

MAPS = {1: (9,), 2: (9, 10), 3: (9, 10, 11)}


def qkv_of(rank: int = 2, heads: int = 2, head_dim: int = 4, **options) -> list[Tensor]:
    """Return heads-last query, key and value."""
    return [torch.zeros(1, *MAPS[rank], heads, head_dim, **options) for _ in range(3)]


def heads_first(rank: int = 2, **options) -> list[Tensor]:
    """Return heads-first query, key and value."""
    return [x.movedim(-2, 1) for x in qkv_of(rank, **options)]


def calls(rank: int) -> dict[str, Callable]:
    """Return all public functions and the layer as functions of the window arguments."""
    q, k, v = qkv_of(rank)
    attn = torch.zeros(1, 2, *MAPS[rank], 3**rank)
    return {
        "fused": lambda **window: function(rank)(q, k, v, **window),
        "packed": lambda **window: function(rank, "_qkvpacked")(torch.stack((q, k, v), -3), **window),
        "qk": lambda **window: function(rank, "_qk")(q.movedim(-2, 1), k.movedim(-2, 1), **window),
        "av": lambda **window: function(rank, "_av")(attn, v.movedim(-2, 1), **window),
        "layer": lambda **window: getattr(natten, f"NeighborhoodAttention{rank}D")(8, 2, **window),
    }


class ErrorTestCase(unittest.TestCase):
    """Base class with an assertion for errors."""

    def assert_error(self, names: str | tuple[str, ...], call: Callable, *args, error=ValueError, **kwargs) -> None:
        """Assert that the call raises the error, and that its message contains all names of arguments and values."""
        with self.assertRaises(error) as caught:
            call(*args, **kwargs)
        for name in (names,) if isinstance(names, str) else names:
            self.assertIn(name, str(caught.exception))


class WindowTest(ErrorTestCase):
    """Invalid windows."""

    def assert_error_everywhere(self, names: tuple[str, ...], without: tuple[str, ...] = (), **window) -> None:
        """Assert that all functions and layers of all ranks reject the window."""
        for rank in RANKS:
            for name, call in calls(rank).items():
                if name not in without:
                    with self.subTest(name, rank=rank):
                        self.assert_error(names, call, **window)

    def test_kernel_size_below_two(self):
        for size in (1, 0, -3):
            self.assert_error_everywhere(("kernel_size", str(size), "axis 0"), kernel_size=size)

    def test_dilation_below_one(self):
        self.assert_error_everywhere(("dilation", "axis 0"), kernel_size=3, dilation=0)
        self.assert_error_everywhere(("dilation", "-1"), kernel_size=3, dilation=-1)

    def test_stride_outside_one_to_kernel_size(self):
        unfused = ("qk", "av")  # have no stride
        for stride in (0, 4):
            self.assert_error_everywhere(("stride", str(stride), "axis 0"), unfused, kernel_size=3, stride=stride)

    def test_error_names_the_axis(self):
        for name, right, wrong in (("kernel_size", 3, 1), ("stride", 1, 5), ("dilation", 1, 0)):
            for axis in range(3):
                with self.subTest(name, axis=axis):
                    values = tuple(wrong if i == axis else right for i in range(3))
                    window = {"kernel_size": 3, name: values}
                    self.assert_error((name, f"axis {axis}"), natten.na3d, *qkv_of(3), **window)
                    self.assert_error((name, f"axis {axis}"), natten.NeighborhoodAttention3D, 8, 2, **window)

    def test_window_exceeds_an_axis(self):
        for rank in RANKS:
            for axis in range(rank):
                dilation = tuple(5 if i == axis else 1 for i in range(rank))
                names = ("kernel_size", "dilation", "15", f"axis {axis}", str(MAPS[rank][axis]))
                for name, call in calls(rank).items():
                    if name != "layer":
                        with self.subTest(name, rank=rank, axis=axis):
                            self.assert_error(names, call, kernel_size=3, dilation=dilation)

    def test_wrong_number_of_values(self):
        for name, value in (("kernel_size", (3, 3, 3, 3)), ("dilation", (1,) * 4), ("is_causal", (True,) * 4)):
            self.assert_error_everywhere((name,), **{"kernel_size": 3, name: value})
        self.assert_error_everywhere(("kernel_size",), kernel_size=())

    def test_wrong_type_of_values(self):
        for value in (3.0, "3", None, True, (3, 3.0)):
            with self.subTest(kernel_size=value):
                self.assert_error(("kernel_size", "int", repr(value)), natten.na2d, *qkv_of(), value)
        self.assert_error(("dilation", "int", "1.5"), natten.na2d, *qkv_of(), 3, dilation=1.5)
        self.assert_error(("stride", "int", "1.5"), natten.na2d, *qkv_of(), 3, stride=1.5)
        self.assert_error(("is_causal", "bool", "1"), natten.na2d, *qkv_of(), 3, is_causal=1)
        self.assert_error(("is_causal", "bool", "'yes'"), natten.na2d, *qkv_of(), 3, is_causal="yes")


class TensorsTest(ErrorTestCase):
    """Tensors that do not fit together."""

    def test_wrong_number_of_dimensions(self):
        for rank in RANKS:
            q, k, v = qkv_of(rank)
            dimensions = str(rank + 3)
            self.assert_error(("query", dimensions), function(rank), q[0], k[0], v[0], 3)
            self.assert_error(("key", dimensions), function(rank), q, k[0], v, 3)
            self.assert_error(("value", dimensions), function(rank), q, k, v[None], 3)
            self.assert_error(("query", dimensions), function(rank, "_qk"), q[0], k[0], 3)
            self.assert_error(("attn", dimensions), function(rank, "_av"), q[0], v, 3)

    def test_qkv_not_packed(self):
        for rank in RANKS:
            q, k, v = qkv_of(rank)
            for qkv in (q, torch.stack((q, k, v, v), -3), torch.stack((q, k, v), 1)):
                names = ("qkv", str(tuple(qkv.shape)), str(rank + 4))
                self.assert_error(names, function(rank, "_qkvpacked"), qkv, 3)

    def test_layer_input_of_another_shape(self):
        for rank in RANKS:
            layer = getattr(natten, f"NeighborhoodAttention{rank}D")(8, 2, 3)
            for shape in ((*MAPS[rank], 8), (1, 1, *MAPS[rank], 8), (1, 8, *MAPS[rank])):
                self.assert_error(("input", str(shape), str(rank + 2), "8"), layer, torch.zeros(shape))

    def test_different_shapes(self):
        q, k, v = qkv_of()
        self.assert_error(("key", "query"), natten.na2d, q, k[:, :8], v[:, :8], 3)
        self.assert_error(("value", "query"), natten.na2d, q, k, v[:, :8], 3)
        self.assert_error(("key", "query"), natten.na2d, q, k.repeat(2, 1, 1, 1, 1), v, 3)
        self.assert_error(("key", "query"), natten.na2d, q, k[..., :2], v[..., :2], 3)
        q, k, _ = heads_first()
        self.assert_error(("key", "query"), natten.na2d_qk, q, k[:, :, :8], 3)

    def test_no_heads_of_the_query(self):
        x = torch.zeros(1, 9, 2, 8)
        with self.assertRaisesRegex(ValueError, "^key and value have 2 heads, but query has 0"):
            natten.na1d(x[:, :, :0], x, x, 3)

    def test_different_dtypes(self):
        q, k, v = qkv_of()
        self.assert_error(("key", "float64", "query", "float32"), natten.na2d, q, k.double(), v, 3)
        self.assert_error(("value", "bfloat16", "query", "float32"), natten.na2d, q, k, v.bfloat16(), 3)
        q, k, _ = heads_first()
        self.assert_error(("key", "float64", "query"), natten.na2d_qk, q, k.double(), 3)
        self.assert_error(("attn", "int64"), natten.na2d_av, torch.zeros(1, 2, 9, 10, 9, dtype=torch.int64), k, 3)

    def test_different_devices(self):
        q, k, v = qkv_of()
        self.assert_error(("key", "meta", "query", "cpu"), natten.na2d, q, k.to("meta"), v, 3)
        self.assert_error(("value", "meta", "query", "cpu"), natten.na2d, q, k, v.to("meta"), 3)
        self.assert_error(("rpb", "meta", "cpu"), natten.na2d, q, k, v, 3, rpb=torch.zeros(2, 5, 5, device="meta"))

    def test_integer_tensors(self):
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
            with self.subTest(dtype):
                q, k, v = qkv_of(dtype=dtype)
                self.assert_error(("query", str(dtype)), natten.na2d, q, k, v, 3)
                self.assert_error(("qkv", str(dtype)), natten.na2d_qkvpacked, torch.stack((q, k, v), -3), 3)
                self.assert_error(("query", str(dtype)), natten.na2d_qk, q.movedim(-2, 1), k.movedim(-2, 1), 3)

    def test_float8_tensors(self):
        for backend in (None, "reference"):
            q, k, v = qkv_of(dtype=torch.float8_e4m3fn)
            self.assert_error(("query", "float8_e4m3fn"), natten.na2d, q, k, v, 3, backend=backend)

    def test_rpb_of_another_shape(self):
        q, k, v = qkv_of()
        for shape in ((2, 3, 3), (2, 5), (1, 5, 5), (5, 5), (2, 5, 5, 1)):
            with self.subTest(shape):
                names = ("rpb", str(shape), "(2, 5, 5)")
                self.assert_error(names, natten.na2d, q, k, v, 3, rpb=torch.zeros(shape))
                self.assert_error(names, natten.na2d_qkvpacked, torch.stack((q, k, v), -3), 3, rpb=torch.zeros(shape))
                self.assert_error(names, natten.na2d_qk, q.movedim(-2, 1), k.movedim(-2, 1), 3, rpb=torch.zeros(shape))

    def test_rpb_of_another_dtype(self):
        q, k, v = qkv_of()
        for dtype in (torch.float64, torch.bfloat16, torch.int64):
            names = ("rpb", str(dtype), "float32")
            self.assert_error(names, natten.na2d, q, k, v, 3, rpb=torch.zeros(2, 5, 5, dtype=dtype))

    def test_attn_of_another_shape(self):
        value = heads_first()[2]
        for shape in ((1, 2, 9, 10, 8), (1, 1, 9, 10, 9), (2, 2, 9, 10, 9), (1, 2, 9, 9, 9)):
            names = ("attn", str(shape), "(1, 2, 9, 10, 9)")
            self.assert_error(names, natten.na2d_av, torch.zeros(shape), value, 3)


class LayerTest(ErrorTestCase):
    """Invalid arguments of the layers."""

    def setUp(self):
        self.layers = [getattr(natten, f"NeighborhoodAttention{rank}D") for rank in RANKS]

    def test_dim_or_embed_dim(self):
        for layer in self.layers:
            self.assert_error(("dim", "embed_dim"), layer, num_heads=2, kernel_size=3)
            self.assert_error(("dim", "embed_dim"), layer, dim=8, embed_dim=8, num_heads=2, kernel_size=3)

    def test_num_heads_and_kernel_size_are_required(self):
        for layer in self.layers:
            self.assert_error(("num_heads", "kernel_size"), layer, 8)
            self.assert_error(("num_heads", "kernel_size"), layer, 8, 2)
            self.assert_error(("num_heads", "kernel_size"), layer, 8, kernel_size=3)

    def test_num_heads_does_not_divide_dim(self):
        """The error names the argument order of old releases, in which num_heads and kernel_size are exchanged."""
        for layer in self.layers:
            self.assert_error(("num_heads", "7", "64", "(dim, kernel_size, num_heads)"), layer, 64, 7, 2)
            self.assert_error(("num_heads", "0"), layer, 64, 0, 3)

    def test_bias_contradicts_rel_pos_bias(self):
        for layer in self.layers:
            self.assert_error(("bias", "rel_pos_bias"), layer, 8, 2, 3, bias=True, rel_pos_bias=False)

    def test_attention_dropout_with_a_stride(self):
        for layer in self.layers:
            self.assert_error(("attn_drop", "0.1", "stride"), layer, 8, 2, 3, stride=2, attn_drop=0.1)


class BackendTest(ErrorTestCase):
    """Unknown and unsupported backends."""

    def calls(self) -> dict[str, Callable]:
        """Return everything that takes a backend as functions of the backend's name."""
        (q, k, v), (q_first, k_first, v_first) = qkv_of(), heads_first()
        packed, attn = torch.stack((q, k, v), -3), torch.zeros(1, 2, 9, 10, 9)
        layer = natten.NeighborhoodAttention2D
        return {
            "fused": lambda name: natten.na2d(q, k, v, 3, backend=name),
            "packed": lambda name: natten.na2d_qkvpacked(packed, 3, backend=name),
            "qk": lambda name: natten.na2d_qk(q_first, k_first, 3, backend=name),
            "av": lambda name: natten.na2d_av(attn, v_first, 3, backend=name),
            "layer": lambda name: layer(8, 2, 3, backend=name)(torch.zeros(1, 9, 10, 8)),
            "use_backend": lambda name: natten.use_backend(name).__enter__(),
        }

    def test_unknown(self):
        for name, call in self.calls().items():
            with self.subTest(name):
                self.assert_error(("'torch'", "'reference'", "'cpu'"), call, "torch")

    def test_backend_does_not_support_the_call(self):
        for name, call in self.calls().items():
            if name != "use_backend":  # accepts any existing backend
                with self.subTest(name):
                    self.assert_error("'cuda'", call, "cuda")

    def test_use_backend_is_undone_at_the_end_of_its_block(self):
        def is_fused() -> bool:
            return runs_fused_operator(lambda: natten.na2d(*qkv_of(), 3))

        with self.assertRaises(ZeroDivisionError), natten.use_backend("reference"):
            raise ZeroDivisionError
        self.assertTrue(is_fused())
        with natten.use_backend("reference"):
            self.assertFalse(is_fused())
            with natten.use_backend(None):
                self.assertTrue(is_fused())
            self.assertFalse(is_fused())
        self.assertTrue(is_fused())


class EnvironmentTest(unittest.TestCase):
    """Environment variables, each in its own process."""

    CALL = (
        "import torch, natten; from test_natten.problems import runs_fused_operator; "
        "q = torch.zeros(1, 5, 1, 2); print(runs_fused_operator(lambda: natten.na1d(q, q, q, 3)))"
    )

    def run_python(self, code: str, **environment: str) -> subprocess.CompletedProcess:
        tests = str(Path(__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": tests, "NATTEN_BACKEND": "", "NATTEN_LOG_LEVEL": "", **environment}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    def test_natten_backend(self):
        done = self.run_python(self.CALL, NATTEN_BACKEND="reference")
        self.assertEqual((done.returncode, done.stdout.strip()), (0, "False"), done.stderr)

    def test_unknown_natten_backend(self):
        done = self.run_python(self.CALL, NATTEN_BACKEND="nonsense")
        self.assertNotEqual(done.returncode, 0)
        self.assertRegex(done.stderr, "ValueError: .*NATTEN_BACKEND.*'nonsense'")

    def test_log_level(self):
        done = self.run_python(self.CALL, NATTEN_LOG_LEVEL="debug")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stderr, r"natten DEBUG: .*\(1, 5, 1, 2\) torch.float32")

    def test_unknown_log_level(self):
        done = self.run_python("import natten", NATTEN_LOG_LEVEL="LOUD")
        self.assertRegex(done.stderr, "ValueError: .*NATTEN_LOG_LEVEL.*'LOUD'")

    def test_no_variable_is_set(self):
        done = self.run_python(self.CALL)
        self.assertEqual((done.returncode, done.stdout.strip()), (0, "True"), done.stderr)
        self.assertNotIn("DEBUG", done.stderr)


class LogTest(unittest.TestCase):
    """The logger "natten"."""

    def test_debug_logs_the_backend(self):
        for name, call in calls(2).items():
            if name != "layer":  # only constructed here
                with self.subTest(name), self.assertLogs("natten", "DEBUG") as logged:
                    call(kernel_size=3)
                self.assertRegex(logged.output[-1], r"DEBUG:natten:.*\b(reference|cpu|cuda)\b")


class EmptyTest(unittest.TestCase):
    """An empty batch is valid."""

    def test_empty_batch(self):
        for rank in RANKS:
            q, k, v = (x[:0].requires_grad_() for x in qkv_of(rank))
            rpb = torch.zeros(2, *(5,) * rank, requires_grad=True)
            for backend in (None, "reference"):
                out, lse = function(rank)(q, k, v, 3, rpb=rpb, return_lse=True, backend=backend)
                self.assertEqual((out.shape, lse.shape), (q.shape, q.shape[:-1]))
                grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, rpb))
                self.assertEqual([x.shape for x in grads], [x.shape for x in (q, k, v, rpb)])
                self.assertEqual(grads[-1].abs().max().item(), 0.0)
            logits = function(rank, "_qk")(q.movedim(-2, 1), k.movedim(-2, 1), 3)
            self.assertEqual(logits.shape, (0, 2, *MAPS[rank], 3**rank))
            self.assertEqual(function(rank, "_av")(logits, v.movedim(-2, 1), 3).shape, (0, 2, *MAPS[rank], 4))
