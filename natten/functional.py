"""Neighborhood attention as functions: fused (`na1d`, `na2d`, `na3d`), on packed qkv, and as two halves (`_qk`, `_av`).

Each kind is written once and made for the three ranks; natten/geometry states the exact semantics. Papers:
Neighborhood Attention Transformer, section 3 (arXiv:2204.07143); with dilation, DiNAT, section 3 (arXiv:2209.15001).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torch import Tensor

from natten import backends
from natten.backends import reference
from natten.composition import attend, attend_composed, merge_attentions
from natten.context import ignore_tuning
from natten.geometry import (
    Axis,
    BoolOrTuple,
    IntOrTuple,
    check_rpb,
    check_same_shape,
    check_tensors,
    make_axes,
)
from natten.memo import remember
from natten.operators import query_key, weight_value
from natten.precision import apply_autocast

__all__ = [
    *(f"na{rank}d{suffix}" for rank in (1, 2, 3) for suffix in ("", "_qkvpacked", "_qk", "_av")),
    "merge_attentions",
]


# ---------------------------------------------------------------------------------------------------------------------
# Fused
# ---------------------------------------------------------------------------------------------------------------------


def _make_fused(rank: int) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: IntOrTuple,
        stride: IntOrTuple = 1,
        dilation: IntOrTuple = 1,
        is_causal: BoolOrTuple = False,
        scale: float | None = None,
        rpb: Tensor | None = None,
        return_lse: bool = False,
        backend: str | None = None,
        *,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        window_padding: str = "shift",
        **tuning,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if tuning:
            ignore_tuning(fused.__name__, tuning)
        window, additional = (kernel_size, stride, dilation, is_causal), (additional_keys, additional_values)
        if query.shape == key.shape == value.shape and _is_basic(*additional, window_padding):
            qkv = query, key, value = apply_autocast(query, key, value)
            axes = _check_fused(rank, query, key, value, rpb, *window)
            results = attend(qkv, axes, rpb, scale, backend)
        else:
            qkv = query, key, value
            results = attend_composed(rank, qkv, window, rpb, scale, backend, additional, window_padding)
        return results if return_lse else results[0]

    return _publish(fused, rank, "", _FUSED_DOC, inputs=_FUSED_INPUTS, ignored=_IGNORED)


def _make_packed(rank: int) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    def packed(
        qkv: Tensor,
        kernel_size: IntOrTuple,
        stride: IntOrTuple = 1,
        dilation: IntOrTuple = 1,
        is_causal: BoolOrTuple = False,
        scale: float | None = None,
        rpb: Tensor | None = None,
        return_lse: bool = False,
        backend: str | None = None,
        *,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        window_padding: str = "shift",
    ) -> Tensor | tuple[Tensor, Tensor]:
        window, additional = (kernel_size, stride, dilation, is_causal), (additional_keys, additional_values)
        if _is_basic(*additional, window_padding):
            (qkv,) = apply_autocast(qkv)
            axes = _check_packed(rank, qkv, rpb, *window)
            results = attend((qkv,), axes, rpb, scale, backend)
        else:
            _check_packing(rank, qkv)
            results = attend_composed(rank, qkv.unbind(-3), window, rpb, scale, backend, additional, window_padding)
        return results if return_lse else results[0]

    return _publish(packed, rank, "_qkvpacked", _FUSED_DOC, inputs=_PACKED_INPUTS, ignored="")


def _is_basic(additional_keys: Tensor | None, additional_values: Tensor | None, window_padding: str) -> bool:
    """Whether the operators take the call as it is; if not, natten/composition.py puts it together."""
    return additional_keys is None and additional_values is None and window_padding == "shift"


_FUSED_DOC = """Neighborhood attention over {rank} {axes}: each token attends to the window around itself.

    Args:
        {inputs}.
        kernel_size: tokens a window has, at least 2; this and the next three are one value or one an axis.
        stride: queries that share one window, at most kernel_size.
        dilation: distance between the tokens of a window; kernel_size * dilation must not exceed the axis.
        is_causal: whether a window ends at its query instead of being centred on it.
        scale: factor on query times key, head_dim ** -0.5 of the query unless given.
        rpb: relative position bias {rpb}, added to the scaled logits; float32 or of the query's dtype.
        return_lse: also return the logsumexp of the logits.
        backend: "reference", "cpu" or "cuda"; None takes the fastest that can.
        additional_keys, additional_values: [B, N, key's heads, head_dim], N tokens that each query attends to beside
            its window, with no bias. They are held against all queries at once: memory for tokens x N logits.
        window_padding: what a window does that would reach over the map's border. "shift": it is moved, the default;
            "zeros": it stays, and keys outside are zero vectors, which take their share of the softmax, with their
            bias; kernel_size * dilation may exceed the axis. "valid": such queries are left out, and each axis comes
            out (kernel_size - 1) * dilation shorter. The latter two for stride 1.{ignored}

    Returns:
        [B, {space}, heads, head_dim] in the query's dtype, contiguous, of the query's heads and the value's head_dim;
        with return_lse also [B, {space}, heads] in float32 (float64 for a float64 query). Both can be differentiated
        once; twice with backend="reference".

    Raises:
        ValueError: naming the argument, and the axis, that does not fit.
    """

_FUSED_INPUTS = (
    "query, key, value: [B, {space}, heads, head_dim], of any strides; key and value may have fewer\n"
    "            heads, of which query's are a multiple, and value another head_dim"
)
_PACKED_INPUTS = "qkv: [B, {space}, 3, heads, head_dim]; backward makes one gradient"
_IGNORED = """
        **tuning: arguments by which other releases tune their kernels (see NATTEN.md), taken and without effect."""

_AXIS_NAMES = {1: "L", 2: "H, W", 3: "D, H, W"}


def _publish(function: Callable, rank: int, suffix: str, doc: str, inputs: str = "", ignored: str = "") -> Callable:
    """Gives a function made for one rank its public name and docstring."""
    function.__name__ = function.__qualname__ = f"na{rank}d{suffix}"
    space = _AXIS_NAMES[rank]
    function.__doc__ = doc.format(
        rank=rank,
        axes="axis" if rank == 1 else "axes",
        inputs=inputs.format(space=space),
        ignored=ignored,
        space=space,
        rpb="[heads" + ", 2K-1" * rank + "]",
    )
    return function


@remember
def _check_fused(rank, query, key, value, rpb, kernel_size, stride, dilation, is_causal) -> tuple[Axis, ...]:
    check_tensors(rank, query=query, key=key, value=value)
    axes = make_axes(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    check_rpb(rpb, axes, query.shape[-2], query.dtype, query.device)
    return axes


@remember
def _check_packed(rank, qkv, rpb, kernel_size, stride, dilation, is_causal) -> tuple[Axis, ...]:
    _check_packing(rank, qkv)
    query = qkv.select(-3, 0)
    check_tensors(rank, qkv=query)
    axes = make_axes(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    check_rpb(rpb, axes, query.shape[-2], query.dtype, query.device)
    return axes


def _check_packing(rank: int, qkv: Tensor) -> None:
    if qkv.dim() != rank + 4 or qkv.shape[-3] != 3:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}, but must have {rank + 4} dimensions: batch, {rank} spatial axes, "
            "3 (query, key and value), heads and head_dim."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Two halves, heads-first: where the attention weights themselves are needed
# ---------------------------------------------------------------------------------------------------------------------


def _make_qk(rank: int) -> Callable[..., Tensor]:
    def qk(
        query: Tensor,
        key: Tensor,
        kernel_size: IntOrTuple,
        dilation: IntOrTuple = 1,
        is_causal: BoolOrTuple = False,
        rpb: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        query, key = apply_autocast(query, key)
        axes = _check_qk(rank, query, key, rpb, kernel_size, dilation, is_causal)
        backend = backends.requested(backend)
        if backends.is_plain(backend):
            return reference.query_key(query, key, rpb, axes)
        return query_key(query, key, rpb, axes, backend)

    return _publish(qk, rank, "_qk", _QK_DOC)


def _make_av(rank: int) -> Callable[..., Tensor]:
    def av(
        attn: Tensor,
        value: Tensor,
        kernel_size: IntOrTuple,
        dilation: IntOrTuple = 1,
        is_causal: BoolOrTuple = False,
        backend: str | None = None,
    ) -> Tensor:
        attn, value = apply_autocast(attn, value)
        axes = _check_av(rank, attn, value, kernel_size, dilation, is_causal)
        backend = backends.requested(backend)
        if backends.is_plain(backend):
            return reference.weight_value(attn, value, axes)
        return weight_value(attn, value, axes, backend)

    return _publish(av, rank, "_av", _AV_DOC)


@remember
def _check_qk(rank, query, key, rpb, kernel_size, dilation, is_causal) -> tuple[Axis, ...]:
    check_tensors(rank, query=query, key=key)
    check_same_shape(query=query, key=key)
    axes = make_axes(query.shape[2:-1], kernel_size, 1, dilation, is_causal)
    check_rpb(rpb, axes, query.shape[1], query.dtype, query.device)
    return axes


@remember
def _check_av(rank, attn, value, kernel_size, dilation, is_causal) -> tuple[Axis, ...]:
    check_tensors(rank, attn=attn, value=value)
    axes = make_axes(value.shape[2:-1], kernel_size, 1, dilation, is_causal)
    expected = (*value.shape[:-1], prod([axis.kernel_size for axis in axes]))
    if attn.shape != expected:
        raise ValueError(f"attn has shape {tuple(attn.shape)}, but this value and kernel_size need {tuple(expected)}.")
    return axes


_QK_DOC = """Logits of each query with the keys of its window, not scaled: scale the query first.

    Args:
        query, key: [B, heads, {space}, head_dim].
        kernel_size, dilation, is_causal: one value or one an axis, as for the fused function.
        rpb: relative position bias {rpb}, added as it is; float32 or of the query's dtype.
        backend: "reference", "cpu" or "cuda"; None takes the fastest that can.

    Returns:
        [B, heads, {space}, W] in the query's dtype; W is the product of kernel_size, the window's keys in row-major
        order. Slots of a causal window that lie before the map are -inf.

    Raises:
        ValueError: naming the argument, and the axis, that does not fit.
    """

_AV_DOC = """Sum over each window of attention weight times value.

    Args:
        attn: weights [B, heads, {space}, W], W the product of kernel_size; slots before the map are ignored.
        value: [B, heads, {space}, head_dim].
        kernel_size, dilation, is_causal: one value or one an axis, as for the fused function.
        backend: "reference", "cpu" or "cuda"; None takes the fastest that can.

    Returns:
        [B, heads, {space}, head_dim] in the value's dtype.

    Raises:
        ValueError: naming the argument, and the axis, that does not fit.
    """


na1d, na2d, na3d = (_make_fused(rank) for rank in (1, 2, 3))
na1d_qkvpacked, na2d_qkvpacked, na3d_qkvpacked = (_make_packed(rank) for rank in (1, 2, 3))
na1d_qk, na2d_qk, na3d_qk = (_make_qk(rank) for rank in (1, 2, 3))
na1d_av, na2d_av, na3d_av = (_make_av(rank) for rank in (1, 2, 3))


def __getattr__(name: str) -> Callable:
    """Names of older releases, which natten/compat.py defines on top of this module."""
    from natten import compat

    return compat.old_name(__name__, name)
