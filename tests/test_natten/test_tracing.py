"""torch.jit.trace, torch.fx, fake tensors and jvp; one sentence for torch.jit.script, nested tensors and torch.vmap."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import natten

SIZES = {1: (13,), 2: (9, 10), 3: (5, 6, 7)}
OTHER_SIZES = {1: [(4,), (30,)], 2: [(4, 12), (14, 3)], 3: [(2, 8, 3), (7, 6, 5)]}
QKV = (2, 9, 10, 2, 4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(rank: int, **arguments) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"kernel_size": 3, "dilation": (2, 1, 1)[:rank], **arguments}
    return getattr(natten, f"NeighborhoodAttention{rank}D")(8, 2, **arguments)


def traced(module: nn.Module, *inputs: Tensor) -> nn.Module:
    """Return the traced module, saved and loaded; the trace may not depend on a size, of which torch would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        program = torch.jit.trace(module, inputs)
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


def results(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of inputs and parameters."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    out = module(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [*inputs, *module.parameters()])]


# ----- torch.jit.trace -----


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2},
        {"is_causal": True, "rel_pos_bias": False},
        {"attn_drop": 1e-9},  # too small to drop anything, but uses the unfused functions
    ],
    ids=["plain", "stride", "causal", "unfused"],
)
@pytest.mark.parametrize("rank", SIZES)
def test_traced_layer(rank, arguments, backend):
    """Outputs and gradients at the traced size and at others, at which the layer may have to pad."""
    module = layer(rank, backend=backend, **arguments)
    program = traced(module, random(2, *SIZES[rank], 8))
    for space in (SIZES[rank], *OTHER_SIZES[rank]):
        x = random(3, *space, 8)
        for found, expected in zip(results(program, x), results(module, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Functions(nn.Module):
    """Fused and unfused functions with separate query, key and value."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        fused = natten.na2d(query, key, value, 3, dilation=(2, 1))
        query, key, value = (x.movedim(-2, 1) for x in (query, key, value))
        return fused + natten.na2d_av(natten.na2d_qk(query, key, 3).softmax(-1), value, 3).movedim(1, -2)


def test_traced_functions():
    program = traced(Functions(), *random(3, *QKV))
    for shape in (QKV, (1, 7, 12, 2, 4)):
        inputs = random(3, *shape, seed=1)
        for found, expected in zip(results(program, *inputs), results(Functions(), *inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ----- torch.fx -----


def test_symbolic_trace():
    """A layer is one node, like the layers of torch.nn."""
    module = nn.Sequential(nn.LayerNorm(8), layer(2))
    graph = fx.symbolic_trace(module)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    for space in SIZES[2], (4, 5):
        torch.testing.assert_close(graph(random(1, *space, 8)), module(random(1, *space, 8)))


# ----- fake tensors -----


@pytest.mark.parametrize("rank", SIZES)
def test_fake_and_meta_layers(rank):
    for context in (FakeTensorMode(), torch.device("meta")):
        with context:
            out = layer(rank)(torch.empty(2, *SIZES[rank], 8))
        assert out.shape == (2, *SIZES[rank], 8)


# ----- derivatives of other kinds -----


def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor, backend: str | None = None) -> Tensor:
    return natten.na2d(query, key, value, 3, dilation=(2, 1), rpb=rpb, backend=backend)


def inputs_of_attend() -> list[Tensor]:
    return [*random(3, *QKV).double().float(), random(2, 5, 5)]


def test_forward_mode():
    inputs = inputs_of_attend()
    tangents = [random(*x.shape, seed=7) for x in inputs]
    out, tangent = torch.func.jvp(attend, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(out, attend(*inputs))
    _, transposed = torch.autograd.functional.vjp(attend, tuple(inputs), torch.ones_like(out))
    expected = sum((a * b).sum() for a, b in zip(transposed, tangents, strict=True))
    torch.testing.assert_close(tangent.sum(), expected, rtol=1e-4, atol=1e-3)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(attend(*duals)).tangent, tangent)


def test_forward_mode_of_a_layer():
    module, x = layer(2), random(1, 9, 10, 8)
    _, tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))
    step = 1e-2
    expected = (module(x + step) - module(x - step)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-2, atol=1e-3)


def test_second_order_gradients_require_the_reference():
    inputs = [x.requires_grad_() for x in inputs_of_attend()]
    (gradient,) = torch.autograd.grad(attend(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend=.*second-order.*reference"):
        gradient.sum().backward()
    (gradient,) = torch.autograd.grad(attend(*inputs, "reference").square().sum(), inputs[0], create_graph=True)
    gradient.square().sum().backward()
    assert inputs[1].grad.abs().max() > 0


def test_vmap_requires_the_reference():
    query, key, value = (x.expand(3, *x.shape).contiguous() for x in random(3, *QKV))
    for function in (natten.na2d, torch.func.grad(lambda *qkv: natten.na2d(*qkv, 3).sum())):
        with pytest.raises(ValueError, match=r"backend=.*vmap.*reference"):
            torch.vmap(lambda *qkv, f=function: f(*qkv, 3) if f is natten.na2d else f(*qkv))(query, key, value)
    out = torch.vmap(lambda *qkv: natten.na2d(*qkv, 3, backend="reference"))(query, key, value)
    torch.testing.assert_close(out[1], natten.na2d(query[1], key[1], value[1], 3), rtol=1e-5, atol=1e-5)


# ----- not supported -----


def test_script():
    with pytest.raises(ValueError, match=r"NeighborhoodAttention2D.*torch.jit.trace"):
        torch.jit.script(nn.Sequential(layer(2)))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    q = torch.nested.nested_tensor([random(9, 10, 2, 4), random(7, 10, 2, 4)], layout=layout)
    calls = {
        "input": lambda: layer(2)(torch.nested.nested_tensor([random(9, 10, 8), random(7, 10, 8)], layout=layout)),
        "query": lambda: natten.na2d(q, q, q, 3),
        "qkv": lambda: natten.na2d_qkvpacked(q, 3),
        "attn": lambda: natten.na2d_av(q, q, 3),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name} is a nested tensor"):
            call()
    with pytest.raises(ValueError, match="query is a nested tensor"):
        natten.na2d_qk(q, q, 3)
