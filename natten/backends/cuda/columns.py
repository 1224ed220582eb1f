"""The columns of tiles: how many there are, and where they begin, for all maps that share a tile.

A kernel is compiled for a tile, and maps of many sizes must share kernels: in detection, each picture has another size.
A tile is therefore chosen for a class of maps, and its columns fit the tiles of all maps in the class. Kernels receive
the exact lengths at run time. natten/csrc/cuda/tiles.h defines tile, unit and column.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import lcm
from typing import NamedTuple

from natten.geometry import Axis

# The classes of maps, by their longest axis, divided by the dilation: the largest length, and the length for which
# costs are estimated. The last class has no largest length. Published models have maps of the typical lengths.
_CLASSES = ((8, 7), (16, 14), (32, 28), (None, 56))
MAX_ROW = 64  # columns of a unit in a row that is not cut into segments
_TYPICAL_LINE, _TYPICAL_WINDOWS = 256, 4  # typical lengths of the last class: on a single axis; in windows, at least


class Lengths(NamedTuple):
    """One axis of the maps of a class.

    Attributes:
        kernel_size: the window, like the next two.
        typical: the number of tokens for which costs are estimated.
        longest: the largest number of tokens, or None if there is no limit. The smallest is kernel_size.
        unit: tokens of a unit along this axis.
        remainders: the possible remainders of the number of tokens divided by `unit`.
    """

    kernel_size: int
    stride: int
    is_causal: bool
    typical: int
    longest: int | None
    unit: int
    remainders: frozenset[int]

    def holds(self, n: int) -> bool:
        """Return whether an axis of n tokens is in the class."""
        is_short = self.longest is None or n <= self.longest
        return self.kernel_size <= n and is_short and n % self.unit in self.remainders


class Row(NamedTuple):
    """How a row of columns is placed in shared memory, in the terms of tiles.h."""

    reach: int
    columns: int
    unit_columns: int


def lengths(axes: tuple[Axis, ...], units: tuple[int, ...], is_inverse: bool, is_large: bool) -> tuple[Lengths, ...]:
    """Return the class of a map.

    Args:
        axes: the axes of the problem.
        units: tokens of a unit along each axis.
        is_inverse: whether the tokens of a tile are keys.
        is_large: whether the problem is so large that maps of a convenient width have a class of their own.
    """
    longest = max(-(-axis.length // axis.dilation) for axis in axes)
    limit, typical = next(found for found in _CLASSES if found[0] is None or longest <= found[0])
    rank = sum(axis.kernel_size > 1 for axis in axes)
    found = []
    for i, (axis, unit) in enumerate(zip(axes, units, strict=True)):
        k = axis.kernel_size
        if k == 1:
            found.append(Lengths(1, 1, False, 1, 1, unit, frozenset(range(unit))))
            continue
        if limit is None:
            typical = max(_TYPICAL_LINE if rank == 1 else _CLASSES[-1][1], _TYPICAL_WINDOWS * k)
        remainders = frozenset(range(unit))
        if is_large and i == len(axes) - 1:
            narrow = _narrow_remainders(k, axis.stride, axis.is_causal, unit, is_inverse)
            both = {axis.length // axis.dilation % unit, -(-axis.length // axis.dilation) % unit}
            remainders = narrow if both <= narrow else remainders
        found.append(Lengths(k, axis.stride, axis.is_causal, max(typical, k), limit, unit, remainders))
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------------
# Columns of single tokens
# ---------------------------------------------------------------------------------------------------------------------


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _window(axis: Lengths, s: int, n: int) -> tuple[int, int]:
    """Return the first key of query s in a class of n tokens, and one past the last key.

    This is `geometry.first_key` for plain numbers.
    """
    group = s - s % axis.stride
    if axis.is_causal:
        leader = min(group + axis.stride - 1, n - 1)
        return max(leader - axis.kernel_size + 1, 0), s + 1
    leader = min(group + axis.stride // 2, n - 1)
    first = min(max(leader - axis.kernel_size // 2, 0), n - axis.kernel_size)
    return first, first + axis.kernel_size


def span(axis: Lengths, is_inverse: bool, s: int, n: int) -> tuple[int, int]:
    """Return the first column of a token of n tokens and the end of its columns, as in problem.h.

    The columns are the keys of a query or, if inverse, the queries of a key.
    """
    if not is_inverse:
        return _window(axis, s, n)
    k, stride = axis.kernel_size, axis.stride
    if axis.is_causal:
        first, last, sees_all = s, s + k - stride, s + k >= n
    else:
        reach = k // 2 - stride // 2
        first, last, sees_all = 0 if s < k else max(round_up(s - (k - 1) + reach, stride), 0), s + reach, s >= n - k
    return first, n if sees_all else min(last // stride * stride + stride, n)


# ---------------------------------------------------------------------------------------------------------------------
# Columns of tiles
# ---------------------------------------------------------------------------------------------------------------------


@cache
def widest(axis: Lengths, is_inverse: bool, size: int) -> int:
    """Return a number of columns along an axis that no tile of `size` tokens exceeds."""
    k, stride = axis.kernel_size, axis.stride
    found = [size + k - 1 if axis.is_causal else size + k + stride - 2]
    if is_inverse and not axis.is_causal:
        reach, last_start = k // 2 - stride // 2, (k - 1) // size * size
        found.append(last_start + size - 1 + reach + stride)  # near the start of the axis, columns begin with 0
        found.append(size + 2 * (k - 1) - reach)  # near the end, they extend to the end
        found.append(last_start + size + k - 1)  # both
    return max(found) if axis.longest is None else min(max(found), axis.longest)


@cache
def typical_columns(axis: Lengths, is_inverse: bool, size: int) -> tuple[float, int]:
    """Return the average and the largest number of columns that a tile of `size` tokens has on a typical axis."""
    n = axis.typical
    found = []
    for s in range(0, n, size):
        found.append(span(axis, is_inverse, min(s + size, n) - 1, n)[1] - span(axis, is_inverse, s, n)[0])
    return sum(found) / len(found), max(found)


def _units(axis: Lengths, is_inverse: bool, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield the first token, the first column and the end of the columns of the units that decide how wide a row is.

    Units differ near the ends of an axis. In between, columns repeat, and the first and last units of tiles are enough.
    """
    unit, border = axis.unit, axis.kernel_size + axis.stride
    starts = set(range(0, round_up(border, unit) + lcm(unit, axis.stride), unit))
    for tile_x in range(0, round_up(border, size) + lcm(size, axis.stride), size):
        starts |= {tile_x, tile_x + size - unit}
    for x in starts:
        for n in range(x + 1, x + 1 + border + 2 * unit):
            if axis.holds(n):
                end = span(axis, is_inverse, min(x + unit, n) - 1, n)[1]
                yield x, span(axis, is_inverse, x, n)[0], end


@cache
def place_row(axis: Lengths, is_inverse: bool, size: int, has_gradient_fragments: bool) -> Row:
    """Return the narrowest row that holds the columns of every tile of `size` tokens."""
    unit, widths = axis.unit, [0] * 8
    after = farthest_unit = farthest_tile = last_first = 0
    for x, first, end in _units(axis, is_inverse, size):
        tile_x = x - x % size
        widths[first % 8] = max(widths[first % 8], end - first)
        farthest_unit, after = max(farthest_unit, x - first), max(after, end - x)
        farthest_tile = max(farthest_tile, x - first if x == tile_x else 0)
        last_first = max(last_first, first - tile_x)
    if has_gradient_fragments:
        unit_columns = round_up(farthest_unit + after, 8)
        return Row(farthest_unit, size - unit + unit_columns, unit_columns)
    # A unit's columns begin at a multiple of 8.
    unit_columns, reach = min(
        (round_up(max(width + (phase + reach) % 8 for phase, width in enumerate(widths) if width), 8), reach)
        for reach in range(farthest_tile, farthest_tile + 8)
    )
    return Row(reach, (last_first + reach) // 8 * 8 + unit_columns, unit_columns)


@cache
def _narrow_remainders(kernel_size: int, stride: int, is_causal: bool, unit: int, is_inverse: bool) -> frozenset[int]:
    """Return the remainders of lengths divided by `unit` with which units have few columns at a fixed place."""
    if unit + kernel_size + stride > MAX_ROW:
        return frozenset(range(unit))
    found: dict[int, tuple[int, int]] = {}  # the farthest first column and end of the columns of a unit
    for remainder in range(unit):
        axis = Lengths(kernel_size, stride, is_causal, kernel_size, None, unit, frozenset((remainder,)))
        units = list(_units(axis, is_inverse, unit))
        found[remainder] = max(x - first for x, first, _ in units), max(end - x for x, _, end in units)
    fewest = min(round_up(before + after, 8) for before, after in found.values())
    best: frozenset[int] = frozenset()
    for most_before, _ in found.values():
        fitting = {r for r, (before, after) in found.items() if before <= most_before and most_before + after <= fewest}
        best = max(best, frozenset(fitting), key=len)
    return best
