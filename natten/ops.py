"""Operators, autograd and composition: everything between the public functions and the backends.

- Operators: torch.ops.natten.* are opaque to torch.compile and choose their backend at run time. Each forward operator
  has a backward operator. Fused attention saves its inputs, output and logsumexp for backward, and nothing of size
  tokens x window. In eager mode the backend is called directly, bypassing the dispatcher.
- Autograd: a torch.autograd.Function around each pair of operators. Programs recorded by torch.jit.trace call the
  operators themselves, which therefore have the same gradients.
- Composition: features that no backend implements natively are built from features that all of them implement.

Inputs are already validated (natten/checks.py), except for `attend_composed` and calls of torch.ops.natten.*.

Shape suffixes: B batch, X the spatial axes, H heads, d head_dim, N additional tokens, W keys per window.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from natten import backends
from natten.backends import exported, reference
from natten.backends.reference import (
    accumulation_dtype,
    is_autocast,
    no_autocast,
    repeat_heads,
    shape_of_grads,
    split_grads,
)
from natten.checks import (
    Window,
    cached,
    check_composed,
    check_merged,
    check_scale,
    has_static_value,
    is_default_scale,
    make_axes,
)
from natten.geometry import Axis, Margin
from natten.tracing import fix_lengths, is_recorded, no_size_guards, untraced

# ---------------------------------------------------------------------------------------------------------------------
# Autocast
# ---------------------------------------------------------------------------------------------------------------------

T = TypeVar("T", Tensor, Tensor | None)

_AUTOCAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def apply_autocast(*tensors: T) -> tuple[T, ...]:
    """Return the tensors in the autocast dtype, like the inputs of a matrix product; float64 and integers are kept."""
    first = tensors[0]
    if first is None or not is_autocast(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(x.to(dtype) if x is not None and x.dtype in _AUTOCAST_DTYPES else x for x in tensors)


def unify_dtypes(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Return query and key unchanged or, under autocast and if their dtypes differ, in the autocast dtype.

    Unfused attention does not follow autocast otherwise: float16 would overflow on unscaled logits.
    """
    if query is None or key is None or query.dtype == key.dtype:
        return query, key
    return apply_autocast(query, key)


# ---------------------------------------------------------------------------------------------------------------------
# Operators
#
# is_causal is a list of int because torch.jit.trace, which fvcore uses, does not support lists of bool.
# ---------------------------------------------------------------------------------------------------------------------

_FUSED_WINDOW = "int[] kernel_size, int[] stride, int[] dilation, int[] is_causal, float scale, str? backend"
_UNFUSED_WINDOW = "int[] kernel_size, int[] dilation, int[] is_causal, str? backend"

for _name, _schema in {
    "attention_forward": f"(Tensor query, Tensor key, Tensor value, Tensor? rpb, {_FUSED_WINDOW}) -> (Tensor, Tensor)",
    "attention_backward": (
        "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor out, "
        f"Tensor lse, {_FUSED_WINDOW}) -> (Tensor, Tensor)"
    ),
    "query_key_forward": f"(Tensor query, Tensor key, Tensor? rpb, {_UNFUSED_WINDOW}) -> Tensor",
    "query_key_backward": (
        f"(Tensor grad_attn, Tensor query, Tensor key, Tensor? rpb, {_UNFUSED_WINDOW}) -> (Tensor, Tensor, Tensor)"
    ),
    "weight_value_forward": f"(Tensor attn, Tensor value, {_UNFUSED_WINDOW}) -> Tensor",
    "weight_value_backward": f"(Tensor grad_out, Tensor attn, Tensor value, {_UNFUSED_WINDOW}) -> (Tensor, Tensor)",
}.items():
    torch.library.define(f"natten::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)


@cached  # 2 us instead of 7 us per call of an operator on a 7x7 map
def _make_axes(space, kernel_size, stride, dilation, is_causal) -> tuple[Axis, ...]:
    return make_axes(space, kernel_size, stride, dilation, [bool(causal) for causal in is_causal])


def _empty_grad_rpb(rpb: Tensor | None, like: Tensor) -> Tensor:
    """Return an empty gradient of rpb; operators cannot return None."""
    return like.new_empty(0) if rpb is None else rpb.new_empty(rpb.shape)


# Fused attention, heads-last


@torch.library.impl("natten::attention_forward", "default")
def _attention_op(query, key, value, rpb, kernel_size, stride, dilation, is_causal, scale, backend):
    axes = _make_axes(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    return backends.choose(query, backend).attention(query, key, value, rpb, axes, scale)


@torch.library.register_fake("natten::attention_forward")
def _attention_fake(query, key, value, rpb, kernel_size, stride, dilation, is_causal, scale, backend):
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))


@torch.library.impl("natten::attention_backward", "default")
def _attention_backward_op(
    grad_out, grad_lse, query, key, value, rpb, out, lse, kernel_size, stride, dilation, is_causal, scale, backend
):
    axes = _make_axes(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    grad_qkv, grad_rpb = backends.choose(query, backend).attention_backward(
        grad_out, grad_lse, query, key, value, rpb, out, lse, axes, scale
    )
    return grad_qkv, _empty_grad_rpb(None, query) if grad_rpb is None else grad_rpb


@torch.library.register_fake("natten::attention_backward")
def _attention_backward_fake(
    grad_out, grad_lse, query, key, value, rpb, out, lse, kernel_size, stride, dilation, is_causal, scale, backend
):
    return query.new_empty(shape_of_grads(query, key, value)), _empty_grad_rpb(rpb, query)


# Unfused attention, heads-first


@torch.library.impl("natten::query_key_forward", "default")
def _query_key_op(query, key, rpb, kernel_size, dilation, is_causal, backend):
    axes = _make_axes(query.shape[2:-1], kernel_size, 1, dilation, is_causal)
    return backends.choose(query, backend).query_key(query, key, rpb, axes).contiguous()


@torch.library.register_fake("natten::query_key_forward")
def _query_key_fake(query, key, rpb, kernel_size, dilation, is_causal, backend):
    return query.new_empty((*query.shape[:-1], prod(kernel_size)))


@torch.library.impl("natten::query_key_backward", "default")
def _query_key_backward_op(grad_attn, query, key, rpb, kernel_size, dilation, is_causal, backend):
    axes = _make_axes(query.shape[2:-1], kernel_size, 1, dilation, is_causal)
    grads = backends.choose(query, backend).query_key_backward(grad_attn, query, key, rpb, axes)
    grad_query, grad_key, grad_rpb = grads
    grad_rpb = _empty_grad_rpb(None, query) if grad_rpb is None else grad_rpb
    return grad_query.contiguous(), grad_key.contiguous(), grad_rpb


@torch.library.register_fake("natten::query_key_backward")
def _query_key_backward_fake(grad_attn, query, key, rpb, kernel_size, dilation, is_causal, backend):
    return query.new_empty(query.shape), key.new_empty(key.shape), _empty_grad_rpb(rpb, query)


@torch.library.impl("natten::weight_value_forward", "default")
def _weight_value_op(attn, value, kernel_size, dilation, is_causal, backend):
    axes = _make_axes(value.shape[2:-1], kernel_size, 1, dilation, is_causal)
    return backends.choose(value, backend).weight_value(attn, value, axes).contiguous()


@torch.library.register_fake("natten::weight_value_forward")
def _weight_value_fake(attn, value, kernel_size, dilation, is_causal, backend):
    return value.new_empty(value.shape)


@torch.library.impl("natten::weight_value_backward", "default")
def _weight_value_backward_op(grad_out, attn, value, kernel_size, dilation, is_causal, backend):
    axes = _make_axes(value.shape[2:-1], kernel_size, 1, dilation, is_causal)
    grads = backends.choose(value, backend).weight_value_backward(grad_out, attn, value, axes)
    return tuple(grad.contiguous() for grad in grads)


@torch.library.register_fake("natten::weight_value_backward")
def _weight_value_backward_fake(grad_out, attn, value, kernel_size, dilation, is_causal, backend):
    return attn.new_empty(attn.shape), value.new_empty(value.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Direct calls
#
# For small maps the dispatcher and autograd take longer than the kernel, so eager calls skip them where possible.
# ---------------------------------------------------------------------------------------------------------------------

_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def _needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Return whether a compiler, tracer, profiler, dispatch mode or tensor subclass must see the operator."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
        or _is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(x is not None and (type(x) not in _PLAIN_TENSORS or x.is_meta or _is_lazy(x)) for x in tensors)
        or torch.overrides.has_torch_function(tensors)
    )


def _is_lazy(x: Tensor) -> bool:
    """Return whether the memory of a tensor does not hold its values: they are still to be negated, or all zero."""
    return x.is_neg() or x._is_zerotensor()


def _is_transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation is active."""
    return _is_functional() or forward_ad._current_level >= 0


def _is_functional() -> bool:
    """Return whether a transform of torch.func is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _is_forward_mode() -> bool:
    return forward_ad._current_level >= 0 and not torch.compiler.is_compiling()


def _needs_grad(*tensors: Tensor | None) -> bool:
    if is_recorded():
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return True
    return not torch.compiler.is_compiling() and _is_transformed()


def _is_counted() -> bool:
    """Return whether fvcore traces the call, which counts autograd functions by their names, also without gradients.

    Other traces, such as those of torch.jit.trace, contain operators instead, because they cannot save functions.
    """
    return torch.jit.is_tracing() and not is_recorded()


def _fused_window(axes: Sequence[Axis]) -> list[list[int]]:
    """Return kernel_size, stride, dilation and is_causal as operators take them."""
    return [list(values) for values in zip(*axes, strict=True)][1:]


def _unfused_window(axes: Sequence[Axis]) -> list[list[int]]:
    kernel_size, _, dilation, is_causal = _fused_window(axes)
    return [kernel_size, dilation, is_causal]


def _unpack(qkv: Sequence[Tensor]) -> Sequence[Tensor]:
    return qkv[0].unbind(-3) if len(qkv) == 1 else qkv


def _attention(
    qkv: Sequence[Tensor], rpb: Tensor | None, axes: Sequence[Axis], scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    query, key, value = _unpack(qkv)
    if _needs_dispatcher(query, key, value, rpb):
        return torch.ops.natten.attention_forward(query, key, value, rpb, *_fused_window(axes), scale, backend)
    return backends.choose(query, backend).attention(query, key, value, rpb, axes, scale)


def _attention_backward(grad_out, grad_lse, qkv, rpb, out, lse, axes, scale, backend) -> tuple[Tensor, Tensor | None]:
    query, key, value = _unpack(qkv)
    tensors = grad_out, grad_lse, query, key, value, rpb, out, lse
    if _needs_dispatcher(*tensors):
        return torch.ops.natten.attention_backward(*tensors, *_fused_window(axes), scale, backend)
    return backends.choose(query, backend).attention_backward(*tensors, axes, scale)


def _query_key(query, key, rpb, axes, backend) -> Tensor:
    if _needs_dispatcher(query, key, rpb):
        return torch.ops.natten.query_key_forward(query, key, rpb, *_unfused_window(axes), backend)
    return backends.choose(query, backend).query_key(query, key, rpb, axes).contiguous()


def _query_key_backward(grad_attn, query, key, rpb, axes, backend) -> tuple[Tensor, Tensor, Tensor | None]:
    tensors = grad_attn, query, key, rpb
    if _needs_dispatcher(*tensors):
        return torch.ops.natten.query_key_backward(*tensors, *_unfused_window(axes), backend)
    return backends.choose(query, backend).query_key_backward(*tensors, axes)


def _weight_value(attn, value, axes, backend) -> Tensor:
    if _needs_dispatcher(attn, value):
        return torch.ops.natten.weight_value_forward(attn, value, *_unfused_window(axes), backend)
    return backends.choose(value, backend).weight_value(attn, value, axes).contiguous()


def _weight_value_backward(grad_out, attn, value, axes, backend) -> tuple[Tensor, Tensor]:
    tensors = grad_out, attn, value
    if _needs_dispatcher(*tensors):
        return torch.ops.natten.weight_value_backward(*tensors, *_unfused_window(axes), backend)
    return backends.choose(value, backend).weight_value_backward(*tensors, axes)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------

_REFERENCE_ONLY = 'backend=None and compiled backends do not support {}; pass backend="reference".'


class _Function(torch.autograd.Function):
    """Base class of the functions of this module, which have first-order gradients and no torch.vmap."""

    @staticmethod
    def vmap(info, in_dims, *args):
        raise ValueError(_REFERENCE_ONLY.format("torch.vmap"))


def _first_order(backward: Callable) -> Callable:
    """Make a backward pass raise if its results are differentiated, like torch's `once_differentiable`."""

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_functional():
            return results
        message = _REFERENCE_ONLY.format("second-order gradients")
        raise_later = torch._C._functions.DelayedError(message.encode(), len(results))
        return raise_later(*[x if x is None else x.detach().requires_grad_() for x in results])  # type: ignore[arg-type]

    return wrapper


class _Attention(_Function):
    """(rpb, axes, scale, backend, qkv) or (rpb, axes, scale, backend, query, key, value) -> (out, lse)."""

    @staticmethod
    def forward(rpb, axes, scale, backend, *qkv):
        return _attention(qkv, rpb, axes, scale, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rpb, ctx.axes, ctx.scale, ctx.backend, *qkv = inputs
        ctx.save_for_backward(rpb, *output, *qkv)
        ctx.set_materialize_grads(False)

    @staticmethod
    @_first_order
    def backward(ctx, grad_out, grad_lse):
        rpb, out, lse, *qkv = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_qkv, grad_rpb = _attention_backward(
            grad_out, grad_lse, qkv, rpb, out, lse, ctx.axes, ctx.scale, ctx.backend
        )
        grads = (grad_qkv,) if len(qkv) == 1 else split_grads(grad_qkv, *qkv)
        return (None if rpb is None else grad_rpb), None, None, None, *grads


class _QueryKey(_Function):
    """(query, key, rpb, axes, backend) -> attn."""

    @staticmethod
    def forward(query, key, rpb, axes, backend):
        return _query_key(query, key, rpb, axes, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, rpb, ctx.axes, ctx.backend = inputs
        ctx.save_for_backward(query, key, rpb)

    @staticmethod
    @_first_order
    def backward(ctx, grad_attn):
        query, key, rpb = ctx.saved_tensors
        grad_query, grad_key, grad_rpb = _query_key_backward(grad_attn, query, key, rpb, ctx.axes, ctx.backend)
        return grad_query, grad_key, (None if rpb is None else grad_rpb), None, None


class _WeightValue(_Function):
    """(attn, value, axes, backend) -> out."""

    @staticmethod
    def forward(attn, value, axes, backend):
        return _weight_value(attn, value, axes, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        attn, value, ctx.axes, ctx.backend = inputs
        ctx.save_for_backward(attn, value)

    @staticmethod
    @_first_order
    def backward(ctx, grad_out):
        attn, value = ctx.saved_tensors
        return *_weight_value_backward(grad_out, attn, value, ctx.axes, ctx.backend), None, None


# Forward-mode differentiation. Unfused attention is bilinear, so that a tangent is a sum of two calls. These are
# separate classes because torch.compile does not support functions with a jvp.


class _QueryKeyForwardMode(_QueryKey):
    """`_QueryKey` with forward-mode differentiation."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _QueryKey.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def jvp(ctx, query_tangent, key_tangent, rpb_tangent, *_):
        query, key, _ = ctx.saved_tensors
        tangent = query_key(query_tangent, key, rpb_tangent, ctx.axes, ctx.backend)
        tangent = tangent + query_key(query, key_tangent, None, ctx.axes, ctx.backend)
        return tangent.masked_fill(tangent.isneginf(), 0.0)  # slots of causal windows before the map are constants


class _WeightValueForwardMode(_WeightValue):
    """`_WeightValue` with forward-mode differentiation."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _WeightValue.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx, attn_tangent, value_tangent, *_):
        attn, value = ctx.saved_tensors
        tangent = weight_value(attn_tangent, value, ctx.axes, ctx.backend)
        return tangent + weight_value(attn, value_tangent, ctx.axes, ctx.backend)


# Function.apply inspects the signature of `forward` in every call; a stored signature saves that time.
for _function in (_Attention, _QueryKey, _WeightValue):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]


def _by_rank(function: type[torch.autograd.Function], name: str) -> dict[int, Any]:
    """Return a subclass for each number of axes, named as in older releases: FLOP counters find functions by name."""
    return {rank: type(name.format(rank), (function,), {"__module__": __name__}) for rank in (1, 2, 3)}


_ATTENTION = _by_rank(_Attention, "FusedNeighborhoodAttention{}D")
_QUERY_KEY = _by_rank(_QueryKey, "NeighborhoodAttention{}DQKAutogradFunction")
_WEIGHT_VALUE = _by_rank(_WeightValue, "NeighborhoodAttention{}DAVAutogradFunction")
FUNCTIONS = tuple(function for by_rank in (_ATTENTION, _QUERY_KEY, _WEIGHT_VALUE) for function in by_rank.values())


def _register_gradients(name: str, tensors: int, keeps_outputs: bool = False) -> None:
    """Give an operator the gradients of its function above, for programs recorded by torch.jit.trace.

    Args:
        name: of the operator, without "_forward".
        tensors: number of its arguments that are tensors; they come first.
        keeps_outputs: whether the backward operator takes its outputs.
    """
    operator = getattr(torch.ops.natten, f"{name}_backward")

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:tensors], *(output if keeps_outputs else ()))
        ctx.window = inputs[tensors:]

    @_first_order
    def backward(ctx, *grads_out):
        saved = ctx.saved_tensors
        grads = operator(*grads_out, *saved, *ctx.window)
        if name == "attention":
            grads = (*split_grads(grads[0], *saved[:3]), grads[1])
        grads = [None if x is None else grad for x, grad in zip(saved, grads, strict=False)]
        return *grads, *[None] * len(ctx.window)

    torch.library.register_autograd(f"natten::{name}_forward", backward, setup_context=setup_context)


_register_gradients("attention", 4, keeps_outputs=True)
_register_gradients("query_key", 3)
_register_gradients("weight_value", 2)


@untraced
def _default_scale(query: Tensor) -> float:
    return query.shape[-1] ** -0.5


def _is_plain(backend: str | None) -> bool:
    """Return whether a call runs as ordinary PyTorch operations; torch.jit.trace would fix the sizes of their maps."""
    return backends.is_plain(backend) and not is_recorded()


def attend(
    qkv: Sequence[Tensor], rpb: Tensor | None, axes: tuple[Axis, ...], scale: float | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Compute fused attention that the backends support natively.

    Args:
        qkv: query, key and value [B, X, H, d], or one packed tensor [B, X, 3, H, d]. Key and value may have fewer
            heads, and value another head_dim.
        rpb: relative position bias [H, 2K-1 per axis], or None.
        axes: the validated axes.
        scale: factor on the logits; None for head_dim ** -0.5.
        backend: name of a backend, or None.

    Returns:
        Output [B, X, H, value head_dim] in the query's dtype and logsumexp [B, X, H] in the accumulation dtype.
    """
    qkv, scale = _apply_symbolic_scale(qkv, scale)
    backend = backends.requested(backend)
    if backends.is_exported():
        query, key, value = _unpack([fix_lengths(x, 1, [axis.length for axis in axes]) for x in qkv])
        with no_size_guards():
            return exported.attention(query, key, value, rpb, axes, scale)
    if _is_plain(backend) or _is_forward_mode():
        query, key, value = _unpack(qkv)
        return reference.attention(query, key, value, rpb, axes, scale)
    if _needs_grad(*qkv, rpb) or _is_counted():
        return _ATTENTION[len(axes)].apply(rpb, axes, scale, backend, *qkv)
    return _attention(qkv, rpb, axes, scale, backend)


def _apply_symbolic_scale(qkv: Sequence[Tensor], scale: float | None) -> tuple[Sequence[Tensor], float]:
    """Return qkv and a factor on the logits that torch.compile may treat as a constant.

    Operators take numbers as constants, so each value of `scale` would need its own graph. A factor of a tensor may
    vary; a scale that does is therefore moved to the query.
    """
    default = _default_scale(qkv[0])
    scale = default if is_default_scale(scale) else check_scale(scale)
    if scale is default or not torch.compiler.is_compiling() or has_static_value(scale):
        return qkv, scale
    query, key, value = _unpack(qkv)
    return (query * (scale / default), key, value), default


def query_key(query: Tensor, key: Tensor, rpb: Tensor | None, axes: tuple[Axis, ...], backend: str | None) -> Tensor:
    """Compute the unscaled logits [B, H, X, W] of heads-first query and key [B, H, X, d]."""
    backend = backends.requested(backend)
    if _is_plain(backend):
        query, key = (fix_lengths(x, 2, [axis.length for axis in axes]) for x in (query, key))
        with no_size_guards():
            return reference.query_key(query, key, rpb, axes)
    if _needs_grad(query, key, rpb) or _is_counted():
        function = _QueryKeyForwardMode if _is_forward_mode() else _QUERY_KEY[len(axes)]
        return function.apply(query, key, rpb, axes, backend)
    return _query_key(query, key, rpb, axes, backend)


def weight_value(attn: Tensor, value: Tensor, axes: tuple[Axis, ...], backend: str | None) -> Tensor:
    """Compute the sums [B, H, X, d] of heads-first values [B, H, X, d], weighted by attn [B, H, X, W]."""
    backend = backends.requested(backend)
    if _is_plain(backend):
        attn, value = (fix_lengths(x, 2, [axis.length for axis in axes]) for x in (attn, value))
        with no_size_guards():
            return reference.weight_value(attn, value, axes)
    if _needs_grad(attn, value) or _is_counted():
        function = _WeightValueForwardMode if _is_forward_mode() else _WEIGHT_VALUE[len(axes)]
        return function.apply(attn, value, axes, backend)
    return _weight_value(attn, value, axes, backend)


# ---------------------------------------------------------------------------------------------------------------------
# Composition
# ---------------------------------------------------------------------------------------------------------------------


def attend_composed(
    rank: int,
    qkv: Sequence[Tensor],
    window: Window,
    rpb: Tensor | None,
    scale: float | None,
    backend: str | None,
    additional: tuple[Tensor | None, Tensor | None],
    window_padding: str,
) -> tuple[Tensor, Tensor]:
    """Compute fused attention with any feature, by reducing it to what the backends support.

    - window_padding "zeros" and "valid": the map is padded with zeros so that no window of interest is shifted, and
      the output is cropped.
    - Additional keys and values: the attention to them alone is merged with the attention to the window by logsumexp.

    Args:
        rank: number of spatial axes.
        qkv: query, key and value, heads-last, not validated.
        window: kernel_size, stride, dilation and is_causal, not validated.
        rpb: relative position bias, not validated, or None.
        scale: factor on the logits; None for head_dim ** -0.5.
        backend: name of a backend, or None.
        additional: keys and values [B, N, H, d], or None and None, not validated.
        window_padding: "shift", "zeros" or "valid", not validated.

    Returns:
        Output [B, X, H, value head_dim] and logsumexp [B, X, H].

    Raises:
        ValueError: naming the argument that does not fit.
    """
    query, key, value = apply_autocast(*qkv)
    extra_key, extra_value = apply_autocast(*additional)
    axes, margins = check_composed(rank, query, key, value, rpb, *window, extra_key, extra_value, window_padding)
    scale = _default_scale(query) if is_default_scale(scale) else check_scale(scale)

    query, key, value = (_pad_map(x, margins) for x in (query, key, value))
    out, lse = attend((query, key, value), rpb, axes, scale, backend)
    query, out, lse = (_crop_map(x, margins) for x in (query, out, lse))
    if extra_key is not None and extra_value is not None and extra_key.shape[1] > 0:
        extra_out, extra_lse = attend_to_all(query, extra_key, extra_value, scale)
        out, lse = merge_attentions((out, extra_out), (lse, extra_lse))
    return out.contiguous(), lse.contiguous()


def _pad_map(x_BXHd: Tensor, margins: Sequence[Margin]) -> Tensor:
    if not any(margin.before or margin.after for margin in margins):
        return x_BXHd
    # F.pad takes the last axis first, and both ends of each.
    ends = (end for margin in reversed(margins) for end in (margin.before, margin.after))
    return F.pad(x_BXHd, (0, 0, 0, 0, *ends))


def _crop_map(x: Tensor, margins: Sequence[Margin]) -> Tensor:
    """Crop a padded map [B, X, H] or [B, X, H, d] to the queries of interest."""
    for dim, margin in enumerate(margins, start=1):
        x = x.narrow(dim, margin.first, margin.queries)
    return x


def query_key_composed(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    axes: tuple[Axis, ...],
    backend: str | None,
    additional_keys: Tensor,
) -> Tensor:
    """Compute logits [B, H, X, W + N] as `query_key`, with those of additional keys [B, H, N, d] at the end."""
    with no_autocast(query):
        extra_BHXN = (query.flatten(2, -2) @ additional_keys.transpose(-2, -1)).unflatten(2, query.shape[2:-1])
        return torch.cat((query_key(query, key, rpb, axes, backend), extra_BHXN), -1)


def weight_value_composed(
    attn: Tensor, value: Tensor, axes: tuple[Axis, ...], backend: str | None, additional_values: Tensor
) -> Tensor:
    """Compute sums as `weight_value`, with the weights [B, H, X, W + N] also of additional values [B, H, N, d]."""
    with no_autocast(value):
        tokens = additional_values.shape[2]
        attn_BHXW, extra_BHXN = attn.split((attn.shape[-1] - tokens, tokens), -1)
        extra_BHXd = (extra_BHXN.flatten(2, -2) @ additional_values).unflatten(2, value.shape[2:-1])
        return weight_value(attn_BHXW, value, axes, backend) + extra_BHXd


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Merge attentions of the same queries to disjoint sets of keys into one attention to all of these keys.

    Each output is weighted by the softmax of its logsumexp. Gradients flow to outputs and logsumexps, and are those of
    attention to all keys.

    Args:
        outputs: two or more outputs [..., heads, head_dim] with the same shape and dtype, heads-last.
        lse_tensors: the logsumexp of each output, [..., heads]. -inf marks a set without keys; at least one
            logsumexp per query must be finite.
        torch_compile, use_autograd_fix: ignored; accepted for compatibility with NATTEN 0.20 and later.

    Returns:
        The merged output in the dtype of the outputs, and the merged logsumexp in float32 (float64 for float64).

    Raises:
        ValueError: naming the tensor that does not fit.
    """
    check_merged(outputs, lse_tensors)
    dtype = accumulation_dtype(outputs[0].dtype)
    with no_autocast(outputs[0]):
        lses = torch.stack([lse.to(dtype) for lse in lse_tensors])
        weights = lses.softmax(0).unsqueeze(-1)
        out = sum(weight * output for weight, output in zip(weights, outputs, strict=True))
        return out.to(outputs[0].dtype), lses.logsumexp(0)


def attend_to_all(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute output and logsumexp of queries [B, X, H, d] that all attend to all keys [B, N, H, d].

    Key and value may have fewer heads, and value another head_dim. If is_causal, query i attends to keys up to i.
    """
    with no_autocast(query):
        dtype = accumulation_dtype(query.dtype)
        q_BHXd = query.flatten(1, -3).movedim(-2, 1).to(dtype) * scale
        k_BHNd, v_BHNd = (repeat_heads(x, query.shape[-2]).movedim(-2, 1).to(dtype) for x in (key, value))
        logits_BHXN = q_BHXd @ k_BHNd.transpose(-2, -1)
        if is_causal:
            is_later_XN = torch.ones(logits_BHXN.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
            logits_BHXN = logits_BHXN.masked_fill(is_later_XN, float("-inf"))
        out_BXHd = (logits_BHXN.softmax(-1) @ v_BHNd).movedim(1, -2)
        lse_BXH = logits_BHXN.logsumexp(-1).movedim(1, -1)
        space = query.shape[:-1]
        return out_BXHd.reshape(*space, value.shape[-1]).to(query.dtype), lse_BXH.reshape(space)
