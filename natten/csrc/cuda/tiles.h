// Shared code of the kernels with matrix instructions.
//
// Tile: the tokens of one submap that a block processes. These are queries; for the gradients of keys and values, keys.
// Columns: the union of the tokens that they attend to (or that attend to them). Shared memory holds the columns.
// Unit: the tokens that a warp processes at a time, in lines of 8 on the last axis. With several axes the lines are
//   consecutive rows of the map, otherwise they follow each other. All tokens of a line have the same position on the first
//   two axes, so the whole warp agrees on whether a row of columns is in the windows of a line. Two lines are the rows of a
//   matrix fragment: line 0 is rows 0 to 7 of the first, line 1 its rows 8 to 15. A unit has one or two matrices, which
//   share the operands that are read from shared memory.
//
// Compile-time parameters in addition to those of problem.h. natten/backends/cuda/__init__.py defines those of unfused attention:
// LEFT and RIGHT, or ROWS and WEIGHTS, the tensors that a kernel reads, and RESULT, which it writes (TensorName). tiles.py
// chooses the others:
//   TILE_Z, TILE_Y, TILE_X  tokens per tile, along each axis
//   MATRICES                matrices of 16 tokens per unit
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
//   SLOTS_PITCH             unfused attention: bytes from one token's weights to the next in shared memory (slots.h), if the
//                           tokens are adjacent in global memory
#pragma once

#include "problem.h"

#ifndef IS_INVERSE
#define IS_INVERSE 0  // whether the block's tokens are keys
#endif
#ifndef HAS_GRADIENT
#define HAS_GRADIENT 0  // whether the kernel computes the gradient of rpb
#endif
#ifndef IS_UNFUSED
#define IS_UNFUSED 0  // whether the kernel reads or writes weights in global memory, for columns of one tensor
#endif
#ifndef HAS_RESULTS
#define HAS_RESULTS 1  // whether results have rows of head_dim
#endif

namespace natten {

// Elements of a row in shared memory and of a row of results: room for either head_dim. What is beyond a head_dim is zero.
constexpr int DIM = ((HEAD_DIM > VALUE_DIM ? HEAD_DIM : VALUE_DIM) + 7) / 8 * 8;
static_assert(DIM <= 256, "head_dim must be at most 256");
static_assert(COLUMNS % 8 == 0 && UNIT_COLUMNS % 8 == 0, "COLUMNS and UNIT_COLUMNS must be multiples of 8");

constexpr int TILE_THREADS = WARPS * 32;
constexpr int LINES = 2 * MATRICES;
constexpr int UNIT_Y = RANK > 1 ? LINES : 1, UNIT_X = RANK > 1 ? 8 : 8 * LINES;
constexpr int UNITS_Y = TILE_Y / UNIT_Y, UNITS_X = TILE_X / UNIT_X;
static_assert(TILE_Y % UNIT_Y == 0 && TILE_X % UNIT_X == 0, "units must fill a tile");
constexpr int UNITS = TILE_Z * UNITS_Y * UNITS_X;
static_assert(!IS_STAGED || UNITS <= WARPS, "with stages, each warp has at most one unit");

constexpr int PIECE = 16 / sizeof(Storage), PIECES = DIM / PIECE;  // elements per 16 bytes, and such pieces per row
static_assert(PIECE == 8 || PIECES % 2 == 0, "multiply_columns does not round the operands of a single piece");
constexpr int QUADS = (PIECES + 3) / 4;  // groups of 4 pieces; the last one may have fewer
// Blocks of 8 elements per row of results, and how many of them this thread block computes.
constexpr int RESULT_BLOCKS = DIM / 8, SLICE = (RESULT_BLOCKS + SLICES - 1) / SLICES;
constexpr int ROW_BLOCKS = UNIT_COLUMNS / 8;     // blocks of 8 columns per row
constexpr int BLOCKS = CHUNK_ROWS * ROW_BLOCKS;  // and per chunk

// ---------------------------------------------------------------------------------------------------------------------
// Layout of shared memory: columns, bias, gradient of the bias, scratch memory of each warp, base addresses of tensors
// ---------------------------------------------------------------------------------------------------------------------

constexpr int PITCH = PIECES;  // distance between columns, in pieces
// Rows of pieces are adjacent, COUNT pieces per row. Pieces are swizzled, so that each of these accesses uses a bank once:
// - 8 consecutive pieces
// - the same piece of 8 rows, except in TF32
// - 4 pieces of 2 rows, if COUNT is a multiple of 4
// - in TF32, 2 pieces of 4 rows at a distance of 2
// An odd COUNT distributes rows by itself.
template <int COUNT>
__device__ __forceinline__ int swizzle(int row) {
  if (COUNT % 2) return 0;
  if (COUNT % 4) return (row >> 2 & 1) * (Element::IS_TFLOAT ? 3 : 1);
  if (Element::IS_TFLOAT) return (row & 6) ^ (COUNT % 8 ? 0 : (row & 1) << 2);
  return ((row & 1) << 2 | (row & 2) | (row >> 2 & 1)) & (COUNT % 8 ? 3 : 7);
}
// Where a piece of a row is, in pieces after row 0. Rows may be counted from any multiple of 8.
template <int COUNT>
__device__ __forceinline__ int place_of(int row, int piece) {
  return (row * COUNT + piece) ^ swizzle<COUNT>(row);
}

constexpr int STAGE_TOKENS = STAGE_ROWS * COLUMNS;
constexpr int BUFFERS = IS_STAGED ? 2 : 1;
constexpr int COLUMN_BYTES = STAGE_TOKENS * PITCH * 16 + GUARD;
constexpr bool INVERSE = IS_INVERSE;
constexpr int SIGN = INVERSE ? -1 : 1;  // the bias index uses key - query = SIGN * (column - token)
constexpr int COLUMN_TENSORS = IS_UNFUSED ? 1 : 2;
#if IS_UNFUSED
constexpr int SLOT_BYTES = 2, SLOT_PIECES = (WINDOW * SLOT_BYTES + 16 - SLOT_BYTES + 15) / 16;  // that a token may touch
constexpr int LOOSE_PITCH = SLOT_PIECES * 16;  // if the tokens are not adjacent
__host__ __device__ constexpr int slots_bytes(int tokens) {
  const int adjacent = (tokens * SLOTS_PITCH + 16 + 15) / 16 * 16, loose = tokens * LOOSE_PITCH;
  return adjacent > loose ? adjacent : loose;
}
#else
__host__ __device__ constexpr int slots_bytes(int) { return 0; }
#endif
// What the columns have if they are queries: logsumexp of all, then minus delta of all; unfused: their weights.
constexpr int QUERIES_BYTES = !INVERSE ? 0 : GUARD + (IS_UNFUSED ? STAGE_ROWS * slots_bytes(COLUMNS) : STAGE_TOKENS * 8);
constexpr int BUFFER_BYTES = COLUMN_TENSORS * COLUMN_BYTES + QUERIES_BYTES;

constexpr int TABLE_ROWS = TABLE_Z * TABLE_Y;
constexpr int FRAGMENTS_PER_ROW = RANK > 1 ? 1 : LINES;  // on one axis, lines have different positions in a row
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
constexpr int DIAGONAL_BLOCKS = ROW_BLOCKS + (RANK > 1 ? 0 : LINES - 1);
constexpr int DIAGONAL_PITCH = (DIAGONAL_BLOCKS * 8 + 16 + 31) / 32 * 32 + 8;
constexpr int STORE_BYTES = HAS_RESULTS && sizeof(Storage) == 2 ? 8 * LINES * SLICE * 16 : 0;
constexpr int DIAGONAL_BYTES = HAS_GRADIENT && !HAS_GRADIENT_FRAGMENTS ? 8 * DIAGONAL_PITCH * 4 : 0;
constexpr int SLOTS_AT = STORE_BYTES > DIAGONAL_BYTES ? STORE_BYTES : DIAGONAL_BYTES;
constexpr int SLOTS_BYTES = INVERSE ? 0 : LINES * slots_bytes(8);
constexpr int WARP_BYTES = SLOTS_AT + SLOTS_BYTES + GUARD;
constexpr int BIAS_AT = BUFFERS * BUFFER_BYTES, GRADIENT_AT = BIAS_AT + BIAS_BYTES + GUARD;
constexpr int WARPS_AT = GRADIENT_AT + GRADIENT_BYTES + GUARD, BASES_AT = WARPS_AT + WARPS * WARP_BYTES;
constexpr int GUARDS = BUFFERS * (COLUMN_TENSORS + INVERSE) + 2 + WARPS;
static_assert(SHARED_BYTES == BASES_AT + 128 - GUARDS * GUARD && TENSORS <= 16, "tiles.py computes another size of shared memory");
static_assert(!IS_SEGMENTED || !(HAS_BIAS_FRAGMENTS || HAS_GRADIENT_FRAGMENTS), "fragments need rows without segments");
static_assert(BIAS_AT % 16 == 0 && GRADIENT_AT % 16 == 0 && WARPS_AT % 16 == 0 && BASES_AT % 16 == 0,
              "vector accesses need an alignment of 16 bytes");
#ifdef NATTEN_EMULATION
static const emulation::Guards guards(BASES_AT + 128, [](int at) {
  const auto ends = [](int offset, int bytes) { return offset % bytes >= bytes - GUARD; };
  if (at < BIAS_AT) {
    at %= BUFFER_BYTES;
    constexpr int END = COLUMN_TENSORS * COLUMN_BYTES;
    return at < END ? ends(at, COLUMN_BYTES) : ends(at - END, QUERIES_BYTES);
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
// Rows of tensors, of SIZE elements: HEAD_DIM or VALUE_DIM
// ---------------------------------------------------------------------------------------------------------------------

// Bytes that all rows are aligned to; the caller of the kernels takes care of that.
template <int SIZE>
constexpr int ALIGNMENT = SIZE * sizeof(Storage) % 16 == 0  ? 16
                          : SIZE * sizeof(Storage) % 8 == 0 ? 8
                          : SIZE * sizeof(Storage) % 4 == 0 ? 4
                                                            : 2;
constexpr int WORD = 4 / sizeof(Storage);  // elements per word

// Loads the word of a row that begins with an element. Elements beyond the row are zero.
template <int SIZE>
__device__ __forceinline__ unsigned load_word(const Storage* row, int element) {
  if constexpr (ALIGNMENT<SIZE> >= 4) return element < SIZE ? *reinterpret_cast<const unsigned*>(row + element) : 0;
  const unsigned low = element < SIZE ? static_cast<unsigned>(row[element]) : 0;
  const unsigned high = element + 1 < SIZE ? static_cast<unsigned>(row[element + 1]) : 0;
  return low | high << 16;
}

// Writes a word of a row, without what is beyond the row.
template <int SIZE>
__device__ __forceinline__ void store_word(Storage* row, int element, unsigned word) {
  if constexpr (ALIGNMENT<SIZE> >= 4) {
    if (element < SIZE) *reinterpret_cast<unsigned*>(row + element) = word;
  } else {
    if (element < SIZE) row[element] = static_cast<Storage>(word);
    if (element + 1 < SIZE) row[element + 1] = static_cast<Storage>(word >> 16);
  }
}

// Copies 16 bytes of a row, which begin with an element, to shared memory, and zeros for what is beyond the row.
// Asynchronously, unless the alignment is too small for that.
template <int SIZE>
__device__ __forceinline__ void copy_piece(char* to, const char* from, int element, bool is_there) {
  constexpr int BYTES = ALIGNMENT<SIZE>;
  if constexpr (BYTES < 4) {
    const Storage* row = reinterpret_cast<const Storage*>(from) - element;
    unsigned words[4] = {};
    if (is_there)
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = load_word<SIZE>(row, element + i * WORD);
    *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
  } else {
#pragma unroll
    for (int i = 0; i < 16; i += BYTES)
      copy_async<BYTES>(to + i, from + i, is_there && (SIZE == DIM || element + i / 4 * WORD < SIZE));
  }
}

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

// Copies a stage of columns of two tensors, with HEAD_DIM and VALUE_DIM elements (unfused: of the first), asynchronously, and
// zeros where there are none. A thread copies the same piece of each of its rows.
__device__ __forceinline__ void copy_columns(const Rows<const Storage>& one, const Rows<const Storage>& two,
                                             const BlockTile& tile, int first_row, char* buffer) {
  constexpr int ROW_PIECES = COLUMNS * PIECES, ROW_THREADS = ROW_PIECES < TILE_THREADS ? ROW_PIECES : TILE_THREADS;
  constexpr int ROWS_AT_ONCE = TILE_THREADS / ROW_THREADS;
  constexpr bool IS_STEADY = RANK < 3 && !IS_SEGMENTED;  // whether the distance between rows is constant
  const int first = threadIdx.x / ROW_THREADS;
  for (int i = threadIdx.x % ROW_THREADS; i < ROW_PIECES && first < ROWS_AT_ONCE; i += ROW_THREADS) {
    const int piece = i % PIECES, column = i / PIECES;
    char* to = buffer + (first * COLUMNS * PITCH + place_of<PITCH>(column, piece)) * 16;
    const char *from_one, *from_two;
    int x;
    const auto go_to = [&](int row) {
      const Place at = tile.place(row);
      x = tile.first_x + at.segment * COLUMNS + column;
      from_one = reinterpret_cast<const char*>(one.at(at.z, at.y, x)) + piece * 16;
      from_two = reinterpret_cast<const char*>(two.at(at.z, at.y, x)) + piece * 16;
    };
    go_to(first_row + first);
#pragma unroll 4
    for (int row = first; row < STAGE_ROWS; row += ROWS_AT_ONCE, to += ROWS_AT_ONCE * COLUMNS * PITCH * 16) {
      if (!IS_STEADY) go_to(first_row + row);
      const bool is_there = first_row + row < tile.rows && tile.x.holds(x);
      copy_piece<HEAD_DIM>(to, from_one, piece * PIECE, is_there);
      if (COLUMN_TENSORS > 1) copy_piece<VALUE_DIM>(to + COLUMN_BYTES, from_two, piece * PIECE, is_there);
      if (IS_STEADY) from_one += ROWS_AT_ONCE * one.step[1], from_two += ROWS_AT_ONCE * two.step[1];
    }
  }
}

}  // namespace natten
