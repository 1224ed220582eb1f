// The initial values of the products of queries and keys: the bias of a pair, or minus infinity if the column is not in the
// token's window. They are divided by the scale, because the sums are multiplied by it later.
#pragma once

#include "products.h"

namespace natten {

// Copies the bias table of a head, with margins, to shared memory, once per block. Does nothing if it is not stored there.
__device__ __forceinline__ void copy_table(const Params& p, int head, char* shared) {
  if (HAS_BIAS_FRAGMENTS || BIAS_BYTES == 0) return;
  float* to = reinterpret_cast<float*>(shared + BIAS_AT);
  const float factor = reciprocal_fast(p.scale);
  for (int i = threadIdx.x; i < BIAS_BYTES / 4; i += TILE_THREADS) {
    const int entry = i - MARGIN;
    to[i] = entry >= 0 && entry < TABLE ? p.rpb[head * static_cast<long long>(TABLE) + entry] * factor : 0.f;
  }
}

// Makes bias fragments, once per tile, for each position of units on the last axis: one per row of the table (or a single
// one without a table), and a last one of minus infinity, for rows that a line does not see.
__device__ __forceinline__ void make_fragments(const Params& p, const BlockTile& tile, char* shared) {
  if (!HAS_BIAS_FRAGMENTS) return;
  const int n = tile.map.n[2], lane = lane_index();
  const float factor = reciprocal_fast(p.scale);
  const float* table = HAS_RPB ? p.rpb + static_cast<long long>(tile.map.head) * TABLE : nullptr;
  for (int group = 0; group < UNITS_X * FRAGMENTS_PER_ROW; ++group) {
    const int unit = group / FRAGMENTS_PER_ROW, line = group % FRAGMENTS_PER_ROW, token = lane / 4 + 8 * line;
    const int first = tile.at[2] + unit * UNIT_X, x = first + token;
    const Span columns = x < n ? columns_x(x, n) : Span{0, 0};
    const int corner = tile.first_x + (first < n ? tile.first_column(first) : 0) - x;  // first column minus token
    float2* to = reinterpret_cast<float2*>(shared + BIAS_AT + unit * BIAS_FRAGMENTS * FRAGMENT_BYTES) + lane;
#pragma unroll 1
    for (int fragment = warp_index() * FRAGMENTS_PER_ROW + line; fragment < BIAS_FRAGMENTS;
         fragment += WARPS * FRAGMENTS_PER_ROW) {
      const float* row = table + fragment / FRAGMENTS_PER_ROW * TABLE_X + KERNEL_X - 1;
      float found[ROW_BLOCKS * 2];
#pragma unroll
      for (int k = 0; k < ROW_BLOCKS * 2; ++k) {
        const int column = corner + k / 2 * 8 + lane % 4 * 2 + k % 2;
        const bool is_there = fragment < BIAS_FRAGMENTS - 1 && columns.holds(x + column);
        found[k] = !is_there ? minus_infinity() : HAS_RPB ? row[SIGN * column] * factor : 0.f;
      }
#pragma unroll
      for (int block = 0; block < ROW_BLOCKS; ++block)
        to[fragment * (FRAGMENT_BYTES / 8) + block * 32] = {found[2 * block], found[2 * block + 1]};
    }
  }
}

class UnitBias {
 public:
  __device__ __forceinline__ UnitBias(const Params& p, const BlockTile& tile, const Unit& unit, const char* shared)
      : unit_(unit), shared_(shared + BIAS_AT),
        table_(HAS_RPB ? p.rpb + tile.map.head * static_cast<long long>(TABLE) : nullptr),
        factor_(reciprocal_fast(p.scale)) {
    const int unit_in_row = (unit.x - tile.at[2]) / UNIT_X;
    if (HAS_BIAS_FRAGMENTS) shared_ += unit_in_row * (BIAS_FRAGMENTS * FRAGMENT_BYTES) + lane_index() * 8;
    else if (!IS_SEGMENTED) mask_columns(0);
  }

  // The table row of a row of columns, for the first line. For each further line it is SIGN rows earlier.
  __device__ __forceinline__ int table_row(const Place& at) const {
    const int row_z = RANK > 2 ? SIGN * (at.z - unit_.z) + KERNEL_Z - 1 : 0;
    const int row_y = RANK > 1 ? SIGN * (at.y - unit_.y) + KERNEL_Y - 1 : 0;
    return row_z * TABLE_Y + row_y;
  }
  // The entry in a table row for the first column and the unit's first token.
  __device__ __forceinline__ int entry_of_corner(int segment) const {
    return SIGN * (unit_.first_x + segment * COLUMNS - unit_.x) + KERNEL_X - 1;
  }

  // Sets row r of `bias`.
  template <class AnyChunk>
  __device__ __forceinline__ void get(const AnyChunk& chunk, int r, Products& bias) {
    if (AnyChunk::IS_REGULAR && chunk.is_repeated(r)) return;
    const Place at = chunk.place(r);
    if (IS_SEGMENTED) mask_columns(at.segment);
    const int row = HAS_RPB ? table_row(at) : 0;
#pragma unroll
    for (int line = 0; line < LINES; ++line) {
      if (AnyChunk::IS_REGULAR && ROLLS && line > 1) break;
      float(&to)[ROW_BLOCKS][4] = bias[line / 2][r];
      const int row_of_line = HAS_RPB && RANK > 1 ? row - SIGN * line : 0;
      if (!chunk.may_see(r, line)) {  // any number will do
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * 2; ++i) to[i / 2][line % 2 * 2 + i % 2] = 0;
        continue;
      }
      if (!HAS_BIAS_FRAGMENTS) {
        find(chunk.is_seen(r, line), row_of_line, line, at.segment, to);
        continue;
      }
      const int fragment = row_of_line * FRAGMENTS_PER_ROW + line % FRAGMENTS_PER_ROW;
      const char* from = shared_ + (chunk.is_seen(r, line) ? fragment : BIAS_FRAGMENTS - 1) * FRAGMENT_BYTES;
#pragma unroll
      for (int block = 0; block < ROW_BLOCKS; ++block) {
        const float2 two = load_pair(from + block * 256);
        to[block][line % 2 * 2] = two.x, to[block][line % 2 * 2 + 1] = two.y;
      }
    }
    if (AnyChunk::IS_REGULAR && ROLLS) roll(chunk.row_of_unit(r) % 2, r, bias);
  }

 private:
  // The bias of the second matrix of a regular unit is that of the first matrix two rows earlier. It stays in registers.
  static constexpr bool ROLLS = HAS_BIAS_FRAGMENTS && MATRICES > 1;
  __device__ __forceinline__ void roll(int parity, int r, Products& bias) {
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * 4; ++i) {
      float& held = held_[parity][i / 4][i % 4];
      bias[MATRICES - 1][r][i / 4][i % 4] = held;
      held = bias[0][r][i / 4][i % 4];
    }
  }

  const Unit& unit_;
  const char* shared_;  // with fragments: the first number of this lane in those of the unit
  const float* table_;
  float held_[2][ROW_BLOCKS][4] = {};
  float factor_, mask_[ROW_BLOCKS][RANK > 1 ? 2 : 2 * LINES];  // zero in a token's window, else minus infinity

  // Computes the values of one line from the table.
  __device__ __forceinline__ void find(bool is_seen, int row, int line, int segment, float (&bias)[ROW_BLOCKS][4]) const {
    const int first = (is_seen ? row * TABLE_X : 0) + entry_of_corner(segment) +
                      SIGN * (lane_index() % 4 * 2 - lane_index() / 4 - (RANK > 1 ? 0 : 8 * line));
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * 2; ++i) {
      const float value = HAS_RPB ? entry(first + SIGN * (i / 2 * 8 + i % 2)) : 0.f;
      bias[i / 2][line % 2 * 2 + i % 2] =
          is_seen ? value + mask_[i / 2][(RANK > 1 ? 0 : 2 * line) + i % 2] : minus_infinity();
    }
  }

  __device__ __forceinline__ void mask_columns(int segment) {
    const int x = unit_.first_x + segment * COLUMNS + lane_index() % 4 * 2;
    // With several axes all lines have the same x, and the first line of a unit always has tokens.
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * (RANK > 1 ? 2 : 2 * LINES); ++i) {
      const int block = RANK > 1 ? i / 2 : i / (2 * LINES), item = RANK > 1 ? i % 2 : i % (2 * LINES);
      mask_[block][item] = unit_.x_span[item / 2].holds(x + block * 8 + item % 2) ? 0.f : minus_infinity();
    }
  }
  __device__ __forceinline__ float entry(int index) const {
    if (BIAS_BYTES) return reinterpret_cast<const float*>(shared_)[MARGIN + index];
    return table_[min(max(index, 0), TABLE - 1)] * factor_;
  }
};

}  // namespace natten
