"""What is refused, and whether the message says what is wrong, where, and what to do."""

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
    """Heads-last query, key and value."""
    return [torch.zeros(1, *MAPS[rank], heads, head_dim, **options) for _ in range(3)]


def heads_first(rank: int = 2, **options) -> list[Tensor]:
    """Heads-first query, key and value."""
    return [x.movedim(-2, 1) for x in qkv_of(rank, **options)]


def calls(rank: int) -> dict[str, Callable]:
    """Every public way to name a window, as functions of the window arguments."""
    q, k, v = qkv_of(rank)
    attn = torch.zeros(1, 2, *MAPS[rank], 3**rank)
    return {
        "fused": lambda **window: function(rank)(q, k, v, **window),
        "packed": lambda **window: function(rank, "_qkvpacked")(torch.stack((q, k, v), -3), **window),
        "qk": lambda **window: function(rank, "_qk")(q.movedim(-2, 1), k.movedim(-2, 1), **window),
        "av": lambda **window: function(rank, "_av")(attn, v.movedim(-2, 1), **window),
        "layer": lambda **window: getattr(natten, f"NeighborhoodAttention{rank}D")(8, 2, **window),
    }


class RefusalTestCase(unittest.TestCase):
    """With a check of error messages by their essential words."""

    def refuses(self, words: str | tuple[str, ...], call: Callable, *arguments, error=ValueError, **named) -> None:
        """The call raises the error, and its message has all the words."""
        with self.assertRaises(error) as caught:
            call(*arguments, **named)
        for word in (words,) if isinstance(words, str) else words:
            self.assertIn(word, str(caught.exception))


class WindowTest(RefusalTestCase):
    """Windows that do not exist."""

    def check_everywhere(self, words: tuple[str, ...], without: tuple[str, ...] = (), **window) -> None:
        """All functions and layers of all ranks refuse the window."""
        for rank in RANKS:
            for name, call in calls(rank).items():
                if name not in without:
                    with self.subTest(name, rank=rank):
                        self.refuses(words, call, **window)

    def test_kernel_size_below_two(self):
        for size in (1, 0, -3):
            self.check_everywhere(("kernel_size", str(size), "axis 0", "at least 2"), kernel_size=size)

    def test_dilation_below_one(self):
        self.check_everywhere(("dilation", "axis 0", "at least 1"), kernel_size=3, dilation=0)
        self.check_everywhere(("dilation", "-1"), kernel_size=3, dilation=-1)

    def test_stride(self):
        halves = ("qk", "av")  # they take no stride
        for stride in (0, 4):
            self.check_everywhere(("stride", str(stride), "axis 0", "3"), halves, kernel_size=3, stride=stride)

    def test_the_axis_is_named(self):
        for name, right, wrong in (("kernel_size", 3, 1), ("stride", 1, 5), ("dilation", 1, 0)):
            for axis in range(3):
                with self.subTest(name, axis=axis):
                    values = tuple(wrong if i == axis else right for i in range(3))
                    window = {"kernel_size": 3, name: values}
                    self.refuses((name, f"axis {axis}"), natten.na3d, *qkv_of(3), **window)
                    self.refuses((name, f"axis {axis}"), natten.NeighborhoodAttention3D, 8, 2, **window)

    def test_window_longer_than_an_axis(self):
        for rank in RANKS:
            for axis in range(rank):
                dilation = tuple(5 if i == axis else 1 for i in range(rank))
                words = ("3 * 5 = 15", f"axis {axis}", str(MAPS[rank][axis]), f"NeighborhoodAttention{rank}D")
                for name, call in calls(rank).items():
                    if name != "layer":
                        with self.subTest(name, rank=rank, axis=axis):
                            self.refuses(words, call, kernel_size=3, dilation=dilation)

    def test_wrong_number_of_values(self):
        for name, value in (("kernel_size", (3, 3, 3, 3)), ("dilation", (1,) * 4), ("is_causal", (True,) * 4)):
            self.check_everywhere((name, "one an axis"), **{"kernel_size": 3, name: value})
        self.check_everywhere(("kernel_size",), kernel_size=())

    def test_wrong_kind_of_values(self):
        for value in (3.0, "3", None, True, (3, 3.0)):
            with self.subTest(kernel_size=value):
                self.refuses(("kernel_size", "int", repr(value)), natten.na2d, *qkv_of(), value)
        self.refuses(("dilation", "int", "1.5"), natten.na2d, *qkv_of(), 3, dilation=1.5)
        self.refuses(("stride", "int", "1.5"), natten.na2d, *qkv_of(), 3, stride=1.5)
        self.refuses(("is_causal", "bool", "1"), natten.na2d, *qkv_of(), 3, is_causal=1)
        self.refuses(("is_causal", "bool", "'yes'"), natten.na2d, *qkv_of(), 3, is_causal="yes")


class TensorsTest(RefusalTestCase):
    """Tensors that do not go together."""

    def test_wrong_number_of_dimensions(self):
        for rank in RANKS:
            q, k, v = qkv_of(rank)
            words = (f"{rank}-D", f"takes {rank + 3}", "heads and head_dim")
            self.refuses(("query", *words), function(rank), q[0], k[0], v[0], 3)
            self.refuses(("key", *words), function(rank), q, k[0], v, 3)
            self.refuses(("value", *words), function(rank), q, k, v[None], 3)
            self.refuses(("query", f"takes {rank + 3}"), function(rank, "_qk"), q[0], k[0], 3)
            self.refuses(("attn", f"takes {rank + 3}"), function(rank, "_av"), q[0], v, 3)

    def test_qkv_that_is_not_packed(self):
        for rank in RANKS:
            q, k, v = qkv_of(rank)
            words = ("qkv", str(tuple(q.shape)), f"{rank + 4} dimensions", "3 (query, key and value)")
            self.refuses(words, function(rank, "_qkvpacked"), q, 3)
            self.refuses(("qkv", "3 (query"), function(rank, "_qkvpacked"), torch.stack((q, k, v, v), -3), 3)
            self.refuses(("qkv", "3 (query"), function(rank, "_qkvpacked"), torch.stack((q, k, v), 1), 3)

    def test_layer_input_of_another_rank(self):
        for rank in RANKS:
            layer = getattr(natten, f"NeighborhoodAttention{rank}D")(8, 2, 3)
            words = (f"NeighborhoodAttention{rank}D", f"{rank + 2} dimensions", "channels")
            self.refuses(words, layer, torch.zeros(*MAPS[rank], 8))
            self.refuses(words, layer, torch.zeros(1, 1, *MAPS[rank], 8))

    def test_shapes_that_differ(self):
        q, k, v = qkv_of()
        self.refuses(("key", "query", "must agree"), natten.na2d, q, k[:, :8], v[:, :8], 3)
        self.refuses(("value", "query", "must agree"), natten.na2d, q, k, v[:, :8], 3)
        self.refuses(("key", "query", "must agree"), natten.na2d, q, k.repeat(2, 1, 1, 1, 1), v, 3)
        self.refuses(("key", "query", "must agree"), natten.na2d, q, k[..., :2], v[..., :2], 3)
        q, k, _ = heads_first()
        self.refuses(("key", "query", "must agree"), natten.na2d_qk, q, k[:, :, :8], 3)

    def test_dtypes_that_differ(self):
        q, k, v = qkv_of()
        self.refuses(("key", "float64", "query", "float32", "convert"), natten.na2d, q, k.double(), v, 3)
        self.refuses(("value", "bfloat16", "query", "float32"), natten.na2d, q, k, v.bfloat16(), 3)
        q, k, _ = heads_first()
        self.refuses(("key", "float64", "query"), natten.na2d_qk, q, k.double(), 3)
        self.refuses(("value", "float64", "attn"), natten.na2d_av, torch.zeros(1, 2, 9, 10, 9), k.double(), 3)

    def test_devices_that_differ(self):
        q, k, v = qkv_of()
        self.refuses(("key", "meta", "query", "cpu"), natten.na2d, q, k.to("meta"), v, 3)
        self.refuses(("value", "meta", "query", "cpu"), natten.na2d, q, k, v.to("meta"), 3)
        self.refuses(("rpb", "meta", "cpu", "move"), natten.na2d, q, k, v, 3, rpb=torch.zeros(2, 5, 5, device="meta"))

    def test_integer_tensors(self):
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
            with self.subTest(dtype):
                q, k, v = qkv_of(dtype=dtype)
                self.refuses(("query", str(dtype), "floating"), natten.na2d, q, k, v, 3)
                self.refuses(("qkv", str(dtype), "floating"), natten.na2d_qkvpacked, torch.stack((q, k, v), -3), 3)
                self.refuses(("query", str(dtype)), natten.na2d_qk, q.movedim(-2, 1), k.movedim(-2, 1), 3)

    def test_rpb_of_another_shape(self):
        q, k, v = qkv_of()
        for shape in ((2, 3, 3), (2, 5), (1, 5, 5), (5, 5), (2, 5, 5, 1)):
            with self.subTest(shape):
                words = ("rpb", str(shape), "2 heads", "(2, 5, 5)")
                self.refuses(words, natten.na2d, q, k, v, 3, rpb=torch.zeros(shape))
                self.refuses(words, natten.na2d_qkvpacked, torch.stack((q, k, v), -3), 3, rpb=torch.zeros(shape))
                self.refuses(words, natten.na2d_qk, q.movedim(-2, 1), k.movedim(-2, 1), 3, rpb=torch.zeros(shape))

    def test_rpb_of_another_dtype(self):
        q, k, v = qkv_of()
        for dtype in (torch.float64, torch.bfloat16, torch.int64):
            words = ("rpb", str(dtype), "float32")
            self.refuses(words, natten.na2d, q, k, v, 3, rpb=torch.zeros(2, 5, 5, dtype=dtype))

    def test_attn_of_another_shape(self):
        value = heads_first()[2]
        for shape in ((1, 2, 9, 10, 8), (1, 1, 9, 10, 9), (2, 2, 9, 10, 9), (1, 2, 9, 9, 9)):
            words = ("attn", str(shape), "(1, 2, 9, 10, 9)")
            self.refuses(words, natten.na2d_av, torch.zeros(shape), value, 3)


class LayerTest(RefusalTestCase):
    """Arguments of the layers."""

    def setUp(self):
        self.layers = [getattr(natten, f"NeighborhoodAttention{rank}D") for rank in RANKS]

    def test_dim_or_embed_dim(self):
        for layer in self.layers:
            self.refuses(("dim", "embed_dim"), layer, num_heads=2, kernel_size=3)
            self.refuses(("dim", "embed_dim"), layer, dim=8, embed_dim=8, num_heads=2, kernel_size=3)

    def test_num_heads_and_kernel_size_are_needed(self):
        for layer in self.layers:
            self.refuses(("num_heads", "kernel_size"), layer, 8)
            self.refuses(("num_heads", "kernel_size"), layer, 8, 2)
            self.refuses(("num_heads", "kernel_size"), layer, 8, kernel_size=3)

    def test_num_heads_that_does_not_divide_names_the_old_order(self):
        for layer in self.layers:
            self.refuses(("num_heads is 7", "dim 64", "0.14.4", "(dim, kernel_size, num_heads)"), layer, 64, 7, 2)
            self.refuses("num_heads is 0", layer, 64, 0, 3)

    def test_bias_against_rel_pos_bias(self):
        for layer in self.layers:
            self.refuses(("bias", "rel_pos_bias", "different"), layer, 8, 2, 3, bias=True, rel_pos_bias=False)

    def test_attention_dropout_with_a_stride(self):
        for layer in self.layers:
            self.refuses(("attn_drop is 0.1", "stride"), layer, 8, 2, 3, stride=2, attn_drop=0.1)


class BackendTest(RefusalTestCase):
    """Backends that are not there."""

    def ways(self) -> dict[str, Callable]:
        """Everything that takes a backend, as functions of its name."""
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
        words = ("'torch'", "unknown", "'reference'", "'cpu'")
        for way, call in self.ways().items():
            with self.subTest(way):
                self.refuses(words, call, "torch")

    def test_a_backend_that_cannot_take_the_call(self):
        for way, call in self.ways().items():
            if way != "use_backend":  # it may be entered wherever the backend exists at all
                with self.subTest(way):
                    self.refuses("'cuda'", call, "cuda")

    def test_use_backend_ends_with_its_block(self):
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
    """Environment variables, each in a process of its own."""

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
        self.assertRegex(done.stderr, "ValueError: .*NATTEN_BACKEND.*'reference'")

    def test_log_level(self):
        done = self.run_python(self.CALL, NATTEN_LOG_LEVEL="debug")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stderr, r"natten DEBUG: backend \w+ runs query \(1, 5, 1, 2\) torch.float32 on cpu")

    def test_unknown_log_level(self):
        done = self.run_python("import natten", NATTEN_LOG_LEVEL="LOUD")
        self.assertRegex(done.stderr, "ValueError: NATTEN_LOG_LEVEL.*'LOUD'.*DEBUG")

    def test_neither(self):
        done = self.run_python(self.CALL)
        self.assertEqual((done.returncode, done.stdout.strip()), (0, "True"), done.stderr)
        self.assertNotIn("DEBUG", done.stderr)


class LogTest(unittest.TestCase):
    """The logger of the package."""

    def test_debug_tells_the_backend(self):
        for name, call in calls(2).items():
            if name != "layer":  # it calls the others
                with self.subTest(name), self.assertLogs("natten", "DEBUG") as logged:
                    call(kernel_size=3)
                    self.assertRegex(logged.output[-1], r"DEBUG:natten:backend (reference|cpu|cuda) runs query")


class EmptyTest(unittest.TestCase):
    """A batch of nothing is no error."""

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


class ChannelsTest(unittest.TestCase):
    """What a layer says of channels that are not its own."""

    def test_channels_first(self):
        layer = natten.NeighborhoodAttention2D(8, 2, 3)
        with self.assertRaisesRegex(ValueError, "input has 7 channels .* dim 8: it takes channels last"):
            layer(torch.zeros(1, 8, 7, 7))
