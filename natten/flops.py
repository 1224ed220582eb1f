"""Count the arithmetic of neighborhood attention, for fvcore and torch.utils.flop_counter.FlopCounterMode.

A MAC is one multiplication and one addition, which are two FLOPs. fvcore counts MACs and calls them flops, like the NAT
and DiNAT papers. FlopCounterMode counts FLOPs.

Let P be the number of pairs of a query and a key of its window, summed over batch and heads, and d the head_dim.
- The forward pass takes 2 P d MACs: query times key, and weight times value.
- The backward pass takes 5 P d MACs: the logits again, and the gradients of weights, value, query and key. Torch
  counts its own attention in the same way.
- P is exact: prod(kernel_size) keys per query, fewer in causal windows.
- Softmax, scale and masks are not counted.
- Adding the relative position bias counts P MACs in fvcore (entry "rpb"), as in the published figures. FlopCounterMode
  does not count additions.

FlopCounterMode counts neighborhood attention only if this module was imported before the mode was created. `import
natten` does not import it, because importing torch.utils.flop_counter takes 0.3 s. Only `get_flops` requires fvcore.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry, register_flop_formula

from natten import ops
from natten.backends import use_backend
from natten.checks import BoolOrTuple, IntOrTuple, check_window
from natten.geometry import Axis, first_key
from natten.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

__all__ = [
    "add_natten_handle",
    "av_1d_flop",
    "av_2d_flop",
    "av_3d_flop",
    "av_flop",
    "fna_flop_count",
    "get_flops",
    "has_fvcore",
    "na_av_flop_count",
    "na_qk_flop_count",
    "qk_1d_flop",
    "qk_1d_rpb_flop",
    "qk_2d_flop",
    "qk_2d_rpb_flop",
    "qk_3d_flop",
    "qk_3d_rpb_flop",
    "qk_rpb_flop",
]


# ---------------------------------------------------------------------------------------------------------------------
# Work of each operator
# ---------------------------------------------------------------------------------------------------------------------


class _Work(NamedTuple):
    """The work of an operator.

    Attributes:
        products: number of dot products over head_dim for each pair of query and key.
        tensor: name of the argument whose shape is that of the map; its last axis is head_dim.
        space: the spatial axes of that argument.
        value_products: number of dot products over the head_dim of the value.
    """

    products: int
    tensor: str
    space: slice
    value_products: int = 0


_HEADS_LAST, _HEADS_FIRST = slice(1, -2), slice(2, -1)

_WORK = {  # by name in torch.ops.natten
    "attention_forward": _Work(1, "query", _HEADS_LAST, value_products=1),
    "attention_backward": _Work(3, "query", _HEADS_LAST, value_products=2),
    "query_key_forward": _Work(1, "query", _HEADS_FIRST),
    "query_key_backward": _Work(2, "query", _HEADS_FIRST),
    "weight_value_forward": _Work(1, "value", _HEADS_FIRST),
    "weight_value_backward": _Work(2, "value", _HEADS_FIRST),
}


def _count(operator: str, arguments: dict[str, Any]) -> tuple[int, int]:
    """Return the MACs in matrix products of one call, and its pairs of query and key over batch and heads.

    Args:
        arguments: the operator's arguments by name, with shapes instead of tensors.
    """
    products, tensor, where, value_products = _WORK[operator]
    *maps, head_dim = arguments[tensor]
    space = arguments[tensor][where]
    window = (arguments.get(name, [1] * len(space)) for name in ("kernel_size", "stride", "dilation", "is_causal"))
    pairs = prod([_axis_pairs(Axis(*values)) for values in zip(space, *window, strict=True)])
    pairs *= prod(maps) // prod(space)
    value_dim = arguments["value"][-1] if value_products else 0
    return pairs * (products * head_dim + value_products * value_dim), pairs


def _axis_pairs(axis: Axis) -> int:
    """Return the number of pairs of a query and a key of its window along one axis."""
    if not axis.is_causal:
        return axis.length * axis.kernel_size
    with _disable_current_modes():  # a counter may run in a mode that makes tensors fake
        position = torch.arange(int(axis.length), device="cpu")
        residue, s = position % axis.dilation, position // axis.dilation
        n = (axis.length - residue + axis.dilation - 1) // axis.dilation
        return int((s + 1 - first_key(axis, s, n).clamp(min=0)).sum())


def _by_name(operator: str, arguments: Sequence[Any]) -> dict[str, Any]:
    """Return positional arguments by their names in the schema of the operator."""
    schema = getattr(torch.ops.natten, operator).default._schema
    return {argument.name: value for argument, value in zip(schema.arguments, arguments, strict=False)}


# ---------------------------------------------------------------------------------------------------------------------
# torch.utils.flop_counter
# ---------------------------------------------------------------------------------------------------------------------


def _register(operator: str) -> None:
    """Register the FLOP formula of an operator, once per process."""

    def flops(*args, out_shape=None, **kwargs) -> int:
        macs, _ = _count(operator, _by_name(operator, args) | kwargs)
        return 2 * macs

    packet = getattr(torch.ops.natten, operator)
    if packet not in flop_registry:
        register_flop_formula(packet)(flops)


for _operator in _WORK:
    _register(_operator)


# ---------------------------------------------------------------------------------------------------------------------
# fvcore, which counts in the graph of torch.jit.trace
# ---------------------------------------------------------------------------------------------------------------------


def get_flops(model: nn.Module, input: Tensor | Sequence[Tensor], disable_warnings: bool = False) -> int:
    """Count the MACs of a model's forward pass with fvcore: the "flops" of the papers.

    Published figures are for a model in eval mode and a single image. Attention is counted by its windows, even if a
    layer or `use_backend` selects the reference backend.

    Args:
        model: the model; it runs once, in its current mode.
        input: its input, a tensor or a tuple of tensors. Values do not matter, but fvcore cannot trace the meta device.
        disable_warnings: suppress fvcore's warnings about uncounted operators and unused modules.

    Returns:
        MACs of the whole batch.

    Raises:
        ImportError: if fvcore is not installed.
    """
    try:
        from fvcore.nn import FlopCountAnalysis
    except ModuleNotFoundError as error:
        raise ImportError("fvcore is not installed; run `pip install fvcore`.") from error
    counter = add_natten_handle(FlopCountAnalysis(model, input))
    if disable_warnings:
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with _fastest_backend(model):
        return int(counter.total())


def add_natten_handle(flop_counter):
    """Make an fvcore FlopCountAnalysis count neighborhood attention.

    Args:
        flop_counter: the FlopCountAnalysis.

    Returns:
        The same object. Its `by_operator()` reports the MACs of matrix products as "attention_forward" and those of the
        bias as "rpb". Calls with backend="reference" are counted by fvcore itself, as the PyTorch operations that they
        run.
    """
    return flop_counter.set_op_handle(**_HANDLES)


@contextmanager
def _fastest_backend(model: nn.Module) -> Iterator[None]:
    """Select the fastest backend for all layers. The reference's tiles compute more than their windows require."""
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


def _operator_handle(operator: str) -> Callable[[list, list], Counter[str]]:
    """Return an fvcore handle that counts matrix products under the operator's name, and the bias as "rpb"."""

    def handle(inputs: list, outputs: list) -> Counter[str]:
        arguments = _by_name(operator, [_argument(value) for value in inputs])
        macs, pairs = _count(operator, arguments)
        return Counter({operator: macs} if arguments.get("rpb") is None else {operator: macs, "rpb": pairs})

    return handle


def _argument(value) -> Any:
    """Return the shape of a tensor of the graph, or the value of a list or constant."""
    if value.isCompleteTensor():
        return value.type().sizes()
    if value.node().kind() == "prim::ListConstruct":
        return [_argument(item) for item in value.node().inputs()]
    return value.toIValue()


def _function_handle(inputs: list, outputs: list) -> Counter[str]:
    """Count the operators in the subgraph of an autograd function."""
    total: Counter[str] = Counter()
    for node in outputs[0].node().g("Subgraph").nodes():
        if node.kind() in _HANDLES:
            total += _HANDLES[node.kind()](list(node.inputs()), list(node.outputs()))
    return total


_HANDLES = {f"natten::{operator}": _operator_handle(operator) for operator in _WORK}
_HANDLES |= {f"prim::PythonOp.{function.__name__}": _function_handle for function in ops.FUNCTIONS}


# ---------------------------------------------------------------------------------------------------------------------
# Helpers of older NATTEN releases
# ---------------------------------------------------------------------------------------------------------------------

has_fvcore = find_spec("fvcore") is not None


def _handle_of_any_call(inputs: list, outputs: list) -> int:
    """Return the MACs of a call of natten in a traced graph: an fvcore handle for its autograd functions.

    Code of older releases registers it as "prim::PythonOp.NeighborhoodAttention2DQKAutogradFunction" and the like.

    Args:
        inputs, outputs: values of the graph.
    """
    handle = _HANDLES.get(outputs[0].node().kind(), _function_handle)
    return sum(handle(inputs, outputs).values())


qk_1d_flop = qk_2d_flop = qk_3d_flop = _handle_of_any_call
qk_1d_rpb_flop = qk_2d_rpb_flop = qk_3d_rpb_flop = qk_rpb_flop = _handle_of_any_call
av_1d_flop = av_2d_flop = av_3d_flop = av_flop = _handle_of_any_call


def fna_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None,
    is_causal: BoolOrTuple | None,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Return the FLOPs of fused attention, or its MACs.

    Args:
        q_shape, k_shape, v_shape: shapes of query, key and value, heads-last or heads-first.
        kernel_size, dilation, is_causal: the window.
        is_heads_last: whether the shapes are [B, *space, heads, head_dim] instead of [B, heads, *space, head_dim].
        return_macs: return MACs instead of FLOPs.
    """
    shapes = {"query": q_shape, "value": v_shape}
    return _count_shapes("attention_forward", shapes, is_heads_last, (kernel_size, dilation, is_causal), return_macs)


def na_qk_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None,
    is_causal: BoolOrTuple | None,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Return the FLOPs of the logits of unfused attention, or their MACs. Arguments: see `fna_flop_count`."""
    window = kernel_size, dilation, is_causal
    return _count_shapes("query_key_forward", {"query": q_shape}, is_heads_last, window, return_macs)


def na_av_flop_count(
    a_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None,
    is_causal: BoolOrTuple | None,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Return the FLOPs of weights times values of unfused attention, or their MACs. See `fna_flop_count`."""
    window = kernel_size, dilation, is_causal
    return _count_shapes("weight_value_forward", {"value": v_shape}, is_heads_last, window, return_macs)


def _count_shapes(
    operator: str, shapes: dict[str, Sequence[int]], is_heads_last: bool, window: tuple, return_macs: bool
) -> int:
    """Count a call by the shapes of its tensors, which have the layout of the operator or the other one."""
    if is_heads_last != (_WORK[operator].space == _HEADS_LAST):
        shapes = {name: _other_layout(shape, is_heads_last) for name, shape in shapes.items()}
    kernel_size, dilation, is_causal = window
    rank = len(next(iter(shapes.values()))) - 3
    names = "kernel_size", "stride", "dilation", "is_causal"
    arguments = dict(zip(names, check_window(rank, kernel_size, 1, dilation, is_causal), strict=True))
    macs, _ = _count(operator, shapes | arguments)
    return macs if return_macs else 2 * macs


def _other_layout(shape: Sequence[int], is_heads_last: bool) -> tuple[int, ...]:
    batch, *middle, head_dim = shape
    return (batch, middle[-1], *middle[:-1], head_dim) if is_heads_last else (batch, *middle[1:], middle[0], head_dim)
