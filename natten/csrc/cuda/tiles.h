// Shared code of the kernels with matrix instructions.
//
// Tile: the tokens of one submap that a block processes. These are queries; for the gradients of keys and values, keys.
// Columns: the union of the tokens that they attend to (or that attend to them). Shared memory holds the columns.
// Unit: the 16 tokens that a warp processes at a time: two rows of 8 on the last two axes, or 16 in a line. Its first
//   half is rows 0 to 7 of a matrix fragment, its second half rows 8 to 15. All tokens of a half have the same position on
//   the first two axes, so the whole warp agrees on whether a row of columns is in the window of a half.
//
// Compile-time parameters in addition to those of problem.h; natten/backends/cuda/tiles.py chooses them:
//   TILE_Z, TILE_Y, TILE_X  tokens per tile, along each axis
//   COLUMNS                 tokens per row of columns in shared memory, a multiple of 8
//   UNIT_COLUMNS            tokens per row of columns that a unit reads, a multiple of 8
//   REACH                   distance from the start of a row of columns to the first token of the tile
//   IS_SEGMENTED            whether long rows are cut into segments of COLUMNS = UNIT_COLUMNS tokens
//   CHUNK_ROWS              rows that a warp processes at a time
//   STAGE_ROWS, IS_STAGED   rows in shared memory at a time; whether there may be more rows, which takes two buffers
//   WARPS, MIN_BLOCKS       warps per block; resident blocks per multiprocessor
//   SLICES                  blocks that share head_dim of the results
//   HAS_BIAS_FRAGMENTS      whether shared memory holds the bias as fragments (bias.h)
//   IS_TABLE_SHARED         without bias fragments: whether shared memory holds the bias table
//   HAS_GRADIENT_FRAGMENTS  whether each warp sums the gradient of the bias as fragments (bias_gradient.h)
//   GRADIENT_TABLES         without gradient fragments: number of gradient tables in shared memory: WARPS, or 0
//   SHARED_BYTES            total size of shared memory
#pragma once

#include "problem.h"

#ifndef IS_INVERSE
#define IS_INVERSE 0  // whether the block's tokens are keys
#endif
#ifndef HAS_GRADIENT
#define HAS_GRADIENT 0  // whether the kernel computes the gradient of rpb
#endif

namespace natten {

static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM <= 256, "head_dim must be a multiple of 8 up to 256");
static_assert(COLUMNS % 8 == 0 && UNIT_COLUMNS % 8 == 0, "COLUMNS and UNIT_COLUMNS must be multiples of 8");

constexpr int TILE_THREADS = WARPS * 32;
constexpr int UNIT_Y = RANK > 1 ? 2 : 1, UNIT_X = RANK > 1 ? 8 : 16;
constexpr int UNITS_Y = TILE_Y / UNIT_Y, UNITS_X = TILE_X / UNIT_X;
static_assert(TILE_Y % UNIT_Y == 0 && TILE_X % UNIT_X == 0, "units must fill a tile");
constexpr int UNITS = TILE_Z * UNITS_Y * UNITS_X;
static_assert(!IS_STAGED || UNITS <= WARPS, "with stages, each warp has at most one unit");

constexpr int PIECE = 16 / sizeof(Storage), PIECES = HEAD_DIM / PIECE;  // elements per 16 bytes, and such pieces per row
static_assert(PIECE == 8 || PIECES % 2 == 0, "multiply_columns does not round the operands of a single piece");
constexpr int STEPS = (PIECES + 1) / 2;  // of a product over head_dim: two pieces per step, the last may have one
// Blocks of 8 elements per row of results, and how many of them this thread block computes.
constexpr int RESULT_BLOCKS = HEAD_DIM / 8, SLICE = (RESULT_BLOCKS + SLICES - 1) / SLICES;
constexpr int ROW_BLOCKS = UNIT_COLUMNS / 8;     // blocks of 8 columns per row
constexpr int BLOCKS = CHUNK_ROWS * ROW_BLOCKS;  // and per chunk

// ---------------------------------------------------------------------------------------------------------------------
// Layout of shared memory: columns, bias, gradient of the bias, scratch memory of each warp, base addresses of tensors
// ---------------------------------------------------------------------------------------------------------------------

constexpr bool IS_POWER = (PIECES & (PIECES - 1)) == 0;
constexpr int PITCH = IS_POWER ? PIECES : PIECES | 1;  // distance between columns, in pieces
// The 8 rows of a matrix must be in different banks, wherever it begins. Either the pitch is odd, or pieces are swizzled.
constexpr int SWIZZLE_MASK = !IS_POWER ? 0 : PIECES < 8 ? PIECES - 1 : 7;
constexpr int SWIZZLE_SHIFT = !IS_POWER || PIECES >= 8 ? 0 : PIECES == 4 ? 1 : PIECES == 2 ? 2 : 3;
__device__ __forceinline__ int swizzle(int column) { return (column >> SWIZZLE_SHIFT) & SWIZZLE_MASK; }

constexpr int STAGE_TOKENS = STAGE_ROWS * COLUMNS;
constexpr int BUFFERS = IS_STAGED ? 2 : 1;
constexpr int COLUMN_BYTES = STAGE_TOKENS * PITCH * 16 + GUARD;
constexpr bool INVERSE = IS_INVERSE;
constexpr int SIGN = INVERSE ? -1 : 1;  // the bias index uses key - query = SIGN * (column - token)
constexpr int STATISTICS_BYTES = INVERSE ? STAGE_TOKENS * 8 + GUARD : 0;  // two numbers per query
constexpr int BUFFER_BYTES = 2 * COLUMN_BYTES + STATISTICS_BYTES;

constexpr int TABLE_ROWS = TABLE_Z * TABLE_Y;
constexpr int FRAGMENTS_PER_ROW = RANK > 1 ? 1 : 2;  // on one axis, the halves of a unit have different positions in a row
constexpr int FRAGMENT_BYTES = ROW_BLOCKS * 256;  // 8 tokens by UNIT_COLUMNS
constexpr int GRADIENT_FRAGMENTS = TABLE_ROWS * FRAGMENTS_PER_ROW;
constexpr int BIAS_FRAGMENTS = (HAS_RPB ? TABLE_ROWS : 1) * FRAGMENTS_PER_ROW + 1;
// For pairs outside the window, entries before and after the table may be read.
constexpr int MARGIN = 2 * UNIT_COLUMNS + 32;
constexpr int BIAS_BYTES = HAS_BIAS_FRAGMENTS         ? UNITS_X * BIAS_FRAGMENTS * FRAGMENT_BYTES
                           : HAS_RPB && IS_TABLE_SHARED ? (TABLE + 2 * MARGIN + 3) / 4 * 16
                                                        : 0;
constexpr int TABLE_STRIDE = (TABLE + 3) / 4 * 4;  // floats
constexpr int GRADIENT_BYTES =
    HAS_GRADIENT_FRAGMENTS ? WARPS * GRADIENT_FRAGMENTS * FRAGMENT_BYTES : GRADIENT_TABLES * TABLE_STRIDE * 4;
constexpr int DIAGONAL_BLOCKS = ROW_BLOCKS + (RANK == 1);
constexpr int DIAGONAL_PITCH = (DIAGONAL_BLOCKS * 8 + 16 + 31) / 32 * 32 + 8;
constexpr int STORE_BYTES = sizeof(Storage) == 2 ? 16 * (SLICE + 1) * 16 : 0;
constexpr int DIAGONAL_BYTES = HAS_GRADIENT && !HAS_GRADIENT_FRAGMENTS ? 8 * DIAGONAL_PITCH * 4 : 0;
constexpr int WARP_BYTES = (STORE_BYTES > DIAGONAL_BYTES ? STORE_BYTES : DIAGONAL_BYTES) + GUARD;
constexpr int BIAS_AT = BUFFERS * BUFFER_BYTES, GRADIENT_AT = BIAS_AT + BIAS_BYTES + GUARD;
constexpr int WARPS_AT = GRADIENT_AT + GRADIENT_BYTES + GUARD, BASES_AT = WARPS_AT + WARPS * WARP_BYTES;
constexpr int GUARDS = BUFFERS * (2 + INVERSE) + 2 + WARPS;
static_assert(SHARED_BYTES == BASES_AT + 128 - GUARDS * GUARD && TENSORS <= 16, "tiles.py computes another size of shared memory");
static_assert(!IS_SEGMENTED || !(HAS_BIAS_FRAGMENTS || HAS_GRADIENT_FRAGMENTS), "fragments need rows without segments");
static_assert(BIAS_AT % 16 == 0 && GRADIENT_AT % 16 == 0 && WARPS_AT % 16 == 0 && BASES_AT % 16 == 0,
              "vector accesses need an alignment of 16 bytes");
#ifdef NATTEN_EMULATION
static const emulation::Guards guards(BASES_AT + 128, [](int at) {
  const auto ends = [](int offset, int bytes) { return offset % bytes >= bytes - GUARD; };
  if (at < BIAS_AT) {
    at %= BUFFER_BYTES;
    return at < 2 * COLUMN_BYTES ? ends(at, COLUMN_BYTES) : ends(at - 2 * COLUMN_BYTES, STATISTICS_BYTES);
  }
  if (at < WARPS_AT) return at < GRADIENT_AT ? at >= GRADIENT_AT - GUARD : at >= WARPS_AT - GUARD;
  return at < BASES_AT && ends(at - WARPS_AT, WARP_BYTES);
});
#endif

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
  int first_x;   // position of the first token of a row of columns; may be before the map
  int segments, rows;

  __device__ __forceinline__ bool locate(const Params& p, int piece, int head) {
    map.head = head;
    if (!natten::locate(p, piece, {TILE_Z, TILE_Y, TILE_X}, map, at)) return false;
    const int *n = map.n;
    z = {columns_z(at[0], n[0]).first, columns_z(min(at[0] + TILE_Z, n[0]) - 1, n[0]).end};
    y = {columns_y(at[1], n[1]).first, columns_y(min(at[1] + TILE_Y, n[1]) - 1, n[1]).end};
    x = {columns_x(at[2], n[2]).first, columns_x(min(at[2] + TILE_X, n[2]) - 1, n[2]).end};
    first_x = IS_SEGMENTED ? x.first : at[2] - REACH;
    segments = IS_SEGMENTED ? (x.end - x.first + COLUMNS - 1) / COLUMNS : 1;
    rows = (RANK > 2 ? z.end - z.first : 1) * (RANK > 1 ? y.end - y.first : 1) * segments;
    return true;
  }
  // Returns the position of a row of columns.
  __device__ __forceinline__ Place place(int row) const {
    if (RANK == 1) return {0, 0, IS_SEGMENTED ? row : 0};
    const int segment = IS_SEGMENTED ? row % segments : 0;
    if (IS_SEGMENTED) row /= segments;
    if (RANK == 2) return {0, y.first + row, segment};
    const int height = y.end - y.first;
    return {z.first + row / height, y.first + row % height, segment};
  }
  // Returns where the columns of the unit with first token `x` begin in a row. This is the largest possible multiple of
  // 8. With gradient fragments it is the same distance before the unit for all units.
  __device__ __forceinline__ int first_column(int x) const {
    return HAS_GRADIENT_FRAGMENTS ? x - at[2] : (columns_x(x, map.n[2]).first - first_x) / 8 * 8;
  }
  __device__ __forceinline__ int row_of(const Place& at) const {
    const int row = (RANK > 2 ? (at.z - z.first) * (y.end - y.first) : 0) + (RANK > 1 ? at.y - y.first : 0);
    return IS_SEGMENTED ? row * segments + at.segment : row;
  }
};

// Computes the base address of each tensor in the submap of the tile, once per block, and stores it in shared memory.
__device__ __forceinline__ void find_bases(const Params& p, const BlockTile& tile, char* shared) {
  const int name = threadIdx.x;
  if (name >= TENSORS) return;
  const bool is_float = name == LSE || name == GRAD_LSE || name == DELTA;
  reinterpret_cast<char**>(shared + BASES_AT)[name] = base_of(p.tensors[name], tile.map, is_float ? 4 : sizeof(Storage));
}
template <class T>
__device__ __forceinline__ Rows<T> rows_of(const Params& p, TensorName name, const char* shared) {
  return Rows<T>(p, name, to_global(reinterpret_cast<char* const*>(shared + BASES_AT)[name]));
}

// Copies a stage of columns of two tensors asynchronously, and zeros where there are none. A thread copies the same piece
// of each of its rows.
__device__ __forceinline__ void copy_columns(const Rows<const Storage>& one, const Rows<const Storage>& two,
                                             const BlockTile& tile, int first_row, char* buffer) {
  constexpr int LINE = COLUMNS * PIECES, LINE_THREADS = LINE < TILE_THREADS ? LINE : TILE_THREADS;
  constexpr int LINES = TILE_THREADS / LINE_THREADS;
  constexpr bool IS_STEADY = RANK < 3 && !IS_SEGMENTED;  // whether the distance between rows is constant
  const int line = threadIdx.x / LINE_THREADS;
  for (int i = threadIdx.x % LINE_THREADS; i < LINE && line < LINES; i += LINE_THREADS) {
    const int piece = i % PIECES, column = i / PIECES;
    char* to = buffer + ((line * COLUMNS + column) * PITCH + (piece ^ swizzle(column))) * 16;
    const char *from_one, *from_two;
    int x;
    const auto go_to = [&](int row) {
      const Place at = tile.place(row);
      x = tile.first_x + at.segment * COLUMNS + column;
      from_one = reinterpret_cast<const char*>(one.at(at.z, at.y, x)) + piece * 16;
      from_two = reinterpret_cast<const char*>(two.at(at.z, at.y, x)) + piece * 16;
    };
    go_to(first_row + line);
#pragma unroll 4
    for (int row = line; row < STAGE_ROWS; row += LINES, to += LINES * COLUMNS * PITCH * 16) {
      if (!IS_STEADY) go_to(first_row + row);
      const bool is_there = first_row + row < tile.rows && tile.x.holds(x);
      copy_async(to, from_one, is_there);
      copy_async(to + COLUMN_BYTES, from_two, is_there);
      if (IS_STEADY) from_one += LINES * one.step[1], from_two += LINES * two.step[1];
    }
  }
  commit_copies();
}

// ---------------------------------------------------------------------------------------------------------------------
// A warp's unit
// ---------------------------------------------------------------------------------------------------------------------

struct Unit {
  int z, y, x;            // first token
  bool is_there[2];       // whether this thread's tokens, one per half, exist
  int token_y[2], token_x[2];  // their positions, clamped to existing tokens
  Span z_span, y_span[2], x_span[2];  // their columns; empty for a token that does not exist
  Span segment_span;
  int first_row, end_row;  // rows of columns
  int first_column;        // in a row of shared memory, a multiple of 8
  int first_x;             // position of that column, in segment 0

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
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int sy = RANK > 1 ? y + half : 0, sx = x + lane_index() / 4 + (RANK > 1 ? 0 : 8 * half);
      y_span[half] = RANK < 2 || sy < end_y ? columns_y(sy, n[1]) : Span{0, 0};
      x_span[half] = sx < end_x ? columns_x(sx, n[2]) : Span{0, 0};
      is_there[half] = (RANK < 2 || sy < end_y) && sx < end_x;
      token_y[half] = RANK > 1 ? min(sy, end_y - 1) : 0, token_x[half] = min(sx, end_x - 1);
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
  __device__ __forceinline__ bool sees(const Place& at, int half) const {
    return (RANK < 3 || z_span.holds(at.z)) && (RANK < 2 || y_span[half].holds(at.y)) &&
           (!IS_SEGMENTED || segment_span.holds(at.segment));
  }
};

// This thread's two rows of a tensor with one row per token of the unit: row lane / 4 of each half.
template <class T>
struct UnitRows {
  T* row[2];

  __device__ __forceinline__ UnitRows(const Rows<T>& rows, const Unit& unit) {
#pragma unroll
    for (int half = 0; half < 2; ++half) row[half] = rows.at(unit.z, unit.token_y[half], unit.token_x[half]);
  }
  // Loads fragment A of one step: two pieces (the last step may have one), with 4 bytes per register.
  __device__ __forceinline__ void fragment(int step, unsigned (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int piece = step * 2 + i / 2;
      const T* from = row[i % 2] + piece * PIECE + lane_index() % 4 * (PIECE / 4);
      a[i] = piece < PIECES ? *reinterpret_cast<const unsigned*>(from) : 0u;
    }
  }
};

// Rounds registers to the format of matrix instructions.
template <int COUNT>
__device__ __forceinline__ void round_operand(unsigned (&registers)[COUNT]) {
  if constexpr (Element::IS_TFLOAT) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) registers[i] = round_to_tfloat(__uint_as_float(registers[i]));
  }
}

// Fragments of all steps. They stay in registers if they need few of them.
struct Fragments {
  static constexpr bool IS_KEPT = PIECES <= 8;
  UnitRows<const Storage> rows;
  unsigned kept[IS_KEPT ? STEPS : 1][4];

  __device__ __forceinline__ Fragments(const Rows<const Storage>& tensor, const Unit& unit) : rows(tensor, unit) {
    if (IS_KEPT)
#pragma unroll
      for (int step = 0; step < STEPS; ++step) load(step, kept[IS_KEPT ? step : 0]);
  }
  __device__ __forceinline__ void load(int step, unsigned (&a)[4]) const {
    rows.fragment(step, a);
    round_operand(a);
  }
  __device__ __forceinline__ void get(int step, unsigned (&a)[4]) const {
    if (!IS_KEPT) return load(step, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = kept[IS_KEPT ? step : 0][i];
  }
};

// sum[16][8 * ROW_BLOCKS] += the unit's rows times consecutive columns in shared memory.
__device__ __forceinline__ void multiply_columns(const Fragments& left, const char* columns, float (&sum)[ROW_BLOCKS][4]) {
  const int lane = lane_index(), exchange = swizzle(lane % 8);
  columns += lane % 8 * (PITCH * 16);
#pragma unroll
  for (int piece = 0; piece < PIECES; piece += 4) {
    unsigned a[2][4];
    left.get(piece / 2, a[0]);
    if (piece + 2 < PIECES) left.get(piece / 2 + 1, a[1]);
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block) {
      const char* row = columns + block * (8 * PITCH * 16);
      unsigned b[4];
      if (piece + 4 <= PIECES) {
        load_matrices<4, false>(b, row + ((piece + lane / 8) ^ exchange) * 16);
        round_operand(b);
        multiply_add<Element, 2 * PIECE>(sum[block], a[0], b);
        multiply_add<Element, 2 * PIECE>(sum[block], a[1], b + 2);
        continue;
      }
      if (piece + 2 <= PIECES) {
        load_matrices<2, false>(b, row + ((piece + lane / 8 % 2) ^ exchange) * 16);
        round_operand(b);
        multiply_add<Element, 2 * PIECE>(sum[block], a[0], b);
      }
      if (PIECES % 2) {  // never for float32
        constexpr int LAST = PIECES - 1;
        load_matrices<1, false>(b, row + (LAST ^ exchange) * 16);
        multiply_add<Element, PIECE>(sum[block], a[LAST % 4 / 2], b);
      }
    }
  }
}

#if ELEMENT == 3

// sum[16][8 * SLICE] += the weights of a chunk times its columns. Thread t of a row holds columns 2 t and 2 t + 1 of a
// block; in the product they are columns t and t + 4, since the order of a sum does not matter.
__device__ __forceinline__ void add_chunk_columns(const float (&weights)[CHUNK_ROWS][ROW_BLOCKS][4], const char* columns,
                                                  int first_block, float (&sum)[SLICE][4]) {
  const int column = lane_index() % 4 * 2, place = lane_index() / 4;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    const float(&w)[4] = weights[block / ROW_BLOCKS][block % ROW_BLOCKS];
    const unsigned a[4] = {round_to_tfloat(w[0]), round_to_tfloat(w[2]), round_to_tfloat(w[1]), round_to_tfloat(w[3])};
    const int first = block / ROW_BLOCKS * COLUMNS + block % ROW_BLOCKS * 8;
    const char* from = columns + (first + column) * (PITCH * 16) + place % 4 * 4;
#pragma unroll
    for (int i = 0; i < SLICE; ++i) {
      const int piece = (first_block + i) * 2 + place / 4;
      if (SLICES > 1 && piece >= PIECES) break;
      unsigned b[2];
#pragma unroll
      for (int k = 0; k < 2; ++k)
        b[k] = *reinterpret_cast<const unsigned*>(from + k * (PITCH * 16) + (piece ^ swizzle(column + k)) * 16);
      round_operand(b);
      multiply_add<Element, 8>(sum[i], a, b);
    }
  }
}

#else

// sum[16][8 * SLICE] += weights[16][8 or 16] times the columns of one or two blocks of a chunk. The first block begins at
// column FIRST, the second at FIRST + STEP.
template <int BLOCK_COUNT, int FIRST, int STEP>
__device__ __forceinline__ void add_columns(const unsigned (&weights)[4], const char* columns, int first_block,
                                            float (&sum)[SLICE][4]) {
  // A matrix is 8 columns by one piece. With two blocks, their matrices come first, then those of the next pieces.
  constexpr int AT_ONCE = 4 / BLOCK_COUNT;
  const int lane = lane_index(), exchange = swizzle(lane % 8), matrix = lane / 8;
  const char* row = columns + (FIRST + lane % 8 + matrix % BLOCK_COUNT * STEP) * (PITCH * 16);
#pragma unroll
  for (int i = 0; i < SLICE; i += AT_ONCE) {
    if (SLICES > 1 && first_block + i >= RESULT_BLOCKS) break;
    unsigned b[4];
    if (i + AT_ONCE <= SLICE && (RESULT_BLOCKS % SLICE == 0 || first_block + i + AT_ONCE <= RESULT_BLOCKS)) {
      load_matrices<4, true>(b, row + ((first_block + i + matrix / BLOCK_COUNT) ^ exchange) * 16);
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k)
        if (i + k < SLICE)
          multiply_add<Element, 8 * BLOCK_COUNT>(sum[i + k < SLICE ? i + k : 0], weights, b + k * BLOCK_COUNT);
      continue;
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      if (i + k >= SLICE || (SLICES > 1 && first_block + i + k >= RESULT_BLOCKS)) continue;
      load_matrices<BLOCK_COUNT, true>(b, row + ((first_block + i + k) ^ exchange) * 16);
      multiply_add<Element, 8 * BLOCK_COUNT>(sum[i + k < SLICE ? i + k : 0], weights, b);
    }
  }
}

// sum[16][8 * SLICE] += the weights of a chunk times its columns, beginning with block BLOCK.
template <int BLOCK = 0>
__device__ __forceinline__ void add_chunk_columns(const float (&weights)[CHUNK_ROWS][ROW_BLOCKS][4], const char* columns,
                                                  int first_block, float (&sum)[SLICE][4]) {
  constexpr int COUNT = BLOCK + 1 < BLOCKS ? 2 : 1, NEXT = BLOCK + COUNT - 1;
  constexpr int FIRST = BLOCK / ROW_BLOCKS * COLUMNS + BLOCK % ROW_BLOCKS * 8;
  constexpr int STEP = NEXT / ROW_BLOCKS * COLUMNS + NEXT % ROW_BLOCKS * 8 - FIRST;
  const float(&one)[4] = weights[BLOCK / ROW_BLOCKS][BLOCK % ROW_BLOCKS];
  const float(&two)[4] = weights[NEXT / ROW_BLOCKS][NEXT % ROW_BLOCKS];
  const unsigned a[4] = {pack(one[0], one[1]), pack(one[2], one[3]), pack(two[0], two[1]), pack(two[2], two[3])};
  add_columns<COUNT, FIRST, STEP>(a, columns, first_block, sum);
  if constexpr (BLOCK + 2 < BLOCKS) add_chunk_columns<BLOCK + 2>(weights, columns, first_block, sum);
}

#endif

#if ELEMENT == 3

// Writes a unit's result. A thread writes 8 bytes of a row, its neighbors the following bytes.
__device__ __forceinline__ void store_unit(const float (&sum)[SLICE][4], const float (&factor)[2], const Rows<Storage>& to,
                                           const Unit& unit, const BlockTile&, int first_block, char*) {
  const UnitRows<Storage> rows(to, unit);
#pragma unroll
  for (int i = 0; i < SLICE * 2; ++i) {
    const int half = i % 2, result = first_block + i / 2;
    if (!unit.is_there[half] || result >= RESULT_BLOCKS) continue;
    *reinterpret_cast<float2*>(rows.row[half] + result * 8 + lane_index() % 4 * 2) = {
        sum[i / 2][2 * half] * factor[half], sum[i / 2][2 * half + 1] * factor[half]};
  }
}

#else

// Writes a unit's result through the warp's shared memory, so that each thread writes 16 bytes.
__device__ __forceinline__ void store_unit(const float (&sum)[SLICE][4], const float (&factor)[2], const Rows<Storage>& to,
                                  const Unit& unit, const BlockTile& tile, int first_block, char* shared) {
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
#pragma unroll
  for (int first = 0; first < 16 * SLICE; first += 32) {
    const int i = first + lane, row = i / SLICE, piece = i % SLICE;
    const int y = RANK > 1 ? unit.y + row / 8 : 0, x = unit.x + (RANK > 1 ? row % 8 : row);
    if (16 * SLICE % 32 && row >= 16) continue;
    if (y >= end_y || x >= end_x || first_block + piece >= RESULT_BLOCKS) continue;
    *reinterpret_cast<uint4*>(to.at(unit.z, y, x) + (first_block + piece) * 8) =
        reinterpret_cast<const uint4*>(shared)[row * (SLICE + 1) + piece];
  }
  __syncwarp();
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Chunks of a unit's columns
// ---------------------------------------------------------------------------------------------------------------------

// CHUNK_ROWS consecutive rows of columns. The unit may not see all of them.
class Chunk {
 public:
  // The chunk begins with `row`, or earlier if the stage, rows [stage_first, stage_first + STAGE_ROWS), ends too soon.
  __device__ __forceinline__ Chunk(const BlockTile& tile, const Unit& unit, int row, int stage_first, const char* buffer)
      : tile_(tile), unit_(unit), row_(row), first_(min(row, stage_first + STAGE_ROWS - CHUNK_ROWS)),
        token_((first_ - stage_first) * COLUMNS + unit.first_column), buffer_(buffer) {}
  __device__ __forceinline__ Place place(int r) const { return tile_.place(first_ + r); }
  // Whether a half of the unit sees a row that no earlier chunk contained.
  __device__ __forceinline__ bool is_seen(int r, int half) const {
    return first_ + r >= row_ && unit_.sees(place(r), half);
  }
  __device__ __forceinline__ bool is_used() const {
    if (RANK < 3 && !IS_SEGMENTED) return true;
    bool found = false;
#pragma unroll
    for (int i = 0; i < CHUNK_ROWS * 2; ++i) found |= is_seen(i / 2, i % 2);
    return found;
  }
  // The unit's columns of row r, of the first or the second tensor.
  __device__ __forceinline__ const char* columns(int tensor, int r = 0) const {
    return buffer_ + tensor * COLUMN_BYTES + token_ * (PITCH * 16) + r * (COLUMNS * PITCH * 16);
  }
  // The two numbers of each of these columns.
  __device__ __forceinline__ const float2* statistics(int r) const {
    return reinterpret_cast<const float2*>(buffer_ + 2 * COLUMN_BYTES) + token_ + r * COLUMNS;
  }

 private:
  const BlockTile& tile_;
  const Unit& unit_;
  int row_, first_, token_;
  const char* buffer_;
};
static_assert(CHUNK_ROWS <= STAGE_ROWS, "a chunk must fit into a stage");

}  // namespace natten
