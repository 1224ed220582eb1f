// What the kernels with matrix instructions share. A block takes a tile of tokens (queries; for the gradients of keys and
// values, keys) of one submap, and holds the union of what they meet (keys; queries), its columns, in shared memory. Each
// warp takes units of 16 tokens: two rows of 8 on the last two axes, or 16 in a line. The first 8 are rows 0 to 7 of a
// matrix fragment, the others rows 8 to 15; all of one half have the same place on the first two axes, so that whether
// a row of columns is in their window is one question for the warp.
//
// What the compiler is told besides problem.h (natten/backends/cuda_tiles.py chooses):
//   TILE_Z, TILE_Y, TILE_X  tokens of a tile
//   COLUMNS                 tokens of a row of columns in shared memory, a multiple of 8
//   UNIT_COLUMNS            those of them that a unit looks at, a multiple of 8
//   IS_SEGMENTED            whether rows are cut into segments of COLUMNS = UNIT_COLUMNS tokens, since they are long
//   CHUNK_ROWS              rows that a warp works on at a time; CHUNK_ROWS * UNIT_COLUMNS is a multiple of 16
//   STAGE_ROWS, IS_STAGED   rows that shared memory holds at a time; whether there may be more, and two such buffers
//   WARPS, MIN_BLOCKS       of a block; blocks that a multiprocessor should hold
//   SLICES                  blocks that share head_dim of the results
//   IS_TABLE_SHARED         whether the bias table is copied to shared memory
//   GRADIENT_TABLES         copies of its gradient there: WARPS, or 1 that warps add to atomically, or 0 if it is too large
//   SHARED_BYTES            of all that
#pragma once

#include "problem.h"

#ifndef IS_INVERSE
#define IS_INVERSE 0  // whether the block's tokens are keys
#endif
#ifndef HAS_GRADIENT
#define HAS_GRADIENT 0  // whether rpb's gradient is summed up
#endif

namespace natten {

static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM <= 256, "head_dim must be a multiple of 8 up to 256");
static_assert(COLUMNS % 8 == 0 && UNIT_COLUMNS % 8 == 0 && CHUNK_ROWS * UNIT_COLUMNS % 16 == 0, "see above");

constexpr int TILE_THREADS = WARPS * 32;
constexpr int UNIT_Y = RANK > 1 ? 2 : 1, UNIT_X = RANK > 1 ? 8 : 16;
constexpr int UNITS_Y = (TILE_Y + UNIT_Y - 1) / UNIT_Y, UNITS_X = (TILE_X + UNIT_X - 1) / UNIT_X;
constexpr int UNITS = TILE_Z * UNITS_Y * UNITS_X, ROUNDS = (UNITS + WARPS - 1) / WARPS;
static_assert(!IS_STAGED || ROUNDS == 1, "staged columns are seen once");

constexpr int PIECES = HEAD_DIM / 8;        // of a row, 16 bytes each
constexpr int STEPS = (PIECES + 1) / 2;     // of a product over head_dim, 16 elements each, the last perhaps 8
constexpr int SLICE = (PIECES + SLICES - 1) / SLICES;  // pieces of the results that a block computes
constexpr int ROW_BLOCKS = UNIT_COLUMNS / 8;           // of 8 columns
constexpr int BLOCKS = CHUNK_ROWS * ROW_BLOCKS;

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory: columns, bias table, its gradient, and some bytes for each warp
// ---------------------------------------------------------------------------------------------------------------------

constexpr bool IS_POWER = (PIECES & (PIECES - 1)) == 0;
constexpr int PITCH = IS_POWER ? PIECES : PIECES | 1;  // pieces from one column to the next
// The 8 rows of a matrix, wherever they begin, must lie in different banks: by an odd pitch, or by an exchange of pieces.
constexpr int SWIZZLE_MASK = !IS_POWER ? 0 : PIECES < 8 ? PIECES - 1 : 7;
constexpr int SWIZZLE_SHIFT = !IS_POWER || PIECES >= 8 ? 0 : PIECES == 4 ? 1 : PIECES == 2 ? 2 : 3;
__device__ __forceinline__ int swizzle(int column) { return (column >> SWIZZLE_SHIFT) & SWIZZLE_MASK; }

constexpr int STAGE_TOKENS = STAGE_ROWS * COLUMNS;
constexpr int BUFFERS = IS_STAGED ? 2 : 1;
constexpr int COLUMN_BYTES = STAGE_TOKENS * PITCH * 16;
constexpr bool INVERSE = IS_INVERSE;
constexpr int SIGN = INVERSE ? -1 : 1;  // of a column's place in the bias table, which is the key's less the query's
constexpr int STATISTICS_BYTES = INVERSE ? STAGE_TOKENS * 8 : 0;  // two numbers of each query
constexpr int BUFFER_BYTES = 2 * COLUMN_BYTES + STATISTICS_BYTES;

// Entries beyond the table may be read, for pairs that no window holds.
constexpr int MARGIN = (RANK > 1 ? TABLE_X : 0) + 2 * UNIT_COLUMNS + 32;
constexpr int TABLE_BYTES = HAS_RPB && IS_TABLE_SHARED ? (TABLE + 2 * MARGIN + 3) / 4 * 16 : 0;
constexpr int GRADIENT_BYTES = GRADIENT_TABLES * ((TABLE + 3) / 4 * 16);
constexpr int DIAGONAL_BLOCKS = ROW_BLOCKS + (RANK == 1);
constexpr int DIAGONAL_PITCH = (DIAGONAL_BLOCKS * 8 + 16 + 31) / 32 * 32 + 8;
constexpr int STORE_BYTES = 16 * (SLICE + 1) * 16, DIAGONAL_BYTES = HAS_GRADIENT ? 8 * DIAGONAL_PITCH * 4 : 0;
constexpr int WARP_BYTES = STORE_BYTES > DIAGONAL_BYTES ? STORE_BYTES : DIAGONAL_BYTES;
constexpr int TABLE_AT = BUFFERS * BUFFER_BYTES, GRADIENT_AT = TABLE_AT + TABLE_BYTES;
constexpr int WARPS_AT = GRADIENT_AT + GRADIENT_BYTES;
static_assert(SHARED_BYTES == WARPS_AT + WARPS * WARP_BYTES, "cuda_tiles.py counts otherwise");

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000); }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

__device__ __forceinline__ Span columns_z(int s, int n) { return INVERSE ? WindowsZ::queries(s, n) : WindowsZ::keys(s, n); }
__device__ __forceinline__ Span columns_y(int s, int n) { return INVERSE ? WindowsY::queries(s, n) : WindowsY::keys(s, n); }
__device__ __forceinline__ Span columns_x(int s, int n) { return INVERSE ? WindowsX::queries(s, n) : WindowsX::keys(s, n); }

// ---------------------------------------------------------------------------------------------------------------------
// The block's tile and its columns
// ---------------------------------------------------------------------------------------------------------------------

struct Place {
  int z, y, segment;
};

struct BlockTile {
  Submap map;
  int at[3];
  Span z, y, x;  // columns
  int segments, rows;

  __device__ __forceinline__ bool locate(const Params& p, long long piece, int head) {
    map.head = head;
    if (!natten::locate(p, piece, {TILE_Z, TILE_Y, TILE_X}, map, at)) return false;
    const int *n = map.n;
    z = {columns_z(at[0], n[0]).first, columns_z(min(at[0] + TILE_Z, n[0]) - 1, n[0]).end};
    y = {columns_y(at[1], n[1]).first, columns_y(min(at[1] + TILE_Y, n[1]) - 1, n[1]).end};
    x = {columns_x(at[2], n[2]).first, columns_x(min(at[2] + TILE_X, n[2]) - 1, n[2]).end};
    segments = IS_SEGMENTED ? (x.end - x.first + COLUMNS - 1) / COLUMNS : 1;
    rows = (RANK > 2 ? z.end - z.first : 1) * (RANK > 1 ? y.end - y.first : 1) * segments;
    return true;
  }
  // Where a row of columns lies.
  __device__ __forceinline__ Place place(int row) const {
    if (RANK == 1) return {0, 0, IS_SEGMENTED ? row : 0};
    const int segment = IS_SEGMENTED ? row % segments : 0;
    if (IS_SEGMENTED) row /= segments;
    if (RANK == 2) return {0, y.first + row, segment};
    const int height = y.end - y.first;
    return {z.first + row / height, y.first + row % height, segment};
  }
  __device__ __forceinline__ int row_of(const Place& at) const {
    const int row = (RANK > 2 ? (at.z - z.first) * (y.end - y.first) : 0) + (RANK > 1 ? at.y - y.first : 0);
    return IS_SEGMENTED ? row * segments + at.segment : row;
  }
};

// Copies a stage of columns of two tensors, in the background; zeros where there are none.
__device__ __forceinline__ void copy_columns(const Params& p, const BlockTile& tile, int first_row, TensorName first,
                                             TensorName second, char* buffer) {
  const Rows<const Storage> one(p, first, tile.map), two(p, second, tile.map);
  for (int i = threadIdx.x; i < STAGE_TOKENS * PIECES; i += TILE_THREADS) {
    const int piece = i % PIECES, token = i / PIECES, row = first_row + token / COLUMNS;
    const Place at = tile.place(row);
    const int x = tile.x.first + at.segment * COLUMNS + token % COLUMNS;
    const bool is_there = row < tile.rows && x < tile.x.end;
    char* to = buffer + (token * PITCH + (piece ^ swizzle(token))) * 16;
    const Storage* from = is_there ? one.at(at.z, at.y, x) + piece * 8 : one.base;
    copy_async(to, from, is_there);
    from = is_there ? two.at(at.z, at.y, x) + piece * 8 : two.base;
    copy_async(to + COLUMN_BYTES, from, is_there);
  }
  commit_copies();
}

// ---------------------------------------------------------------------------------------------------------------------
// A warp's unit
// ---------------------------------------------------------------------------------------------------------------------

struct Unit {
  int z, y, x;            // first token
  bool is_there[2];       // whether this thread's tokens, one in each half, exist
  Span z_span, y_span[2], x_span[2];  // columns of these tokens; empty where there are none
  Span segment_span;
  int first_row, end_row;  // of columns
  int first_column;        // in a row of shared memory
  int first_x;             // where that is, in segment 0

  __device__ __forceinline__ int token_y(int half) const { return RANK > 1 ? y + half : 0; }
  __device__ __forceinline__ int token_x(int row) const { return RANK > 1 ? x + row % 8 : x + row; }

  // False, for the whole warp, if the unit has no tokens.
  __device__ __forceinline__ bool locate(const BlockTile& tile, int index) {
    const int* n = tile.map.n;
    x = tile.at[2] + index % UNITS_X * UNIT_X, index /= UNITS_X;
    y = tile.at[1] + (RANK > 1 ? index % UNITS_Y * UNIT_Y : 0);
    z = RANK > 2 ? tile.at[0] + index / UNITS_Y : 0;
    // A tile's last units may lie beyond it, where its size is no multiple of theirs.
    const int end_y = min(tile.at[1] + TILE_Y, n[1]), end_x = min(tile.at[2] + TILE_X, n[2]);
    if ((RANK > 2 && z >= min(tile.at[0] + TILE_Z, n[0])) || (RANK > 1 && y >= end_y) || x >= end_x) return false;
    z_span = columns_z(z, n[0]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int sy = token_y(half), sx = token_x(lane_index() / 4 + 8 * half);
      y_span[half] = RANK < 2 || sy < end_y ? columns_y(sy, n[1]) : Span{0, 0};
      x_span[half] = sx < end_x ? columns_x(sx, n[2]) : Span{0, 0};
      is_there[half] = (RANK < 2 || sy < end_y) && sx < end_x;
    }
    const Span ys = {columns_y(y, n[1]).first, columns_y(min(y + UNIT_Y, end_y) - 1, n[1]).end};
    const Span xs = {columns_x(x, n[2]).first, columns_x(min(x + UNIT_X, end_x) - 1, n[2]).end};
    if (IS_SEGMENTED) {
      segment_span = {(xs.first - tile.x.first) / COLUMNS, (xs.end - 1 - tile.x.first) / COLUMNS + 1};
      first_column = 0;
    } else {
      segment_span = {0, 1};
      first_column = min(xs.first - tile.x.first, COLUMNS - UNIT_COLUMNS);
    }
    first_x = tile.x.first + first_column;
    first_row = tile.row_of({z_span.first, ys.first, segment_span.first});
    end_row = tile.row_of({z_span.end - 1, ys.end - 1, segment_span.end - 1}) + 1;
    return true;
  }
  __device__ __forceinline__ bool sees(const Place& at, int half) const {
    return (RANK < 3 || z_span.holds(at.z)) && (RANK < 2 || y_span[half].holds(at.y)) &&
           (!IS_SEGMENTED || segment_span.holds(at.segment));
  }
};

// This thread's rows of a tensor that belongs to the unit's tokens: lane / 4 of each half; null where there is no token.
template <class T>
struct UnitRows {
  T* row[2];

  __device__ __forceinline__ UnitRows(const Rows<T>& rows, const Unit& unit) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      row[half] = unit.is_there[half]
                      ? rows.at(unit.z, unit.token_y(half), unit.token_x(lane_index() / 4 + 8 * half))
                      : nullptr;
  }
  // Fragment A of a step of 16 elements (8 in the last if head_dim is odd in that).
  __device__ __forceinline__ void fragment(int step, unsigned (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int item = step * 16 + i / 2 * 8 + lane_index() % 4 * 2;
      const bool is_there = item < HEAD_DIM && row[i % 2];
      a[i] = is_there ? *reinterpret_cast<const unsigned*>(row[i % 2] + item) : 0u;
    }
  }
};

// Fragments of all steps, kept if that costs few registers.
struct Fragments {
  static constexpr bool IS_KEPT = HEAD_DIM <= 64;
  UnitRows<const Storage> rows;
  unsigned kept[IS_KEPT ? STEPS : 1][4];

  __device__ __forceinline__ Fragments(const Rows<const Storage>& tensor, const Unit& unit) : rows(tensor, unit) {
    if (IS_KEPT)
#pragma unroll
      for (int step = 0; step < STEPS; ++step) rows.fragment(step, kept[IS_KEPT ? step : 0]);
  }
  __device__ __forceinline__ void get(int step, unsigned (&a)[4]) const {
    if (!IS_KEPT) return rows.fragment(step, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = kept[IS_KEPT ? step : 0][i];
  }
};

// out[16][8 * ROW_BLOCKS] = the unit's rows times a row of columns that begins at `token`.
__device__ __forceinline__ void multiply_columns(const Fragments& left, const char* columns, int token,
                                        float (&out)[ROW_BLOCKS][4]) {
  const int lane = lane_index();
#pragma unroll
  for (int block = 0; block < ROW_BLOCKS; ++block)
#pragma unroll
    for (int i = 0; i < 4; ++i) out[block][i] = 0;
  token += lane % 8;
  const int exchange = swizzle(token);
#pragma unroll
  for (int piece = 0; piece < PIECES; piece += 4) {
    unsigned a[2][4];
    left.get(piece / 2, a[0]);
    if (piece + 2 < PIECES) left.get(piece / 2 + 1, a[1]);
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block) {
      const char* row = columns + (token + 8 * block) * (PITCH * 16);
      unsigned b[4];
      if (piece + 4 <= PIECES) {
        load_matrices<4, false>(b, row + ((piece + lane / 8) ^ exchange) * 16);
        multiply_add<Element, 16>(out[block], a[0], b);
        multiply_add<Element, 16>(out[block], a[1], b + 2);
        continue;
      }
      if (piece + 2 <= PIECES) {
        load_matrices<2, false>(b, row + ((piece + lane / 8 % 2) ^ exchange) * 16);
        multiply_add<Element, 16>(out[block], a[0], b);
      }
      if (PIECES % 2) {
        constexpr int LAST = PIECES - 1;
        load_matrices<1, false>(b, row + (LAST ^ exchange) * 16);
        multiply_add<Element, 8>(out[block], a[LAST % 4 / 2], b);
      }
    }
  }
}

// sum[16][8 * SLICE] += weights[16][16], two blocks of a chunk, times the columns of these blocks; `token` is this lane's
// column, that of block 0 for lanes 0 to 7 and 16 to 23, of block 1 for the others.
__device__ __forceinline__ void add_columns(const unsigned (&weights)[4], const char* columns, int token, int first_piece,
                                   float (&sum)[SLICE][4]) {
  const int lane = lane_index(), exchange = swizzle(token);
  const char* row = columns + token * (PITCH * 16);
#pragma unroll
  for (int i = 0; i < SLICE; i += 2) {
    if (SLICES > 1 && first_piece + i >= PIECES) break;
    unsigned b[4];
    if (i + 1 < SLICE && (PIECES % SLICE == 0 || first_piece + i + 1 < PIECES)) {
      load_matrices<4, true>(b, row + ((first_piece + i + lane / 16) ^ exchange) * 16);
      multiply_add<Element, 16>(sum[i], weights, b);
      multiply_add<Element, 16>(sum[i + 1 < SLICE ? i + 1 : i], weights, b + 2);
    } else {
      load_matrices<2, true>(b, row + ((first_piece + i) ^ exchange) * 16);
      multiply_add<Element, 16>(sum[i], weights, b);
    }
  }
}

// Two blocks of a chunk as the left operand of add_columns.
__device__ __forceinline__ void pack_blocks(const float (&one)[4], const float (&two)[4], unsigned (&a)[4]) {
  a[0] = pack(one[0], one[1]), a[1] = pack(one[2], one[3]), a[2] = pack(two[0], two[1]), a[3] = pack(two[2], two[3]);
}

// Writes a unit's result, by way of the warp's shared memory so that each thread writes 16 bytes.
__device__ __forceinline__ void store_unit(const float (&sum)[SLICE][4], const float (&factor)[2], const Rows<Storage>& to,
                                  const Unit& unit, const BlockTile& tile, int first_piece, char* shared) {
  const int lane = lane_index();
  unsigned* words = reinterpret_cast<unsigned*>(shared);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < SLICE; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      words[(lane / 4 + 8 * half) * (SLICE + 1) * 4 + i * 4 + lane % 4] =
          pack(sum[i][2 * half] * factor[half], sum[i][2 * half + 1] * factor[half]);
  __syncwarp();
  const int end_y = min(tile.at[1] + TILE_Y, tile.map.n[1]), end_x = min(tile.at[2] + TILE_X, tile.map.n[2]);
  for (int i = lane; i < 16 * SLICE; i += 32) {
    const int row = i / SLICE, piece = i % SLICE, y = unit.token_y(row / 8), x = unit.token_x(row);
    if (y >= end_y || x >= end_x || first_piece + piece >= PIECES) continue;
    *reinterpret_cast<uint4*>(to.at(unit.z, y, x) + (first_piece + piece) * 8) =
        reinterpret_cast<const uint4*>(shared)[row * (SLICE + 1) + piece];
  }
  __syncwarp();
}

// ---------------------------------------------------------------------------------------------------------------------
// Bias and windows
// ---------------------------------------------------------------------------------------------------------------------

// The bias table of a head times log2(e), with its margins.
__device__ __forceinline__ void copy_table(const Params& p, int head, char* shared) {
  float* table = reinterpret_cast<float*>(shared + TABLE_AT);
  if (TABLE_BYTES)
    for (int i = threadIdx.x; i < TABLE_BYTES / 4; i += TILE_THREADS) {
      const int entry = i - MARGIN;
      table[i] = entry >= 0 && entry < TABLE ? p.rpb[head * static_cast<long long>(TABLE) + entry] * LOG2_E : 0.f;
    }
}

// What is added to the logits of a unit: bias where a column is in the window, else minus infinity. Rows of columns come
// one after another; on maps of several axes the second half sees, of the table, what the first saw a row before.
class UnitBias {
 public:
  __device__ __forceinline__ UnitBias(const Params& p, int head, const char* shared, const Unit& unit)
      : unit_(unit), shared_(reinterpret_cast<const float*>(shared + TABLE_AT) + MARGIN),
        table_(HAS_RPB ? p.rpb + head * static_cast<long long>(TABLE) : nullptr) {
    if (!IS_SEGMENTED) mask_columns(0);
  }

  // Where a row of columns begins in the table, for the first half.
  __device__ __forceinline__ int entry_of_row(const Place& at) const {
    const int row_z = RANK > 2 ? SIGN * (at.z - unit_.z) + KERNEL_Z - 1 : 0;
    const int row_y = RANK > 1 ? SIGN * (at.y - unit_.y) + KERNEL_Y - 1 : 0;
    return (row_z * TABLE_Y + row_y) * TABLE_X;
  }
  // The same for its first column and the unit's first token.
  __device__ __forceinline__ int entry_of_corner(int segment) const {
    return SIGN * (unit_.first_x + segment * COLUMNS - unit_.x) + KERNEL_X - 1;
  }

  __device__ __forceinline__ void get(const Place& at, float (&bias)[ROW_BLOCKS][4]) {
    if (IS_SEGMENTED) mask_columns(at.segment);
    if (!HAS_RPB) {
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 4; ++i) bias[i / 4][i % 4] = mask_[i / 4][RANK > 1 ? i % 2 : i % 4];
      return;
    }
    const int row = entry_of_row(at);
    const int corner = entry_of_corner(at.segment) + SIGN * (lane_index() % 4 * 2 - lane_index() / 4);
    if (RANK == 1) {
      float line[ROW_BLOCKS + 1][2];
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 2 + 2; ++i) line[i / 2][i % 2] = entry(corner + SIGN * (i / 2 * 8 - 8 + i % 2));
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 4; ++i)
        bias[i / 4][i % 4] = line[i / 4 + 1 - i % 4 / 2][i % 2] + mask_[i / 4][RANK > 1 ? i % 2 : i % 4];
      return;
    }
    const int row_before = row - SIGN * TABLE_X;
    if (held_ != row_before || IS_SEGMENTED) load(row_before + corner);
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * 2; ++i) bias[i / 2][2 + i % 2] = before_[i / 2][i % 2];
    load(row + corner);
    held_ = row;
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * 2; ++i) bias[i / 2][i % 2] = before_[i / 2][i % 2];
  }

 private:
  const Unit& unit_;
  const float *shared_, *table_;
  float mask_[ROW_BLOCKS][RANK > 1 ? 2 : 4], before_[ROW_BLOCKS][2];
  int held_ = -(1 << 30);

  __device__ __forceinline__ void mask_columns(int segment) {
    const int x = unit_.first_x + segment * COLUMNS + lane_index() % 4 * 2;
    // On maps of several axes both halves have the same x; where only the second has tokens there is no unit.
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * (RANK > 1 ? 2 : 4); ++i) {
      const int block = RANK > 1 ? i / 2 : i / 4, item = RANK > 1 ? i % 2 : i % 4;
      mask_[block][item] = unit_.x_span[item / 2].holds(x + block * 8 + item % 2) ? 0.f : minus_infinity();
    }
  }
  __device__ __forceinline__ float entry(int index) const {
    if (TABLE_BYTES) return shared_[index];
    return table_[min(max(index, 0), TABLE - 1)] * LOG2_E;
  }
  __device__ __forceinline__ void load(int index) {
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * 2; ++i)
      before_[i / 2][i % 2] = entry(index + SIGN * (i / 2 * 8 + i % 2)) + mask_[i / 2][i % 2];
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The walk: stages of columns, units, chunks of rows
// ---------------------------------------------------------------------------------------------------------------------

// A chunk: CHUNK_ROWS rows of columns, of which some may not matter to the unit. Little of it is kept in registers.
class Chunk {
 public:
  __device__ __forceinline__ Chunk(const BlockTile& tile, const Unit& unit, int first, int end, int stage_first)
      : tile_(tile), first_(first), last_(min(CHUNK_ROWS, end - first) - 1), seen_(0),
        token_((first - stage_first) * COLUMNS + unit.first_column) {
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (r <= last_ && unit.sees(place(r), half)) seen_ |= 1u << (2 * r + half);
  }
  __device__ __forceinline__ Place place(int r) const { return tile_.place(first_ + min(r, last_)); }
  // Where the unit's columns of a row begin in shared memory.
  __device__ __forceinline__ int token(int r) const { return token_ + min(r, last_) * COLUMNS; }
  __device__ __forceinline__ bool is_seen(int r, int half) const { return seen_ >> (2 * r + half) & 1; }
  __device__ __forceinline__ bool is_used(int r) const { return seen_ >> (2 * r) & 3; }
  // Whether any column of blocks 2 * pair and the next is in use, and this lane's column of them for add_columns.
  __device__ __forceinline__ bool is_pair_used(int pair) const {
    return is_used(2 * pair / ROW_BLOCKS) || is_used((2 * pair + 1) / ROW_BLOCKS);
  }
  __device__ __forceinline__ int pair_token(int pair) const {
    const int one = 2 * pair, two = one + 1;
    const int first = token(one / ROW_BLOCKS) + one % ROW_BLOCKS * 8;
    const int second = token(two / ROW_BLOCKS) + two % ROW_BLOCKS * 8;
    return (lane_index() / 8 % 2 ? second : first) + lane_index() % 8;
  }

 private:
  const BlockTile& tile_;
  int first_, last_;
  unsigned seen_;
  int token_;
};
static_assert(CHUNK_ROWS <= 16, "a bit for each half of a row");

// Makes a Work of each unit of this warp, by make(unit); calls its add(chunk, buffer) for each chunk of the unit's columns,
// and finish(). copy(first_row, buffer) brings a stage of columns to shared memory.
template <class Work, class Copy, class Make>
__device__ __forceinline__ void walk(const BlockTile& tile, char* shared, Copy copy, Make make) {
  const int stages = IS_STAGED ? (tile.rows + STAGE_ROWS - 1) / STAGE_ROWS : 1;
  copy(0, shared);
#pragma unroll 1
  for (int round = 0; round < ROUNDS; ++round) {
    Unit unit{};
    const int index = round * WARPS + warp_index();
    const bool has_unit = index < UNITS && unit.locate(tile, index);
    if (!IS_STAGED) {
      if (round == 0) wait_copies<0>(), __syncthreads();
      if (!has_unit) continue;
      Work work = make(unit);
#pragma unroll 1
      for (int row = unit.first_row; row < unit.end_row; row += CHUNK_ROWS)
        work.add(Chunk(tile, unit, row, unit.end_row, 0), shared);
      work.finish();
      continue;
    }
    if (!has_unit) unit.first_row = unit.end_row = 0;
    Work work = make(unit);
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      char* buffer = shared + stage % BUFFERS * BUFFER_BYTES;
      if (stage + 1 < stages) {
        copy((stage + 1) * STAGE_ROWS, shared + (stage + 1) % BUFFERS * BUFFER_BYTES);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
      const int first = max(unit.first_row, stage * STAGE_ROWS), end = min(unit.end_row, (stage + 1) * STAGE_ROWS);
#pragma unroll 1
      for (int row = first; row < end; row += CHUNK_ROWS)
        work.add(Chunk(tile, unit, row, end, stage * STAGE_ROWS), buffer);
      __syncthreads();
    }
    if (has_unit) work.finish();
  }
}

}  // namespace natten
