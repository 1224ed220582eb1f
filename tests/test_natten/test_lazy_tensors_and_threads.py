"""Inputs whose memory does not hold their values, scales that are tensors or vary, and backends chosen by threads."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import natten
from natten import backends
from test_natten.problems import function

SPACE = {1: (9,), 2: (7, 8), 3: (4, 5, 6)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def fused(rank, *qkv):
    return function(rank)(*qkv, 3)


def packed(rank, *qkv):
    return function(rank, "_qkvpacked")(torch.stack(qkv, -3), 3)


def unfused(rank, query, key, value):
    query, key, value = (x.movedim(-2, 1) for x in (query, key, value))
    return function(rank, "_av")(function(rank, "_qk")(query, key, 3).softmax(-1), value, 3)


# ----- lazy tensors -----


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("attend", [fused, packed, unfused])
@pytest.mark.parametrize("changed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["negated", "zero"])
def test_lazy_inputs(rank, attend, changed, kind):
    shape = (2, *SPACE[rank], 2, 4)
    qkv = list(torch.randn(3, *shape).unbind())
    if kind == "negated":
        qkv[changed] = torch.randn(shape, dtype=torch.complex64).conj().imag
        assert qkv[changed].is_neg()
    else:
        qkv[changed] = torch._efficientzerotensor(shape)
    expected = attend(rank, *(x.clone().resolve_neg() if kind == "negated" else x + 0.0 for x in qkv))
    torch.testing.assert_close(attend(rank, *qkv), expected)


def test_lazy_bias_and_gradient():
    query, key, value = torch.randn(3, 2, 7, 8, 2, 4, requires_grad=True).unbind()
    rpb = torch.randn(2, 5, 5, dtype=torch.complex64).conj().imag
    out = natten.na2d(query, key, value, 3, rpb=rpb)
    torch.testing.assert_close(out, natten.na2d(query, key, value, 3, rpb=rpb.resolve_neg()))
    grad = torch.randn(out.shape, dtype=torch.complex64).conj().imag
    found, expected = (torch.autograd.grad(out, query, g, retain_graph=True) for g in (grad, grad.resolve_neg()))
    torch.testing.assert_close(found, expected)


# ----- scale -----


def attend_composed(query, key, value, scale):
    return natten.na2d(query, key, value, 3, scale=scale, window_padding="zeros")


def attend(query, key, value, scale):
    return natten.na2d(query, key, value, 3, scale=scale)


@pytest.mark.parametrize("call", [attend, attend_composed])
def test_scale_as_tensor(call):
    qkv = torch.randn(3, 1, 7, 8, 2, 4).unbind()
    scale = torch.nn.Parameter(torch.tensor(0.3))
    for invalid in (scale, 2 * scale, torch.ones(2), "wide", [0.1, 0.2]):
        with pytest.raises(ValueError, match=r"^scale"):
            call(*qkv, invalid)
    expected = call(*qkv, 0.3)
    torch.testing.assert_close(call(*qkv, scale.detach()), expected)
    with torch.no_grad():
        torch.testing.assert_close(call(*qkv, scale), expected)
    layer = natten.NeighborhoodAttention2D(8, 2, 3, qk_scale=scale)
    with pytest.raises(ValueError, match=r"^scale"):
        layer(torch.randn(1, 7, 8, 8))


@pytest.mark.parametrize("call", [attend, attend_composed])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_share_a_graph(call, dynamic, dtype):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=counter)
    tolerance = 1e-5 if dtype is torch.float32 else 2**-6
    for scale in (0.1, 0.2, 0.5, 1.0, 2.0):
        qkv = torch.randn(3, 1, 7, 8, 2, 4, dtype=dtype).unbind()
        torch.testing.assert_close(compiled(*qkv, scale), call(*qkv, scale), atol=tolerance, rtol=tolerance)
    assert counter.frame_count <= 3


def test_gradient_with_a_scale_that_varies():
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for scale in (0.1, 0.2, 0.5):
        qkv = torch.randn(3, 1, 7, 8, 2, 4, requires_grad=True)
        grads = [torch.autograd.grad(call(*qkv.unbind(), scale).sin().sum(), qkv) for call in (compiled, attend)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_map_that_is_too_small(dynamic):
    def call(x, rank):
        return function(rank)(x, x, x, 7)

    for rank in (1, 2, 3):
        compiled = torch.compile(call, dynamic=dynamic, backend="eager")
        for length in (8, 9, 10):
            compiled(torch.randn(1, *[length] * rank, 1, 4), rank)
        with pytest.raises(ValueError, match=r"kernel_size.*axis 0"):
            compiled(torch.randn(1, *[5] * rank, 1, 4), rank)
        torch.compiler.reset()
        strict = torch.compile(call, dynamic=dynamic, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"raised exception ValueError.*kernel_size") as caught:
            strict(torch.randn(1, *[5] * rank, 1, 4), rank)
        assert "not implemented" not in str(caught.value)


# ----- threads -----


def run_in_threads(*functions):
    """Run functions in parallel and return their results; raise the first error."""
    found, errors = {}, []

    def run(index):
        try:
            found[index] = functions[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [found[index] for index in range(len(functions))]


def test_backend_of_a_thread():
    """Blocks of eight threads overlap; each sees its own backend, and none leaves it to others."""

    def work(index):
        name = ("reference", "cpu", None)[index % 3]
        seen = set()
        for _ in range(20):
            with natten.use_backend(name):
                time.sleep(0.001)
                seen.add(backends.requested(None))
            seen.add((backends.requested(None),))
        return seen == {name, (None,)}

    assert backends.requested(None) is None
    assert all(run_in_threads(*(lambda index=index: work(index) for index in range(8))))
    assert backends.requested(None) is None


def test_compiled_code_follows_the_backend_of_its_thread():
    compiled = torch.compile(lambda x: x * (2 if backends.requested(None) is None else 3), backend="eager")
    one = torch.ones(1)
    assert compiled(one) == 2
    with natten.use_backend("reference"):
        assert compiled(one) == 3
        assert run_in_threads(lambda: compiled(one).item()) == [2]
    assert compiled(one) == 2
