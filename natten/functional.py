"""Neighborhood attention as functions.

- `na1d`, `na2d`, `na3d`: fused attention on query, key and value, heads-last [B, *space, heads, head_dim].
- `na*_qkvpacked`: the same on one packed tensor [B, *space, 3, heads, head_dim].
- `na*_qk`, `na*_av`: unfused attention, heads-first [B, heads, *space, head_dim], for access to the attention weights.
- `merge_attentions`: merges attentions of the same queries to several sets of keys.

The exact semantics are specified in natten/geometry. Papers: Neighborhood Attention Transformer, section 3
(arXiv:2204.07143); with dilation, DiNAT, section 3 (arXiv:2209.15001).

Notation in shapes: L, H, W, D are the lengths of the map's axes in tokens, K is kernel_size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from natten import ops
from natten.checks import (
    BoolOrTuple,
    IntOrTuple,
    check_av,
    check_fused,
    check_packed,
    check_packing,
    check_qk,
    have_one_shape,
    ignore_tuning,
    order_3d,
)
from natten.ops import merge_attentions

__all__ = [
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na1d_qkvpacked",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na2d_qkvpacked",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "na3d_qkvpacked",
]


# ---------------------------------------------------------------------------------------------------------------------
# Fused
# ---------------------------------------------------------------------------------------------------------------------


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = 1,
    dilation: IntOrTuple | None = 1,
    is_causal: BoolOrTuple | None = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    window_padding: str = "shift",
    **tuning: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute 1-D neighborhood attention: each token attends to the window around it.

    Args:
        query, key, value: [B, L, heads, head_dim].
        rpb: relative position bias [heads, 2K-1].
        kernel_size, stride, dilation, is_causal, scale, return_lse, backend, additional_keys, additional_values,
            window_padding, **tuning: see `na2d`.

    Returns:
        [B, L, heads, head_dim]; with return_lse also the logsumexp [B, L, heads]. See `na2d`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    window, additional = (kernel_size, stride, dilation, is_causal), (additional_keys, additional_values)
    return _fused(1, query, key, value, window, scale, rpb, return_lse, backend, additional, window_padding, tuning)


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = 1,
    dilation: IntOrTuple | None = 1,
    is_causal: BoolOrTuple | None = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    window_padding: str = "shift",
    **tuning: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute 2-D neighborhood attention: each token attends to the window around it.

    Papers: NAT, section 3 (arXiv:2204.07143); with dilation, DiNAT, section 3 (arXiv:2209.15001).

    Args:
        query, key, value: [B, H, W, heads, head_dim], with any strides. Key and value may have fewer heads, if their
            number divides the number of query heads; value may have a different head_dim.
        kernel_size: window size in tokens, at least 2. This and the next three arguments take a single value or one
            per axis.
        stride: number of consecutive queries that share a window, at most kernel_size.
        dilation: distance between neighboring tokens of a window; kernel_size * dilation must not exceed the axis.
        is_causal: whether the window ends at its query instead of being centered on it.
        scale: factor on the logits; None or 0: head_dim ** -0.5 of the query.
        rpb: relative position bias [heads, 2K-1, 2K-1], added to the scaled logits; float32 or the query's dtype.
        return_lse: also return the logsumexp of the logits.
        backend: "reference", "cpu" or "cuda"; None selects the fastest that supports the call.
        additional_keys, additional_values: N tokens [B, N, key heads, head_dim] that all queries attend to in addition
            to their window, without bias. Requires memory for tokens x N logits.
        window_padding: how windows that would cross the border of the map are handled.
            "shift" (default): they are shifted into the map.
            "zeros": they are not shifted; keys outside are zero vectors, which take part in the softmax, with bias.
            kernel_size * dilation may exceed the axis.
            "valid": their queries are dropped; each axis of the output is (kernel_size - 1) * dilation shorter.
            "zeros" and "valid" require stride 1.
        **tuning: arguments that tune the kernels of other NATTEN releases (listed in natten/checks.py); ignored.

    Returns:
        [B, H, W, heads, head_dim] in the query's dtype, contiguous, with the query's heads and the value's head_dim.
        With return_lse also the logsumexp [B, H, W, heads] in float32 (float64 for a float64 query). Both are
        differentiable once; twice with backend="reference".

    Raises:
        ValueError: naming the argument that does not fit.
    """
    window, additional = (kernel_size, stride, dilation, is_causal), (additional_keys, additional_values)
    return _fused(2, query, key, value, window, scale, rpb, return_lse, backend, additional, window_padding, tuning)


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = 1,
    dilation: IntOrTuple | None = 1,
    is_causal: BoolOrTuple | None = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    window_padding: str = "shift",
    **tuning: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute 3-D neighborhood attention: each token attends to the window around it.

    Args:
        query, key, value: [B, D, H, W, heads, head_dim].
        rpb: relative position bias [heads, 2K-1, 2K-1, 2K-1].
        kernel_size, stride, dilation, is_causal, scale, return_lse, backend, additional_keys, additional_values,
            window_padding, **tuning: see `na2d`.

    Returns:
        [B, D, H, W, heads, head_dim]; with return_lse also the logsumexp [B, D, H, W, heads]. See `na2d`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    window, additional = (kernel_size, stride, dilation, is_causal), (additional_keys, additional_values)
    return _fused(3, query, key, value, window, scale, rpb, return_lse, backend, additional, window_padding, tuning)


def _fused(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: tuple,
    scale: float | None,
    rpb: Tensor | None,
    return_lse: bool,
    backend: str | None,
    additional: tuple[Tensor | None, Tensor | None],
    window_padding: str,
    tuning: dict[str, Any],
) -> Tensor | tuple[Tensor, Tensor]:
    if tuning:
        ignore_tuning(f"na{rank}d", tuning)
    if have_one_shape(query, key, value) and _is_native(additional, window_padding):
        query, key, value = ops.apply_autocast(query, key, value)
        axes = check_fused(rank, query, key, value, rpb, *window)
        results = ops.attend((query, key, value), rpb, axes, scale, backend)
    else:
        qkv = query, key, value
        results = ops.attend_composed(rank, qkv, window, rpb, scale, backend, additional, window_padding)
    return results if return_lse else results[0]


def _is_native(additional: tuple[Tensor | None, Tensor | None], window_padding: str) -> bool:
    """Return whether the backends support these features natively; otherwise natten/ops.py composes them."""
    return additional[0] is None and additional[1] is None and window_padding == "shift"


def na1d_qkvpacked(
    qkv: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = 1,
    dilation: IntOrTuple | None = 1,
    is_causal: BoolOrTuple | None = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    window_padding: str = "shift",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `na1d` of a packed tensor. The backward pass writes a single packed gradient.

    Args:
        qkv: query, key and value as one tensor [B, L, 3, heads, head_dim].
        rpb: relative position bias [heads, 2K-1].
        kernel_size, stride, dilation, is_causal, scale, return_lse, backend, additional_keys, additional_values,
            window_padding: see `na2d`.

    Returns:
        [B, L, heads, head_dim]; with return_lse also the logsumexp [B, L, heads]. See `na2d`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    window, additional = (kernel_size, stride, dilation, is_causal), (additional_keys, additional_values)
    return _packed(1, qkv, window, scale, rpb, return_lse, backend, additional, window_padding)


def na2d_qkvpacked(
    qkv: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = 1,
    dilation: IntOrTuple | None = 1,
    is_causal: BoolOrTuple | None = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    window_padding: str = "shift",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `na2d` of a packed tensor. The backward pass writes a single packed gradient.

    Args:
        qkv: query, key and value as one tensor [B, H, W, 3, heads, head_dim].
        rpb: relative position bias [heads, 2K-1, 2K-1].
        kernel_size, stride, dilation, is_causal, scale, return_lse, backend, additional_keys, additional_values,
            window_padding: see `na2d`.

    Returns:
        [B, H, W, heads, head_dim]; with return_lse also the logsumexp [B, H, W, heads]. See `na2d`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    window, additional = (kernel_size, stride, dilation, is_causal), (additional_keys, additional_values)
    return _packed(2, qkv, window, scale, rpb, return_lse, backend, additional, window_padding)


def na3d_qkvpacked(
    qkv: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = 1,
    dilation: IntOrTuple | None = 1,
    is_causal: BoolOrTuple | None = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    window_padding: str = "shift",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `na3d` of a packed tensor. The backward pass writes a single packed gradient.

    Args:
        qkv: query, key and value as one tensor [B, D, H, W, 3, heads, head_dim].
        rpb: relative position bias [heads, 2K-1, 2K-1, 2K-1].
        kernel_size, stride, dilation, is_causal, scale, return_lse, backend, additional_keys, additional_values,
            window_padding: see `na2d`.

    Returns:
        [B, D, H, W, heads, head_dim]; with return_lse also the logsumexp [B, D, H, W, heads]. See `na2d`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    window, additional = (kernel_size, stride, dilation, is_causal), (additional_keys, additional_values)
    return _packed(3, qkv, window, scale, rpb, return_lse, backend, additional, window_padding)


def _packed(
    rank: int,
    qkv: Tensor,
    window: tuple,
    scale: float | None,
    rpb: Tensor | None,
    return_lse: bool,
    backend: str | None,
    additional: tuple[Tensor | None, Tensor | None],
    window_padding: str,
) -> Tensor | tuple[Tensor, Tensor]:
    if _is_native(additional, window_padding):
        (qkv,) = ops.apply_autocast(qkv)
        axes = check_packed(rank, qkv, rpb, *window)
        results = ops.attend((qkv,), rpb, axes, scale, backend)
    else:
        check_packing(rank, qkv)
        results = ops.attend_composed(rank, qkv.unbind(-3), window, rpb, scale, backend, additional, window_padding)
    return results if return_lse else results[0]


# ---------------------------------------------------------------------------------------------------------------------
# Unfused: logits, and sums of values weighted by attention weights
# ---------------------------------------------------------------------------------------------------------------------


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: BoolOrTuple | None = False,
    rpb: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the unscaled logits of each query with the keys of its window.

    Args:
        query, key: [B, heads, L, head_dim].
        rpb: relative position bias [heads, 2K-1].
        kernel_size, dilation, additional_keys, is_causal, backend: see `na2d_qk`.

    Returns:
        [B, heads, L, K]. See `na2d_qk`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    return _qk(1, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, backend)


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: BoolOrTuple | None = False,
    rpb: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the unscaled logits of each query with the keys of its window. Scale the query first.

    Args:
        query, key: [B, heads, H, W, head_dim].
        additional_keys: N tokens [B, heads, N, head_dim] that all queries attend to in addition to their window. Pass
            this and what follows by name.
        rpb: relative position bias [heads, 2K-1, 2K-1], added to the logits; float32 or the query's dtype.
        kernel_size, dilation, is_causal, backend: see `na2d`.

    Returns:
        [B, heads, H, W, K*K] in the query's dtype, with the keys of a window in row-major order. Entries of a causal
        window that lie before the map are -inf. With additional keys [B, heads, H, W, K*K + N], theirs at the end.
        Autocast does not change the dtype, unless those of query and key differ.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    return _qk(2, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, backend)


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: BoolOrTuple | None = False,
    rpb: Tensor | None = None,
    backend: str | None = None,
    *,
    kernel_size_d: int | None = None,
    dilation_d: int | None = None,
) -> Tensor:
    """Compute the unscaled logits of each query with the keys of its window.

    Args:
        query, key: [B, heads, D, H, W, head_dim].
        rpb: relative position bias [heads, 2K-1, 2K-1, 2K-1].
        kernel_size, dilation, additional_keys, is_causal, backend: see `na2d_qk`.
        kernel_size_d, dilation_d: kernel_size and dilation along the first axis, as NATTEN 0.15 took them.

    Returns:
        [B, heads, D, H, W, K*K*K]. See `na2d_qk`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    arguments = kernel_size, dilation, additional_keys, is_causal, rpb
    kernel_size, dilation, additional_keys, is_causal, rpb = order_3d(arguments, kernel_size_d, dilation_d)
    return _qk(3, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, backend)


def _qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None,
    additional_keys: Tensor | None,
    is_causal: BoolOrTuple | None,
    rpb: Tensor | None,
    backend: str | None,
) -> Tensor:
    query, key = ops.unify_dtypes(query, key)
    axes = check_qk(rank, query, key, rpb, kernel_size, dilation, is_causal, additional_keys)
    if additional_keys is None:
        return ops.query_key(query, key, rpb, axes, backend)
    return ops.query_key_composed(query, key, rpb, axes, backend, additional_keys)


def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None = 1,
    additional_values: Tensor | None = None,
    is_causal: BoolOrTuple | None = False,
    backend: str | None = None,
) -> Tensor:
    """Compute the sum of the values of each window, weighted by attention weights.

    Args:
        attn: attention weights [B, heads, L, K], as `na1d_qk` orders them.
        value: [B, heads, L, head_dim].
        kernel_size, dilation, additional_values, is_causal, backend: see `na2d_av`.

    Returns:
        [B, heads, L, head_dim]. See `na2d_av`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    return _av(1, attn, value, kernel_size, dilation, additional_values, is_causal, backend)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None = 1,
    additional_values: Tensor | None = None,
    is_causal: BoolOrTuple | None = False,
    backend: str | None = None,
) -> Tensor:
    """Compute the sum of the values of each window, weighted by attention weights.

    Args:
        attn: attention weights [B, heads, H, W, K*K], as `na2d_qk` orders them. Entries of a causal window that lie
            before the map are ignored. Converted to the dtype of the value.
        value: [B, heads, H, W, head_dim].
        additional_values: [B, heads, N, head_dim], whose weights follow those of the window: attn is then
            [B, heads, H, W, K*K + N]. Pass this and what follows by name.
        kernel_size, dilation, is_causal, backend: see `na2d`.

    Returns:
        [B, heads, H, W, head_dim] in the value's dtype.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    return _av(2, attn, value, kernel_size, dilation, additional_values, is_causal, backend)


def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None = 1,
    additional_values: Tensor | None = None,
    is_causal: BoolOrTuple | None = False,
    backend: str | None = None,
    *,
    kernel_size_d: int | None = None,
    dilation_d: int | None = None,
) -> Tensor:
    """Compute the sum of the values of each window, weighted by attention weights.

    Args:
        attn: attention weights [B, heads, D, H, W, K*K*K], as `na3d_qk` orders them.
        value: [B, heads, D, H, W, head_dim].
        kernel_size, dilation, additional_values, is_causal, backend: see `na2d_av`.
        kernel_size_d, dilation_d: kernel_size and dilation along the first axis, as NATTEN 0.15 took them.

    Returns:
        [B, heads, D, H, W, head_dim]. See `na2d_av`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    arguments = kernel_size, dilation, additional_values, is_causal, backend
    kernel_size, dilation, additional_values, is_causal, backend = order_3d(arguments, kernel_size_d, dilation_d)
    return _av(3, attn, value, kernel_size, dilation, additional_values, is_causal, backend)


def _av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None,
    additional_values: Tensor | None,
    is_causal: BoolOrTuple | None,
    backend: str | None,
) -> Tensor:
    axes = check_av(rank, attn, value, kernel_size, dilation, is_causal, additional_values)
    attn = attn.to(value.dtype)
    if additional_values is None:
        return ops.weight_value(attn, value, axes, backend)
    return ops.weight_value_composed(attn, value, axes, backend, additional_values)
