"""Neighborhood attention in exported programs: few, large operations that every runtime has and runs fast.

Not a backend that users choose: while torch.export or an ONNX exporter records a program, fused attention is recorded
as this function. The method is that of the reference backend, with four differences for the sake of runtimes:

- Tokens are gathered once, from a map whose spatial axes are flattened, directly into the layout of the products.
- The weights are one softmax. The logsumexp is computed apart, so that exporters drop it if nothing uses it.
- Axes are counted from the front, because the TorchScript exporter of ONNX forgets the rank of tensors.
- Tiles are small, because the time of the products and the softmax is proportional to the keys per tile.

Shape suffixes: B batch, X the spatial axes, N all tokens, H heads, d head_dim, T tiles, Q queries and K keys per tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from natten.backends.reference import accumulation_dtype, no_autocast, repeat_heads
from natten.geometry import Axis, AxisTiles, axis_tiles, ceil_div


def attention(
    q_BXHd: Tensor, k_BXHd: Tensor, v_BXHd: Tensor, rpb: Tensor | None, axes: Sequence[Axis], scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output in the query's dtype, and the logsumexp of the logits [B, X, H] in the accumulation dtype."""
    with no_autocast(q_BXHd):
        dtype, space = accumulation_dtype(q_BXHd.dtype), q_BXHd.shape[1:-2]
        k_BXHd, v_BXHd = (repeat_heads(x, q_BXHd.shape[-2]) for x in (k_BXHd, v_BXHd))
        is_whole = all(_is_one_tile(axis) and axis.dilation == 1 for axis in axes)  # then tokens stay where they are
        tiles = [axis_tiles(axis, _tile_size(axis), q_BXHd.device) for axis in axes]
        query_TQ = None if is_whole else _join([axis.query_TQ for axis in tiles], space)
        key_TK = None if is_whole else _join([axis.key_TK for axis in tiles], space)
        place_N = None if is_whole else _places(axes, q_BXHd.device)

        q_BHTQd = _to_tiles(q_BXHd.to(dtype) * scale, query_TQ)
        k_BHTKd, v_BHTKd = (_to_tiles(x.to(dtype), key_TK) for x in (k_BXHd, v_BXHd))
        logits_BHTQK = q_BHTQd @ k_BHTKd.transpose(3, 4) + _bias(rpb, tiles, dtype)
        out_BHTQd = logits_BHTQK.softmax(4) @ v_BHTKd
        out_BXHd = _from_tiles(out_BHTQd, place_N, space).to(q_BXHd.dtype)
        lse_BXH = _from_tiles(logits_BHTQK.logsumexp(-1, keepdim=True), place_N, space).squeeze(q_BXHd.dim() - 1)
        return out_BXHd, lse_BXH


def _is_one_tile(axis: Axis) -> bool:
    """Return whether a residue class is one tile: at most 2.5 K tokens. torch.export may not know the length."""
    longest = ceil_div(axis.length, axis.dilation)
    return isinstance(longest, int) and 2 * longest <= 5 * axis.kernel_size


def _tile_size(axis: Axis) -> int:
    """Return the queries per tile and axis: K/2, which see 1.5 K keys, or a whole residue class if it is short."""
    return ceil_div(axis.length, axis.dilation) if _is_one_tile(axis) else ceil_div(axis.kernel_size, 2)


def _join(positions: Sequence[Tensor], space: Sequence[int]) -> Tensor:
    """Return the tokens of all tiles [T, items], from the positions [tiles, items] along each axis."""
    token_TK = positions[0]
    for position, length in zip(positions[1:], space[1:], strict=True):
        token_TK = (token_TK[:, None, :, None] * length + position[None, :, None, :]).flatten(2).flatten(0, 1)
    return token_TK


def _places(axes: Sequence[Axis], device: torch.device) -> Tensor:
    """Return the index of each token of the map, [N], among the queries of all tiles in order; see `axis_tiles`."""
    tile_N = query_N = torch.zeros(1, dtype=torch.long, device=device)
    for axis in axes:
        size = _tile_size(axis)
        tiles_per_class = ceil_div(ceil_div(axis.length, axis.dilation), size)
        position_L = torch.arange(axis.length, device=device)
        s_L = position_L // axis.dilation
        tile_L = position_L % axis.dilation * tiles_per_class + s_L // size
        tile_N = (tile_N[:, None] * (axis.dilation * tiles_per_class) + tile_L).flatten()
        query_N = (query_N[:, None] * size + s_L % size).flatten()
    return tile_N * prod(map(_tile_size, axes)) + query_N


def _to_tiles(x_BXHd: Tensor, token_TK: Tensor | None) -> Tensor:
    """Gather tokens: [B, X, H, d] -> [B, H, T, items, d]; all of them in one tile if `token_TK` is None."""
    x_BHNd = x_BXHd.flatten(1, x_BXHd.dim() - 3).permute(0, 2, 1, 3)
    if token_TK is None:
        return x_BHNd.unsqueeze(2)
    return x_BHNd.index_select(2, token_TK.flatten()).unflatten(2, token_TK.shape)


def _from_tiles(x_BHTQd: Tensor, place_N: Tensor | None, space: Sequence[int]) -> Tensor:
    """Return the queries of all tiles in the order of the map: [B, H, T, Q, d] -> [B, X, H, d]."""
    x_BHNd = x_BHTQd.flatten(2, 3)
    if place_N is not None:
        x_BHNd = x_BHNd.index_select(2, place_N)
    return x_BHNd.permute(0, 2, 1, 3).unflatten(1, tuple(space))


def _bias(rpb: Tensor | None, tiles: Sequence[AxisTiles], dtype: torch.dtype) -> Tensor:
    """Return the bias of each pair [H, T, Q, K], -inf where the key is outside the window; H is 1 without rpb."""
    rank = len(tiles)
    if rpb is None:
        table = torch.zeros((1, *(axis.outside for axis in tiles)), dtype=dtype, device=tiles[0].key_TK.device)
    else:
        table = rpb.to(dtype)
    table = F.pad(table, (0, 1) * rank, value=float("-inf")).flatten(1)  # the entry `outside` of each axis
    entry_TQK = tiles[0].bias_TQK
    for axis in tiles[1:]:
        first = entry_TQK[:, None, :, None, :, None] * (axis.outside + 1)
        entry_TQK = (first + axis.bias_TQK[None, :, None, :, None, :]).flatten(4).flatten(2, 3).flatten(0, 1)
    return table.index_select(1, entry_TQK.flatten()).unflatten(1, entry_TQK.shape)
