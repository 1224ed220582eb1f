// A warp's unit, and the chunks of columns that it processes.
#pragma once

#include "tiles.h"

namespace natten {

struct Unit {
  int z, y, x;                            // first token
  bool is_there[LINES];                   // whether this thread's tokens, one per line, exist
  int token_y[LINES], token_x[LINES];     // their positions, clamped to existing tokens
  Span z_span, y_span[LINES], x_span[LINES];  // their columns; empty for a token that does not exist
  Span segment_span;
  int first_row, end_row;  // rows of columns
  int first_column;        // in a row of shared memory, a multiple of 8
  int first_x;             // position of that column, in segment 0
  bool is_regular;         // whether the window of each line is complete and begins one row after that of the previous line

  // Returns false, for the whole warp, if the unit has no tokens.
  __device__ __forceinline__ bool locate(const BlockTile& tile, int index) {
    const int* n = tile.map.n;
    x = tile.at[2] + index % UNITS_X * UNIT_X, index /= UNITS_X;
    y = tile.at[1] + (RANK > 1 ? index % UNITS_Y * UNIT_Y : 0);
    z = RANK > 2 ? tile.at[0] + index / UNITS_Y : 0;
    // The last units of a tile may be outside the map.
    const int end_y = min(tile.at[1] + TILE_Y, n[1]), end_x = min(tile.at[2] + TILE_X, n[2]);
    if ((RANK > 2 && z >= min(tile.at[0] + TILE_Z, n[0])) || (RANK > 1 && y >= end_y) || x >= end_x) return false;
    z_span = columns_z(z, n[0]);
    is_regular = RANK > 1;
#pragma unroll
    for (int line = 0; line < LINES; ++line) {
      const int sy = RANK > 1 ? y + line : 0, sx = x + lane_index() / 4 + (RANK > 1 ? 0 : 8 * line);
      y_span[line] = RANK < 2 || sy < end_y ? columns_y(sy, n[1]) : Span{0, 0};
      x_span[line] = sx < end_x ? columns_x(sx, n[2]) : Span{0, 0};
      is_there[line] = (RANK < 2 || sy < end_y) && sx < end_x;
      token_y[line] = RANK > 1 ? min(sy, end_y - 1) : 0, token_x[line] = min(sx, end_x - 1);
      is_regular &= y_span[line].first == y_span[0].first + line && y_span[line].end == y_span[line].first + KERNEL_Y;
    }
    const Span ys = {columns_y(y, n[1]).first, columns_y(min(y + UNIT_Y, end_y) - 1, n[1]).end};
    segment_span = {0, 1};
    if (IS_SEGMENTED) {
      const Span xs = {columns_x(x, n[2]).first, columns_x(min(x + UNIT_X, end_x) - 1, n[2]).end};
      segment_span = {(xs.first - tile.x.first) / COLUMNS, (xs.end - 1 - tile.x.first) / COLUMNS + 1};
    }
    first_column = IS_SEGMENTED ? 0 : tile.first_column(x);
    first_x = tile.first_x + first_column;
    first_row = tile.row_of({z_span.first, ys.first, segment_span.first});
    end_row = tile.row_of({z_span.end - 1, ys.end - 1, segment_span.end - 1}) + 1;
    return true;
  }
  __device__ __forceinline__ bool sees(const Place& at, int line) const {
    return (RANK < 3 || z_span.holds(at.z)) && (RANK < 2 || y_span[line].holds(at.y)) &&
           (!IS_SEGMENTED || segment_span.holds(at.segment));
  }
};

// Rows of columns that the lines of a regular unit see, on the second axis. Row r is in the window of line l if
// l <= r < l + KERNEL_Y.
constexpr int REGULAR_ROWS = KERNEL_Y + LINES - 1;
static_assert(CHUNK_ROWS <= REGULAR_ROWS, "the first chunk of a regular unit must not need rows before its columns");
constexpr int ANY_ROW = -1;
// Whether there is an unrolled loop for regular units. It is not worth its size if few units are regular, or for many rows.
constexpr bool HAS_REGULAR_UNITS =
    RANK > 1 && STRIDE_Y == 1 && !IS_SEGMENTED && !IS_STAGED && REGULAR_ROWS * ROW_BLOCKS * QUADS <= 64;

// CHUNK_ROWS consecutive rows of columns. The unit may not see all of them. ROW: for a regular unit, the number of rows
// that earlier chunks processed, so that the compiler knows which line sees which row; otherwise ANY_ROW.
template <int ROW>
class Chunk {
 public:
  static constexpr bool IS_REGULAR = ROW != ANY_ROW;

  // The chunk begins with `row`, or earlier if the rows [first, end) that can be read end too soon. buffer: row `first`.
  __device__ __forceinline__ Chunk(const BlockTile& tile, const Unit& unit, int row, int first, int end, const char* buffer)
      : tile_(tile), unit_(unit), row_(row), first_(IS_REGULAR ? row - SHIFT : min(row, end - CHUNK_ROWS)),
        token_((first_ - first) * COLUMNS + unit.first_column), buffer_(buffer) {}
  // For a regular unit: the number of rows of the unit before row r, and whether an earlier chunk contained row r.
  __device__ __forceinline__ int row_of_unit(int r) const { return ROW - SHIFT + r; }
  __device__ __forceinline__ bool is_repeated(int r) const { return r < SHIFT; }
  __device__ __forceinline__ Place place(int r) const { return tile_.place(first_ + r); }
  // Whether a line of the unit sees a row that no earlier chunk contained.
  __device__ __forceinline__ bool is_seen(int r, int line) const {
    if (IS_REGULAR) return !is_repeated(r) && row_of_unit(r) >= line && row_of_unit(r) < line + KERNEL_Y;
    return first_ + r >= row_ && unit_.sees(place(r), line);
  }
  // What the compiler knows about that: whether a line, or a matrix, may see the row.
  __device__ __forceinline__ bool may_see(int r, int line) const { return !IS_REGULAR || is_seen(r, line); }
  __device__ __forceinline__ bool is_seen_by(int r, int matrix) const {
    return may_see(r, 2 * matrix) || may_see(r, 2 * matrix + 1);
  }
  // Whether a matrix uses the chunk, and whether it is known that it uses no earlier chunk.
  __device__ __forceinline__ bool is_used_by(int matrix) const {
    bool found = !IS_REGULAR;
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) found |= is_seen_by(r, matrix);
    return found;
  }
  __device__ __forceinline__ bool is_first_of(int matrix) const {
    return IS_REGULAR && RANK == 2 && ROW <= 2 * matrix;
  }
  // Whether the unit sees any row.
  __device__ __forceinline__ bool is_used() const {
    if (IS_REGULAR || (RANK < 3 && !IS_SEGMENTED)) return true;
    bool found = false;
#pragma unroll
    for (int i = 0; i < CHUNK_ROWS * LINES; ++i) found |= is_seen(i / LINES, i % LINES);
    return found;
  }
  // The unit's columns of row r, of the first or the second tensor.
  __device__ __forceinline__ const char* columns(int tensor, int r = 0) const {
    return buffer_ + tensor * COLUMN_BYTES + token_ * (PITCH * 16) + r * (COLUMNS * PITCH * 16);
  }
  __device__ __forceinline__ int row_of_stage(int r) const { return (token_ - unit_.first_column) / COLUMNS + r; }
  // What the columns of the stage have in addition, as queries.
  __device__ __forceinline__ const char* queries() const { return buffer_ + COLUMN_TENSORS * COLUMN_BYTES; }
  // The first or the second statistic of each of these columns.
  __device__ __forceinline__ const float* statistics(int which, int r) const {
    return reinterpret_cast<const float*>(queries()) + which * STAGE_TOKENS + token_ + r * COLUMNS;
  }

 private:
  static constexpr int SHIFT = ROW + CHUNK_ROWS > REGULAR_ROWS ? ROW + CHUNK_ROWS - REGULAR_ROWS : 0;
  const BlockTile& tile_;
  const Unit& unit_;
  int row_, first_, token_;
  const char* buffer_;
};
static_assert(CHUNK_ROWS <= STAGE_ROWS, "a chunk must fit into a stage");

}  // namespace natten
