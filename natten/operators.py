"""The two fused operators, torch.ops.natten.attention_forward and attention_backward, and autograd around them.

The operators are opaque to torch.compile; the backend is chosen inside them, at run time. Between forward and backward
only the inputs, the output and the logsumexp are kept: nothing of size tokens x window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from natten import dispatch
from natten.geometry import Axis, make_axes
from natten.precision import accumulation_dtype

_WINDOW = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale, str? backend"

torch.library.define(
    "natten::attention_forward",
    f"(Tensor query, Tensor key, Tensor value, Tensor? rpb, {_WINDOW}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "natten::attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor out, Tensor lse, "
    f"{_WINDOW}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("natten::attention_forward", "default")
def _forward(query, key, value, rpb, kernel_size, stride, dilation, is_causal, scale, backend):
    axes = make_axes(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    return dispatch.choose(query, key, value, rpb, axes, backend).attention(query, key, value, rpb, axes, scale)


@torch.library.register_fake("natten::attention_forward")
def _forward_fake(query, key, value, rpb, kernel_size, stride, dilation, is_causal, scale, backend):
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))


@torch.library.impl("natten::attention_backward", "default")
def _backward(
    grad_out, grad_lse, query, key, value, rpb, out, lse, kernel_size, stride, dilation, is_causal, scale, backend
):
    axes = make_axes(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    grad_qkv, grad_rpb = dispatch.choose(query, key, value, rpb, axes, backend).attention_backward(
        grad_out, grad_lse, query, key, value, rpb, out, lse, axes, scale
    )
    return grad_qkv, query.new_empty(0) if grad_rpb is None else grad_rpb


@torch.library.register_fake("natten::attention_backward")
def _backward_fake(
    grad_out, grad_lse, query, key, value, rpb, out, lse, kernel_size, stride, dilation, is_causal, scale, backend
):
    shape = (*query.shape[:-2], 3, *query.shape[-2:])
    return query.new_empty(shape), query.new_empty(0) if rpb is None else rpb.new_empty(rpb.shape)


class _FusedAttention(torch.autograd.Function):
    """(rpb, window, qkv) or (rpb, window, query, key, value) -> (out, lse)."""

    @staticmethod
    def forward(rpb, window, *qkv):
        query, key, value = _split(qkv)
        return torch.ops.natten.attention_forward(query, key, value, rpb, *window)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rpb, ctx.window, *qkv = inputs
        ctx.save_for_backward(rpb, *output, *qkv)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        rpb, out, lse, *qkv = ctx.saved_tensors
        query, key, value = _split(qkv)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_qkv, grad_rpb = torch.ops.natten.attention_backward(
            grad_out, grad_lse, query, key, value, rpb, out, lse, *ctx.window
        )
        grads = (grad_qkv,) if len(qkv) == 1 else grad_qkv.unbind(-3)
        return (None if rpb is None else grad_rpb), None, *grads


def _split(qkv: Sequence[Tensor]) -> Sequence[Tensor]:
    return qkv[0].unbind(-3) if len(qkv) == 1 else qkv


def fused_attention(
    qkv: Sequence[Tensor], rpb: Tensor | None, axes: Sequence[Axis], scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of checked heads-last tensors: `qkv` is (query, key, value), or one packed tensor."""
    _, *window = (list(values) for values in zip(*axes, strict=True))
    return _FusedAttention.apply(rpb, (*window, scale, backend), *qkv)
