"""The operators torch.ops.natten.*, each with its backward as another one, and autograd around them.

They are opaque to torch.compile; the backend is chosen inside them, at run time. Fused attention keeps only its inputs,
its output and the logsumexp for backward: nothing of size tokens x window.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from natten import backends
from natten.backends.reference import accumulation_dtype
from natten.geometry import Axis, make_axes

# is_causal is a list of int since torch.jit.trace, on whose graphs fvcore counts, takes no list of bool.
_WINDOW = "int[] kernel_size, int[] stride, int[] dilation, int[] is_causal, float scale, str? backend"
_HALF_WINDOW = "int[] kernel_size, int[] dilation, int[] is_causal, str? backend"


def _define(name: str, schema: str) -> None:
    torch.library.define(f"natten::{name}", schema, tags=torch.Tag.pt2_compliant_tag)


def _axes(space, kernel_size, stride, dilation, is_causal):
    return make_axes(space, kernel_size, stride, dilation, [bool(causal) for causal in is_causal])


def _empty_like_table(rpb: Tensor | None, like: Tensor) -> Tensor:
    """What stands for the gradient of rpb: operators return no None."""
    return like.new_empty(0) if rpb is None else rpb.new_empty(rpb.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The way past the dispatcher and autograd, which take longer than a small problem
# ---------------------------------------------------------------------------------------------------------------------

_KINDS = (Tensor, torch.nn.Parameter)


def _is_seen(*tensors: Tensor | None) -> bool:
    """Whether something looks on: torch.compile, a tracer, a profiler, a mode or transform, another class of tensor."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
        or _is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(x is not None and (type(x) not in _KINDS or x.is_meta) for x in tensors)
        or torch.overrides.has_torch_function(tensors)
    )


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return True
    return not torch.compiler.is_compiling() and _is_transformed()


# ---------------------------------------------------------------------------------------------------------------------
# Fused attention, heads-last
# ---------------------------------------------------------------------------------------------------------------------

_define("attention_forward", f"(Tensor query, Tensor key, Tensor value, Tensor? rpb, {_WINDOW}) -> (Tensor, Tensor)")
_define(
    "attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor out, Tensor lse, "
    f"{_WINDOW}) -> (Tensor, Tensor)",
)


def _forward(query, key, value, rpb, kernel_size, stride, dilation, is_causal, scale, backend):
    axes = _axes(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    return backends.choose(query, backend).attention(query, key, value, rpb, axes, scale)


torch.library.impl("natten::attention_forward", "default")(_forward)


@torch.library.register_fake("natten::attention_forward")
def _forward_fake(query, key, value, rpb, kernel_size, stride, dilation, is_causal, scale, backend):
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))


def _backward(
    grad_out, grad_lse, query, key, value, rpb, out, lse, kernel_size, stride, dilation, is_causal, scale, backend
):
    axes = _axes(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    grad_qkv, grad_rpb = backends.choose(query, backend).attention_backward(
        grad_out, grad_lse, query, key, value, rpb, out, lse, axes, scale
    )
    return grad_qkv, _empty_like_table(None, query) if grad_rpb is None else grad_rpb


torch.library.impl("natten::attention_backward", "default")(_backward)


@torch.library.register_fake("natten::attention_backward")
def _backward_fake(
    grad_out, grad_lse, query, key, value, rpb, out, lse, kernel_size, stride, dilation, is_causal, scale, backend
):
    shape = (*query.shape[:-2], 3, *query.shape[-2:])
    return query.new_empty(shape), _empty_like_table(rpb, query)


def _attend(qkv, rpb, window):
    arguments = (*_split(qkv), rpb)
    forward = torch.ops.natten.attention_forward if _is_seen(*arguments) else _forward
    return forward(*arguments, *window)


def _attend_backward(grad_out, grad_lse, qkv, rpb, out, lse, window):
    arguments = (grad_out, grad_lse, *_split(qkv), rpb, out, lse)
    backward = torch.ops.natten.attention_backward if _is_seen(*arguments) else _backward
    return backward(*arguments, *window)


def _split(qkv: Sequence[Tensor]) -> Sequence[Tensor]:
    return qkv[0].unbind(-3) if len(qkv) == 1 else qkv


class _FusedAttention(torch.autograd.Function):
    """(rpb, window, qkv) or (rpb, window, query, key, value) -> (out, lse)."""

    @staticmethod
    def forward(rpb, window, *qkv):
        return _attend(qkv, rpb, window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rpb, ctx.window, *qkv = inputs
        ctx.save_for_backward(rpb, *output, *qkv)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        rpb, out, lse, *qkv = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_qkv, grad_rpb = _attend_backward(grad_out, grad_lse, qkv, rpb, out, lse, ctx.window)
        grads = (grad_qkv,) if len(qkv) == 1 else grad_qkv.unbind(-3)
        return (None if rpb is None else grad_rpb), None, *grads


def fused_attention(
    qkv: Sequence[Tensor], rpb: Tensor | None, axes: Sequence[Axis], scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of checked heads-last tensors: `qkv` is (query, key, value), or one packed tensor."""
    needs_grad = _needs_grad(*qkv, rpb)
    if not needs_grad and not _is_seen(*qkv, rpb):  # straight to the backend: small problems feel every step
        query, key, value = _split(qkv)
        return backends.choose(query, backend).attention(query, key, value, rpb, axes, scale)
    _, *window = (list(values) for values in zip(*axes, strict=True))
    window = (*window, scale, backend)
    return _FusedAttention.apply(rpb, window, *qkv) if needs_grad else _attend(qkv, rpb, window)


# ---------------------------------------------------------------------------------------------------------------------
# The two halves, heads-first
# ---------------------------------------------------------------------------------------------------------------------

_define("query_key_forward", f"(Tensor query, Tensor key, Tensor? rpb, {_HALF_WINDOW}) -> Tensor")
_define(
    "query_key_backward",
    f"(Tensor grad_attn, Tensor query, Tensor key, Tensor? rpb, {_HALF_WINDOW}) -> (Tensor, Tensor, Tensor)",
)
_define("weight_value_forward", f"(Tensor attn, Tensor value, {_HALF_WINDOW}) -> Tensor")
_define("weight_value_backward", f"(Tensor grad_out, Tensor attn, Tensor value, {_HALF_WINDOW}) -> (Tensor, Tensor)")


def _half_axes(heads_first: Tensor, kernel_size, dilation, is_causal):
    return _axes(heads_first.shape[2:-1], kernel_size, 1, dilation, is_causal)


@torch.library.impl("natten::query_key_forward", "default")
def _query_key(query, key, rpb, kernel_size, dilation, is_causal, backend):
    axes = _half_axes(query, kernel_size, dilation, is_causal)
    return backends.choose(query, backend).query_key(query, key, rpb, axes).contiguous()


@torch.library.register_fake("natten::query_key_forward")
def _query_key_fake(query, key, rpb, kernel_size, dilation, is_causal, backend):
    return query.new_empty((*query.shape[:-1], prod(kernel_size)))


@torch.library.impl("natten::query_key_backward", "default")
def _query_key_backward(grad_attn, query, key, rpb, kernel_size, dilation, is_causal, backend):
    axes = _half_axes(query, kernel_size, dilation, is_causal)
    grads = backends.choose(query, backend).query_key_backward(grad_attn, query, key, rpb, axes)
    grad_query, grad_key, grad_rpb = grads
    grad_rpb = _empty_like_table(None, query) if grad_rpb is None else grad_rpb
    return grad_query.contiguous(), grad_key.contiguous(), grad_rpb


@torch.library.register_fake("natten::query_key_backward")
def _query_key_backward_fake(grad_attn, query, key, rpb, kernel_size, dilation, is_causal, backend):
    return query.new_empty(query.shape), key.new_empty(key.shape), _empty_like_table(rpb, query)


@torch.library.impl("natten::weight_value_forward", "default")
def _weight_value(attn, value, kernel_size, dilation, is_causal, backend):
    axes = _half_axes(value, kernel_size, dilation, is_causal)
    return backends.choose(value, backend).weight_value(attn, value, axes).contiguous()


@torch.library.register_fake("natten::weight_value_forward")
def _weight_value_fake(attn, value, kernel_size, dilation, is_causal, backend):
    return value.new_empty(value.shape)


@torch.library.impl("natten::weight_value_backward", "default")
def _weight_value_backward(grad_out, attn, value, kernel_size, dilation, is_causal, backend):
    axes = _half_axes(value, kernel_size, dilation, is_causal)
    grads = backends.choose(value, backend).weight_value_backward(grad_out, attn, value, axes)
    return tuple(grad.contiguous() for grad in grads)


@torch.library.register_fake("natten::weight_value_backward")
def _weight_value_backward_fake(grad_out, attn, value, kernel_size, dilation, is_causal, backend):
    return attn.new_empty(attn.shape), value.new_empty(value.shape)


class _QueryKey(torch.autograd.Function):
    """(rpb, window, query, key) -> attn."""

    @staticmethod
    def forward(rpb, window, query, key):
        return torch.ops.natten.query_key_forward(query, key, rpb, *window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rpb, ctx.window, query, key = inputs
        ctx.save_for_backward(rpb, query, key)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_attn):
        rpb, query, key = ctx.saved_tensors
        grads = torch.ops.natten.query_key_backward(grad_attn, query, key, rpb, *ctx.window)
        grad_query, grad_key, grad_rpb = grads
        return (None if rpb is None else grad_rpb), None, grad_query, grad_key


class _WeightValue(torch.autograd.Function):
    """(window, attn, value) -> out."""

    @staticmethod
    def forward(window, attn, value):
        return torch.ops.natten.weight_value_forward(attn, value, *window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.window, attn, value = inputs
        ctx.save_for_backward(attn, value)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        return None, *torch.ops.natten.weight_value_backward(grad_out, *ctx.saved_tensors, *ctx.window)


def _half_window(axes: Sequence[Axis], backend: str | None) -> tuple:
    _, kernel_size, _, dilation, is_causal = (list(values) for values in zip(*axes, strict=True))
    return kernel_size, dilation, is_causal, backend


def query_key(query: Tensor, key: Tensor, rpb: Tensor | None, axes: Sequence[Axis], backend: str | None) -> Tensor:
    """Logits [B, H, X, W] of checked heads-first tensors."""
    window = _half_window(axes, backend)
    if not _needs_grad(query, key, rpb):
        return torch.ops.natten.query_key_forward(query, key, rpb, *window)
    return _QueryKey.apply(rpb, window, query, key)


def weight_value(attn: Tensor, value: Tensor, axes: Sequence[Axis], backend: str | None) -> Tensor:
    """Sums [B, H, X, d] of checked heads-first tensors."""
    window = _half_window(axes, backend)
    if not _needs_grad(attn, value):
        return torch.ops.natten.weight_value_forward(attn, value, *window)
    return _WeightValue.apply(window, attn, value)


# Function.apply asks for the signature at every call; made here, it need not be found out anew.
for _function in (_FusedAttention, _QueryKey, _WeightValue):
    _function.forward.__signature__ = inspect.signature(_function.forward)
