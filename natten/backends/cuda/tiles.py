"""How the kernels with matrix instructions cut a problem into tiles; natten/csrc/cuda/tiles.h says what the words mean.

A larger tile reads fewer columns a token, for neighbouring tiles read many of the same; a smaller one leaves room for
several blocks on a multiprocessor, which hide each other's waiting. All that a tile can be is tried, and the one that
should take the least time is taken, by the bytes it brings to shared memory and the instructions it issues.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import chain, product
from math import ceil, prod
from typing import NamedTuple

from natten.geometry import Axis

KINDS = ("forward", "grad_query", "grad_key_value")

_LONG_AXIS = 1 << 12  # of which not every tile is looked at
_MOST_WARPS = 8
_MOST_UNITS = 32  # of a tile
_MOST_ROW_BLOCKS = 8  # of 8 columns, of a row that is held as one
_LARGE_DIM = 128  # beyond it, rows held as one may be too large
# Of a multiprocessor's shared memory for each block: it has so much more than a block may have.
_RESERVED_BYTES = 1 << 10
_MAY_HAVE_FRAGMENTS, _MAY_HAVE_GRADIENT_FRAGMENTS = True, True  # tests turn these off
_MOST_TABLE_BYTES, _MOST_GRADIENT_BYTES = 48 << 10, 32 << 10  # of tables in shared memory, where there are no fragments
_BASES_BYTES = 128  # where tensors begin
_STAGE_CHUNKS = (1, 2, 4, 8)  # of a stage, where columns come in stages
# Instructions of a warp, as counted in the machine code for sm_90: of a stage; of a block of a unit's 8 columns, and of
# that for 16 of head_dim; of a unit; of a tile; to bring 16 bytes a lane; to make a fragment.
_STAGE_COST = 120.0
_COLUMNS_COST = {"forward": 33.0, "grad_query": 52.0, "grad_key_value": 39.0}
# How many instructions could be issued while a block's operands come from shared memory, beside those of products.
_SHARED_TIME = {"forward": 16.0, "grad_query": 32.0, "grad_key_value": 24.0}
_PRODUCTS = {"forward": 2, "grad_query": 3, "grad_key_value": 4}  # of a block, for 16 of head_dim
_PRODUCT_COST, _PRODUCT_TIME, _PRODUCT_SHARED_TIME = {2: 1.5, 4: 3.5}, 6.5, 8.0  # of 16 of head_dim, likewise
_UNIT_COST, _TILE_COST, _COPY_COST, _FRAGMENT_COST = 270.0, 360.0, 5.0, 29.0
_TABLE_COST, _DIAGONAL_COST = 20.0, 25.0  # of a block of columns, where its bias is no fragment, or the gradient of it
_CHUNK_BLOCKS = {"forward": 8, "grad_query": 4, "grad_key_value": 2}  # of 8 columns, at a time, for small head_dim
_MOST_SLICE_DIM = {"forward": 128, "grad_query": 128, "grad_key_value": 64}
# Warps of a multiprocessor, up to a head_dim (twice it, of float32), so that none spills registers: 16 have 128 each,
# 12 have 168, 8 have 255. Fewer where more is kept: on maps of three axes, for stages, for a gradient's large chunks.
_RESIDENT_WARPS = {
    "forward": ((32, 16), (64, 12), (256, 8)),
    "grad_query": ((64, 12), (256, 8)),
    "grad_key_value": ((32, 16), (64, 12), (256, 8)),
}
_FEWER_RESIDENT_WARPS, _FEWEST_RESIDENT_WARPS = 12, 8
_BYTES_PER_INSTRUCTION = 6.0  # brought to a multiprocessor while it issues one


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


class _Held(NamedTuple):
    """How shared memory holds columns and bias, in tiles.h's words."""

    columns: int
    unit_columns: int
    reach: int
    is_segmented: bool
    has_bias_fragments: bool
    has_gradient_fragments: bool

    @property
    def fragment_bytes(self) -> int:
        """Of 8 tokens by a unit's columns."""
        return 32 * self.unit_columns


class _Stage(NamedTuple):
    """Rows of columns that it holds at a time, whether there may be more, and the warps that work on them."""

    rows: int
    is_staged: bool
    warps: int


# ---------------------------------------------------------------------------------------------------------------------
# How far windows reach
# ---------------------------------------------------------------------------------------------------------------------


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def _window(axis: Axis, s: int, n: int) -> tuple[int, int]:
    """First key of a query of a class of n tokens, and one past the last: geometry.first_key for plain numbers."""
    group = s - s % axis.stride
    if axis.is_causal:
        leader = min(group + axis.stride - 1, n - 1)
        return max(leader - axis.kernel_size + 1, 0), s + 1
    leader = min(group + axis.stride // 2, n - 1)
    first = min(max(leader - axis.kernel_size // 2, 0), n - axis.kernel_size)
    return first, first + axis.kernel_size


def _span(axis: Axis, is_inverse: bool, s: int, n: int) -> tuple[int, int]:
    """The columns of a token: keys of a query; if inverse, queries that see a key, as problem.h has them."""
    if not is_inverse:
        return _window(axis, s, n)
    k, stride = axis.kernel_size, axis.stride
    if axis.is_causal:
        first, last, sees_all = s, s + k - stride, s + k >= n
    else:
        reach = k // 2 - stride // 2
        first, last, sees_all = 0 if s < k else max(_multiple(s - (k - 1) + reach, stride), 0), s + reach, s >= n - k
    return first, n if sees_all else min(last // stride * stride + stride, n)


def _starts(axis: Axis, n: int, size: int) -> Iterator[int]:
    """First tokens of the tiles of a class of n tokens; of a very long one some in the middle, where all are alike."""
    edge = _multiple(2 * axis.kernel_size + (axis.stride + 1) * size, size)
    if n <= max(_LONG_AXIS, 4 * edge):
        return iter(range(0, n, size))
    return chain(range(0, edge, size), range((n - edge) // size * size, n, size))


def _classes(axis: Axis) -> set[int]:
    """Lengths of the residue classes."""
    longest = -(-axis.length // axis.dilation)
    return {longest, axis.length // axis.dilation} if axis.dilation > 1 else {longest}


@cache
def widest(axis: Axis, is_inverse: bool, size: int) -> int:
    """Most columns that `size` tokens, counted off from the first, meet together on an axis, in any residue class."""
    return max(before + after for before, after in _reaches(axis, is_inverse, size))


@cache
def average(axis: Axis, is_inverse: bool, size: int) -> float:
    """Columns that they meet on average."""
    reaches = _reaches(axis, is_inverse, size)
    return sum(before + after for before, after in reaches) / len(reaches)


@cache
def farthest(axis: Axis, is_inverse: bool, size: int) -> tuple[int, int]:
    """How far before the first of `size` tokens their columns begin at most, and how far after it they end."""
    reaches = _reaches(axis, is_inverse, size)
    return max(before for before, _ in reaches), max(after for _, after in reaches)


@cache
def _reaches(axis: Axis, is_inverse: bool, size: int) -> list[tuple[int, int]]:
    found = []
    for n in _classes(axis):
        for s in _starts(axis, n, size):
            first, end = _span(axis, is_inverse, s, n)[0], _span(axis, is_inverse, min(s + size, n) - 1, n)[1]
            found.append((s - first, end - s))
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
    item_bytes: int = 2,
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
        item_bytes: of an element: 2, or 4 of float32 in TF32.
    """
    arguments = (kind, axes, dim, maps, has_rpb, processors, most_shared_bytes, is_ordered, item_bytes)
    return min(tiles_and_costs(*arguments), key=lambda found: found[1], default=(None, 0.0))[0]


def tiles_and_costs(
    kind: str, axes, dim, maps, has_rpb, processors, most_shared_bytes, is_ordered, item_bytes=2
) -> Iterator[tuple[Tile, float]]:
    """All tiles that choose_tile chooses from, each with what it should cost beside the others."""
    chooser = _Chooser(kind, axes, dim, has_rpb, most_shared_bytes, is_ordered, item_bytes)
    return ((tile, chooser.cost(tile, maps, processors)) for tile in chooser.tiles())


class _Chooser:
    def __init__(self, kind, axes, dim: int, has_rpb: bool, most_shared_bytes: int, is_ordered: bool, item_bytes: int):
        self.kind, self.axes, self.item_bytes = kind, axes, item_bytes
        self.wide = dim * item_bytes // 2  # head_dim of halves that takes as much room
        self.has_rpb, self.most_shared_bytes, self.is_ordered = has_rpb, most_shared_bytes, is_ordered
        self.is_inverse = kind == "grad_key_value"
        self.rank = 3 if axes[0].kernel_size > 1 else 2 if axes[1].kernel_size > 1 else 1
        self.unit = (1, 2, 8) if self.rank > 1 else (1, 1, 16)
        self.longest = [-(-axis.length // axis.dilation) for axis in axes]
        self.table = prod(2 * axis.kernel_size - 1 for axis in axes)
        self.table_rows = self.table // (2 * axes[2].kernel_size - 1)
        self.fragments_a_row = 1 if self.rank > 1 else 2
        self.pieces = self.wide // 8  # of 16 bytes, of a row
        is_large = item_bytes == 4 and dim > 64  # whose results and operands together would spill registers
        most_slice_dim = _MOST_SLICE_DIM[kind] // (2 if is_large else 1)
        self.slices = -(-dim // most_slice_dim)
        self.slice_results = -(-(dim // 8) // self.slices)
        self.chunk_blocks = _CHUNK_BLOCKS[kind] if self.wide <= 32 else max(_CHUNK_BLOCKS[kind] // 2, 2)
        resident = (warps for most, warps in _RESIDENT_WARPS[kind] if self.wide <= most)
        self.most_resident_warps = next(resident, _FEWEST_RESIDENT_WARPS)
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
        for held in self._ways_to_hold(size[2]):
            met = [widest(axis, self.is_inverse, q) for axis, q in zip(self.axes, size, strict=True)]
            rows = met[0] * met[1] * (-(-met[2] // held.columns) if held.is_segmented else 1)
            chunk_rows = max(1, min(self.chunk_blocks // (held.unit_columns // 8), rows))
            for chunk in {chunk_rows, 1} if self.wide > _LARGE_DIM else {chunk_rows}:
                for stage in self._stages(units, rows, chunk):
                    tile = self._tile(size, held, chunk, stage)
                    if self._is_fit(tile):
                        yield tile

    def _ways_to_hold(self, size_x: int) -> Iterator[_Held]:
        """Rows of columns are held as one unless they are long, then in segments, with which there are no fragments."""
        is_whole = False
        may_have_gradient = self.has_gradient and _MAY_HAVE_GRADIENT_FRAGMENTS
        for has_gradient in (False, True) if may_have_gradient else (False,):
            reach, begins, unit_columns = self._place_columns(size_x, has_gradient)
            if unit_columns <= 8 * _MOST_ROW_BLOCKS:
                is_whole = True
                for has_bias in (True, False) if _MAY_HAVE_FRAGMENTS else (False,):
                    yield _Held(max(begins) + unit_columns, unit_columns, reach, False, has_bias, has_gradient)
        if is_whole and self.wide <= _LARGE_DIM:
            return
        segment = 8 * max(self.chunk_blocks, 4) if self.wide <= _LARGE_DIM else 16
        yield _Held(segment, segment, 0, True, False, False)

    def _place_columns(self, size_x: int, has_gradient_fragments: bool) -> tuple[int, set[int], int]:
        """REACH; where in a row of a tile's columns those of units begin, as tiles.h has it; and how many each has."""
        axis, unit = self.axes[2], self.unit[2]
        reach = farthest(axis, self.is_inverse, unit if has_gradient_fragments else size_x)[0]
        begins, most = set(), 0
        for n in _classes(axis):
            for at in _starts(axis, n, size_x):
                for x in range(at, min(at + size_x, n), unit):
                    first = _span(axis, self.is_inverse, x, n)[0]
                    end = _span(axis, self.is_inverse, min(x + unit, n) - 1, n)[1]
                    begin = x - at if has_gradient_fragments else (first - at + reach) // 8 * 8
                    begins.add(begin)
                    most = max(most, end - at + reach - begin)
        return reach, begins, _multiple(most, 8)

    def _stages(self, units: int, rows: int, chunk_rows: int) -> Iterator[_Stage]:
        if units > _MOST_WARPS:
            for warps in range(1, _MOST_WARPS + 1):
                yield _Stage(rows, False, warps)
            return
        yield _Stage(rows, False, units)
        for chunks in _STAGE_CHUNKS:
            if chunks * chunk_rows < rows:
                yield _Stage(chunks * chunk_rows, True, units)

    def _is_fit(self, tile: Tile) -> bool:
        """Whether it fits the GPU, and no warps add to one table in no certain order where that matters."""
        is_ordered = tile.warps == 1 or tile.has_gradient_fragments or tile.gradient_tables == tile.warps
        return tile.shared_bytes <= self.most_shared_bytes and (
            is_ordered or not (self.has_gradient and self.is_ordered)
        )

    def _tile(self, size, held: _Held, chunk_rows: int, stage: _Stage) -> Tile:
        pitch = self.pieces if self.pieces & (self.pieces - 1) == 0 else self.pieces | 1
        tokens = stage.rows * held.columns
        buffer = tokens * pitch * 32 + (tokens * 8 if self.is_inverse else 0)
        has_table, bias = self._bias(size, held)
        tables, gradient = self._gradient(held, stage.warps)
        blocks = held.unit_columns // 8 + (self.rank == 1)
        has_diagonals = self.has_gradient and not held.has_gradient_fragments
        diagonals = 8 * (_multiple(blocks * 8 + 16, 32) + 8) * 4 if has_diagonals else 0
        warp = max((16 * (self.slice_results + 1) * 16 if self.item_bytes == 2 else 0), diagonals)
        shared = (2 if stage.is_staged else 1) * buffer + bias + gradient + stage.warps * warp + _BASES_BYTES
        resident = self._resident_warps(held, chunk_rows, stage) // stage.warps
        fitting = (self.most_shared_bytes + _RESERVED_BYTES) // (shared + _RESERVED_BYTES)
        return Tile(
            size=tuple(size),
            columns=held.columns,
            unit_columns=held.unit_columns,
            reach=held.reach,
            is_segmented=held.is_segmented,
            chunk_rows=chunk_rows,
            stage_rows=stage.rows,
            is_staged=stage.is_staged,
            warps=stage.warps,
            min_blocks=max(1, min(fitting, resident)),
            slices=self.slices,
            has_bias_fragments=held.has_bias_fragments,
            is_table_shared=has_table,
            has_gradient_fragments=held.has_gradient_fragments,
            gradient_tables=tables,
            shared_bytes=shared,
        )

    def _resident_warps(self, held: _Held, chunk_rows: int, stage: _Stage) -> int:
        """Warps that a multiprocessor has registers for."""
        most, chunk = self.most_resident_warps, chunk_rows * held.unit_columns
        is_large_stage = stage.is_staged and self.wide > 32
        if self.kind != "forward" and (held.is_segmented or is_large_stage or chunk > 32):
            return _FEWEST_RESIDENT_WARPS
        if self.rank > 2 or is_large_stage or (self.is_inverse and chunk > 16):
            return min(most, _FEWER_RESIDENT_WARPS)
        return most

    def _bias(self, size, held: _Held) -> tuple[bool, int]:
        """Whether shared memory holds the bias as a table, and the bytes of that or, if there are any, of fragments."""
        if held.has_bias_fragments:
            rows = self.table_rows if self.has_rpb else 1
            return False, size[2] // self.unit[2] * (rows * self.fragments_a_row + 1) * held.fragment_bytes
        table = _multiple(self.table + 2 * (2 * held.unit_columns + 32), 4) * 4
        is_shared = self.has_rpb and table <= _MOST_TABLE_BYTES
        return is_shared, table * is_shared

    def _gradient(self, held: _Held, warps: int) -> tuple[int, int]:
        """How many tables of the gradient of bias it holds, and the bytes of that or of each warp's fragments."""
        if held.has_gradient_fragments:
            return 0, warps * self.table_rows * self.fragments_a_row * held.fragment_bytes
        one = _multiple(self.table, 4) * 4
        fits = [count for count in (warps, 1) if count * one <= _MOST_GRADIENT_BYTES]
        tables = fits[0] if fits and self.has_gradient else 0
        return tables, tables * one

    def cost(self, tile: Tile, maps: int, processors: int) -> float:
        """About what all tiles of a problem take, in instructions of a multiprocessor; only comparisons count."""
        tiles = maps * prod(
            ceil(n / q) * a.dilation for n, q, a in zip(self.longest, tile.size, self.axes, strict=True)
        )
        met = [average(axis, self.is_inverse, q) for axis, q in zip(self.axes, tile.size, strict=True)]
        read = 4 * self.wide * prod(met) + 6 * self.wide * prod(tile.size)
        one = self._instructions(tile)
        # One block reads while another computes, and a staged one does both at a time.
        reading, overlapped = read / _BYTES_PER_INSTRUCTION, min(tile.min_blocks * (1.5 if tile.is_staged else 1), 2)
        one *= 1 + 6 / (tile.min_blocks * tile.warps)  # few warps leave the multiprocessor idle
        one = max(reading, one) + min(reading, one) / overlapped
        blocks, at_a_time = tiles * tile.slices, processors * tile.min_blocks
        return one * (max(blocks, at_a_time) if blocks < 4 * at_a_time else blocks)

    def _instructions(self, tile: Tile) -> float:
        """About what a block issues for a tile."""
        steps = self.wide / 16 * _PRODUCTS[self.kind]
        column_cost = max(
            _COLUMNS_COST[self.kind] + _PRODUCT_COST[self.item_bytes] * steps,
            _PRODUCT_TIME * steps,
            _SHARED_TIME[self.kind] + _PRODUCT_SHARED_TIME * steps,
        )
        column_cost += _TABLE_COST * (not tile.has_bias_fragments)
        column_cost += _DIAGONAL_COST * (self.has_gradient and not tile.has_gradient_fragments)
        unit_met = [widest(axis, self.is_inverse, u) for axis, u in zip(self.axes, self.unit, strict=True)]
        rows = unit_met[0] * unit_met[1]
        stages = 1
        if tile.is_segmented:
            rows *= -(-unit_met[2] // tile.unit_columns) + (unit_met[2] % tile.unit_columns > 0) / 2
        if tile.is_staged:  # of a stage, warps wait for the one that has most to do
            met = [widest(axis, self.is_inverse, q) for axis, q in zip(self.axes, tile.size, strict=True)]
            lines = met[0] * met[1] * (-(-met[2] // tile.columns) if tile.is_segmented else 1)
            stages = -(-lines // tile.stage_rows)
            rows = max(rows, stages * min(rows, tile.stage_rows))
        units = prod(-(-q // u) for q, u in zip(tile.size, self.unit, strict=True))
        chunks = -(-rows // tile.chunk_rows) * tile.chunk_rows
        work = -(-units // tile.warps) * tile.warps * (_UNIT_COST + chunks * tile.unit_columns / 8 * column_cost)
        work += tile.warps * (_TILE_COST + stages * _STAGE_COST)
        work += stages * tile.stage_rows * tile.columns * self.pieces / 16 * _COPY_COST
        if tile.has_bias_fragments:
            work += tile.size[2] / self.unit[2] * self.table_rows * self.fragments_a_row * _FRAGMENT_COST
        return work
