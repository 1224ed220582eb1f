"""The cpu backend against the reference in float64, with the same rounded inputs.

Errors are root mean squares. Over a sweep, the error may be twice that of the reference in the same dtype, which allows
for another order of summation. For a single problem it may be eight times as large, because small results vary by
chance. Where the reference happens to be almost exact, it may be one rounding of the largest value, or four in float32:
weights are computed again from the logsumexp, whose rounding changes them by a few roundings of their own.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import unittest

import pytest
import torch
from torch import Tensor

import natten
from natten.backends.cpu import build
from natten.backends.kernels import warn_fallback
from test_natten.problems import RANKS, Problem, cotangents, function, gradients, make_qkv, make_rpb, random_problem

PROBLEMS_PER_RANK = 200  # of the long sweep
HEAD_DIMS = (8, 10, 16, 20, 24, 32, 1, 7, 12, 14, 28, 36, 40, 64, 72, 100, 128, 256, 264)
_SPARE = {1: 70, 2: 24, 3: 7}  # tokens per axis beyond kernel_size * dilation, enough for several vectors of queries


def problem_of(rank: int, seed: int) -> Problem:
    """Return a random problem that the kernels support. Some maps are wide, some have the size of a window."""
    rng = random.Random(f"cpu-{rank}-{seed}")
    problem = random_problem(rank, seed, spare=rng.choice((0, 4, _SPARE[rank])))
    head_dim = rng.choice(HEAD_DIMS if rng.random() < 0.3 else HEAD_DIMS[:6])
    return problem._replace(head_dim=head_dim)


def fused(problem: Problem, qkv: list[Tensor], rpb: Tensor | None, backend: str) -> list[Tensor]:
    """Return output, logsumexp and the gradients of q, k, v and rpb."""
    outputs = function(problem.rank)(*qkv, *problem.window, rpb=rpb, return_lse=True, backend=backend)
    return [*outputs, *gradients(outputs, [*qkv, rpb], cotangents(*outputs, problem.seed))]


def unfused(problem: Problem, qkv: list[Tensor], rpb: Tensor | None, backend: str) -> list[Tensor]:
    """Return logits, softmax(logits) times value, and the gradients of q, k, v and rpb, from the unfused functions."""
    kernel_size, _, dilation, is_causal = problem.window
    query, key, value = (x.movedim(-2, 1) for x in qkv)
    window = {"kernel_size": kernel_size, "dilation": dilation, "is_causal": is_causal}
    logits = function(problem.rank, "_qk")(query, key, **window, rpb=rpb, backend=backend)
    out = function(problem.rank, "_av")(logits.softmax(-1), value, **window, backend=backend)
    sent = cotangents(out, out, problem.seed)[:1]
    return [logits, out, *gradients((out,), [*qkv, rpb], sent)]


def mixed_qkv(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """Return inputs of which some have fewer key/value heads, or values of another head_dim."""
    rng = random.Random(f"mixed-{problem}")
    qkv = make_qkv(problem, dtype)
    if rng.random() < 0.7:
        return qkv
    key_heads = rng.choice([heads for heads in range(1, problem.heads + 1) if problem.heads % heads == 0])
    key = make_qkv(problem._replace(heads=key_heads), dtype)[1]
    value = make_qkv(problem._replace(heads=key_heads, head_dim=rng.choice(HEAD_DIMS[:13])), dtype)[2]
    return [qkv[0], key, value]


def to_double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().double().requires_grad_()


class AgainstReferenceTest(unittest.TestCase):
    """Seeded random problems of all ranks against the reference."""

    def setUp(self):
        self.errors: list[tuple[float, float]] = []  # of the backend and of the reference, in units of rounding
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(2)  # the number of threads decides how a problem is cut

    def check(
        self,
        compute,
        problem: Problem,
        dtype: torch.dtype,
        rpb_dtype: torch.dtype,
        qkv: list[Tensor] | None = None,
    ) -> None:
        qkv, rpb = qkv or make_qkv(problem, dtype), make_rpb(problem, rpb_dtype)
        found = compute(problem, qkv, rpb, "cpu")
        peers = compute(problem, qkv, rpb, "reference")
        exact = compute(problem, [to_double(x) for x in qkv], to_double(rpb), "reference")
        for index, (x, peer, expected) in enumerate(zip(found, peers, exact, strict=True)):
            self.assertEqual((x.shape, x.dtype), (peer.shape, peer.dtype))
            is_finite = expected.isfinite()
            self.assertTrue(torch.equal(x.isfinite(), is_finite))
            x, peer, expected = (y.detach().double()[is_finite] for y in (x, peer, expected))
            rounding = torch.finfo(dtype).eps * max([1.0, *expected.abs().flatten().tolist()])
            error, peer_error = ((y - expected).square().mean().sqrt().item() / rounding for y in (x, peer))
            least = 4.0 if dtype == torch.float32 else 1.0
            self.assertLessEqual(error, max(8 * peer_error, least), f"result {index}")
            self.errors.append((error, peer_error))

    def check_all(self, compute, count: int, dtype: torch.dtype, rpb_dtype: torch.dtype) -> None:
        for rank in RANKS:
            self.errors = []
            for seed in range(count):
                problem = problem_of(rank, seed)
                with self.subTest(problem=problem):
                    qkv = mixed_qkv(problem, dtype) if compute is fused else None
                    self.check(compute, problem, dtype, rpb_dtype, qkv)
            error, peer_error = torch.tensor(self.errors).square().mean(0).sqrt().tolist()
            self.assertLessEqual(error, 2 * peer_error, f"rank {rank}")

    def test_fused_float32(self):
        self.check_all(fused, 60, torch.float32, torch.float32)

    def test_fused_bfloat16(self):
        self.check_all(fused, 20, torch.bfloat16, torch.float32)

    def test_fused_float16(self):
        self.check_all(fused, 20, torch.float16, torch.float16)

    def test_unfused_float32(self):
        self.check_all(unfused, 20, torch.float32, torch.float32)

    def test_unfused_bfloat16(self):
        self.check_all(unfused, 8, torch.bfloat16, torch.bfloat16)

    @pytest.mark.slow
    def test_long_sweep(self):
        for compute, dtype in itertools.product((fused, unfused), (torch.float32, torch.bfloat16, torch.float16)):
            self.check_all(compute, PROBLEMS_PER_RANK, dtype, dtype)

    def test_fewer_key_heads_and_other_value_head_dims(self):
        """Natively, as all head_dims are: no repetition and no padding."""
        generator = torch.Generator().manual_seed(0)

        def make(problem: Problem, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
            x = torch.randn(problem.batch, *problem.space, heads, head_dim, generator=generator)
            return x.to(dtype).requires_grad_()

        shapes = [(8, 2, 32, 64), (4, 1, 10, 20), (3, 3, 36, 14), (6, 2, 1, 3), (2, 1, 12, 300)]
        for (heads, key_heads, dim, value_dim), rank, dtype in itertools.product(
            shapes, RANKS, (torch.float32, torch.bfloat16)
        ):
            problem = problem_of(rank, dim)._replace(heads=heads, head_dim=dim, has_rpb=True)
            qkv = [make(problem, heads, dim, dtype), make(problem, key_heads, dim, dtype)]
            qkv.append(make(problem, key_heads, value_dim, dtype))
            with self.subTest(problem=problem, key_heads=key_heads, value_dim=value_dim, dtype=dtype):
                self.check(fused, problem, dtype, torch.float32, qkv)

    def test_large_windows(self):
        windows = [((300,), 151), ((40, 40), 21), ((12, 90), (3, 41)), ((20, 20), 20), ((17, 16), (16, 15))]
        windows.append(((6, 9, 20), (3, 5, 13)))
        for (space, kernel_size), is_causal in itertools.product(windows, (False, True)):
            problem = problem_of(len(space), 0)
            kernel_size = natten.checks.per_axis(kernel_size, len(space), "kernel_size", int)
            ones = (1,) * len(space)
            window = problem.window._replace(
                kernel_size=kernel_size, stride=ones, dilation=ones, is_causal=(is_causal,) * len(space)
            )
            problem = problem._replace(space=space, window=window, head_dim=32, has_rpb=True)
            with self.subTest(problem=problem):
                self.check(fused, problem, torch.float32, torch.float32)

    def test_one_image_and_head_on_many_threads(self):
        """Maps are cut into strips, whose gradients of keys overlap."""
        before = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, before)
        torch.set_num_threads(7)
        for space in ((500,), (61, 9), (9, 300), (40, 5, 6), (4, 5, 260)):
            problem = problem_of(len(space), 3)._replace(space=space, batch=1, heads=1, head_dim=16, has_rpb=True)
            for stride, causal in ((1, False), (2, False), (2, True)):
                window = [(3,), (stride,), (1,), (causal,)]
                window = problem.window._replace(
                    **{name: value * len(space) for name, value in zip(problem.window._fields, window, strict=True)}
                )
                for dtype in (torch.float32, torch.bfloat16):
                    with self.subTest(space=space, window=window, dtype=dtype):
                        self.check(fused, problem._replace(window=window), dtype, torch.float32)

    def test_many_lines(self):
        """More lines than the square root of the largest int32, in one strip and in several."""
        q, k, v = torch.randn(3, 1, 100_000, 4, 1, 8, generator=torch.Generator().manual_seed(0))
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(natten.na2d(q, k, v, 3, backend="cpu"))
        self.assertTrue(torch.equal(*results))
        for slab in (slice(0, 10), slice(-10, None)):
            part = natten.na2d(*(x[:, slab].double() for x in (q, k, v)), 3, backend="reference")
            inner = slice(0, 9) if slab.start == 0 else slice(1, None)  # the cut moves the window of the last line
            torch.testing.assert_close(results[0][:, slab][:, inner].double(), part[:, inner], rtol=0, atol=1e-5)


class PropertiesTest(unittest.TestCase):
    """Properties beyond numerical accuracy."""

    def setUp(self):
        generator = torch.Generator().manual_seed(0)
        self.qkv = torch.randn(2, 20, 23, 3, 3, 16, generator=generator)
        self.rpb = torch.randn(3, 9, 9, generator=generator)
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())

    def results(self, threads: int, **options) -> list[Tensor]:
        torch.set_num_threads(threads)
        qkv, rpb = self.qkv.clone().requires_grad_(), self.rpb.clone().requires_grad_()
        out = natten.na2d_qkvpacked(qkv, 5, rpb=rpb, backend="cpu", **options)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [qkv, rpb])]

    def test_repeated_calls_are_bitwise_equal(self):
        for threads in (1, 2, 5):
            first = self.results(threads)
            for _ in range(3):
                for x, y in zip(first, self.results(threads), strict=True):
                    self.assertTrue(torch.equal(x, y))

    def test_output_does_not_depend_on_the_number_of_threads(self):
        for factor in (1, 20):  # with large logits, single weights dominate
            self.qkv *= factor
            self.assertTrue(torch.equal(self.results(1)[0], self.results(4)[0]))

    def test_strided_views(self):
        """Views of a packed qkv tensor, heads-first memory, and rows that are not contiguous."""
        expected = natten.na2d(*(x.contiguous() for x in self.qkv.unbind(-3)), 5, backend="cpu")
        heads_first = [x.movedim(-2, 1).contiguous().movedim(1, -2) for x in self.qkv.unbind(-3)]
        every_other = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in self.qkv.unbind(-3)]
        for views in (self.qkv.unbind(-3), heads_first, every_other):
            self.assertTrue(torch.equal(natten.na2d(*views, 5, backend="cpu"), expected))

    def test_causal_windows_do_not_see_later_tokens(self):
        """Later tokens have no influence, however large they are, and receive no gradient."""
        q, k, v = torch.randn(3, 1, 40, 2, 8, generator=torch.Generator().manual_seed(1))
        expected = natten.na1d(q, k, v, 9, is_causal=True, backend="cpu")
        v[:, 20:] = 1e30
        k, v = k.requires_grad_(), v.requires_grad_()
        out = natten.na1d(q, k, v, 9, is_causal=True, backend="cpu")
        self.assertTrue(torch.equal(out[:, :20], expected[:, :20]))
        grads = torch.autograd.grad(out[:, :20].sum(), [k, v])
        for grad in grads:
            self.assertTrue(torch.equal(grad[:, 20:], torch.zeros_like(grad[:, 20:])))

    def test_slots_before_the_map_are_never_read(self):
        """What unfused operators are given in them, as weights or as gradients of logits, has no influence."""
        generator = torch.Generator().manual_seed(3)
        for rank, is_causal in itertools.product(RANKS, (True, (True, False, False), (False, False, True))):
            if isinstance(is_causal, tuple):
                is_causal = is_causal[3 - rank :]
            q, k, v = torch.randn(3, 1, 2, *(6, 7, 21)[3 - rank :], 12, generator=generator)
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            logits = function(rank, "_qk")(q, k, 5, is_causal=is_causal, backend="cpu")
            missing, zeros = logits.detach().isinf(), torch.zeros_like(logits)
            results = []
            for filling in (0.0, float("nan")):
                weights = logits.detach().masked_fill(missing, filling).requires_grad_()
                out = function(rank, "_av")(weights, v, 5, is_causal=is_causal, backend="cpu")
                grads = torch.autograd.grad(out.sum(), (weights, v))
                sent = torch.where(missing, filling, zeros + 1)
                results.append([out, *grads, *torch.autograd.grad(logits, (q, k), sent, retain_graph=True)])
            with self.subTest(rank=rank, is_causal=is_causal):
                for x, y in zip(*results, strict=True):
                    self.assertTrue(torch.equal(x, y))

    def test_a_nan_is_not_hidden(self):
        self.qkv[0, 3, 3, 0, 1, 2] = float("nan")
        out = natten.na2d_qkvpacked(self.qkv, 5, backend="cpu")
        self.assertTrue(out[0, 3, 3, 1].isnan().all())
        self.assertTrue(out[1].isfinite().all())

    def test_large_logits(self):
        """Softmax subtracts the largest logit first."""
        q, k, v = torch.randn(3, 1, 12, 1, 8, generator=torch.Generator().manual_seed(2)) * 100
        found = natten.na1d(q, k, v, 5, return_lse=True, backend="cpu")
        expected = natten.na1d(q.double(), k.double(), v.double(), 5, return_lse=True, backend="reference")
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)

    def test_unsupported_inputs_fall_back_to_the_reference(self):
        x = torch.zeros((1, 9, 2, 8), dtype=torch.float64)
        with self.assertRaisesRegex(ValueError, "backend='cpu' .*float64"):
            natten.na1d(x, x, x, 3, backend="cpu")
        self.assertEqual(natten.na1d(x, x, x, 3).shape, x.shape)

    def test_operators_called_directly_check_their_tensors(self):
        """The kernels read addresses, so nothing below the operators would notice a mismatch."""
        x, window = torch.zeros(1, 9, 2, 8), ([3], [1], [1], [0], 1.0, "cpu")
        attend = torch.ops.natten.attention_forward
        for arguments, text in (
            ((x, x[:, :8], x, None), "^key .*8"),
            ((x, x[..., :5], x, None), "^key .*head_dim 5"),
            ((x, x, x.half(), None), "^value .*float16"),
            ((x, x, x, torch.zeros(2, 3)), "^rpb .*3"),
        ):
            with self.assertRaisesRegex(ValueError, text):
                attend(*arguments, *window)
        heads_first = x.movedim(2, 1)
        with self.assertRaisesRegex(ValueError, "^key .*head_dim 5"):
            torch.ops.natten.query_key_forward(heads_first, heads_first[..., :5], None, [3], [1], [0], "cpu")


# Prints how many MiB the second of two backward passes adds to the process.
_MEMORY = """
import resource, sys, torch, natten

torch.set_num_threads(1)
def attend(kernel_size):
    x = torch.ones(1, 8192, 1, 8, requires_grad=True)
    rpb = torch.ones(1, 2 * kernel_size - 1, requires_grad=True)
    natten.na1d(x, x, x, kernel_size, is_causal=True, rpb=rpb, backend="cpu").sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print((-attend(63) + attend(4095)) // (2**20 if sys.platform == "darwin" else 2**10))
"""


@unittest.skipUnless(os.name == "posix", "the peak memory is read with getrusage")
class MemoryTest(unittest.TestCase):
    def test_long_windows_with_a_bias(self):
        """Memory grows with the window, not with its square, which would be 64 MiB for one float per pair."""
        done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertLess(int(done.stdout), 32)


def _attend_in_child(results) -> None:
    torch.set_num_threads(2)
    x = torch.ones(4, 30, 2, 8)
    results.put(natten.na1d(x, x, x, 5, backend="cpu").sum().item())


@unittest.skipUnless(hasattr(os, "fork"), "this system does not fork")
class ForkTest(unittest.TestCase):
    """A process forked after a parallel region, like a worker of a DataLoader."""

    def test_a_forked_child_does_not_hang(self):
        x = torch.ones(4, 30, 2, 8)
        before = torch.get_num_threads()
        self.addCleanup(torch.set_num_threads, before)
        torch.set_num_threads(2)
        expected = natten.na1d(x, x, x, 5, backend="cpu").sum().item()
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        child = context.Process(target=_attend_in_child, args=(results,))
        child.start()
        child.join(600)
        hangs = child.is_alive()
        child.kill()
        self.assertFalse(hangs)
        self.assertEqual(child.exitcode, 0)
        self.assertEqual(results.get(), expected)


class UnavailableTest(unittest.TestCase):
    """Without kernels for this machine, calls fall back to the reference."""

    def test_fallback_warns_once(self):
        def fail():
            raise build.Unavailable("no compiler; install one")

        library, build.cpu_library = build.cpu_library, fail
        self.addCleanup(setattr, build, "cpu_library", library)
        warn_fallback.cache_clear()
        x = torch.ones(1, 9, 2, 8)
        with self.assertWarnsRegex(RuntimeWarning, "no compiler") as caught:
            for _ in range(3):
                natten.na1d(x, x, x, 3)
        self.assertEqual(len([w for w in caught.warnings if w.category is RuntimeWarning]), 1)
        with self.assertRaisesRegex(ValueError, "install one"):
            natten.na1d(x, x, x, 3, backend="cpu")


if __name__ == "__main__":
    unittest.main()
