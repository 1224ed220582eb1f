"""The specification of neighborhood attention: windows, bias index, tiles and padding.

Along one axis of length L with window K, dilation D and stride S, the query at position i belongs to residue class
r = i mod D. It is token s = i div D of the n = ceil((L - r) / D) tokens in that class. Its window lies in that class:

- Not causal: the K tokens lo .. lo+K-1, lo = clamp(leader - K div 2, 0, n - K). Windows are shifted at the borders, so
  there are always K keys.
- Causal: the tokens max(0, leader-K+1) .. s.
- With S = 1 the leader is s itself. With S > 1 the S queries of a group share a leader: with g = (s div S) * S, it is
  min(g + S div 2, n - 1); causal: min(g + S - 1, n - 1).

Key s' of query s uses entry s' - s + K - 1 of a bias table with 2K - 1 entries. Windows over several axes are products.
These are equations 1 and 2 of DiNAT (arXiv:2209.15001) and, for D = 1, NAT, section 3 (arXiv:2204.07143).

Shape suffixes: L positions of an axis, T tiles, Q queries and K keys of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
    """Return the first of the K keys of a query in its residue class. In causal windows it may be negative.

    Args:
        axis: the axis.
        s: index of the query in its residue class, any shape.
        n: number of tokens in that class, broadcastable to s.
    """
    group = s - s % axis.stride
    if axis.is_causal:
        leader = torch.minimum(group + (axis.stride - 1), n - 1)
        return leader - (axis.kernel_size - 1)
    leader = torch.minimum(group + axis.stride // 2, n - 1)
    return torch.minimum((leader - axis.kernel_size // 2).clamp(min=0), n - axis.kernel_size)


def ceil_div(length: int, part: int) -> int:
    """Divide and round up. In ONNX, the quotient of a negative symbolic integer would be rounded to the other side."""
    return (length + part - 1) // part


class AxisTiles(NamedTuple):
    """An axis split into tiles: up to Q consecutive queries of one residue class, and all keys that any of them sees.

    Attributes:
        query_TQ: position of each query; the last tile of a class repeats the last query to fill up.
        key_TK: position of each key; entries outside all windows of the tile are valid positions without meaning.
        bias_TQK: entry of the bias table for each pair; `outside` if the key is not in the window.
        place_L: index of each position of the axis in ``query_TQ.flatten()``.
        is_repeat_TQ: whether the query is a repetition.
        outside: 2K - 1, one past the end of the bias table.
    """

    query_TQ: Tensor
    key_TK: Tensor
    bias_TQK: Tensor
    place_L: Tensor
    is_repeat_TQ: Tensor
    outside: int


def axis_tiles(axis: Axis, size: int, device: torch.device | None = None) -> AxisTiles:
    """Split an axis into tiles of `size` queries, with tensors on `device`.

    A tile of one query has exactly K keys, in the order of its window, so size 1 returns the table of all windows.
    """
    length, kernel_size, stride, dilation, _ = axis
    longest = ceil_div(length, dilation)  # tokens of residue class 0
    tiles_per_class = ceil_div(longest, size)
    tile_T = torch.arange(dilation * tiles_per_class, device=device)
    residue_T1 = (tile_T // tiles_per_class)[:, None]
    n_T1 = (length - residue_T1 + dilation - 1) // dilation

    s_TQ = (tile_T[:, None] - residue_T1 * tiles_per_class) * size + torch.arange(size, device=device)
    is_repeat_TQ = s_TQ >= n_T1
    s_TQ = torch.minimum(s_TQ, n_T1 - 1)
    first_TQ = first_key(axis, s_TQ, n_T1)

    if size == 1:
        span, start_T1 = kernel_size, first_TQ
    else:
        span, start_T1 = kernel_size + size + stride - 2, first_TQ[:, :1].clamp(min=0)
        if isinstance(longest, int):  # else torch.export records a program for any length
            span = min(span, longest)
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
    """Return the number of tokens to append to each axis to make it at least kernel_size * dilation long.

    The lengths may be symbolic integers, or the tensors that torch.jit.trace turns sizes into. So are the results.
    """
    return tuple(_missing(length, k * d) for length, k, d in zip(space, kernel_size, dilation, strict=True))


def _missing(length: Any, least: int) -> Any:
    if isinstance(length, int):
        return max(0, least - length)
    if isinstance(length, Tensor):
        return (least - length).clamp(min=0)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    # torch.export can reason about the maximum of a length and a number, but not about that of a difference and 0.
    return 0 if statically_known_true(length >= least) else torch.sym_max(length, least) - length


class Margin(NamedTuple):
    """How to pad an axis so that no window of interest is shifted, in tokens.

    Attributes:
        before, after: number of zero tokens to add at either end.
        first, queries: first and number of the queries of interest, on the padded axis.
    """

    before: int
    after: int
    first: int
    queries: int


def margin(axis: Axis, window_padding: str) -> Margin:
    """Return the margin of an axis with stride 1 for window_padding "zeros" or "valid"; `queries` may be below 1."""
    length, kernel_size, _, dilation, is_causal = axis
    before = (kernel_size - 1 if is_causal else kernel_size // 2) * dilation
    inner = (kernel_size - 1) * dilation  # window span minus its query
    if window_padding == "zeros":
        return Margin(before, max(inner - before, kernel_size * dilation - length - before), before, length)
    # Short axes are padded because each residue class needs kernel_size tokens; no query of interest sees the zeros.
    return Margin(0, max(0, kernel_size * dilation - length), before, length - inner)
