"""The cpu backend: fused kernels in C++ (natten/csrc/cpu), compiled for this machine by natten/build.py.

Python passes a plan, which describes a problem down to the strides of its tensors, and the tensors' addresses. Plans
are kept, since making one costs more than a small problem takes. Inputs must be finite, as for the reference.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from struct import Struct
from types import ModuleType

import torch
from torch import Tensor

from natten.geometry import Axis, check_rpb
from natten.memo import remember

NAME = "cpu"

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# As TensorName in natten/csrc/cpu/plan.h.
_TENSORS = (
    *("QUERY", "KEY", "VALUE", "OUT", "LSE", "ATTN", "GRAD_OUT", "GRAD_LSE", "GRAD_ATTN"),
    *("GRAD_QUERY", "GRAD_KEY", "GRAD_VALUE"),
)
_PLAN = Struct(f"=4q 15q d {len(_TENSORS) * 5}q")
_ADDRESSES = Struct(f"{len(_TENSORS)}P")
_ARGUMENTS = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
_NO_AXIS = (1, 1, 1, 1, 0)
_NO_STRIDES = (0,) * 5


def refuses(query: Tensor) -> str | None:
    """Why this backend cannot take a call with such a query (or value), or None if it can."""
    if query.device.type != "cpu":
        return f"the tensors are on {query.device}"
    if query.dtype not in _DTYPES:
        return f"it computes float32, bfloat16 and float16, not {query.dtype}"
    dim = query.shape[-1]
    if dim % 8 or dim > 256:
        return f"head_dim is {dim}, but must be a multiple of 8 up to 256"
    try:
        _library()
    except RuntimeError as error:
        reason = str(error).removesuffix(".")
        _warn(reason)
        return reason
    return None


@cache
def _warn(reason: str) -> None:
    warnings.warn(f"natten computes in plain PyTorch, several times slower: {reason}.", RuntimeWarning, stacklevel=2)


def _library() -> ctypes.CDLL:
    return _build().cpu_library()


@cache
def _build() -> ModuleType:
    """natten.build, imported late so that `python -m natten.build` is not imported before it runs."""
    from natten import build

    return build


# ---------------------------------------------------------------------------------------------------------------------
# Fused attention
# ---------------------------------------------------------------------------------------------------------------------


def attention(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, axes: Sequence[Axis], scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, X, H, d] in the query's dtype and logsumexp [B, X, H] in float32, both contiguous."""
    query, key, value = (_with_contiguous_rows(x) for x in (query, key, value))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    _run("natten_attention", axes, scale, rpb, QUERY=query, KEY=key, VALUE=value, OUT=out, LSE=lse)
    return out, lse


def attention_backward(
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
    query, key, value, out, grad_out = (_with_contiguous_rows(x) for x in (query, key, value, out, grad_out))
    grad_qkv = query.new_empty((*query.shape[:-2], 3, *query.shape[-2:]))
    grad_rpb = None if rpb is None else rpb.new_empty(rpb.shape, dtype=torch.float32)
    grad_query, grad_key, grad_value = grad_qkv.unbind(-3)
    _run(
        "natten_attention_backward",
        axes,
        scale,
        rpb,
        grad_rpb,
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
    return grad_qkv, None if rpb is None else grad_rpb.to(rpb.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The two halves, heads-first
# ---------------------------------------------------------------------------------------------------------------------


def query_key(query: Tensor, key: Tensor, rpb: Tensor | None, axes: Sequence[Axis]) -> Tensor:
    """Unscaled logits [B, H, X, W] of [B, H, X, d]; -inf in slots of a causal window before the map."""
    query, key = _with_contiguous_rows(query), _with_contiguous_rows(key)
    attn = query.new_empty((*query.shape[:-1], _window_size(axes)))
    _run("natten_query_key", axes, 1.0, rpb, **_heads_last(QUERY=query, KEY=key, ATTN=attn))
    return attn


def query_key_backward(
    grad_attn: Tensor, query: Tensor, key: Tensor, rpb: Tensor | None, axes: Sequence[Axis]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `query_key` for query, key and rpb."""
    query, key, grad_attn = (_with_contiguous_rows(x) for x in (query, key, grad_attn))
    grad_query, grad_key = query.new_empty(query.shape), key.new_empty(key.shape)
    grad_rpb = None if rpb is None else rpb.new_empty(rpb.shape, dtype=torch.float32)
    tensors = _heads_last(QUERY=query, KEY=key, GRAD_ATTN=grad_attn, GRAD_QUERY=grad_query, GRAD_KEY=grad_key)
    _run("natten_query_key_backward", axes, 1.0, rpb, grad_rpb, **tensors)
    return grad_query, grad_key, None if rpb is None else grad_rpb.to(rpb.dtype)


def weight_value(attn: Tensor, value: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Sums [B, H, X, d] of values by weights [B, H, X, W]."""
    attn, value = _with_contiguous_rows(attn), _with_contiguous_rows(value)
    out = value.new_empty(value.shape)
    _run("natten_weight_value", axes, 1.0, None, **_heads_last(VALUE=value, ATTN=attn, OUT=out))
    return out


def weight_value_backward(grad_out: Tensor, attn: Tensor, value: Tensor, axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """Gradients of `weight_value` for attn and value."""
    attn, value, grad_out = (_with_contiguous_rows(x) for x in (attn, value, grad_out))
    grad_attn, grad_value = attn.new_empty(attn.shape), value.new_empty(value.shape)
    tensors = _heads_last(VALUE=value, ATTN=attn, GRAD_OUT=grad_out, GRAD_ATTN=grad_attn, GRAD_VALUE=grad_value)
    _run("natten_weight_value_backward", axes, 1.0, None, **tensors)
    return grad_attn, grad_value


def _heads_last(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: x.movedim(1, -2) for name, x in tensors.items()}


def _window_size(axes: Sequence[Axis]) -> int:
    return prod([axis.kernel_size for axis in axes])


# ---------------------------------------------------------------------------------------------------------------------
# Plans and calls
# ---------------------------------------------------------------------------------------------------------------------


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _run(
    function: str,
    axes: Sequence[Axis],
    scale: float,
    rpb: Tensor | None,
    grad_rpb: Tensor | None = None,
    **tensors: Tensor | None,
) -> None:
    """Calls an exported function with heads-last tensors, named as in TensorName, and the bias table."""
    shaped = tensors["QUERY"] if "QUERY" in tensors else tensors["VALUE"]
    table = None if rpb is None else rpb.float().contiguous()
    plan = _plan(shaped, axes, scale, rpb, tuple(tensors), *tensors.values())
    addresses = _ADDRESSES.pack(*[_address(tensors.get(name)) for name in _TENSORS])
    failed = _function(_library(), function)(plan, addresses, _address(table), _address(grad_rpb), _threads())
    if failed == 1:
        raise MemoryError(f"natten's CPU kernels ran out of memory on tensors of shape {tuple(shaped.shape)}.")
    if failed:
        raise RuntimeError(
            f"natten's CPU kernels failed on tensors of shape {tuple(shaped.shape)}: set backend='reference'."
        )


@cache
def _function(library: ctypes.CDLL, name: str) -> Callable[..., int]:
    function = getattr(library, name)
    function.argtypes, function.restype = _ARGUMENTS, ctypes.c_int
    return function


@remember
def _plan(
    shaped: Tensor, axes: tuple[Axis, ...], scale: float, rpb: Tensor | None, names: tuple, *tensors: Tensor | None
) -> bytes:
    """A plan for the named tensors, on a map whose query or value is `shaped`.

    Raises:
        ValueError: if one does not go with that: an operator called past the public functions, which check first.
    """
    check_rpb(rpb, axes, shaped.shape[-2], shaped.dtype, shaped.device)
    no_axes = 3 - len(axes)
    values = [_DTYPES[shaped.dtype], shaped.shape[0], shaped.shape[-2], shaped.shape[-1]]
    values += (*_NO_AXIS * no_axes, *(int(value) for axis in axes for value in axis))
    values.append(scale)
    given = dict(zip(names, tensors, strict=True))
    for name in _TENSORS:
        x = given.get(name)
        if x is None:
            values += _NO_STRIDES
            continue
        _check_layout(name, x, shaped, axes)
        strides = x.stride()
        values += strides[0], *(0,) * no_axes, *strides[1 : len(axes) + 2]
    return _PLAN.pack(*values)


def _check_layout(name: str, x: Tensor, shaped: Tensor, axes: tuple[Axis, ...]) -> None:
    items = {"LSE": (), "GRAD_LSE": (), "ATTN": (_window_size(axes),), "GRAD_ATTN": (_window_size(axes),)}
    expected = (*shaped.shape[:-1], *items.get(name, (shaped.shape[-1],)))
    dtype = torch.float32 if items.get(name) == () else shaped.dtype
    if (x.dtype, x.shape, x.device) != (dtype, expected, shaped.device):
        raise ValueError(
            f"{name.lower()} is {x.dtype} of shape {tuple(x.shape)} on {x.device}, heads last, but these kernel_size "
            f"and tensors need {dtype} of shape {expected} on {shaped.device}."
        )


_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _threads() -> int:
    """PyTorch's number; one in a forked process, which OpenMP's threads did not follow."""
    return 1 if _is_forked else torch.get_num_threads()
