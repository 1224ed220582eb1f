"""Windows as tables, for implementations that want them so; made of natten.geometry, the specification.

L is the length of an axis, K its kernel_size, N the tokens of the map, W the keys of a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from natten.geometry import Axis, axis_tiles


def axis_windows(axis: Axis) -> tuple[Tensor, Tensor]:
    """For each position of an axis, its keys and their entries of the bias table, both [L, K].

    The entry is 2K - 1, one past the end, where a causal window leaves the map.
    """
    tiles = axis_tiles(axis, 1)
    return tiles.key_TK[tiles.place_L], tiles.bias_TQK[tiles.place_L, 0]


def axis_pairs(axis: Axis) -> Tensor:
    """Entry of the bias table for each pair of positions [L, L], 2K - 1 where the key is not in the window."""
    key_LK, bias_LK = axis_windows(axis)
    outside = torch.full((axis.length, axis.length), 2 * axis.kernel_size - 1)
    return outside.scatter_reduce(1, key_LK, bias_LK, "amin")  # the least: a slot outside may point at a real key


def flatten(tables: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Indices along each axis [L, K] as indices into the flattened axes of those sizes, [N, W]."""
    flat = tables[0]
    for table, size in zip(tables[1:], sizes[1:], strict=True):
        flat = (flat[:, None, :, None] * size + table[None, :, None, :]).flatten(2).flatten(0, 1)
    return flat


def bias_index(axes: Sequence[Axis], tables: Sequence[Tensor]) -> Tensor:
    """Tables of bias entries along each axis as places in a flattened `padded_bias`, [N, W]."""
    return flatten(tables, [2 * axis.kernel_size for axis in axes])


def padded_bias(rpb: Tensor | None, axes: Sequence[Axis], fill: float) -> Tensor:
    """The bias table with an entry `fill` for "outside" on each axis, [heads, 2K..]; zeros for one head without rpb."""
    table = torch.zeros(1, *(2 * axis.kernel_size - 1 for axis in axes)) if rpb is None else rpb
    return F.pad(table, (0, 1) * len(axes), value=fill)
