"""What the backends of compiled kernels share: which problems they take, and tensors made before and behind a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from natten.geometry import Axis

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as the kernels number them
# As TensorName in the kernels' headers, cpu/plan.h and cuda/problem.h.
TENSORS = (
    *("QUERY", "KEY", "VALUE", "OUT", "LSE", "ATTN", "GRAD_OUT", "GRAD_LSE", "GRAD_ATTN"),
    *("GRAD_QUERY", "GRAD_KEY", "GRAD_VALUE"),
)
_FLOAT32 = ("LSE", "GRAD_LSE", "DELTA")  # one number a query and head


def refuses_kind(query: Tensor) -> str | None:
    """Why no kernel can take such a query (or value), or None if one can."""
    if query.dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, not {query.dtype}"
    dim = query.shape[-1]
    if dim % 8 or dim > 256:
        return f"head_dim is {dim}, but must be a multiple of 8 up to 256"
    return None


@cache
def warn(reason: str) -> str:
    """Says once that the reference serves, and why."""
    warnings.warn(f"natten computes in plain PyTorch, several times slower: {reason}.", RuntimeWarning, stacklevel=2)
    return reason


def with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def check_layout(name: str, x: Tensor, shaped: Tensor, axes: tuple[Axis, ...]) -> None:
    """Raises ValueError if a tensor does not go with the query or value `shaped`, heads-last."""
    items = {"ATTN": (_window_size(axes),), "GRAD_ATTN": (_window_size(axes),)}
    expected = shaped.shape[:-1] if name in _FLOAT32 else (*shaped.shape[:-1], *items.get(name, (shaped.shape[-1],)))
    dtype = torch.float32 if name in _FLOAT32 else shaped.dtype
    if (x.dtype, x.shape, x.device) != (dtype, expected, shaped.device):
        raise ValueError(
            f"{name.lower()} is {x.dtype} of shape {tuple(x.shape)} on {x.device}, heads last, but these kernel_size "
            f"and tensors need {dtype} of shape {tuple(expected)} on {shaped.device}."
        )


class Problems:
    """The functions that natten/dispatch.py asks of a backend.

    Args:
        run: `run(kind, axes, scale, rpb, **tensors) -> grad_rpb`, which solves one kind of problem, a method's name, on
            heads-last tensors named as in TENSORS; a gradient of rpb comes in its dtype, None where there is none.
        rows: makes rows of head_dim numbers fit for the kernels, by a copy if need be.
    """

    def __init__(self, run: Callable[..., Tensor | None], rows: Callable[[Tensor], Tensor]):
        self.run = run
        self.rows = rows

    # Fused attention

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, axes: Sequence[Axis], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output [B, X, H, d] in the query's dtype and logsumexp [B, X, H] in float32, both contiguous."""
        query, key, value = map(self.rows, (query, key, value))
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        self.run("attention", axes, scale, rpb, QUERY=query, KEY=key, VALUE=value, OUT=out, LSE=lse)
        return out, lse

    def attention_backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        out: Tensor,
        lse: Tensor,
        axes: Sequence[Axis],
        scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of `attention` from its inputs and outputs: [B, X, 3, H, d] for q, k and v, and rpb's."""
        query, key, value, out, grad_out = map(self.rows, (query, key, value, out, grad_out))
        grad_qkv = query.new_empty((*query.shape[:-2], 3, *query.shape[-2:]))
        grad_query, grad_key, grad_value = grad_qkv.unbind(-3)
        grad_rpb = self.run(
            "attention_backward",
            axes,
            scale,
            rpb,
            QUERY=query,
            KEY=key,
            VALUE=value,
            OUT=out,
            LSE=lse,
            GRAD_OUT=grad_out,
            GRAD_LSE=grad_lse,
            GRAD_QUERY=grad_query,
            GRAD_KEY=grad_key,
            GRAD_VALUE=grad_value,
        )
        return grad_qkv, grad_rpb

    # The two halves, heads-first

    def query_key(self, query: Tensor, key: Tensor, rpb: Tensor | None, axes: Sequence[Axis]) -> Tensor:
        """Unscaled logits [B, H, X, W] of [B, H, X, d]; -inf in slots of a causal window before the map."""
        query, key = map(self.rows, (query, key))
        attn = query.new_empty((*query.shape[:-1], _window_size(axes)))
        self.run("query_key", axes, 1.0, rpb, **_heads_last(QUERY=query, KEY=key, ATTN=attn))
        return attn

    def query_key_backward(
        self, grad_attn: Tensor, query: Tensor, key: Tensor, rpb: Tensor | None, axes: Sequence[Axis]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of `query_key` for query, key and rpb."""
        query, key, grad_attn = self.rows(query), self.rows(key), with_contiguous_rows(grad_attn)
        grad_query, grad_key = query.new_empty(query.shape), key.new_empty(key.shape)
        tensors = _heads_last(QUERY=query, KEY=key, GRAD_ATTN=grad_attn, GRAD_QUERY=grad_query, GRAD_KEY=grad_key)
        grad_rpb = self.run("query_key_backward", axes, 1.0, rpb, **tensors)
        return grad_query, grad_key, grad_rpb

    def weight_value(self, attn: Tensor, value: Tensor, axes: Sequence[Axis]) -> Tensor:
        """Sums [B, H, X, d] of values by weights [B, H, X, W]."""
        attn, value = with_contiguous_rows(attn), self.rows(value)
        out = value.new_empty(value.shape)
        self.run("weight_value", axes, 1.0, None, **_heads_last(VALUE=value, ATTN=attn, OUT=out))
        return out

    def weight_value_backward(
        self, grad_out: Tensor, attn: Tensor, value: Tensor, axes: Sequence[Axis]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `weight_value` for attn and value."""
        attn, value, grad_out = with_contiguous_rows(attn), self.rows(value), self.rows(grad_out)
        grad_attn, grad_value = attn.new_empty(attn.shape), value.new_empty(value.shape)
        tensors = _heads_last(VALUE=value, ATTN=attn, GRAD_OUT=grad_out, GRAD_ATTN=grad_attn, GRAD_VALUE=grad_value)
        self.run("weight_value_backward", axes, 1.0, None, **tensors)
        return grad_attn, grad_value


def _heads_last(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: x.movedim(1, -2) for name, x in tensors.items()}


def _window_size(axes: Sequence[Axis]) -> int:
    return prod([axis.kernel_size for axis in axes])
