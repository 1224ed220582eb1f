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

// With several axes, the table row of a row of columns for the second half is that of the previous row of columns for the
// first half. Both are added up here before they are added to the sums. Sums is the derived class, with the method
// add_line(line, table row, corner).
template <class Sums>
class HeldRow {
 public:
  // Adds the gradients of a row of columns. `row`: its table row for the first half; `corner`: the entry in that row for
  // the first column and token.
  __device__ __forceinline__ void add(int row, int corner, const float (&grad)[ROW_BLOCKS][4]) {
    if (held_ != row - 1 || corner_ != corner) flush();
    float line[ROW_BLOCKS][2];
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * 2; ++i) {
      line[i / 2][i % 2] = grad[i / 2][2 + i % 2] + before_[i / 2][i % 2];
      before_[i / 2][i % 2] = grad[i / 2][i % 2];
    }
    static_cast<Sums*>(this)->add_line(line, row - 1, corner);
    held_ = row, corner_ = corner;
  }
  // Adds what the first half contributes to the last row.
  __device__ __forceinline__ void flush() {
    if (held_ != NOTHING) static_cast<Sums*>(this)->add_line(before_, held_, corner_);
    held_ = NOTHING;
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * 2; ++i) before_[i / 2][i % 2] = 0;
  }

 private:
  static constexpr int NOTHING = -(1 << 30);
  float before_[ROW_BLOCKS][2] = {};
  int held_ = NOTHING, corner_ = 0;
};

// Sums the gradient as fragments, one per table row. Their diagonals are summed once at the end.
class FragmentGradient : public HeldRow<FragmentGradient> {
 public:
  __device__ __forceinline__ FragmentGradient(float* sums, char*) : sums_(sums) {}

  __device__ __forceinline__ void add(int row, int, const float (&grad)[ROW_BLOCKS][4]) {
    if (RANK > 1) return HeldRow::add(row, 0, grad);  // all corners are equal
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float line[ROW_BLOCKS][2];
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 2; ++i) line[i / 2][i % 2] = grad[i / 2][2 * half + i % 2];
      add_line(line, half, 0);
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
      for (int half = 0; half < FRAGMENTS_PER_ROW; ++half)
        for (int token = 0; token < 8; ++token) {
          const int column = first + token + 8 * half;
          if (column < 0 || column >= UNIT_COLUMNS) continue;
          const int place = fragment_place(column / 8, token * 4 + column % 8 / 2) + column % 2;
          for (int warp = 0; warp < WARPS; ++warp)
            sum += sums[(warp * GRADIENT_FRAGMENTS + row * FRAGMENTS_PER_ROW + half) * (FRAGMENT_BYTES / 4) + place];
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
class DiagonalGradient : public HeldRow<DiagonalGradient> {
 public:
  __device__ __forceinline__ DiagonalGradient(float* table, char* scratch)
      : table_(table), scratch_(reinterpret_cast<float*>(scratch)) {
    if (!HAS_GRADIENT) return;
    for (int i = lane_index(); i < 8 * DIAGONAL_PITCH; i += 32) scratch_[i] = 0;
    __syncwarp();
  }

  __device__ __forceinline__ void add(int row, int corner, const float (&grad)[ROW_BLOCKS][4]) {
    if (RANK > 1) return HeldRow::add(row, corner, grad);
    float line[DIAGONAL_BLOCKS][2];  // relative to its tokens, the columns of the second half are shifted by 8
#pragma unroll
    for (int i = 0; i < DIAGONAL_BLOCKS * 2; ++i) {
      const int block = i / 2, item = i % 2;
      line[block][item] = (block > 0 ? grad[block > 0 ? block - 1 : 0][item] : 0.f) +
                          (block < ROW_BLOCKS ? grad[block < ROW_BLOCKS ? block : 0][2 + item] : 0.f);
    }
    add_line(line, row, corner - 8);
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
