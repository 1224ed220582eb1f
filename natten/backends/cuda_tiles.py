"""How the kernels with matrix instructions cut a problem into tiles; natten/csrc/cuda/tiles.h says what the words mean.

A larger tile reads fewer columns a token, for neighbouring tiles read many of the same; a smaller one leaves room for
several blocks on a multiprocessor, which hide each other's waiting. All that a tile can be is tried, and the one that
should take the least time is taken, by the bytes it brings to shared memory and the products it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from math import ceil, prod
from typing import NamedTuple

from natten.geometry import Axis

KINDS = ("forward", "grad_query", "grad_key_value")

_MOST_WARPS = 8
_MOST_UNITS = 32  # of a tile
_MOST_ROW_BLOCKS = 8  # of 8 columns, of a row that is held as one
_LARGE_DIM = 128  # beyond it, rows held as one may be too large
_RESERVED_BYTES = (
    1 << 10
)  # of a multiprocessor's shared memory for each block: it has so much more than a block may have
# In shared memory: bias as fragments, else as a table; its gradient as fragments of each warp, else as tables.
_MOST_FRAGMENT_BYTES, _MOST_TABLE_BYTES = 32 << 10, 64 << 10
_MOST_GRADIENT_FRAGMENT_BYTES, _MOST_GRADIENT_BYTES = 80 << 10, 32 << 10
_BASES_BYTES = 128  # where tensors begin
_STAGE_CHUNKS = (1, 2, 4, 8)  # of a stage, where columns come in stages
_STAGE_COST = 60.0  # of waiting for a stage, in the time of products of a warp
# What a unit of 16 tokens and 8 columns costs beside products over 16 of head_dim, in their time.
_ELEMENTWISE_COST = {"forward": 6.0, "grad_query": 10.0, "grad_key_value": 9.0}
_PRODUCTS = {"forward": 2, "grad_query": 3, "grad_key_value": 4}
_CHUNK_BLOCKS = {"forward": 8, "grad_query": 4, "grad_key_value": 2}  # of 8 columns, at a time, for small head_dim
_MOST_SLICE_DIM = {"forward": 128, "grad_query": 128, "grad_key_value": 64}
# Warps of a multiprocessor, up to a head_dim, so that registers are not spilled: 16 have 128 each, 12 have 168, 8 have
# 255 of them. Fewer where more is kept: on maps of three axes, for stages, and where a gradient's chunks are large.
_RESIDENT_WARPS = {
    "forward": ((64, 16), (256, 8)),
    "grad_query": ((32, 16), (64, 12), (256, 8)),
    "grad_key_value": ((32, 16), (64, 12), (256, 8)),
}
_MOST_RESIDENT_OF_SOME, _MOST_RESIDENT_OF_OTHERS = 12, 8
_BYTES_PER_PRODUCT = 20.0  # brought to shared memory in the time of one product of a unit, 16 x 8 x 16


class Tile(NamedTuple):
    """What tiles.h is told, in its words."""

    size: tuple[int, int, int]
    columns: int
    unit_columns: int
    reach: int
    is_segmented: bool
    chunk_rows: int
    stage_rows: int
    is_staged: bool
    warps: int
    min_blocks: int
    slices: int
    has_bias_fragments: bool
    is_table_shared: bool
    has_gradient_fragments: bool
    gradient_tables: int
    shared_bytes: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def definitions(self) -> tuple[str, ...]:
        words = {
            "TILE_Z": self.size[0],
            "TILE_Y": self.size[1],
            "TILE_X": self.size[2],
            "COLUMNS": self.columns,
            "UNIT_COLUMNS": self.unit_columns,
            "REACH": self.reach,
            "IS_SEGMENTED": int(self.is_segmented),
            "CHUNK_ROWS": self.chunk_rows,
            "STAGE_ROWS": self.stage_rows,
            "IS_STAGED": int(self.is_staged),
            "WARPS": self.warps,
            "MIN_BLOCKS": self.min_blocks,
            "SLICES": self.slices,
            "HAS_BIAS_FRAGMENTS": int(self.has_bias_fragments),
            "IS_TABLE_SHARED": int(self.is_table_shared),
            "HAS_GRADIENT_FRAGMENTS": int(self.has_gradient_fragments),
            "GRADIENT_TABLES": self.gradient_tables,
            "SHARED_BYTES": self.shared_bytes,
        }
        return tuple(f"{name}={value}" for name, value in words.items())


# ---------------------------------------------------------------------------------------------------------------------
# How far windows reach
# ---------------------------------------------------------------------------------------------------------------------


def _window(axis: Axis, s: int, n: int) -> tuple[int, int]:
    """First key of a query of a class of n tokens, and one past the last: geometry.first_key for plain numbers."""
    group = s - s % axis.stride
    if axis.is_causal:
        leader = min(group + axis.stride - 1, n - 1)
        return max(leader - axis.kernel_size + 1, 0), s + 1
    leader = min(group + axis.stride // 2, n - 1)
    first = min(max(leader - axis.kernel_size // 2, 0), n - axis.kernel_size)
    return first, first + axis.kernel_size


@cache
def _spans(axis: Axis, is_inverse: bool, n: int) -> tuple[tuple[int, int], ...]:
    """For each token of a class its columns: keys of a query; if inverse, queries that see a key."""
    windows = [_window(axis, s, n) for s in range(n)]
    if not is_inverse:
        return tuple(windows)
    spans, first, end = [], 0, 0
    for key in range(n):  # neither end of a window ever moves back
        while windows[first][1] <= key:
            first += 1
        while end < n and windows[end][0] <= key:
            end += 1
        spans.append((first, end))
    return tuple(spans)


def _classes(axis: Axis) -> set[int]:
    """Lengths of the residue classes."""
    longest = -(-axis.length // axis.dilation)
    return {longest, axis.length // axis.dilation} if axis.dilation > 1 else {longest}


@cache
def widest(axis: Axis, is_inverse: bool, size: int) -> int:
    """Most columns that `size` tokens, counted off from the first, meet together on an axis, in any residue class."""
    return max(before + after for before, after in _reaches(axis, is_inverse, size))


@cache
def farthest(axis: Axis, is_inverse: bool, size: int) -> tuple[int, int]:
    """How far before the first of `size` tokens their columns begin at most, and how far after it they end."""
    reaches = _reaches(axis, is_inverse, size)
    return max(before for before, _ in reaches), max(after for _, after in reaches)


def _reaches(axis: Axis, is_inverse: bool, size: int) -> list[tuple[int, int]]:
    found = []
    for n in _classes(axis):
        spans = _spans(axis, is_inverse, n)
        found += [(s - spans[s][0], spans[min(s + size, n) - 1][1] - s) for s in range(0, n, size)]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Choosing
# ---------------------------------------------------------------------------------------------------------------------


@cache
def choose_tile(
    kind: str,
    axes: tuple[Axis, Axis, Axis],
    dim: int,
    maps: int,
    has_rpb: bool,
    processors: int,
    most_shared_bytes: int,
    is_ordered: bool,
) -> Tile | None:
    """The tile for a kernel; None if none fits.

    Args:
        kind: one of KINDS.
        axes: three, of which the first may be of one token.
        dim: head_dim.
        maps: images times heads.
        processors: multiprocessors of the GPU.
        most_shared_bytes: of a block.
        is_ordered: whether rpb's gradient must be the same from run to run.
    """
    chooser = _Chooser(kind, axes, dim, has_rpb, most_shared_bytes, is_ordered)
    return min(chooser.tiles(), key=lambda tile: chooser.cost(tile, maps, processors), default=None)


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of


class _Chooser:
    def __init__(self, kind: str, axes, dim: int, has_rpb: bool, most_shared_bytes: int, is_ordered: bool):
        self.kind, self.axes, self.dim = kind, axes, dim
        self.has_rpb, self.most_shared_bytes, self.is_ordered = has_rpb, most_shared_bytes, is_ordered
        self.is_inverse = kind == "grad_key_value"
        self.rank = 3 if axes[0].kernel_size > 1 else 2 if axes[1].kernel_size > 1 else 1
        self.unit = (1, 2, 8) if self.rank > 1 else (1, 1, 16)
        self.longest = [-(-axis.length // axis.dilation) for axis in axes]
        self.table = prod(2 * axis.kernel_size - 1 for axis in axes)
        self.table_rows, self.halves = self.table // (2 * axes[2].kernel_size - 1), 1 if self.rank > 1 else 2
        self.pieces = dim // 8
        self.slices = -(-dim // _MOST_SLICE_DIM[kind])
        self.slice_pieces = -(-self.pieces // self.slices)
        self.chunk_blocks = _CHUNK_BLOCKS[kind] if dim <= 32 else max(_CHUNK_BLOCKS[kind] // 2, 2)
        self.most_resident_warps = next(warps for most, warps in _RESIDENT_WARPS[kind] if dim <= most)
        self.has_gradient = has_rpb and kind == "grad_query"

    def tiles(self) -> Iterator[Tile]:
        """All tiles that fit."""
        for size in product(*(self._sizes(i) for i in range(3))):
            units = prod(-(-q // u) for q, u in zip(size, self.unit, strict=True))
            if units <= _MOST_UNITS:
                yield from self._tiles_of_size(size, units)

    def _sizes(self, i: int) -> list[int]:
        """Sizes of a tile along an axis: multiples of a unit's, which need not exceed the axis."""
        unit = self.unit[i]
        most = min(_multiple(self.longest[i], unit), unit * _MOST_UNITS)
        return list(range(unit, most + 1, unit))

    def _tiles_of_size(self, size, units: int) -> Iterator[Tile]:
        for columns, unit_columns, reach, is_segmented in self._columns(size[2]):
            met = [widest(axis, self.is_inverse, q) for axis, q in zip(self.axes, size, strict=True)]
            rows = met[0] * met[1] * (-(-met[2] // columns) if is_segmented else 1)
            chunk_rows = max(1, min(self.chunk_blocks // (unit_columns // 8), rows))
            if chunk_rows * unit_columns % 16:
                chunk_rows += 1
            rows = max(rows, chunk_rows)
            for is_staged, stage_rows, warps in self._stages(units, rows, chunk_rows):
                tile = self._tile(
                    size, columns, unit_columns, reach, is_segmented, chunk_rows, stage_rows, is_staged, warps
                )
                if self._is_fit(tile):
                    yield tile

    def _columns(self, size_x: int) -> Iterator[tuple[int, int, int, bool]]:
        """Ways to hold a row of columns: as one, unless it is long, and in segments."""
        before, after = farthest(self.axes[2], self.is_inverse, self.unit[2])
        unit_columns = _multiple(before + after, 8)
        if unit_columns <= 8 * _MOST_ROW_BLOCKS:
            yield size_x - self.unit[2] + unit_columns, unit_columns, before, False
            if self.dim <= _LARGE_DIM:
                return
        segment = 8 * max(self.chunk_blocks, 4) if self.dim <= _LARGE_DIM else 16
        yield segment, segment, 0, True

    def _stages(self, units: int, rows: int, chunk_rows: int) -> Iterator[tuple[bool, int, int]]:
        """Whether columns come in stages, of how many rows, and for how many warps."""
        if units > _MOST_WARPS:
            for warps in range(1, _MOST_WARPS + 1):
                if units % warps == 0 or warps == _MOST_WARPS:
                    yield False, rows, warps
            return
        yield False, rows, units
        for chunks in _STAGE_CHUNKS:
            if chunks * chunk_rows < rows:
                yield True, chunks * chunk_rows, units

    def _is_fit(self, tile: Tile) -> bool:
        """Whether it fits the GPU, and no warps add to one table in no certain order where that matters."""
        is_ordered = tile.warps == 1 or tile.has_gradient_fragments or tile.gradient_tables == tile.warps
        return tile.shared_bytes <= self.most_shared_bytes and (
            is_ordered or not (self.has_gradient and self.is_ordered)
        )

    def _tile(
        self, size, columns, unit_columns, reach, is_segmented, chunk_rows, stage_rows, is_staged, warps
    ) -> Tile:
        pitch = self.pieces if self.pieces & (self.pieces - 1) == 0 else self.pieces | 1
        tokens = stage_rows * columns
        buffer = tokens * pitch * 32 + (tokens * 8 if self.is_inverse else 0)
        fragment = unit_columns * 32  # bytes of 8 tokens by these columns
        has_fragments, has_table, bias = self._bias(size, is_segmented, unit_columns, fragment)
        has_sums, tables, gradient = self._gradient(is_segmented, warps, fragment)
        blocks = unit_columns // 8 + (self.rank == 1)
        diagonals = 8 * (_multiple(blocks * 8 + 16, 32) + 8) * 4 if self.has_gradient and not has_sums else 0
        warp = max(16 * (self.slice_pieces + 1) * 16, diagonals)
        shared = (2 if is_staged else 1) * buffer + bias + gradient + warps * warp + _BASES_BYTES
        most_warps = self.most_resident_warps
        if self.rank > 2 or (is_staged and self.dim > 32):
            most_warps = min(most_warps, _MOST_RESIDENT_OF_SOME)
        if self.kind != "forward" and (is_segmented or (is_staged and self.dim > 32) or chunk_rows * unit_columns > 32):
            most_warps = _MOST_RESIDENT_OF_OTHERS
        resident = max(
            1, min((self.most_shared_bytes + _RESERVED_BYTES) // (shared + _RESERVED_BYTES), most_warps // warps)
        )
        return Tile(
            size=tuple(size),
            columns=columns,
            unit_columns=unit_columns,
            reach=reach,
            is_segmented=is_segmented,
            chunk_rows=chunk_rows,
            stage_rows=stage_rows,
            is_staged=is_staged,
            warps=warps,
            min_blocks=resident,
            slices=self.slices,
            has_bias_fragments=has_fragments,
            is_table_shared=has_table,
            has_gradient_fragments=has_sums,
            gradient_tables=tables,
            shared_bytes=shared,
        )

    def _bias(self, size, is_segmented: bool, unit_columns: int, fragment: int) -> tuple[bool, bool, int]:
        """Whether shared memory holds the bias as fragments, whether as a table, and bytes of that."""
        rows = self.table_rows if self.has_rpb else 1
        fragments = size[2] // self.unit[2] * (rows * self.halves + 1) * fragment
        if not is_segmented and fragments <= _MOST_FRAGMENT_BYTES:
            return True, False, fragments
        if not self.has_rpb:
            return False, False, 0
        margin = 2 * unit_columns + 32
        table = _multiple(self.table + 2 * margin, 4) * 4
        return (False, True, table) if table <= _MOST_TABLE_BYTES else (False, False, 0)

    def _gradient(self, is_segmented: bool, warps: int, fragment: int) -> tuple[bool, int, int]:
        """Whether it holds the gradient of bias as fragments of each warp, or how many tables, and bytes of that."""
        if not self.has_gradient:
            return False, 0, 0
        fragments = warps * self.table_rows * self.halves * fragment
        if not is_segmented and fragments <= _MOST_GRADIENT_FRAGMENT_BYTES:
            return True, 0, fragments
        one = _multiple(self.table, 4) * 4
        tables = next((count for count in (warps, 1) if count * one <= _MOST_GRADIENT_BYTES), 0)
        return False, tables, tables * one

    def cost(self, tile: Tile, maps: int, processors: int) -> float:
        """About what all tiles of a problem take, in products of a unit; only comparisons count."""
        tiles = maps * prod(
            ceil(n / q) * a.dilation for n, q, a in zip(self.longest, tile.size, self.axes, strict=True)
        )
        reach = [widest(axis, self.is_inverse, q) for axis, q in zip(self.axes, tile.size, strict=True)]
        unit_reach = [widest(axis, self.is_inverse, u) for axis, u in zip(self.axes, self.unit, strict=True)]
        read = 4 * self.dim * prod(reach) + 6 * self.dim * prod(tile.size)
        units = prod(-(-q // u) for q, u in zip(tile.size, self.unit, strict=True))
        rounds = -(-units // tile.warps)
        row = _multiple(unit_reach[2], tile.unit_columns) if tile.is_segmented else tile.unit_columns
        products = _PRODUCTS[self.kind] * self.dim / 16 + _ELEMENTWISE_COST[self.kind]
        stages = -(-prod(reach[:2]) * -(-reach[2] // tile.columns) // tile.stage_rows)
        rows = unit_reach[0] * unit_reach[1] * (row // tile.unit_columns)
        if tile.is_staged:  # of a stage, warps wait for the one that has most to do
            rows = max(rows, stages * min(rows, tile.stage_rows))
        work = rounds * tile.warps * rows * tile.unit_columns / 8 * products
        work += stages * tile.warps * _STAGE_COST
        # One block reads while another computes, and a staged one does both at a time.
        reading, overlapped = read / _BYTES_PER_PRODUCT, tile.min_blocks * (1.5 if tile.is_staged else 1)
        one = max(reading, work) + min(reading, work) / overlapped
        waiting = 1 + 4 / (tile.min_blocks * tile.warps)  # few warps leave the multiprocessor idle
        blocks, at_a_time = tiles * tile.slices, processors * tile.min_blocks
        return one * waiting * (max(blocks, at_a_time) if blocks < 4 * at_a_time else blocks)
