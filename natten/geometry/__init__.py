"""The specification of neighborhood attention: windows, bias index, tiles, padding; and all checks of arguments.

Along one axis of length L, with window K, dilation D and stride S, the query at position i belongs to the residue class
r = i mod D and is the s-th token of it, s = i div D, out of n = ceil((L - r) / D). Its window lies in the same class:

- not causal: the K tokens lo .. lo+K-1, lo = clamp(leader - K div 2, 0, n - K): always K keys, moved at the borders;
- causal: the tokens leader-K+1 .. s that exist;
- the leader is s itself, or with S > 1 the token that all S queries of a group share: with g = (s div S) * S it is
  min(g + S div 2, n - 1), causal: min(g + S - 1, n - 1).

A key s' of a query s takes entry s' - s + K - 1 of a bias table with 2K - 1 entries. Several axes: the product.
This is DiNAT's equations 1 and 2 (arXiv:2209.15001), with NAT (arXiv:2204.07143) as D = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from natten.memo import remember

IntOrTuple = int | Sequence[int]
BoolOrTuple = bool | Sequence[bool]


class Axis(NamedTuple):
    """One spatial axis of a problem; lengths in tokens."""

    length: int
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool


# ---------------------------------------------------------------------------------------------------------------------
# Windows and tiles
# ---------------------------------------------------------------------------------------------------------------------


def first_key(axis: Axis, s: Tensor, n: Tensor) -> Tensor:
    """First of the K keys of a query in its residue class; negative where a causal window begins before the map.

    Args:
        s: index of the query within its residue class, any shape.
        n: number of tokens of that class, broadcastable to s.
    """
    group = s - s % axis.stride
    if axis.is_causal:
        leader = torch.minimum(group + (axis.stride - 1), n - 1)
        return leader - (axis.kernel_size - 1)
    leader = torch.minimum(group + axis.stride // 2, n - 1)
    return torch.minimum((leader - axis.kernel_size // 2).clamp(min=0), n - axis.kernel_size)


class AxisTiles(NamedTuple):
    """One axis cut into tiles: up to Q consecutive queries of one residue class, and every key that any of them sees.

    Attributes:
        query_TQ: position of each query; a tile at the end of its class repeats the last query.
        key_TK: position of each key; entries that no window of the tile holds point anywhere.
        bias_TQK: entry of the bias table for each pair, `outside` where the key is not in the window.
        place_L: for each position of the axis, where its query stands in ``query_TQ.flatten()``.
        is_repeat_TQ: whether the query is such a repetition.
        outside: 2K - 1, one past the end of the bias table.
    """

    query_TQ: Tensor
    key_TK: Tensor
    bias_TQK: Tensor
    place_L: Tensor
    is_repeat_TQ: Tensor
    outside: int


def axis_tiles(axis: Axis, size: int, device: torch.device | None = None) -> AxisTiles:
    """Cuts an axis into tiles of `size` queries.

    A tile of one query has exactly K keys, in window order: with size 1 this is the window table of the definition.
    """
    length, kernel_size, stride, dilation, _ = axis
    longest = -(-length // dilation)  # tokens of residue class 0
    tiles_per_class = -(-longest // size)
    tile = torch.arange(dilation * tiles_per_class, device=device)
    residue_T1 = (tile // tiles_per_class)[:, None]
    n_T1 = (length - residue_T1 + dilation - 1) // dilation

    s_TQ = (tile % tiles_per_class)[:, None] * size + torch.arange(size, device=device)
    is_repeat_TQ = s_TQ >= n_T1
    s_TQ = torch.minimum(s_TQ, n_T1 - 1)
    first_TQ = first_key(axis, s_TQ, n_T1)

    if size == 1:
        span, start_T1 = kernel_size, first_TQ
    else:
        span, start_T1 = min(longest, kernel_size + size + stride - 2), first_TQ[:, :1].clamp(min=0)
    key_TK = start_T1 + torch.arange(span, device=device)

    outside = 2 * kernel_size - 1
    offset_TQK = key_TK[:, None, :] - first_TQ[:, :, None]
    is_seen_TQK = (offset_TQK >= 0) & (offset_TQK < kernel_size) & (key_TK >= 0)[:, None, :]
    if axis.is_causal:
        is_seen_TQK &= key_TK[:, None, :] <= s_TQ[:, :, None]
    bias_TQK = key_TK[:, None, :] - s_TQ[:, :, None] + (kernel_size - 1)
    bias_TQK = torch.where(is_seen_TQK, bias_TQK, outside)
    key_TK = torch.minimum(key_TK.clamp(min=0), n_T1 - 1)

    position = torch.arange(length, device=device)
    place_L = (position % dilation) * (tiles_per_class * size) + position // dilation
    return AxisTiles(
        query_TQ=residue_T1 + s_TQ * dilation,
        key_TK=residue_T1 + key_TK * dilation,
        bias_TQK=bias_TQK,
        place_L=place_L,
        is_repeat_TQ=is_repeat_TQ,
        outside=outside,
    )


def padding(space: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Tokens to append to each axis so that it holds kernel_size * dilation of them; 0 where it is long enough."""
    return tuple(max(0, k * d - length) for length, k, d in zip(space, kernel_size, dilation, strict=True))


WINDOW_PADDINGS = ("shift", "zeros", "valid")


class Margin(NamedTuple):
    """How an axis is laid out so that the windows of some queries need not be moved; in tokens.

    Attributes:
        before, behind: zeros to put at either end.
        first, count: the queries that are wanted, counted on the axis with its zeros.
    """

    before: int
    behind: int
    first: int
    count: int


def margin(axis: Axis, window_padding: str) -> Margin:
    """The layout of an axis without a stride for window_padding "zeros" or "valid"; `count` may come out below 1."""
    length, kernel_size, _, dilation, is_causal = axis
    before = (kernel_size - 1 if is_causal else kernel_size // 2) * dilation
    inner = (kernel_size - 1) * dilation  # what a window reaches to both sides together, a multiple of dilation
    if window_padding == "zeros":
        return Margin(before, max(inner - before, kernel_size * dilation - length - before), before, length)
    # Short axes get zeros that no wanted query sees, since each residue class needs kernel_size tokens.
    return Margin(0, max(0, kernel_size * dilation - length), before, length - inner)


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def per_axis(value, rank: int, name: str, kind: type) -> tuple:
    """An argument given once or once an axis, as a tuple of `rank` values.

    Raises:
        ValueError: if it is neither one value nor `rank` values of the kind.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank or not all(_is_kind(v, kind) for v in values):
        raise ValueError(f"{name} must be one {kind.__name__} or {rank} of them, one an axis, but is {value!r}.")
    return tuple(v if isinstance(v, torch.SymInt) else kind(v) for v in values)


def _is_kind(value, kind: type) -> bool:
    """Whether a value is a bool, or an int of Python, of NumPy or of torch.compile."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, torch.SymInt, Integral))


def check_window(
    rank: int, kernel_size: IntOrTuple, stride: IntOrTuple, dilation: IntOrTuple, is_causal: BoolOrTuple
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """The four window arguments as tuples, one value an axis.

    Raises:
        ValueError: kernel_size < 2, stride < 1, stride > kernel_size, dilation < 1, or not one value an axis.
    """
    kernel_size = per_axis(kernel_size, rank, "kernel_size", int)
    stride = per_axis(stride, rank, "stride", int)
    dilation = per_axis(dilation, rank, "dilation", int)
    is_causal = per_axis(is_causal, rank, "is_causal", bool)
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        if k < 2:
            raise ValueError(f"kernel_size is {k} on axis {axis}, but a window needs at least 2 tokens on each axis.")
        if not 1 <= s <= k:
            raise ValueError(f"stride is {s} on axis {axis}, but must lie between 1 and kernel_size, here {k}.")
        if d < 1:
            raise ValueError(f"dilation is {d} on axis {axis}, but must be at least 1.")
    return kernel_size, stride, dilation, is_causal


def make_margins(space: Sequence[int], window: tuple[tuple, ...], window_padding: str) -> tuple[Margin, ...]:
    """The layout of each axis for a checked window and window_padding "zeros" or "valid".

    Raises:
        ValueError: with a stride, and where an axis is too short to hold a single window.
    """
    margins = []
    for index, axis in enumerate(Axis(*values) for values in zip(space, *window, strict=True)):
        if axis.stride > 1:
            raise ValueError(
                f"stride is {axis.stride} on axis {index}, but window_padding={window_padding!r} is defined for "
                "windows of their own alone: use stride 1, or window_padding='shift'."
            )
        margins.append(margin(axis, window_padding))
        if margins[-1].count < 1:
            raise ValueError(
                f"window_padding='valid' leaves no query on axis {index}: a window reaches over "
                f"{axis.length + 1 - margins[-1].count} tokens, kernel_size {axis.kernel_size} at dilation "
                f"{axis.dilation}, but that axis has only {axis.length}."
            )
    return tuple(margins)


def make_axes(
    space: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    dilation: IntOrTuple = 1,
    is_causal: BoolOrTuple = False,
) -> tuple[Axis, ...]:
    """The checked axes of a problem on a map of the given lengths.

    Raises:
        ValueError: as `check_window`, and where kernel_size * dilation exceeds the length of an axis.
    """
    return _make_axes(tuple(space), kernel_size, stride, dilation, is_causal)


@remember
def _make_axes(space, kernel_size, stride, dilation, is_causal) -> tuple[Axis, ...]:
    window = check_window(len(space), kernel_size, stride, dilation, is_causal)
    axes = tuple(Axis(*values) for values in zip(space, *window, strict=True))
    for index, axis in enumerate(axes):
        if axis.kernel_size * axis.dilation > axis.length:
            raise ValueError(
                f"kernel_size * dilation is {axis.kernel_size} * {axis.dilation} = {axis.kernel_size * axis.dilation} "
                f"on axis {index}, but that axis has only {axis.length} tokens, of a map of "
                f"{'x'.join(map(str, space))}: make either smaller, "
                f"or pad the map, as the layer NeighborhoodAttention{len(axes)}D does."
            )
    return axes


def check_tensors(rank: int, **tensors: Tensor) -> None:
    """Checks that tensors of one problem have rank + 3 dimensions, one floating dtype and one device.

    Raises:
        ValueError: naming the tensor that does not fit.
    """
    (first_name, first), *others = tensors.items()
    for name, x in tensors.items():
        if x.dim() != rank + 3:
            raise ValueError(
                f"{name} has {x.dim()} dimensions, but {rank}-D neighborhood attention takes {rank + 3}: batch, "
                f"{rank} spatial axes, heads and head_dim; its shape is {tuple(x.shape)}."
            )
        if x.shape[-1] == 0:
            raise ValueError(f"{name} has head_dim 0, but needs at least 1; its shape is {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}, but must be a floating-point tensor.")
    for name, x in others:
        if x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, but {first_name} is {first.dtype} on {first.device}: "
                "convert one of them."
            )


def check_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError, naming both, where two tensors that must agree in shape do not."""
    (first_name, first), *others = tensors.items()
    for name, x in others:
        if x.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but {first_name} has {tuple(first.shape)}: they must agree."
            )


def check_attention(rank: int, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Checks heads-last query, key and value; these two may have fewer heads, and value another head_dim.

    Raises:
        ValueError: naming the tensor that does not fit, and how.
    """
    check_tensors(rank, query=query, key=key, value=value)
    for name, x in {"key": key, "value": value}.items():
        if x.shape[:-2] != query.shape[:-2]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but query has {tuple(query.shape)}: batch and spatial axes must "
                "agree."
            )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has head_dim {key.shape[-1]}, but query has {query.shape[-1]}: they must agree.")
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if value.shape[-2] != kv_heads:
        raise ValueError(f"value has {value.shape[-2]} heads, but key has {kv_heads}: they must agree.")
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"key and value have {kv_heads} heads, but query has {heads}: they must agree, or query have a multiple."
        )


def check_additional(additional_keys: Tensor | None, additional_values: Tensor | None, key: Tensor, value: Tensor):
    """Checks keys and values beside the map, [B, N, heads, head_dim] of the key's and value's heads and head_dim.

    Raises:
        ValueError: naming the tensor that does not fit, or that is missing.
    """
    if (additional_keys is None) != (additional_values is None):
        given, missing = ("additional_keys", "additional_values")[:: 1 if additional_values is None else -1]
        raise ValueError(f"{given} is given without {missing}: give both or neither.")
    if additional_keys is None:
        return
    tokens = additional_keys.shape[1] if additional_keys.dim() > 1 else 0
    pairs = {"additional_keys": (additional_keys, key), "additional_values": (additional_values, value)}
    for name, (x, like) in pairs.items():
        expected = (like.shape[0], tokens, *like.shape[-2:])
        if tuple(x.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but must have {tuple(expected)} beside these keys: batch, tokens, "
                "heads and head_dim."
            )
        if x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, but key is {like.dtype} on {like.device}: convert one of them."
            )


def check_window_padding(window_padding: str) -> None:
    """Raises ValueError if there is no such window_padding."""
    if window_padding not in WINDOW_PADDINGS:
        raise ValueError(
            f"window_padding is {window_padding!r}, but must be {', '.join(map(repr, WINDOW_PADDINGS[:-1]))} or "
            f"{WINDOW_PADDINGS[-1]!r}."
        )


def check_rpb(rpb: Tensor | None, axes: Sequence[Axis], heads: int, dtype: torch.dtype, device: torch.device) -> None:
    """Checks a relative position bias: shape [heads, 2K - 1 on each axis], the dtype of the query or float32.

    Raises:
        ValueError: naming what is wrong and what is expected.
    """
    if rpb is None:
        return
    expected = (heads, *(2 * axis.kernel_size - 1 for axis in axes))
    if tuple(rpb.shape) != expected:
        raise ValueError(f"rpb has shape {tuple(rpb.shape)}, but {heads} heads and this kernel_size need {expected}.")
    if rpb.dtype not in (dtype, torch.float32):
        raise ValueError(f"rpb is {rpb.dtype}, but must be float32 or of the query's dtype, {dtype}.")
    if rpb.device != device:
        raise ValueError(f"rpb is on {rpb.device}, but the query is on {device}: move one of them.")
