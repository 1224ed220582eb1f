// Unfused attention with matrix instructions: RESULT[key] = the sum over queries of WEIGHTS[query][slot] * ROWS[query]. These are
// the gradients of keys and values. The tokens of a tile are keys, and its columns are the queries that attend to them.
#define IS_INVERSE 1
#include "slots.h"

namespace natten {

// The slots of one axis that belong to the keys of a tile, in the window of a query with this first key.
__device__ __forceinline__ Span slots_of_tile(const BlockTile& tile, int axis, int start) {
  constexpr int SIZES[3] = {TILE_Z, TILE_Y, TILE_X}, WINDOWS[3] = {KERNEL_Z, KERNEL_Y, KERNEL_X};
  const int end = min(tile.at[axis] + SIZES[axis], tile.map.n[axis]);
  return {max(tile.at[axis] - start, 0), min(end - start, WINDOWS[axis])};
}

struct Scatter {
  const Params& p;
  const BlockTile& tile;
  const Unit& unit;
  char* shared;
  int first_block;
  Rows<const Storage> rows;
  SlotPlaces places;
  // The distance in bytes from a row of the stage to the slots of this thread's columns, as if slot 0 were at a multiple of
  // 16 bytes.
  int slot_bytes[LINES_IN_X][ROW_BLOCKS][2];
  // Slot 0 is as many bytes after such a multiple as this plus the position of the row in global memory, modulo 16.
  unsigned low_part[LINES_IN_X][ROW_BLOCKS][2];
  unsigned selector[LINES_IN_X][ROW_BLOCKS];  // which of the columns attend to this thread's tokens
  Sums sum;

  __device__ __forceinline__ Scatter(const Params& p, const BlockTile& tile, const Unit& unit, char* shared, int slice)
      : p(p), tile(tile), unit(unit), shared(shared), first_block(slice * SLICE),
        rows(rows_of<const Storage>(p, WEIGHTS, shared)), places(places_to_read(rows.step[2])) {
    find_columns(0);
    clear(sum);
  }

  __device__ __forceinline__ void find_columns(int segment) {
    const int n = tile.map.n[2], corner = unit.first_x + segment * COLUMNS;
#pragma unroll
    for (int i = 0; i < LINES_IN_X * ROW_BLOCKS; ++i) {
      const int line = i / ROW_BLOCKS, block = i % ROW_BLOCKS, x = corner + block * 8 + lane_index() % 4 * 2;
      const Span& span = unit.x_span[line];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        // Instead of slots that are not in shared memory, others are read, which the selector ignores.
        const int query = min(max(x + k, tile.x.first), tile.x.end - 1), start = WindowsX::start(query, n);
        const Span copied = RANK > 1 ? Span{0, KERNEL_X} : slots_of_tile(tile, 2, start);
        const int slot = min(max(unit.token_x[line] - start, copied.first), copied.end - 1);
        const int distance = (unit.first_column + query - corner) * places.pitch;
        slot_bytes[line][block][k] = distance + slot * SLOT_BYTES;
        low_part[line][block][k] = low_bits(rows.at(0, 0, query)) - distance;
      }
      selector[line][block] = select_halves(span.holds(x), span.holds(x + 1));
    }
  }

  template <class AnyChunk>
  __device__ __forceinline__ void add(const AnyChunk& chunk) {
    Words weights;
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      const Place at = chunk.place(r);
      if (IS_SEGMENTED) find_columns(at.segment);
      const char* slots = chunk.queries() + chunk.row_of_stage(r) * slots_bytes(COLUMNS);
      const unsigned low = at.z * static_cast<unsigned>(rows.step[0]) + at.y * static_cast<unsigned>(rows.step[1]);
      const int slot_z = RANK > 2 ? unit.z - WindowsZ::start(at.z, tile.map.n[0]) : 0;
      const int slot_y = RANK > 1 ? unit.y - WindowsY::start(at.y, tile.map.n[1]) : 0;
      const char* found[LINES_IN_X][ROW_BLOCKS][2];
#pragma unroll
      for (int i = 0; i < LINES_IN_X * ROW_BLOCKS * 2; ++i) {
        const int line = i / 2 / ROW_BLOCKS, block = i / 2 % ROW_BLOCKS, k = i % 2;
        found[line][block][k] = slots + slot_index(slot_z, slot_y, 0) * SLOT_BYTES + slot_bytes[line][block][k] +
                                ((low_part[line][block][k] + low) & 15);
      }
#pragma unroll
      for (int line = 0; line < LINES; ++line) {
        const bool is_seen = chunk.may_see(r, line) && chunk.is_seen(r, line);
        const int x = LINES_IN_X > 1 ? line : 0, row = RANK > 1 ? line * (KERNEL_X * SLOT_BYTES) : 0;
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block) {
          unsigned& word = weights[line / 2][r][block][line % 2];
          word = 0;
          if (is_seen)
            word = join_halves(*reinterpret_cast<const Storage*>(found[x][block][0] + row),
                               *reinterpret_cast<const Storage*>(found[x][block][1] + row), selector[x][block]);
        }
      }
    }
    add_chunk_columns(weights, chunk, 0, first_block, sum);
  }

  __device__ __forceinline__ void finish() {
    store_unit<HEAD_DIM>(sum, rows_of<Storage>(p, RESULT, shared), unit, tile, first_block,
                         scratch_of_warp(shared));
  }
};

// Copies the weights of the queries of a stage for the keys of the tile asynchronously. A thread copies the same piece of the
// weights of each of its rows.
__device__ __forceinline__ void copy_weights(const Rows<const Storage>& weights, const BlockTile& tile, int first_row,
                                             char* buffer) {
  constexpr bool IS_STEADY = RANK < 3 && !IS_SEGMENTED;  // whether the distance between rows is constant
  const int *n = tile.map.n, rows = min(STAGE_ROWS, tile.rows - first_row);
  const SlotPlaces places = places_to_read(weights.step[2]);
  for (unsigned i = threadIdx.x; i < COLUMNS * SLOT_PIECES; i += TILE_THREADS) {
    const int column = i / SLOT_PIECES, piece = i % SLOT_PIECES;
    char* to = buffer + COLUMN_TENSORS * COLUMN_BYTES;
    const char* slots = reinterpret_cast<const char*>(weights.at(0, tile.y.first + first_row, tile.first_x + column));
#pragma unroll 1
    for (int row = 0; row < rows; ++row, to += slots_bytes(COLUMNS), slots += weights.step[1]) {
      const Place place = tile.place(first_row + row);
      const int query = tile.first_x + place.segment * COLUMNS + column;
      if (!IS_STEADY) slots = reinterpret_cast<const char*>(weights.at(place.z, place.y, query));
      Span z = {0, 1}, y = {0, 1}, x = {0, KERNEL_X};
      if (RANK > 2) z = slots_of_tile(tile, 0, WindowsZ::start(place.z, n[0]));
      if (RANK > 1) y = slots_of_tile(tile, 1, WindowsY::start(place.y, n[1]));
      if (RANK == 1) x = slots_of_tile(tile, 2, WindowsX::start(query, n[2]));
      const int end = tile.x.holds(query) ? slot_index(z.end - 1, y.end - 1, x.end - 1) + 1 : 0;
      copy_slots(slots, slot_index(z.first, y.first, x.first), end, piece, to + places.of(column, low_bits(slots)));
    }
  }
}

}  // namespace natten

NATTEN_KERNEL(natten_scatter_tiles, natten::TILE_THREADS, MIN_BLOCKS) {
  using namespace natten;
  NATTEN_SHARED_MEMORY(shared);
  const int head = blockIdx.x % p.heads, slice = blockIdx.x / p.heads % SLICES;
  BlockTile tile;
  if (!tile.locate(p, blockIdx.x / p.heads / SLICES, head)) return;
  walk<Scatter>(
      p, tile, shared, false,
      [&](int row, char* buffer) {
        const auto columns = rows_of<const Storage>(p, ROWS, shared);
        copy_columns(columns, columns, tile, row, buffer);
        copy_weights(rows_of<const Storage>(p, WEIGHTS, shared), tile, row, buffer);
        commit_copies();
      },
      [&](const Unit& unit) { return Scatter(p, tile, unit, shared, slice); });
}
