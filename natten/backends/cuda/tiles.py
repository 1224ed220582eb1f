"""Choose how the kernels with matrix instructions cut a problem into tiles. natten/csrc/cuda/tiles.h defines the terms.

Neighboring tiles read many of the same columns, so a larger tile reads fewer columns per token. A smaller tile leaves
room for several blocks on a multiprocessor, which hide each other's latency. `choose_tile` tries all possible tiles and
returns the one with the lowest cost, which is estimated from the bytes that a tile copies to shared memory and the
instructions that it issues.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from math import ceil, prod
from typing import NamedTuple

from natten.backends.cuda.columns import (
    MAX_ROW,
    Lengths,
    lengths,
    place_row,
    round_up,
    typical_columns,
    widest,
)
from natten.backends.cuda.slots import slots_bytes, slots_pitch
from natten.geometry import Axis

KERNELS = ("forward", "grad_query", "grad_key_value")
UNFUSED_KERNELS = ("logits", "gather", "scatter")  # for 16 bits and windows without strides
_OF_KEYS = ("grad_key_value", "scatter")  # the tokens of a tile are keys

# Tokens times heads per multiprocessor: above the first number, problems are large. The other two are those for which
# costs are estimated.
_LARGE_TOKENS, _SMALL_TYPICAL, _LARGE_TYPICAL = 256, 64, 1 << 14
_MAX_WARPS = 8  # per block
_UNIT_COUNTS = (1, 2, 3, 4, 6, 7, 8, 12, 14, 16, 24, 28, 32)  # possible sizes of a tile along an axis
_MAX_UNITS = 32  # per tile
# Largest head_dim, in units of 2 bytes, of units with two matrices: these share operands, but need more registers.
_MAX_DIM_OF_PAIRS = {"forward": 64, "grad_query": 32, "grad_key_value": 32} | dict.fromkeys(UNFUSED_KERNELS, 64)
_MAX_WINDOW_OF_PAIRS = 256  # largest window of such units in unfused attention, which stores their weights
_MAX_UNFUSED_LINE = 32  # instead of MAX_ROW, on a single axis: each of its lines keeps the places of columns
_LARGE_DIM = 128  # for a larger head_dim, rows that are not cut into segments may be too large
# A multiprocessor reserves this much of its shared memory per block, in addition to what the block requests.
_RESERVED_BYTES = 1 << 10
_MAY_HAVE_FRAGMENTS, _MAY_HAVE_GRADIENT_FRAGMENTS = True, True  # tests set these to False
_MAX_TABLE_BYTES, _MAX_GRADIENT_BYTES = 48 << 10, 64 << 10  # limits for tables in shared memory, without fragments
_BASES_BYTES = 128  # base addresses of tensors
_STAGE_CHUNKS = (1, 2, 4, 8)  # possible numbers of chunks per stage

# The cost model, in instructions per warp, counted in the machine code for sm_90.
_STAGE_COST = 120.0  # per stage
_COLUMNS_COST = {"forward": 24.0, "grad_query": 36.0, "grad_key_value": 26.0}  # per matrix and block of 8 columns
_COLUMNS_COST |= {"logits": 14.0, "gather": 10.0, "scatter": 14.0}
# Instructions that could be issued while shared memory delivers the operands of a block, without those of products.
_SHARED_TIME = {"forward": 16.0, "grad_query": 32.0, "grad_key_value": 24.0} | dict.fromkeys(UNFUSED_KERNELS, 32.0)
# Products per matrix and block of columns, and their costs; all per 16 elements of head_dim. Keys of the first cost:
# item bytes.
_PRODUCTS = {"forward": 2, "grad_query": 3, "grad_key_value": 4} | dict.fromkeys(UNFUSED_KERNELS, 1)
_PRODUCT_COST, _PRODUCT_TIME, _PRODUCT_SHARED_TIME = {2: 1.5, 4: 3.5}, 6.5, 8.0
_UNIT_COST, _TILE_COST = 170.0, 360.0  # per matrix of a unit, per tile
_COPY_COST, _FRAGMENT_COST = 5.0, 29.0  # to copy 16 bytes per lane, to make a fragment
_TABLE_COST, _DIAGONAL_COST = 20.0, 25.0  # per block of columns whose bias, or whose gradient, is not a fragment
_SLOTS_COST = 13.0  # to copy 16 bytes of weights per lane, which begin anywhere
_BYTES_PER_INSTRUCTION = 6.0  # that a multiprocessor receives while it issues one instruction

# Blocks of 8 columns per chunk, for a small head_dim.
_CHUNK_BLOCKS = {"forward": 4, "grad_query": 2, "grad_key_value": 2} | dict.fromkeys(UNFUSED_KERNELS, 2)
_MAX_SLICE_DIM = {"forward": 128, "grad_query": 128, "grad_key_value": 64}  # largest head_dim per block
_MAX_SLICE_DIM |= {"logits": 256, "gather": 128, "scatter": 128}
# Resident warps per multiprocessor that do not spill registers: with 12 warps a thread has 168 registers, with 8 it has
# 255. The latter for units of two matrices, for large head_dim (in units of 2 bytes), and where a thread keeps more
# values: with stages, or with large chunks and a gradient.
_RESIDENT_WARPS, _FEWEST_RESIDENT_WARPS, _MAX_DIM_OF_RESIDENT_WARPS = 12, 8, 64


class Tile(NamedTuple):
    """The parameters that tiles.h is compiled with, under its names."""

    size: tuple[int, int, int]
    matrices: int
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
    slots_pitch: int = 0

    @property
    def threads(self) -> int:
        """Number of threads per block."""
        return 32 * self.warps

    def definitions(self) -> tuple[str, ...]:
        """Return the macros of tiles.h, as "NAME=VALUE"."""
        macros = {
            "TILE_Z": self.size[0],
            "TILE_Y": self.size[1],
            "TILE_X": self.size[2],
            "MATRICES": self.matrices,
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
        if self.slots_pitch:
            macros["SLOTS_PITCH"] = self.slots_pitch
        return tuple(f"{name}={value}" for name, value in macros.items())


class _Layout(NamedTuple):
    """The layout of columns and bias in shared memory, in the terms of tiles.h."""

    columns: int
    unit_columns: int
    reach: int
    is_segmented: bool
    has_bias_fragments: bool
    has_gradient_fragments: bool

    @property
    def fragment_bytes(self) -> int:
        """Size of a fragment: 8 tokens by the columns of a unit."""
        return 32 * self.unit_columns


class _Stage(NamedTuple):
    """How a tile is processed.

    Attributes:
        rows: rows of columns in shared memory at a time.
        is_staged: whether there may be more rows than these.
        warps: number of warps.
    """

    rows: int
    is_staged: bool
    warps: int


# ---------------------------------------------------------------------------------------------------------------------
# The choice of a tile
# ---------------------------------------------------------------------------------------------------------------------


def choose_tile(
    kernel: str,
    axes: tuple[Axis, Axis, Axis],
    dim: int,
    maps: int,
    has_rpb: bool,
    processors: int,
    max_shared_bytes: int,
    item_bytes: int = 2,
) -> Tile | None:
    """Return the tile for a kernel, or None if no tile fits. All maps of a class have the same tile (columns.py).

    Args:
        kernel: one of KERNELS or UNFUSED_KERNELS.
        axes: three axes; the leading ones have one token if the problem has fewer axes.
        dim: head_dim.
        maps: number of images times number of heads.
        has_rpb: whether the problem has a bias.
        processors: number of multiprocessors of the GPU.
        max_shared_bytes: limit of shared memory per block.
        item_bytes: bytes per element: 2, or 4 for float32 in TF32.
    """
    is_large = _is_large(axes, maps, processors)
    shared = _class_of(kernel, axes, dim * item_bytes // 2, is_large)
    return _choose(kernel, shared, is_large, dim, has_rpb, processors, max_shared_bytes, item_bytes)


def tiles_and_costs(
    kernel: str, axes, dim, maps, has_rpb, processors, max_shared_bytes, item_bytes=2
) -> Iterator[tuple[Tile, float]]:
    """Yield all tiles that `choose_tile` compares, each with its estimated cost."""
    is_large = _is_large(axes, maps, processors)
    shared = _class_of(kernel, axes, dim * item_bytes // 2, is_large)
    chooser = _Chooser(kernel, shared, dim, has_rpb, max_shared_bytes, item_bytes)
    return ((tile, chooser.cost(tile, is_large, processors)) for tile in chooser.tiles())


def _is_large(axes: tuple[Axis, ...], maps: int, processors: int) -> bool:
    return maps * prod(axis.length for axis in axes) > _LARGE_TOKENS * processors


def _class_of(kernel: str, axes: tuple[Axis, ...], wide: int, is_large: bool) -> tuple[Lengths, ...]:
    is_line = axes[0].kernel_size == axes[1].kernel_size == 1
    is_short = is_line and axes[2].length <= 16 * axes[2].dilation
    is_single = is_short or wide > _MAX_DIM_OF_PAIRS[kernel]
    if kernel in UNFUSED_KERNELS:
        is_single |= is_line or prod(axis.kernel_size for axis in axes) > _MAX_WINDOW_OF_PAIRS
    lines = 2 if is_single else 4
    return lengths(axes, (1, 1, 8 * lines) if is_line else (1, lines, 8), kernel in _OF_KEYS, is_large)


@cache
def _choose(kernel, axes, is_large, dim, has_rpb, processors, max_shared_bytes, item_bytes):
    chooser = _Chooser(kernel, axes, dim, has_rpb, max_shared_bytes, item_bytes)
    return min(chooser.tiles(), key=lambda tile: chooser.cost(tile, is_large, processors), default=None)


class _Chooser:
    """Enumerates the tiles of a kernel for a class of maps, and estimates their costs."""

    def __init__(
        self,
        kernel: str,
        axes: tuple[Lengths, ...],
        dim: int,
        has_rpb: bool,
        max_shared_bytes: int,
        item_bytes: int,
    ):
        self.kernel, self.axes, self.item_bytes = kernel, axes, item_bytes
        self.wide = dim * item_bytes // 2  # head_dim in units of 2 bytes
        self.has_bias, self.max_shared_bytes = has_rpb and kernel != "gather", max_shared_bytes
        self.is_inverse, self.is_unfused = kernel in _OF_KEYS, kernel in UNFUSED_KERNELS
        self.window = prod(axis.kernel_size for axis in axes)
        self.slots_pitch = slots_pitch(kernel, self.window) if self.is_unfused else 0
        self.rank = 3 if axes[0].kernel_size > 1 else 2 if axes[1].kernel_size > 1 else 1
        self.unit = [axis.unit for axis in axes]
        self.matrices = self.unit[1] // 2 if self.rank > 1 else self.unit[2] // 16
        self.lines = 2 * self.matrices
        self.table = prod(2 * axis.kernel_size - 1 for axis in axes)
        self.table_rows = self.table // (2 * axes[2].kernel_size - 1)
        self.fragments_per_row = 1 if self.rank > 1 else self.lines
        self.pieces = self.wide // 8  # 16-byte pieces per row
        is_large = item_bytes == 4 and dim > 64  # results and operands together would spill registers
        max_slice_dim = _MAX_SLICE_DIM[kernel] // (2 if is_large else 1)
        self.slices = -(-dim // max_slice_dim)
        self.slice_results = -(-(dim // 8) // self.slices)
        self.chunk_blocks = _CHUNK_BLOCKS[kernel] if self.wide <= 32 else max(_CHUNK_BLOCKS[kernel] // 2, 2)
        is_small = (self.matrices == 1 or self.is_unfused) and self.wide <= _MAX_DIM_OF_RESIDENT_WARPS
        is_small = is_small and (item_bytes == 2 or kernel != "grad_query")  # which rounds two operands to TF32
        self.max_resident_warps = _RESIDENT_WARPS if is_small else _FEWEST_RESIDENT_WARPS
        self.has_gradient = has_rpb and kernel in ("grad_query", "gather")

    def tiles(self) -> Iterator[Tile]:
        """Yield all tiles that fit."""
        for size in product(*(self._sizes(i) for i in range(3))):
            units = prod(-(-q // u) for q, u in zip(size, self.unit, strict=True))
            if units <= _MAX_UNITS:
                yield from self._tiles_of_size(size, units)

    def _sizes(self, i: int) -> list[int]:
        """Return the possible sizes of a tile along an axis: multiples of the unit, up to a typical length."""
        unit = self.unit[i]
        return [unit * count for count in _UNIT_COUNTS if unit * (count - 1) < self.axes[i].typical]

    def _tiles_of_size(self, size, units: int) -> Iterator[Tile]:
        for layout in self._layouts(size[2]):
            spans = [widest(axis, self.is_inverse, q) for axis, q in zip(self.axes, size, strict=True)]
            rows = spans[0] * spans[1] * (-(-spans[2] // layout.columns) if layout.is_segmented else 1)
            chunk_rows = max(1, min(self.chunk_blocks // (layout.unit_columns // 8), rows))
            for chunk in {chunk_rows, 1} if self.wide > _LARGE_DIM else {chunk_rows}:
                for stage in self._stages(units, rows, chunk):
                    tile = self._tile(size, layout, chunk, stage)
                    if self._fits(tile):
                        yield tile

    def _layouts(self, size_x: int) -> Iterator[_Layout]:
        """Yield the possible layouts. Long rows of columns are cut into segments, for which there are no fragments."""
        is_unsegmented = False
        may_have_gradient = self.has_gradient and _MAY_HAVE_GRADIENT_FRAGMENTS
        is_narrow = self.unit[2] + self.axes[2].kernel_size + self.axes[2].stride - 2 <= MAX_ROW
        for has_gradient in (False, True) if may_have_gradient else (False,):
            row = place_row(self.axes[2], self.is_inverse, size_x, has_gradient) if is_narrow else None
            longest = _MAX_UNFUSED_LINE if self.is_unfused and self.rank == 1 else MAX_ROW
            if row is not None and row.unit_columns <= longest:
                is_unsegmented = True
                for has_bias in (True, False) if self._may_have_bias_fragments() else (False,):
                    yield _Layout(row.columns, row.unit_columns, row.reach, False, has_bias, has_gradient)
        if is_unsegmented and self.wide <= _LARGE_DIM:
            return
        # Few columns if each has many bytes: rows of a large head_dim, or weights.
        segment = 16 if self.wide > _LARGE_DIM or self.kernel == "scatter" else 8 * max(self.chunk_blocks, 4)
        yield _Layout(segment, segment, 0, True, False, False)

    def _may_have_bias_fragments(self) -> bool:
        """Return whether there may be bias fragments, which also mask columns; unfused attention does not need that."""
        return _MAY_HAVE_FRAGMENTS and (self.has_bias or not self.is_unfused)

    def _stages(self, units: int, rows: int, chunk_rows: int) -> Iterator[_Stage]:
        if units > _MAX_WARPS:
            units_per_warp = range(-(-units // _MAX_WARPS), units + 1)
            for warps in sorted({-(-units // count) for count in units_per_warp}):
                yield _Stage(rows, False, warps)
            return
        yield _Stage(rows, False, units)
        for chunks in _STAGE_CHUNKS:
            if chunks * chunk_rows < rows:
                yield _Stage(chunks * chunk_rows, True, units)

    def _fits(self, tile: Tile) -> bool:
        """Return whether a tile fits into shared memory and sums gradients in a fixed order."""
        has_fixed_order = tile.warps == 1 or tile.has_gradient_fragments or tile.gradient_tables == tile.warps
        return tile.shared_bytes <= self.max_shared_bytes and (has_fixed_order or not self.has_gradient)

    def _tile(self, size, layout: _Layout, chunk_rows: int, stage: _Stage) -> Tile:
        tokens = stage.rows * layout.columns
        buffer = tokens * self.pieces * 16 * (1 if self.is_unfused else 2)
        if self.is_inverse:
            buffer += stage.rows * self._slots_bytes(layout.columns) if self.is_unfused else tokens * 8
        has_table, bias = self._bias(size, layout)
        tables, gradient = self._gradient(layout, stage.warps)
        blocks = layout.unit_columns // 8 + (self.lines - 1 if self.rank == 1 else 0)
        has_diagonals = self.has_gradient and not layout.has_gradient_fragments
        diagonals = 8 * (round_up(blocks * 8 + 16, 32) + 8) * 4 if has_diagonals else 0
        has_store = self.item_bytes == 2 and self.kernel != "logits"
        warp = max((8 * self.lines * self.slice_results * 16 if has_store else 0), diagonals)
        warp += self.lines * self._slots_bytes(8) if self.is_unfused and not self.is_inverse else 0
        shared = (2 if stage.is_staged else 1) * buffer + bias + gradient + stage.warps * warp + _BASES_BYTES
        resident = self._resident_warps(layout, chunk_rows, stage) // stage.warps
        fitting = (self.max_shared_bytes + _RESERVED_BYTES) // (shared + _RESERVED_BYTES)
        return Tile(
            size=tuple(size),
            matrices=self.matrices,
            columns=layout.columns,
            unit_columns=layout.unit_columns,
            reach=layout.reach,
            is_segmented=layout.is_segmented,
            chunk_rows=chunk_rows,
            stage_rows=stage.rows,
            is_staged=stage.is_staged,
            warps=stage.warps,
            min_blocks=max(1, min(fitting, resident)),
            slices=self.slices,
            has_bias_fragments=layout.has_bias_fragments,
            is_table_shared=has_table,
            has_gradient_fragments=layout.has_gradient_fragments,
            gradient_tables=tables,
            shared_bytes=shared,
            slots_pitch=self.slots_pitch,
        )

    def _slots_bytes(self, tokens: int) -> int:
        return slots_bytes(tokens, self.window, self.slots_pitch)

    def _resident_warps(self, layout: _Layout, chunk_rows: int, stage: _Stage) -> int:
        """Return the number of warps for which a multiprocessor has registers."""
        chunk = chunk_rows * layout.unit_columns
        is_large_stage = stage.is_staged and self.wide > 32
        if self.kernel != "forward" and (layout.is_segmented or is_large_stage or chunk > 32):
            return _FEWEST_RESIDENT_WARPS
        return self.max_resident_warps

    def _bias(self, size, layout: _Layout) -> tuple[bool, int]:
        """Return whether shared memory holds the bias as a table, and the bytes of the table or of the fragments."""
        if layout.has_bias_fragments:
            rows = self.table_rows if self.has_bias else 1
            return False, size[2] // self.unit[2] * (rows * self.fragments_per_row + 1) * layout.fragment_bytes
        table_bytes = round_up(self.table + 2 * (2 * layout.unit_columns + 32), 4) * 4
        is_shared = self.has_bias and table_bytes <= _MAX_TABLE_BYTES
        return is_shared, table_bytes * is_shared

    def _gradient(self, layout: _Layout, warps: int) -> tuple[int, int]:
        """Return the number of gradient tables in shared memory, and the bytes of the tables or of the fragments."""
        if layout.has_gradient_fragments:
            return 0, warps * self.table_rows * self.fragments_per_row * layout.fragment_bytes
        table_bytes = round_up(self.table, 4) * 4
        tables = warps if self.has_gradient and warps * table_bytes <= _MAX_GRADIENT_BYTES else 0
        return tables, tables * table_bytes

    def cost(self, tile: Tile, is_large: bool, processors: int) -> float:
        """Estimate the time of a typical problem, in instructions per multiprocessor. Only comparisons matter."""
        tokens = processors * (_LARGE_TYPICAL if is_large else _SMALL_TYPICAL)
        lengths_and_sizes = [(axis.typical, q) for axis, q in zip(self.axes, tile.size, strict=True)]
        tiles = tokens * prod(ceil(n / q) / n for n, q in lengths_and_sizes)
        columns = prod(self._typical(i, q)[0] for i, q in enumerate(tile.size))
        reading = 4 * self.wide * columns + 6 * self.wide * prod(tile.size)
        if self.is_unfused:
            reading = 2 * (self.wide * (columns + prod(tile.size)) + self.window * prod(tile.size))
        reading /= _BYTES_PER_INSTRUCTION
        computing = self._instructions(tile)
        resident = tile.min_blocks * tile.warps
        computing *= 1 + 6 / resident  # with few warps, the multiprocessor idles
        computing *= round_up(resident, 4) / resident  # its warps are divided among four schedulers
        # One block reads while another computes; a staged block does both at the same time.
        overlap = min(tile.min_blocks * (1.5 if tile.is_staged else 1), 2)
        cost_per_block = max(reading, computing) + min(reading, computing) / overlap
        blocks, resident_blocks = tiles * tile.slices, processors * tile.min_blocks
        return cost_per_block * (max(blocks, resident_blocks) if blocks < 4 * resident_blocks else blocks)

    def _typical(self, i: int, size: int) -> tuple[float, int]:
        """Return the average and the largest number of columns of `size` tokens on axis i of a typical map."""
        return typical_columns(self.axes[i], self.is_inverse, size)

    def _instructions(self, tile: Tile) -> float:
        """Estimate the instructions that a block issues for a tile."""
        steps = self.wide / 16 * _PRODUCTS[self.kernel]
        column_cost = max(
            self.matrices * (_COLUMNS_COST[self.kernel] + _PRODUCT_COST[self.item_bytes] * steps),
            self.matrices * _PRODUCT_TIME * steps,
            _SHARED_TIME[self.kernel] + _PRODUCT_SHARED_TIME * steps,
        )
        column_cost += _TABLE_COST * (not tile.has_bias_fragments and (self.has_bias or not self.is_unfused))
        column_cost += _DIAGONAL_COST * (self.has_gradient and not tile.has_gradient_fragments)
        unit_spans = [self._typical(i, u)[1] for i, u in enumerate(self.unit)]
        rows: float = unit_spans[0] * unit_spans[1]
        stages = 1
        if tile.is_segmented:
            rows *= -(-unit_spans[2] // tile.unit_columns) + (unit_spans[2] % tile.unit_columns > 0) / 2
        if tile.is_staged:  # in each stage, all warps wait for the slowest
            spans = [self._typical(i, q)[1] for i, q in enumerate(tile.size)]
            lines = spans[0] * spans[1] * (-(-spans[2] // tile.columns) if tile.is_segmented else 1)
            stages = -(-lines // tile.stage_rows)
            rows = max(rows, stages * min(rows, tile.stage_rows))
        units = prod(-(-q // u) for q, u in zip(tile.size, self.unit, strict=True))
        chunks = -(-rows // tile.chunk_rows) * tile.chunk_rows
        unit_cost = _UNIT_COST * self.matrices + chunks * tile.unit_columns / 8 * column_cost
        work = -(-units // tile.warps) * tile.warps * unit_cost
        work += tile.warps * (_TILE_COST + stages * _STAGE_COST)
        work += stages * tile.stage_rows * tile.columns * self.pieces / (32 if self.is_unfused else 16) * _COPY_COST
        if self.is_unfused and self.is_inverse:
            work += stages * tile.stage_rows * tile.columns * (self.slots_pitch // 16) / 32 * _SLOTS_COST
        if tile.has_bias_fragments:
            work += tile.size[2] / self.unit[2] * self.table_rows * self.fragments_per_row * _FRAGMENT_COST
        return work
