"""What the backends with compiled kernels share: supported inputs, layout checks, and the outputs they allocate."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from natten.backends import reference
from natten.backends.reference import shape_of_grads, split_grads, sum_heads
from natten.geometry import Axis

P = ParamSpec("P")
R = TypeVar("R")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as numbered in the kernels
# In the order of TensorName in csrc/cpu/plan.h and csrc/cuda/problem.h.
TENSORS = (
    *("QUERY", "KEY", "VALUE", "OUT", "LSE", "ATTN", "GRAD_OUT", "GRAD_LSE", "GRAD_ATTN"),
    *("GRAD_QUERY", "GRAD_KEY", "GRAD_VALUE"),
)
_FLOAT32 = ("LSE", "GRAD_LSE", "DELTA")  # one float32 value per query and head


def unsupported_input(query: Tensor, max_dim: int) -> str | None:
    """Return why kernels with this largest head_dim cannot run such a query (or value), or None if they can."""
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype} is not supported; use float32, bfloat16 or float16"
    if query.shape[-1] > max_dim:
        return f"head_dim {query.shape[-1]} is not supported; use at most {max_dim}"
    return None


@cache
def warn_fallback(reason: str) -> str:
    """Warn, once per reason, that calls fall back to the reference backend. Return the reason."""
    warnings.warn(
        f"natten falls back to plain PyTorch, which is several times slower: {reason}.", RuntimeWarning, stacklevel=2
    )
    return reason


class Unsupported(Exception):
    """The kernels cannot run a problem, as their plan shows. The message says why."""


def with_fallback(method: Callable[P, R]) -> Callable[P, R]:
    """Return a method of `KernelBackend` that lets the reference compute what the kernels do not support.

    It warns once per reason.
    """

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except Unsupported as error:
            warn_fallback(str(error))
        return getattr(reference, method.__name__)(*args, **kwargs)

    return run


def with_contiguous_rows(x: Tensor) -> Tensor:
    """Return the tensor, or a copy, with a last dimension of stride 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_heads_and_dims(heads: int, kv_heads: int, dim: int, value_dim: int) -> None:
    """Check the sizes of fused attention, like `check_layout`.

    Raises:
        ValueError: if the heads of keys do not divide those of queries, or a head_dim is 0.
    """
    if not dim or not value_dim:
        raise ValueError(f"query has head_dim {dim} and value {value_dim}; both must be at least 1.")
    if heads and (not kv_heads or heads % kv_heads):
        raise ValueError(f"key has {kv_heads} heads, which do not divide the {heads} heads of query.")


def check_layout(
    name: str,
    x: Tensor,
    shaped: Tensor,
    axes: Sequence[Axis],
    kv_heads: int | None = None,
    value_dim: int | None = None,
) -> None:
    """Check a heads-last tensor of a problem whose query (or value) is `shaped`.

    The public functions check their arguments; this protects kernels from operators that are called directly.

    Args:
        name: as in `TENSORS`.
        kv_heads: heads of key and value; as many as the query has if None.
        value_dim: head_dim of value and output; that of the query if None.

    Raises:
        ValueError: if the dtype, shape or device does not match.
    """
    base = name.removeprefix("GRAD_")
    heads, dim = shaped.shape[-2:]
    if kv_heads is not None and base in ("KEY", "VALUE"):
        heads = kv_heads
    if value_dim is not None and base in ("VALUE", "OUT"):
        dim = value_dim
    items = (_window_size(axes),) if base == "ATTN" else () if name in _FLOAT32 else (dim,)
    expected = (*shaped.shape[:-2], heads, *items)
    dtype = torch.float32 if name in _FLOAT32 else shaped.dtype
    if (x.dtype, x.shape, x.device) != (dtype, expected, shaped.device):
        raise ValueError(
            f"{name.lower()} is {x.dtype} of heads-last shape {tuple(x.shape)} on {x.device}; "
            f"expected {dtype} of shape {tuple(expected)} on {shaped.device}."
        )


def _check_head_dim(dim: int, **tensors: Tensor) -> None:
    """Check the head_dim of tensors that `check_layout` would compare with another one.

    Raises:
        ValueError: naming the tensor whose head_dim is not `dim`.
    """
    for name, x in tensors.items():
        if x.shape[-1] != dim:
            raise ValueError(f"{name} has head_dim {x.shape[-1]}; expected {dim}.")


class KernelBackend:
    """The functions of `natten.backends.Backend` on top of compiled kernels.

    Some kernels compute a gradient of key and value for each head of the query. Those are summed here.

    Args:
        launch: ``launch(op, axes, scale, rpb, **tensors) -> grad_rpb`` runs the kernels of one op, which is the name of
            a method below, on heads-last tensors named as in `TENSORS`. It returns the gradient of rpb in rpb's dtype,
            or None if the op has none.
        with_usable_rows: returns a tensor, or a copy of it, whose rows of head_dim values the kernels can read.
        max_dim: largest head_dim of the kernels. The reference computes attention to values with a larger one.
        repeats_heads: whether the kernels of fused attention for such a query and scale are of this kind.
    """

    def __init__(
        self,
        launch: Callable[..., Tensor | None],
        with_usable_rows: Callable[[Tensor], Tensor],
        max_dim: int,
        repeats_heads: Callable[[Tensor, float], bool] = lambda query, scale: False,
    ):
        self._launch = launch
        self._with_usable_rows = with_usable_rows
        self._max_dim = max_dim
        self._repeats_heads = repeats_heads

    # Fused attention, heads-last

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, axes: Sequence[Axis], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return the output [B, X, H, value head_dim] in the query's dtype and the logsumexp [B, X, H] in float32."""
        _check_head_dim(query.shape[-1], key=key)
        if value.shape[-1] > self._max_dim:
            return reference.attention(query, key, value, rpb, axes, scale)
        query, key, value = map(self._with_usable_rows, (query, key, value))
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        self._launch("attention", axes, scale, rpb, QUERY=query, KEY=key, VALUE=value, OUT=out, LSE=lse)
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
        """Return the gradients of query, key and value in one tensor, as `split_grads` reads it, and that of rpb."""
        _check_head_dim(query.shape[-1], key=key)
        _check_head_dim(value.shape[-1], out=out, grad_out=grad_out)
        if value.shape[-1] > self._max_dim:
            return reference.attention_backward(grad_out, grad_lse, query, key, value, rpb, out, lse, axes, scale)
        q, k, v, out, grad_out = map(self._with_usable_rows, (query, key, value, out, grad_out))
        grads = query.new_empty(shape_of_grads(query, key, value))
        views = split_grads(grads, query, key, value)
        grad_q, grad_k, grad_v = found = [
            self._target(x, query.shape[-2] if self._repeats_heads(query, scale) else x.shape[-2]) for x in views
        ]
        optional = {} if grad_lse is None else {"GRAD_LSE": grad_lse}
        grad_rpb = self._launch(
            "attention_backward",
            axes,
            scale,
            rpb,
            QUERY=q,
            KEY=k,
            VALUE=v,
            OUT=out,
            LSE=lse,
            GRAD_OUT=grad_out,
            GRAD_QUERY=grad_q,
            GRAD_KEY=grad_k,
            GRAD_VALUE=grad_v,
            **optional,
        )
        for view, grad in zip(views, found, strict=True):
            if grad is not view:
                sum_heads(grad, view)
        return grads, grad_rpb

    def _target(self, grad: Tensor, heads: int) -> Tensor:
        """Return where the kernels write a gradient for a number of heads: the gradient itself if they can."""
        if grad.shape[-2] == heads and self._with_usable_rows(grad) is grad:
            return grad
        return grad.new_empty((*grad.shape[:-2], heads, grad.shape[-1]))

    # Unfused attention, heads-first

    def query_key(self, query: Tensor, key: Tensor, rpb: Tensor | None, axes: Sequence[Axis]) -> Tensor:
        """Return the unscaled logits [B, H, X, W]; -inf in slots of a causal window before the map."""
        _check_head_dim(query.shape[-1], key=key)
        query, key = map(self._with_usable_rows, (query, key))
        attn = query.new_empty((*query.shape[:-1], _window_size(axes)))
        self._launch("query_key", axes, 1.0, rpb, **_heads_last(QUERY=query, KEY=key, ATTN=attn))
        return attn

    def query_key_backward(
        self, grad_attn: Tensor, query: Tensor, key: Tensor, rpb: Tensor | None, axes: Sequence[Axis]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients of query, key and rpb."""
        _check_head_dim(query.shape[-1], key=key)
        query, key = map(self._with_usable_rows, (query, key))
        grad_attn = with_contiguous_rows(grad_attn)
        grad_query, grad_key = query.new_empty(query.shape), key.new_empty(key.shape)
        tensors = _heads_last(QUERY=query, KEY=key, GRAD_ATTN=grad_attn, GRAD_QUERY=grad_query, GRAD_KEY=grad_key)
        grad_rpb = self._launch("query_key_backward", axes, 1.0, rpb, **tensors)
        return grad_query, grad_key, grad_rpb

    def weight_value(self, attn: Tensor, value: Tensor, axes: Sequence[Axis]) -> Tensor:
        """Return the sums [B, H, X, d] of values weighted by attn [B, H, X, W]."""
        attn, value = with_contiguous_rows(attn), self._with_usable_rows(value)
        out = value.new_empty(value.shape)
        self._launch("weight_value", axes, 1.0, None, **_heads_last(VALUE=value, ATTN=attn, OUT=out))
        return out

    def weight_value_backward(
        self, grad_out: Tensor, attn: Tensor, value: Tensor, axes: Sequence[Axis]
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of attn and value."""
        _check_head_dim(value.shape[-1], grad_out=grad_out)
        attn = with_contiguous_rows(attn)
        value, grad_out = map(self._with_usable_rows, (value, grad_out))
        grad_attn, grad_value = attn.new_empty(attn.shape), value.new_empty(value.shape)
        tensors = _heads_last(VALUE=value, ATTN=attn, GRAD_OUT=grad_out, GRAD_ATTN=grad_attn, GRAD_VALUE=grad_value)
        self._launch("weight_value_backward", axes, 1.0, None, **tensors)
        return grad_attn, grad_value


def _heads_last(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: x.movedim(1, -2) for name, x in tensors.items()}


def _window_size(axes: Sequence[Axis]) -> int:
    return prod([axis.kernel_size for axis in axes])
