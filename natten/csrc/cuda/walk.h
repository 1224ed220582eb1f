// The loops of a block over its tile: stages of columns, units, chunks of rows.
#pragma once

#include "bias.h"

namespace natten {

// Passes rows [row, end) of columns to `work`, chunk by chunk. Shared memory holds rows from first_row on.
template <class Work>
__device__ __forceinline__ void add_rows(Work& work, const BlockTile& tile, const Unit& unit, int row, int end,
                                         int first_row, const char* buffer) {
#pragma unroll 1
  for (; row < end; row += CHUNK_ROWS) {
    const Chunk<ANY_ROW> chunk(tile, unit, row, first_row, first_row + STAGE_ROWS, buffer);
    if (chunk.is_used()) work.add(chunk);
  }
}

// Passes consecutive rows of columns that a regular unit sees to `work`, in an unrolled loop.
template <int ROW = 0, class Work>
__device__ __forceinline__ void add_regular_rows(Work& work, const BlockTile& tile, const Unit& unit, int row,
                                                 const char* buffer) {
  work.add(Chunk<ROW>(tile, unit, row + ROW, 0, STAGE_ROWS, buffer));
  if constexpr (ROW + CHUNK_ROWS < REGULAR_ROWS) add_regular_rows<ROW + CHUNK_ROWS>(work, tile, unit, row, buffer);
}

// Passes all rows of columns of a unit to `work`.
template <class Work>
__device__ __forceinline__ void add_all_rows(Work& work, const BlockTile& tile, const Unit& unit, const char* buffer) {
  if (!HAS_REGULAR_UNITS || !unit.is_regular)
    return add_rows(work, tile, unit, unit.first_row, unit.end_row, 0, buffer);
  if (RANK == 2) return add_regular_rows(work, tile, unit, unit.first_row, buffer);
  const int height = tile.y.end - tile.y.first;
#pragma unroll 1
  for (int row = unit.first_row; row < unit.end_row; row += height) add_regular_rows(work, tile, unit, row, buffer);
}

// Finds the only unit of a warp. If there is none, returns false and sets a unit without rows, whose first token is
// readable.
__device__ __forceinline__ bool find_unit(const BlockTile& tile, Unit& unit) {
  if (warp_index() < UNITS && unit.locate(tile, warp_index())) return true;
  unit = {};
  return false;
}

// Processes a tile in stages. The next stage is copied during the computation. Each warp has at most one unit.
template <class Work, class Copy, class Make>
__device__ __forceinline__ void walk_stages(const BlockTile& tile, char* shared, Copy copy, Make make) {
  Unit unit;
  const bool has_unit = find_unit(tile, unit);
  Work work = make(unit);
#pragma unroll 1
  for (int first_row = 0, buffer = 0; first_row < tile.rows; first_row += STAGE_ROWS, buffer ^= 1) {
    const int next_row = first_row + STAGE_ROWS;
    if (next_row < tile.rows) {
      copy(next_row, shared + (buffer ^ 1) * BUFFER_BYTES);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const int row = max(unit.first_row, first_row), end = min(unit.end_row, next_row);
    add_rows(work, tile, unit, row, end, first_row, shared + buffer * BUFFER_BYTES);
    __syncthreads();
  }
  if (has_unit) work.finish();
}

// Processes a tile with at most one unit per warp. `make` reads the unit's tokens while the columns are copied.
template <class Work, class Make>
__device__ __forceinline__ void walk_units(const BlockTile& tile, char* shared, Make make) {
  Unit unit;
  const bool has_unit = find_unit(tile, unit);
  Work work = make(unit);
  wait_copies<0>();
  __syncthreads();
  if (!has_unit) return;
  add_all_rows(work, tile, unit, shared);
  work.finish();
}

// Processes a tile. For each unit of this warp, creates a Work with make(unit), calls work.add(chunk) for each chunk of the
// unit's columns, and then work.finish(). copy(first_row, buffer) copies a stage of columns to shared memory.
// has_fragments: whether shared memory already contains the bias fragments of the tile.
template <class Work, class Copy, class Make>
__device__ __forceinline__ void walk(const Params& p, const BlockTile& tile, char* shared, bool has_fragments, Copy copy,
                                     Make make) {
  find_bases(p, tile, shared);
  __syncthreads();
  copy(0, shared);
  if (!has_fragments) make_fragments(p, tile, shared);
  if (IS_STAGED) return walk_stages<Work>(tile, shared, copy, make);
  if (UNITS <= WARPS) return walk_units<Work>(tile, shared, make);
  wait_copies<0>();
  __syncthreads();
#pragma unroll 1
  for (int index = warp_index(); index < UNITS; index += WARPS) {
    Unit unit;
    if (!unit.locate(tile, index)) continue;
    Work work = make(unit);
    add_all_rows(work, tile, unit, shared);
    work.finish();
  }
}

}  // namespace natten
