// The gradient of rpb. The gradient of a table entry is the sum of the gradients of logits over all pairs that use the
// entry, which form diagonals in the matrix of tokens and columns. Each warp sums its units, and the block sums its warps.
#pragma once

#include "bias.h"

namespace natten {

// The position of a lane's two numbers of a block in a fragment of 8 tokens by UNIT_COLUMNS columns. The numbers of two
// blocks are adjacent, so that a thread reads 16 bytes at a time.
__device__ __forceinline__ int fragment_place(int block, int lane) {
  const bool is_last = block == ROW_BLOCKS - 1 && ROW_BLOCKS % 2;
  return is_last ? block * 64 + lane * 2 : block / 2 * 128 + lane * 4 + block % 2 * 2;
}
__device__ __forceinline__ void load_fragment(const float* from, float (&to)[ROW_BLOCKS][2]) {
#pragma unroll
  for (int block = 0; block < ROW_BLOCKS; ++block) {
    if (block % 2 == 0 && block + 1 < ROW_BLOCKS) {
      const float4 four = *reinterpret_cast<const float4*>(from + fragment_place(block, lane_index()));
      to[block][0] = four.x, to[block][1] = four.y, to[block + 1][0] = four.z, to[block + 1][1] = four.w;
    } else if (block % 2 == 0) {
      const float2 two = *reinterpret_cast<const float2*>(from + fragment_place(block, lane_index()));
      to[block][0] = two.x, to[block][1] = two.y;
    }
  }
}

__device__ __forceinline__ void store_fragment(const float (&from)[ROW_BLOCKS][2], float* to) {
#pragma unroll
  for (int block = 0; block < ROW_BLOCKS; ++block) {
    float* place = to + fragment_place(block, lane_index());
    if (block % 2 == 0 && block + 1 < ROW_BLOCKS)
      *reinterpret_cast<float4*>(place) = {from[block][0], from[block][1], from[block + 1][0], from[block + 1][1]};
    else if (block % 2 == 0)
      *reinterpret_cast<float2*>(place) = {from[block][0], from[block][1]};
  }
}

// With several axes, the table row of a row of columns for a line is that of the previous row of columns for the previous
// line. What the lines contribute to a table row is added up here before it is added to the sums. Sums is the derived
// class, with the method add_line(line, table row, corner).
template <class Sums>
class HeldRows {
 public:
  // Adds row r of a chunk. `row`: its table row for the first line; `corner`: the entry in that row for the first column
  // and token. A table row is complete after the last line.
  template <class AnyChunk>
  __device__ __forceinline__ void add(const AnyChunk& chunk, int r, int row, int corner, const Products& grad) {
    if (!AnyChunk::IS_REGULAR && (held_ != row - 1 || corner_ != corner)) flush();
#pragma unroll
    for (int line = LINES - 1; line >= 0; --line) {
      if (!chunk.may_see(r, line)) continue;
      float sum[ROW_BLOCKS][2];
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 2; ++i) {
        const float before = line > 0 ? before_[line > 0 ? line - 1 : 0][i / 2][i % 2] : 0.f;
        sum[i / 2][i % 2] = grad[line / 2][r][i / 2][line % 2 * 2 + i % 2] + before;
        if (line < LINES - 1) before_[line < LINES - 1 ? line : 0][i / 2][i % 2] = sum[i / 2][i % 2];
      }
      if (line == LINES - 1) static_cast<Sums*>(this)->add_line(sum, row - line, corner);
    }
    held_ = AnyChunk::IS_REGULAR ? NOTHING : row, corner_ = corner;
  }
  // Adds what the first lines contribute to the last rows.
  __device__ __forceinline__ void flush() {
#pragma unroll
    for (int line = 0; line < LINES - 1; ++line) {
      if (held_ != NOTHING) static_cast<Sums*>(this)->add_line(before_[line], held_ - line, corner_);
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 2; ++i) before_[line][i / 2][i % 2] = 0;
    }
    held_ = NOTHING;
  }

 private:
  static constexpr int NOTHING = -(1 << 30);
  float before_[LINES - 1][ROW_BLOCKS][2] = {};  // of the previous lines, for the table row that the next line adds to
  int held_ = NOTHING, corner_ = 0;
};

// Sums the gradient as fragments, one per table row. Their diagonals are summed once at the end.
class FragmentGradient : public HeldRows<FragmentGradient> {
 public:
  __device__ __forceinline__ FragmentGradient(float* sums, char*) : sums_(sums) {}

  template <class AnyChunk>
  __device__ __forceinline__ void add(const AnyChunk& chunk, int r, int row, int, const Products& grad) {
    if (RANK > 1) return HeldRows::add(chunk, r, row, 0, grad);  // all corners are equal
#pragma unroll
    for (int line = 0; line < LINES; ++line) {
      float found[ROW_BLOCKS][2];
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 2; ++i) found[i / 2][i % 2] = grad[line / 2][r][i / 2][line % 2 * 2 + i % 2];
      add_line(found, line, 0);
    }
  }
  // Rows outside the table only receive zeros.
  __device__ __forceinline__ void add_line(const float (&line)[ROW_BLOCKS][2], int row, int) {
    float* to = sums_ + min(max(row, 0), GRADIENT_FRAGMENTS - 1) * (FRAGMENT_BYTES / 4);
    float sum[ROW_BLOCKS][2];
    load_fragment(to, sum);
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * 2; ++i) sum[i / 2][i % 2] += line[i / 2][i % 2];
    store_fragment(sum, to);
  }

  // Sums the diagonals over all warps, with all threads of the block.
  static __device__ __forceinline__ void sum_diagonals(const float* sums, float* out) {
    for (int i = threadIdx.x; i < TABLE; i += TILE_THREADS) {
      const int row = i / TABLE_X, first = i % TABLE_X - (KERNEL_X - 1) + REACH;
      float sum = 0;
      for (int line = 0; line < FRAGMENTS_PER_ROW; ++line)
        for (int token = 0; token < 8; ++token) {
          const int column = first + token + 8 * line;
          if (column < 0 || column >= UNIT_COLUMNS) continue;
          const int place = fragment_place(column / 8, token * 4 + column % 8 / 2) + column % 2;
          for (int warp = 0; warp < WARPS; ++warp)
            sum += sums[(warp * GRADIENT_FRAGMENTS + row * FRAGMENTS_PER_ROW + line) * (FRAGMENT_BYTES / 4) + place];
        }
      out[i] = sum;
    }
  }

 private:
  float* sums_;
};

static_assert(!HAS_GRADIENT || HAS_GRADIENT_FRAGMENTS || GRADIENT_TABLES == WARPS || WARPS == 1,
              "each warp needs a table");

// Sums the diagonals of each row and adds them to a table. Used if fragments are too large, or if rows have segments.
class DiagonalGradient : public HeldRows<DiagonalGradient> {
 public:
  __device__ __forceinline__ DiagonalGradient(float* table, char* scratch)
      : table_(table), scratch_(reinterpret_cast<float*>(scratch)) {
    if (!HAS_GRADIENT) return;
    for (int i = lane_index(); i < 8 * DIAGONAL_PITCH; i += 32) scratch_[i] = 0;
    __syncwarp();
  }

  template <class AnyChunk>
  __device__ __forceinline__ void add(const AnyChunk& chunk, int r, int row, int corner, const Products& grad) {
    if (RANK > 1) return HeldRows::add(chunk, r, row, corner, grad);
    float sum[DIAGONAL_BLOCKS][2] = {};  // relative to its tokens, the columns of each line are shifted by 8
#pragma unroll
    for (int line = 0; line < LINES; ++line)
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 2; ++i)
        sum[(LINES - 1 - line + i / 2) % DIAGONAL_BLOCKS][i % 2] += grad[line / 2][r][i / 2][line % 2 * 2 + i % 2];
    add_line(sum, row, corner - 8 * (LINES - 1));
  }

  // line: this thread's part of 8 tokens by columns, as in a fragment. Entries outside the table only receive zeros.
  template <int LINE_BLOCKS>
  __device__ __forceinline__ void add_line(const float (&line)[LINE_BLOCKS][2], int row, int corner) {
    if (row < 0 || row >= TABLE_ROWS) return;
    const int lane = lane_index();
#pragma unroll
    for (int block = 0; block < LINE_BLOCKS; ++block)
      *reinterpret_cast<float2*>(scratch_ + lane / 4 * DIAGONAL_PITCH + 8 + block * 8 + lane % 4 * 2) = {
          line[block][0], line[block][1]};
    __syncwarp();
#pragma unroll
    for (int first = 0; first < DIAGONAL_BLOCKS * 8 + 7; first += 32) {
      const int diagonal = first + lane, entry = corner + diagonal - 7;
      if (diagonal >= DIAGONAL_BLOCKS * 8 + 7 || entry < 0 || entry >= TABLE_X) continue;
      float sum = 0;
#pragma unroll
      for (int token = 0; token < 8; ++token) sum += scratch_[token * DIAGONAL_PITCH + diagonal + 1 + token];
      table_[row * TABLE_X + entry] += sum;  // no other warp uses this table
    }
    __syncwarp();
  }

 private:
  float *table_, *scratch_;
};

#if HAS_GRADIENT_FRAGMENTS
using UnitGradient = FragmentGradient;
#else
using UnitGradient = DiagonalGradient;
#endif

// The gradient of rpb over all pieces of a block, in shared memory or, if it is too large, in the result itself.
class BlockGradient {
 public:
  __device__ __forceinline__ BlockGradient(const Params& p, int head, int part, int slice, char* shared)
      : out_(p.partial_rpb + (head * static_cast<long long>(p.parts) + part) * TABLE),
        tables_(reinterpret_cast<float*>(shared + GRADIENT_AT)) {
    if (!HAS_GRADIENT || slice) return;
    if (GRADIENT_BYTES == 0) tables_ = out_;
    const int count = GRADIENT_BYTES == 0 ? TABLE : GRADIENT_BYTES / 4;
    for (int i = threadIdx.x; i < count; i += TILE_THREADS) tables_[i] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ float* of_warp() const { return tables_ + warp_index() * STRIDE; }
  __device__ __forceinline__ void finish() const {
    __syncthreads();
    if (!HAS_GRADIENT || GRADIENT_BYTES == 0) return;
    if (HAS_GRADIENT_FRAGMENTS) return FragmentGradient::sum_diagonals(tables_, out_);
    for (int i = threadIdx.x; i < TABLE; i += TILE_THREADS) {
      float sum = tables_[i];
      for (int table = 1; table < GRADIENT_TABLES; ++table) sum += tables_[table * TABLE_STRIDE + i];
      out_[i] = sum;
    }
  }

 private:
  static constexpr int STRIDE = HAS_GRADIENT_FRAGMENTS ? GRADIENT_FRAGMENTS * FRAGMENT_BYTES / 4
                                : GRADIENT_TABLES > 1  ? TABLE_STRIDE
                                                       : 0;
  float *out_, *tables_;
};

}  // namespace natten
