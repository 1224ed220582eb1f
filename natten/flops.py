"""How much arithmetic neighborhood attention takes: for fvcore, and for torch.utils.flop_counter.FlopCounterMode.

Two units. A MAC is one multiplication with its addition, and makes two FLOPs. fvcore counts MACs and calls them flops,
as papers on vision do, those on NAT and DiNAT among them; FlopCounterMode counts FLOPs.

With P the pairs of a query and a key of its window, summed over batch and heads, and d the head_dim, a forward pass
takes 2 P d MACs (query times key, weight times value) and a backward pass 5 P d: the logits once more, and the
gradients of weights, value, query and key, as torch counts its own attention. P is counted exactly: prod(kernel_size)
keys a query, fewer in causal windows. Softmax, scale and masks count nothing. Adding the relative position bias counts
P for fvcore, entry "rpb", as the published figures have it, and nothing for FlopCounterMode, which counts no addition.

Importing this module is what makes FlopCounterMode know the formulas: do so before the mode is made. `import natten`
does not, since torch.utils.flop_counter takes a third of a second to import. Only `get_flops` needs fvcore.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry, register_flop_formula

from natten import operators
from natten.backends import use_backend
from natten.geometry import Axis, first_key
from natten.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

__all__ = ["add_natten_handle", "get_flops"]


# ---------------------------------------------------------------------------------------------------------------------
# What each operator computes
# ---------------------------------------------------------------------------------------------------------------------


class _Work(NamedTuple):
    """The work of an operator.

    Attributes:
        products: multiplications of head_dim numbers that each pair of query and key takes.
        tensor: an argument that has the shape of a map, head_dim last.
        space: where its spatial axes are.
    """

    products: int
    tensor: str
    space: slice


_HEADS_LAST, _HEADS_FIRST = slice(1, -2), slice(2, -1)

# By name in torch.ops.natten. Arguments are found by name: kernel_size, dilation, is_causal, and stride and rpb if any.
_WORK = {
    "attention_forward": _Work(2, "query", _HEADS_LAST),
    "attention_backward": _Work(5, "query", _HEADS_LAST),
    "query_key_forward": _Work(1, "query", _HEADS_FIRST),
    "query_key_backward": _Work(2, "query", _HEADS_FIRST),
    "weight_value_forward": _Work(1, "value", _HEADS_FIRST),
    "weight_value_backward": _Work(2, "value", _HEADS_FIRST),
}


def _count(operator: str, arguments: dict[str, Any]) -> tuple[int, int]:
    """MACs in matrix products of one call, and pairs of query and key over batch and heads.

    Args:
        arguments: by name, with shapes in place of tensors.
    """
    products, tensor, where = _WORK[operator]
    *maps, head_dim = arguments[tensor]
    space = arguments[tensor][where]
    window = (arguments.get(name, [1] * len(space)) for name in ("kernel_size", "stride", "dilation", "is_causal"))
    pairs = prod([_axis_pairs(Axis(*values)) for values in zip(space, *window, strict=True)])
    pairs *= prod(maps) // prod(space)
    return products * pairs * head_dim, pairs


def _axis_pairs(axis: Axis) -> int:
    """Pairs of a query and a key of its window along one axis."""
    if not axis.is_causal:
        return axis.length * axis.kernel_size
    with _disable_current_modes():  # where a counter looks on, tensors may be fake
        position = torch.arange(int(axis.length), device="cpu")
        residue, s = position % axis.dilation, position // axis.dilation
        n = (axis.length - residue + axis.dilation - 1) // axis.dilation
        return int((s + 1 - first_key(axis, s, n).clamp(min=0)).sum())


def _by_name(operator: str, arguments: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments by the names that the operator's schema gives them."""
    schema = getattr(torch.ops.natten, operator).default._schema
    return {argument.name: value for argument, value in zip(schema.arguments, arguments, strict=False)}


# ---------------------------------------------------------------------------------------------------------------------
# torch.utils.flop_counter
# ---------------------------------------------------------------------------------------------------------------------


def _register(operator: str) -> None:
    """Tells torch the FLOPs of an operator, once."""

    def flops(*args, out_shape=None, **kwargs) -> int:
        macs, _ = _count(operator, _by_name(operator, args) | kwargs)
        return 2 * macs

    packet = getattr(torch.ops.natten, operator)
    if packet not in flop_registry:
        register_flop_formula(packet)(flops)


for _operator in _WORK:
    _register(_operator)


# ---------------------------------------------------------------------------------------------------------------------
# fvcore, which counts on the graph of torch.jit.trace
# ---------------------------------------------------------------------------------------------------------------------


def get_flops(model: nn.Module, input: Tensor | Sequence[Tensor], disable_warnings: bool = False) -> int:
    """MACs of a model's forward pass by fvcore's rules, the "flops" of the papers; whole batch.

    The published figures are those of a model in eval mode and one image. Attention is counted by its windows, also
    where a layer or `use_backend` asks for plain PyTorch.

    Args:
        model: runs once, in the mode it is in.
        input: what it takes, a tensor or a tuple of tensors. Their numbers do not matter, but they must not be on the
            meta device, on which fvcore cannot trace.
        disable_warnings: keep fvcore from logging which operators it does not count and which modules did not run.

    Raises:
        ImportError: if fvcore is not installed.
    """
    try:
        from fvcore.nn import FlopCountAnalysis
    except ModuleNotFoundError as error:
        raise ImportError("get_flops needs fvcore, which is not installed: run `pip install fvcore`.") from error
    counter = add_natten_handle(FlopCountAnalysis(model, input))
    if disable_warnings:
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with _through_operators(model):
        return int(counter.total())


def add_natten_handle(flop_counter):
    """Teaches an fvcore FlopCountAnalysis to count neighborhood attention, in MACs; returns it.

    Its `by_operator()` has the matrix products as "attention_forward" and the bias as "rpb". It sees calls that go
    through the operators, all but those for which `backend="reference"` asks for plain PyTorch.
    """
    return flop_counter.set_op_handle(**_HANDLES)


@contextmanager
def _through_operators(model: nn.Module) -> Iterator[None]:
    """Lets no layer run as plain PyTorch, whose tiles take more than their windows need."""
    layers = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)
    previous = {layer: layer.backend for layer in model.modules() if isinstance(layer, layers)}
    try:
        for layer in previous:
            layer.backend = None
        with use_backend(None):
            yield
    finally:
        for layer, backend in previous.items():
            layer.backend = backend


def _macs(operator: str, arguments: dict[str, Any]) -> Counter[str]:
    """One call as fvcore wants it: MACs by kind."""
    macs, pairs = _count(operator, arguments)
    return Counter({operator: macs} if arguments.get("rpb") is None else {operator: macs, "rpb": pairs})


def _operator_handle(operator: str) -> Callable[[list, list], Counter[str]]:
    """Counts one call of an operator."""
    return lambda inputs, outputs: _macs(operator, _by_name(operator, [_argument(value) for value in inputs]))


def _argument(value) -> Any:
    """What a value of the graph was: the shape of a tensor, a list, or the value of a constant."""
    if value.isCompleteTensor():
        return value.type().sizes()
    if value.node().kind() == "prim::ListConstruct":
        return [_argument(item) for item in value.node().inputs()]
    return value.toIValue()


def _function_handle(inputs: list, outputs: list) -> Counter[str]:
    """Counts the operators that an autograd function ran, of which the graph has one node with a graph of its own."""
    total = Counter()
    for node in outputs[0].node().g("Subgraph").nodes():
        if node.kind() in _HANDLES:
            total += _HANDLES[node.kind()](list(node.inputs()), list(node.outputs()))
    return total


_HANDLES = {f"natten::{operator}": _operator_handle(operator) for operator in _WORK}
_HANDLES |= {
    f"prim::PythonOp.{name}": _function_handle
    for name, value in vars(operators).items()
    if isinstance(value, type) and issubclass(value, torch.autograd.Function)
}
