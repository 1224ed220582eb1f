// Matrix products of a unit's tokens and its columns.
#pragma once

#include "unit.h"

namespace natten {

using Products = float[MATRICES][CHUNK_ROWS][ROW_BLOCKS][4];  // of a unit's tokens and a chunk's columns
using Words = unsigned[MATRICES][CHUNK_ROWS][ROW_BLOCKS][2];   // the same in 16 bits, two columns of a line per word
using Sums = float[MATRICES][SLICE][4];                        // results of a unit

__device__ __forceinline__ void clear(Sums& sum) {
#pragma unroll
  for (int i = 0; i < MATRICES * SLICE * 4; ++i) sum[i / 4 / SLICE][i / 4 % SLICE][i % 4] = 0;
}

// The scratch memory of this warp.
__device__ __forceinline__ char* scratch_of_warp(char* shared) { return shared + WARPS_AT + warp_index() * WARP_BYTES; }

// This thread's rows of a tensor with one row per token of the unit: row lane / 4 of each line.
template <class T>
struct UnitRows {
  T* row[LINES];

  __device__ __forceinline__ UnitRows(const Rows<T>& rows, const Unit& unit) {
#pragma unroll
    for (int line = 0; line < LINES; ++line) row[line] = rows.at(unit.z, unit.token_y[line], unit.token_x[line]);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Products over head_dim
// ---------------------------------------------------------------------------------------------------------------------

// A quad of 4 pieces is the operand of 2 steps of a matrix product. What remains after the last whole quad are 2 pieces for
// another step, or 1 for half a step, or both. A sum over head_dim may have any order. Therefore the words that a lane
// contributes to the fragments of a row can be adjacent in memory, if both operands are loaded like this: of each quad a lane
// takes one piece, or half a piece if there are only two. For other head_dims it takes a word of each piece.
constexpr bool TAKES_PIECES = PIECES % 4 == 0, TAKES_HALVES = PIECES == 2;
constexpr int MAX_KEPT_PIECES = 16;  // of a tensor, in the registers of a thread

// Loads this lane's words of a quad of a row in global memory.
template <int SIZE>
__device__ __forceinline__ void load_words(int quad, const Storage* row, unsigned (&words)[4]) {
  const char* from = reinterpret_cast<const char*>(row) + quad * 64;
  const int lane = lane_index() % 4;
  if (SIZE < DIM) {
    constexpr int COUNT = TAKES_HALVES ? 2 : 4, STEP = TAKES_PIECES || TAKES_HALVES ? 1 : 4;  // words, and their distance
    const int first = quad * 16 + lane * (TAKES_PIECES ? 4 : TAKES_HALVES ? 2 : 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = i < COUNT ? load_word<SIZE>(row, (first + i * STEP) * WORD) : 0;
    return;
  }
  if (TAKES_PIECES) {
    const uint4 four = *reinterpret_cast<const uint4*>(from + lane * 16);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    return;
  }
  words[0] = words[1] = words[2] = words[3] = 0;
  if (TAKES_HALVES) {
    const uint2 two = *reinterpret_cast<const uint2*>(from + lane * 8);
    words[0] = two.x, words[1] = two.y;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (4 * quad + i < PIECES) words[i] = *reinterpret_cast<const unsigned*>(from + i * 16 + lane * 4);
}

// The same, for lane / 4 of 8 columns in shared memory.
__device__ __forceinline__ void load_column_words(int quad, const char* columns, unsigned (&words)[4]) {
  const int lane = lane_index(), first = 4 * quad, rest = PIECES - first;
  const auto at = [&](int column, int piece) { return columns + place_of<PITCH>(column, piece) * 16; };
  if (TAKES_PIECES) {
    const uint4 four = *reinterpret_cast<const uint4*>(at(lane / 4, first + lane % 4));
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  } else if (TAKES_HALVES) {
    const uint2 two = *reinterpret_cast<const uint2*>(at(lane / 4, lane % 4 / 2) + lane % 2 * 8);
    words[0] = two.x, words[1] = two.y;
  } else if (rest >= 4) {
    load_matrices<4, false>(words, at(lane % 8, first + lane / 8));
  } else {
    if (rest >= 2) load_matrices<2, false>(words, at(lane % 8, first + lane / 8 % 2));
    if (rest % 2) load_matrices<1, false>(words + rest - 1, at(lane % 8, PIECES - 1));
  }
}

// sum[16][8] += the product of rows and columns over a quad. `a` holds the rows' fragments of two steps.
__device__ __forceinline__ void multiply_quad(int quad, float (&sum)[4], const unsigned (&a)[8], const unsigned (&b)[4]) {
  const int rest = PIECES - 4 * quad;
  if (rest >= 2) multiply_add<Element, 2 * PIECE>(sum, a, b);
  if (rest >= 4) multiply_add<Element, 2 * PIECE>(sum, a + 4, b + 2);
  else if (rest == 1) multiply_add<Element, PIECE>(sum, a, b);
  else if (rest == 3) multiply_add<Element, PIECE>(sum, a + 4, b + 2);
}

// Rounds registers to the format of matrix instructions.
template <int COUNT>
__device__ __forceinline__ void round_operand(unsigned (&registers)[COUNT]) {
  if constexpr (Element::IS_TFLOAT) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) registers[i] = round_to_tfloat(__uint_as_float(registers[i]));
  }
}

// The fragments of a unit's rows of a tensor, of SIZE elements. They stay in registers if they need few of them.
template <int SIZE>
struct Fragments {
  static constexpr bool IS_KEPT = PIECES * MATRICES <= MAX_KEPT_PIECES;
  UnitRows<const Storage> rows;
  unsigned kept[IS_KEPT ? MATRICES : 1][IS_KEPT ? QUADS : 1][8];

  __device__ __forceinline__ Fragments(const Rows<const Storage>& tensor, const Unit& unit) : rows(tensor, unit) {
    if (!IS_KEPT) return;
    // The compiler would rather keep words in the order of loads, and move them to the order of matrix instructions for each
    // instruction.
    const unsigned zero = unit.x >> 31;
#pragma unroll
    for (int i = 0; i < MATRICES * QUADS; ++i) {
      unsigned(&a)[8] = kept[IS_KEPT ? i / QUADS : 0][IS_KEPT ? i % QUADS : 0];
      load(i / QUADS, i % QUADS, a);
#pragma unroll
      for (unsigned& word : a) word = renew(word, zero);
    }
  }
  __device__ __forceinline__ void get(int matrix, int quad, unsigned (&a)[8]) const {
    if (!IS_KEPT) return load(matrix, quad, a);
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i] = kept[IS_KEPT ? matrix : 0][IS_KEPT ? quad : 0][i];
  }

 private:
  __device__ __forceinline__ void load(int matrix, int quad, unsigned (&a)[8]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned found[4];
      load_words<SIZE>(quad, rows.row[2 * matrix + half], found);
      round_operand(found);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[2 * i + half] = found[i];
    }
  }
};

// Adds to row r of `products` the products of the unit's rows and the columns of a tensor.
template <int SIZE, class AnyChunk>
__device__ __forceinline__ void multiply_columns(const Fragments<SIZE>& left, const AnyChunk& chunk, int tensor, int r,
                                                 Products& products) {
  const char* columns = chunk.columns(tensor, r);
#pragma unroll
  for (int quad = 0; quad < QUADS; ++quad) {
    unsigned a[MATRICES][8];
#pragma unroll
    for (int m = 0; m < MATRICES; ++m)
      if (chunk.is_seen_by(r, m)) left.get(m, quad, a[m]);
#pragma unroll
    for (int block = 0; block < ROW_BLOCKS; ++block) {
      unsigned b[4];
      load_column_words(quad, columns + block * (8 * PITCH * 16), b);
      round_operand(b);
#pragma unroll
      for (int m = 0; m < MATRICES; ++m)
        if (chunk.is_seen_by(r, m)) multiply_quad(quad, products[m][r][block], a[m], b);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Products over columns
// ---------------------------------------------------------------------------------------------------------------------

#if ELEMENT == 3

// sum += the weights of a chunk times its columns. Thread t of a row holds columns 2 t and 2 t + 1 of a block; in the
// product they are columns t and t + 4, since the order of a sum does not matter.
template <class AnyChunk>
__device__ __forceinline__ void add_chunk_columns(const Products& weights, const AnyChunk& chunk, int tensor,
                                                  int first_block, Sums& sum) {
  const int column = lane_index() % 4 * 2, place = lane_index() / 4;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    const int r = block / ROW_BLOCKS, first = block % ROW_BLOCKS * 8;
    unsigned a[MATRICES][4];
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
      const float(&w)[4] = weights[m][r][block % ROW_BLOCKS];
      a[m][0] = round_to_tfloat(w[0]), a[m][1] = round_to_tfloat(w[2]);
      a[m][2] = round_to_tfloat(w[1]), a[m][3] = round_to_tfloat(w[3]);
    }
    const char* from = chunk.columns(tensor, r) + first * (PITCH * 16) + place % 4 * 4;
#pragma unroll
    for (int i = 0; i < SLICE; ++i) {
      const int piece = (first_block + i) * 2 + place / 4;
      if (SLICES > 1 && piece >= PIECES) break;
      unsigned b[2];
#pragma unroll
      for (int k = 0; k < 2; ++k)
        b[k] = *reinterpret_cast<const unsigned*>(from + place_of<PITCH>(column + k, piece) * 16);
      round_operand(b);
#pragma unroll
      for (int m = 0; m < MATRICES; ++m)
        if (chunk.is_seen_by(r, m)) multiply_add<Element, 8>(sum[m][i], a[m], b);
    }
  }
}

#else

// The weights of a line of a matrix (0 or 1) and two columns, as an operand.
__device__ __forceinline__ unsigned operand(const Products& weights, int matrix, int r, int block, int line) {
  const float(&four)[4] = weights[matrix][r][block];
  return pack(four[2 * line], four[2 * line + 1]);
}
__device__ __forceinline__ unsigned operand(const Words& weights, int matrix, int r, int block, int line) {
  return weights[matrix][r][block][line];
}

// sum += the weights of one or two blocks of a chunk, from BLOCK on, times their columns. Weights: Products or Words.
template <int BLOCK, class Weights, class AnyChunk>
__device__ __forceinline__ void add_columns(const Weights& weights, const AnyChunk& chunk, int tensor, int first_block,
                                            Sums& sum) {
  constexpr int COUNT = BLOCK + 1 < BLOCKS ? 2 : 1, NEXT = BLOCK + COUNT - 1;
  constexpr int ROW_OF_ONE = BLOCK / ROW_BLOCKS, ROW_OF_TWO = NEXT / ROW_BLOCKS;
  constexpr int FIRST = ROW_OF_ONE * COLUMNS + BLOCK % ROW_BLOCKS * 8;
  constexpr int STEP = ROW_OF_TWO * COLUMNS + NEXT % ROW_BLOCKS * 8 - FIRST;  // from the first block to the second
  unsigned a[MATRICES][4];
#pragma unroll
  for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      a[m][line] = operand(weights, m, ROW_OF_ONE, BLOCK % ROW_BLOCKS, line);
      a[m][2 + line] = operand(weights, m, ROW_OF_TWO, NEXT % ROW_BLOCKS, line);
    }
  }
  const auto add = [&](int i, const unsigned* b) {
#pragma unroll
    for (int m = 0; m < MATRICES; ++m)
      if (chunk.is_seen_by(ROW_OF_ONE, m) || chunk.is_seen_by(ROW_OF_TWO, m))
        multiply_add<Element, 8 * COUNT>(sum[m][i < SLICE ? i : 0], a[m], b);
  };
  // A matrix is 8 columns by one piece. With two blocks, their matrices come first, then those of the next pieces.
  constexpr int AT_ONCE = 4 / COUNT;
  const int lane = lane_index(), matrix = lane / 8;
  const char* columns = chunk.columns(tensor) + (FIRST + matrix % COUNT * STEP) * (PITCH * 16);
  const auto at = [&](int piece) { return columns + place_of<PITCH>(lane % 8, piece) * 16; };
#pragma unroll
  for (int i = 0; i < SLICE; i += AT_ONCE) {
    if (SLICES > 1 && first_block + i >= RESULT_BLOCKS) break;
    unsigned b[4];
    if (i + AT_ONCE <= SLICE && (RESULT_BLOCKS % SLICE == 0 || first_block + i + AT_ONCE <= RESULT_BLOCKS)) {
      load_matrices<4, true>(b, at(first_block + i + matrix / COUNT));
#pragma unroll
      for (int k = 0; k < AT_ONCE; ++k) add(i + k, b + k * COUNT);
      continue;
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
      if (i + k >= SLICE || (SLICES > 1 && first_block + i + k >= RESULT_BLOCKS)) continue;
      load_matrices<COUNT, true>(b, at(first_block + i + k));
      add(i + k, b);
    }
  }
}

// sum += the weights of a chunk times its columns, beginning with block BLOCK.
template <int BLOCK = 0, class Weights, class AnyChunk>
__device__ __forceinline__ void add_chunk_columns(const Weights& weights, const AnyChunk& chunk, int tensor,
                                                  int first_block, Sums& sum) {
  add_columns<BLOCK>(weights, chunk, tensor, first_block, sum);
  if constexpr (BLOCK + 2 < BLOCKS) add_chunk_columns<BLOCK + 2>(weights, chunk, tensor, first_block, sum);
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Results
// ---------------------------------------------------------------------------------------------------------------------

#if ELEMENT == 3

// Writes a unit's result, with SIZE elements per row and a factor per line. A thread writes 8 bytes of a row, its neighbors
// the following bytes.
template <int SIZE>
__device__ __forceinline__ void store_unit(const Sums& sum, const float (&factor)[LINES], const Rows<Storage>& to,
                                           const Unit& unit, const BlockTile&, int first_block, char*) {
  const UnitRows<Storage> rows(to, unit);
#pragma unroll
  for (int i = 0; i < SLICE * LINES; ++i) {
    const int line = i % LINES, block = i / LINES, result = first_block + block;
    if (!unit.is_there[line] || result >= RESULT_BLOCKS) continue;
    const float(&four)[4] = sum[line / 2][block];
    const float2 two = {four[line % 2 * 2] * factor[line], four[line % 2 * 2 + 1] * factor[line]};
    const int element = result * 8 + lane_index() % 4 * 2;
    if (SIZE == DIM) {
      *reinterpret_cast<float2*>(rows.row[line] + element) = two;
    } else {
      store_word<SIZE>(rows.row[line], element, __float_as_uint(two.x));
      store_word<SIZE>(rows.row[line], element + 1, __float_as_uint(two.y));
    }
  }
}

#else

// Writes a unit's result, with SIZE elements per row and a factor per line, through the warp's shared memory, so that each
// thread writes 16 bytes.
template <int SIZE>
__device__ __forceinline__ void store_unit(const Sums& sum, const float (&factor)[LINES], const Rows<Storage>& to,
                                           const Unit& unit, const BlockTile& tile, int first_block, char* shared) {
  constexpr int COUNT = 8 * LINES * SLICE;  // pieces
  // Otherwise the compiler would compute addresses before the loop over columns, and keep them in local memory.
  const int lane = renew(lane_index(), 0);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < SLICE; ++i) {
    unsigned* to = reinterpret_cast<unsigned*>(shared) + place_of<SLICE>(lane / 4, i) * 4 + lane % 4;
#pragma unroll
    for (int line = 0; line < LINES; ++line)
      to[line * (8 * SLICE * 4)] =
          pack(sum[line / 2][i][line % 2 * 2] * factor[line], sum[line / 2][i][line % 2 * 2 + 1] * factor[line]);
  }
  __syncwarp();
  const int end_y = min(tile.at[1] + TILE_Y, tile.map.n[1]), end_x = min(tile.at[2] + TILE_X, tile.map.n[2]);
#pragma unroll
  for (int first = 0; first < COUNT; first += 32) {
    const int i = first + lane, row = i / SLICE, piece = i % SLICE;
    const int y = RANK > 1 ? unit.y + row / 8 : 0, x = unit.x + (RANK > 1 ? row % 8 : row);
    if (COUNT % 32 && i >= COUNT) continue;
    if (y >= end_y || x >= end_x || first_block + piece >= RESULT_BLOCKS) continue;
    Storage* const result = to.at(unit.z, y, x);
    const uint4 four = reinterpret_cast<const uint4*>(shared)[place_of<SLICE>(row, piece)];
    const int element = (first_block + piece) * 8;
    if (SIZE == DIM) {
      *reinterpret_cast<uint4*>(result + element) = four;
    } else {
      store_word<SIZE>(result, element, four.x), store_word<SIZE>(result, element + 2, four.y);
      store_word<SIZE>(result, element + 4, four.z), store_word<SIZE>(result, element + 6, four.w);
    }
  }
  __syncwarp();
}

#endif

// Writes a unit's result as it is.
template <int SIZE>
__device__ __forceinline__ void store_unit(const Sums& sum, const Rows<Storage>& to, const Unit& unit,
                                           const BlockTile& tile, int first_block, char* shared) {
  float one[LINES];
#pragma unroll
  for (int line = 0; line < LINES; ++line) one[line] = 1;
  store_unit<SIZE>(sum, one, to, unit, tile, first_block, shared);
}

}  // namespace natten
