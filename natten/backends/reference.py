"""The reference backend: neighborhood attention in plain PyTorch, on any device, in any dtype, for any rank.

Queries are processed in tiles (`geometry.axis_tiles`). Within a tile this is ordinary attention between all queries and
all keys of the tile, with a bias of -inf where a key is outside the window of a query. With one query per tile, this is
the definition itself; unfused attention always uses one query per tile. Larger tiles compute the same values with
larger matrix products.

Memory is linear in tokens x window. Inputs must be finite: a NaN spreads to every query of its tile.

Shape suffixes: B batch, X the spatial axes, H heads, d head_dim, T tiles (of all axes), Q queries per tile, K keys per
tile, W keys per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from natten.geometry import Axis, AxisTiles, axis_tiles, ceil_div

NAME = "reference"


def unsupported_reason(query: Tensor) -> str | None:
    """Return None, since the reference backend supports every call."""
    return None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums are accumulated: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def is_autocast(device: str) -> bool:
    """Return whether autocast is enabled for a device type."""
    return device != "meta" and torch.is_autocast_enabled(device)  # torch raises for meta


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context that disables autocast on the tensor's device.

    It does nothing where autocast is already off, so that exported graphs have no nested regions.
    """
    device = x.device.type
    return torch.autocast(device, enabled=False) if is_autocast(device) else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Heads and head_dims
# ---------------------------------------------------------------------------------------------------------------------


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each head so that query head h meets key/value head h div (heads / heads of x): [..., heads, d]."""
    times = 1 if x.shape[-2] == heads else heads // x.shape[-2]
    return x if times == 1 else x.unsqueeze(-2).expand(*x.shape[:-1], times, x.shape[-1]).flatten(-3, -2)


def sum_heads(x: Tensor, out: Tensor) -> None:
    """Sum the repetitions of each head into `out`, which has fewer heads or as many: the adjoint of `repeat_heads`."""
    if x.shape == out.shape:
        out.copy_(x)
    else:
        torch.sum(x.unflatten(-2, (out.shape[-2], -1)).to(out.dtype), -2, out=out)


def shape_of_grads(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """Return the shape of the tensor that holds the gradients of query, key and value; see `split_grads`."""
    if query.shape == key.shape == value.shape:
        return (*query.shape[:-2], 3, *query.shape[-2:])
    return (query.numel() + key.numel() + value.numel(),)


def split_grads(grad_qkv: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Return views of the gradients of query, key and value.

    Args:
        grad_qkv: [B, X, 3, H, d] if the three have the same shape, else the gradients one after another, 1-D.
    """
    if grad_qkv.dim() > 1:
        return grad_qkv.unbind(-3)
    parts = grad_qkv.split([x.numel() for x in (query, key, value)])
    return tuple(part.view(x.shape) for part, x in zip(parts, (query, key, value), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Fused attention
# ---------------------------------------------------------------------------------------------------------------------


def attention(
    q_BXHd: Tensor, k_BXHd: Tensor, v_BXHd: Tensor, rpb: Tensor | None, axes: Sequence[Axis], scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output in the query's dtype, and the logsumexp of the logits [B, X, H] in the accumulation dtype.

    Both are differentiable.
    """
    with no_autocast(q_BXHd):
        tiles = _tiles(axes, q_BXHd.device)
        *_, v_BTHKd, logits_BTHQK = _logits(q_BXHd, k_BXHd, v_BXHd, rpb, tiles, scale)
        top_BTHQ1 = logits_BTHQK.detach().amax(-1, keepdim=True)
        weight_BTHQK = logits_BTHQK.sub_(top_BTHQ1).exp_()
        total_BTHQ1 = weight_BTHQK.sum(-1, keepdim=True)
        out_BXHd = _from_tiles(weight_BTHQK @ v_BTHKd / total_BTHQ1, tiles).to(q_BXHd.dtype)
        lse_BXH = _from_tiles(top_BTHQ1 + total_BTHQ1.log(), tiles).squeeze(-1)
        return out_BXHd, lse_BXH


def attention_backward(
    grad_out_BXHd: Tensor,
    grad_lse_BXH: Tensor | None,
    q_BXHd: Tensor,
    k_BXHd: Tensor,
    v_BXHd: Tensor,
    rpb: Tensor | None,
    out_BXHd: Tensor,
    lse_BXH: Tensor,
    axes: Sequence[Axis],
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of query, key and value in one tensor, as `split_grads` reads it, and that of rpb."""
    with no_autocast(q_BXHd):
        tiles = _tiles(axes, q_BXHd.device)
        q_BTHQd, k_BTHKd, v_BTHKd, logits_BTHQK = _logits(q_BXHd, k_BXHd, v_BXHd, rpb, tiles, scale)
        grad_out_BXHd = grad_out_BXHd.to(lse_BXH.dtype)
        delta_BXH = (grad_out_BXHd * out_BXHd).sum(-1)
        if grad_lse_BXH is not None:
            delta_BXH = delta_BXH - grad_lse_BXH

        queries = [axis.query_TQ for axis in tiles]
        grad_out_BTHQd = _to_tiles(grad_out_BXHd, queries)
        delta_BTHQ1 = _to_tiles(delta_BXH.unsqueeze(-1), queries)
        lse_BTHQ1 = _to_tiles(lse_BXH.unsqueeze(-1), queries)
        # A repeated query must not count twice; a logsumexp of inf gives it zero weights.
        lse_BTHQ1 = lse_BTHQ1.masked_fill(_is_repeat(tiles), float("inf"))

        weight_BTHQK = logits_BTHQK.sub_(lse_BTHQ1).exp_()
        grad_weight_BTHQK = grad_out_BTHQd @ v_BTHKd.transpose(-2, -1)
        grad_logits_BTHQK = grad_weight_BTHQK.sub_(delta_BTHQ1).mul_(weight_BTHQK)

        shape, keys = q_BXHd.shape, [axis.key_TK for axis in tiles]
        grad_q = _from_tiles(grad_logits_BTHQK @ k_BTHKd, tiles).mul(scale)
        grad_k = _add_tiles(grad_logits_BTHQK.transpose(-2, -1) @ q_BTHQd, keys, shape)
        grad_v = _add_tiles(weight_BTHQK.transpose(-2, -1) @ grad_out_BTHQd, keys, shape)
        grad_qkv = q_BXHd.new_empty(shape_of_grads(q_BXHd, k_BXHd, v_BXHd))
        views = split_grads(grad_qkv, q_BXHd, k_BXHd, v_BXHd)
        for view, grad in zip(views, (grad_q, grad_k, grad_v), strict=True):
            sum_heads(grad, view)
        grad_rpb = None if rpb is None else _add_bias(grad_logits_BTHQK.sum(0), tiles, rpb)
        return grad_qkv, grad_rpb


def _tiles(axes: Sequence[Axis], device: torch.device) -> list[AxisTiles]:
    """Return tiles of K queries per axis, which have 2K - 1 keys. A residue class of up to 2.5 K tokens is one tile."""
    return [axis_tiles(axis, _tile_size(axis), device) for axis in axes]


def _tile_size(axis: Axis) -> int:
    longest = ceil_div(axis.length, axis.dilation)
    is_short = isinstance(longest, int) and 2 * longest <= 5 * axis.kernel_size  # torch.export may not know the length
    return longest if is_short else axis.kernel_size


def _is_repeat(tiles: Sequence[AxisTiles]) -> Tensor:
    """Return a mask [T, 1, Q, 1] of the queries that are repetitions on any axis."""
    is_repeat_TQ = tiles[0].is_repeat_TQ
    for axis in tiles[1:]:
        is_repeat = is_repeat_TQ[:, None, :, None] | axis.is_repeat_TQ[None, :, None, :]
        is_repeat_TQ = is_repeat.flatten(2).flatten(0, 1)
    return is_repeat_TQ[:, None, :, None]


def _logits(q_BXHd, k_BXHd, v_BXHd, rpb, tiles: list[AxisTiles], scale: float) -> tuple[Tensor, ...]:
    """Return the scaled query, the key and the value in tiles, and the logits, in the accumulation dtype."""
    dtype = accumulation_dtype(q_BXHd.dtype)
    k_BXHd, v_BXHd = (repeat_heads(x, q_BXHd.shape[-2]) for x in (k_BXHd, v_BXHd))
    keys = [axis.key_TK for axis in tiles]
    q_BTHQd = _to_tiles(q_BXHd.to(dtype) * scale, [axis.query_TQ for axis in tiles])
    k_BTHKd = _to_tiles(k_BXHd.to(dtype), keys)
    v_BTHKd = _to_tiles(v_BXHd.to(dtype), keys)
    logits_BTHQK = q_BTHQd @ k_BTHKd.transpose(-2, -1) + _bias(rpb, tiles, dtype)
    return q_BTHQd, k_BTHKd, v_BTHKd, logits_BTHQK


# ---------------------------------------------------------------------------------------------------------------------
# Unfused attention
# ---------------------------------------------------------------------------------------------------------------------


def query_key(q_BHXd: Tensor, k_BHXd: Tensor, rpb: Tensor | None, axes: Sequence[Axis]) -> Tensor:
    """Return the unscaled logits [B, H, X, W], with the keys of a window in row-major order.

    Slots of a causal window before the map are -inf.
    """
    with no_autocast(q_BHXd):
        tiles = _windows(axes, q_BHXd)
        q_BTH1d, k_BTHWd = _to_windows(q_BHXd, tiles, "query_TQ"), _to_windows(k_BHXd, tiles, "key_TK")
        bias_TH1W = _bias(rpb, tiles, q_BTH1d.dtype)
        # Filled after the sum, so that autograd treats these slots as constants.
        logits_BTH1W = (q_BTH1d @ k_BTHWd.transpose(-2, -1) + bias_TH1W).masked_fill(bias_TH1W.isinf(), float("-inf"))
        return _from_windows(logits_BTH1W, tiles, q_BHXd.dtype)


def query_key_backward(
    grad_BHXW: Tensor, q_BHXd: Tensor, k_BHXd: Tensor, rpb: Tensor | None, axes: Sequence[Axis]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of query, key and rpb."""
    with no_autocast(q_BHXd):
        tiles = _windows(axes, q_BHXd)
        q_BTH1d, k_BTHWd = _to_windows(q_BHXd, tiles, "query_TQ"), _to_windows(k_BHXd, tiles, "key_TK")
        is_void = _is_outside(tiles) | _is_repeat(tiles)
        grad_BTH1W = _to_windows(grad_BHXW, tiles, "query_TQ").masked_fill(is_void, 0.0)
        grad_q = _from_windows(grad_BTH1W @ k_BTHWd, tiles, q_BHXd.dtype)
        grad_k = _add_windows(grad_BTH1W.transpose(-2, -1) @ q_BTH1d, tiles, k_BHXd)
        grad_rpb = None if rpb is None else _add_bias(grad_BTH1W.sum(0), tiles, rpb)
        return grad_q, grad_k, grad_rpb


def weight_value(weight_BHXW: Tensor, v_BHXd: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return the sums of weight times value over each window, [B, H, X, d].

    Slots of a causal window before the map are ignored.
    """
    with no_autocast(v_BHXd):
        tiles = _windows(axes, v_BHXd)
        weight_BTH1W = _to_windows(weight_BHXW, tiles, "query_TQ").masked_fill(_is_outside(tiles), 0.0)
        return _from_windows(weight_BTH1W @ _to_windows(v_BHXd, tiles, "key_TK"), tiles, v_BHXd.dtype)


def weight_value_backward(
    grad_BHXd: Tensor, weight_BHXW: Tensor, v_BHXd: Tensor, axes: Sequence[Axis]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weights and the value."""
    with no_autocast(v_BHXd):
        tiles = _windows(axes, v_BHXd)
        is_void = _is_outside(tiles) | _is_repeat(tiles)
        weight_BTH1W = _to_windows(weight_BHXW, tiles, "query_TQ").masked_fill(is_void, 0.0)
        grad_BTH1d, v_BTHWd = _to_windows(grad_BHXd, tiles, "query_TQ"), _to_windows(v_BHXd, tiles, "key_TK")
        grad_weight_BTH1W = (grad_BTH1d @ v_BTHWd.transpose(-2, -1)).masked_fill(is_void, 0.0)
        grad_v = _add_windows(weight_BTH1W.transpose(-2, -1) @ grad_BTH1d, tiles, v_BHXd)
        return _from_windows(grad_weight_BTH1W, tiles, weight_BHXW.dtype), grad_v


def _windows(axes: Sequence[Axis], x: Tensor) -> list[AxisTiles]:
    """Return tiles of one query, which contain exactly the keys of its window."""
    return [axis_tiles(axis, 1, x.device) for axis in axes]


def _is_outside(tiles: Sequence[AxisTiles]) -> Tensor:
    """Return a mask [T, 1, 1, W] of the slots of causal windows that are before the map."""
    return _bias(None, tiles, torch.float32).isinf()


def _to_windows(x_BHXd: Tensor, tiles: Sequence[AxisTiles], positions: str) -> Tensor:
    """Return x in windows [B, T, H, 1 or W, d], in the accumulation dtype.

    Args:
        positions: the field of `AxisTiles` with the positions to gather.
    """
    x_BXHd = x_BHXd.movedim(1, -2).to(accumulation_dtype(x_BHXd.dtype))
    return _to_tiles(x_BXHd, [getattr(axis, positions) for axis in tiles])


def _from_windows(x_BTH1d: Tensor, tiles: Sequence[AxisTiles], dtype: torch.dtype) -> Tensor:
    return _from_tiles(x_BTH1d, tiles).movedim(-2, 1).to(dtype)


def _add_windows(x_BTHWd: Tensor, tiles: Sequence[AxisTiles], like_BHXd: Tensor) -> Tensor:
    shape = like_BHXd.movedim(1, -2).shape
    x_BXHd = _add_tiles(x_BTHWd, [axis.key_TK for axis in tiles], shape)
    return x_BXHd.movedim(-2, 1).to(like_BHXd.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Between maps and tiles
# ---------------------------------------------------------------------------------------------------------------------


def _to_tiles(x_BXHd: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """Gather the given positions [tiles, items] of each axis: [B, X, H, d] -> [B, T, H, items, d]."""
    rank = len(positions)
    x = x_BXHd
    for axis, position in reversed(list(enumerate(positions, start=1))):
        x = x.index_select(axis, position.flatten()).unflatten(axis, position.shape)
    x = x.permute(0, *range(1, 2 * rank, 2), 2 * rank + 1, *range(2, 2 * rank + 1, 2), 2 * rank + 2)
    return x.flatten(1, rank).flatten(3, rank + 2)


def _from_tiles(x_BTHQd: Tensor, tiles: Sequence[AxisTiles]) -> Tensor:
    """Return the queries of all tiles in the order of the map, without repetitions: [B, T, H, Q, d] -> [B, X, H, d]."""
    x = _join_tiles(x_BTHQd, [axis.query_TQ for axis in tiles])
    for dim, axis in enumerate(tiles, start=1):
        x = x.index_select(dim, axis.place_L)
    return x


def _add_tiles(x_BTHKd: Tensor, positions: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Sum the values of all tiles per position, the adjoint of `_to_tiles`: [B, T, H, K, d] -> [B, X, H, d]."""
    x = _join_tiles(x_BTHKd, positions)
    for dim, position in enumerate(positions, start=1):
        total = x.new_zeros(*x.shape[:dim], shape[dim], *x.shape[dim + 1 :])
        x = total.index_add_(dim, position.flatten(), x)
    return x


def _join_tiles(x_BTHQd: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """Reshape [B, T, H, items, d] to [B, tiles x items of each axis, H, d]."""
    rank = len(positions)
    x = x_BTHQd.unflatten(3, [p.shape[1] for p in positions]).unflatten(1, [p.shape[0] for p in positions])
    pairs = (axis for pair in zip(range(1, rank + 1), range(rank + 2, 2 * rank + 2), strict=True) for axis in pair)
    x = x.permute(0, *pairs, rank + 1, 2 * rank + 2)
    for axis in range(1, rank + 1):
        x = x.flatten(axis, axis + 1)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Relative position bias
# ---------------------------------------------------------------------------------------------------------------------


def _bias(rpb: Tensor | None, tiles: Sequence[AxisTiles], dtype: torch.dtype) -> Tensor:
    """Return the bias of each pair [T, H, Q, K], -inf where the key is outside the window; H is 1 without rpb."""
    rank = len(tiles)
    if rpb is None:
        table = torch.zeros((1, *(axis.outside for axis in tiles)), dtype=dtype, device=tiles[0].key_TK.device)
    else:
        table = rpb.to(dtype)
    table = F.pad(table, (0, 1) * rank, value=float("-inf"))  # the entry `outside` of each axis
    for dim, axis in enumerate(tiles, start=1):
        table = table.index_select(dim, axis.bias_TQK.flatten())
    heads = table.shape[0]
    table = table.reshape(heads, *(size for axis in tiles for size in axis.bias_TQK.shape))
    table = table.permute(_pair_order(rank))
    return table.reshape(-1, heads, *(prod([axis.bias_TQK.shape[i] for axis in tiles]) for i in (1, 2)))


def _add_bias(grad_THQK: Tensor, tiles: Sequence[AxisTiles], rpb: Tensor) -> Tensor:
    """Sum the gradient of each table entry, the adjoint of `_bias`: [T, H, Q, K] -> rpb's shape and dtype."""
    rank, heads = len(tiles), rpb.shape[0]
    order = _pair_order(rank)
    sizes = (heads, *(size for axis in tiles for size in axis.bias_TQK.shape))
    x = grad_THQK.reshape(*(sizes[i] for i in order))
    x = x.permute(tuple(order.index(i) for i in range(len(order))))
    x = x.reshape(heads, *(axis.bias_TQK.numel() for axis in tiles))
    for dim, axis in enumerate(tiles, start=1):
        total = x.new_zeros(*x.shape[:dim], axis.outside + 1, *x.shape[dim + 1 :])
        x = total.index_add_(dim, axis.bias_TQK.flatten(), x).narrow(dim, 0, axis.outside)
    return x.to(rpb.dtype).contiguous()


def _pair_order(rank: int) -> tuple[int, ...]:
    """Return the permutation from [H, tiles, queries, keys of each axis] to [tiles.., H, queries.., keys..]."""
    tiles, queries, keys = (range(first, 3 * rank + 1, 3) for first in (1, 2, 3))
    return (*tiles, 0, *queries, *keys)
