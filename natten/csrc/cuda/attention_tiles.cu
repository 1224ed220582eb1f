// Fused attention, forward, with matrix instructions: FlashAttention (arXiv:2205.14135) on tiles of a map, as in "Faster
// Neighborhood Attention" (arXiv:2403.04690), but with a bias, and skipping columns outside all windows.
#include "walk.h"

namespace natten {

// Less than any logit. Not minus infinity, so that the weight of a logit of minus infinity is zero.
constexpr float LOWEST_BASE = -3e38f;
// Weights remain below 2^MAX_EXPONENT, which float16 can represent.
constexpr float MAX_EXPONENT = 8;

struct Attend {
  const Params& p;
  const BlockTile& tile;
  const Unit& unit;
  char* shared;
  int first_block;
  Fragments<HEAD_DIM> query;
  UnitBias bias;
  float scale;  // includes log2(e), for exp2
  float base[LINES], total[LINES];  // weights are 2^(logit * scale - base)
  Sums sum;

  __device__ __forceinline__ Attend(const Params& p, const BlockTile& tile, const Unit& unit, char* shared, int slice)
      : p(p), tile(tile), unit(unit), shared(shared), first_block(slice * SLICE),
        query(rows_of<const Storage>(p, QUERY, shared), unit), bias(p, tile, unit, shared), scale(p.scale * LOG2_E) {
#pragma unroll
    for (int line = 0; line < LINES; ++line) base[line] = LOWEST_BASE, total[line] = 0;
    clear(sum);
  }

  template <class AnyChunk>
  __device__ __forceinline__ void add(const AnyChunk& chunk) {
    Products weights;
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      bias.get(chunk, r, weights);
      multiply_columns(query, chunk, 0, r, weights);
    }
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
      if (!chunk.is_used_by(m)) continue;
      raise_base(chunk, weights, 2 * m);
      weigh_line(chunk, weights, 2 * m), weigh_line(chunk, weights, 2 * m + 1);
    }
    add_chunk_columns(weights, chunk, 1, first_block, sum);
  }

  // Raises the base of two lines to the largest logit if logits exceed it by too much, and rescales the previous sums.
  template <class AnyChunk>
  __device__ __forceinline__ void raise_base(const AnyChunk& chunk, const Products& logits, int first_line) {
    float largest[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS * 2; ++i) {
      const int half = i % 2, r = i / 2 / (2 * ROW_BLOCKS);
      if (chunk.may_see(r, first_line + half))
        largest[half] = max(largest[half], item(logits, r, i / 2 % (2 * ROW_BLOCKS), first_line + half));
    }
    const bool exceeds = largest[0] * scale > base[first_line] + MAX_EXPONENT ||
                         largest[1] * scale > base[first_line + 1] + MAX_EXPONENT;
    if (!chunk.is_first_of(first_line / 2) && __builtin_expect(!__any_sync(~0u, exceeds), true)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int line = first_line + half;
      float highest = max(largest[half] * scale, base[line]);
      highest = max(highest, __shfl_xor_sync(~0u, highest, 1));
      highest = max(highest, __shfl_xor_sync(~0u, highest, 2));
      const float factor = exp2_fast(base[line] - highest);
      base[line] = highest;
      if (chunk.is_first_of(first_line / 2)) continue;  // the sums are zero
      total[line] *= factor;
#pragma unroll
      for (int i = 0; i < SLICE * 2; ++i) sum[line / 2][i / 2][line % 2 * 2 + i % 2] *= factor;
    }
  }

  // Converts the logits of a line to weights.
  template <class AnyChunk>
  __device__ __forceinline__ void weigh_line(const AnyChunk& chunk, Products& products, int line) {
#pragma unroll
    for (int i = 0; i < BLOCKS * 2; ++i) {
      const int r = i / (2 * ROW_BLOCKS);
      float& weight = item(products, r, i % (2 * ROW_BLOCKS), line);
      weight = chunk.may_see(r, line) ? exp2_fast(weight * scale - base[line]) : 0.f;
      total[line] += weight;
    }
  }
  template <class AnyProducts>
  static __device__ __forceinline__ auto& item(AnyProducts& products, int r, int column, int line) {
    return products[line / 2][r][column / 2][line % 2 * 2 + column % 2];
  }

  __device__ __forceinline__ void finish() {
    float factor[LINES];
    const UnitRows<float> lse(rows_of<float>(p, LSE, shared), unit);
#pragma unroll
    for (int line = 0; line < LINES; ++line) {
      total[line] += __shfl_xor_sync(~0u, total[line], 1);
      total[line] += __shfl_xor_sync(~0u, total[line], 2);
      factor[line] = reciprocal_fast(total[line]);
      if (first_block == 0 && lane_index() % 4 == 0 && unit.is_there[line])
        *lse.row[line] = (base[line] + log2_fast(total[line])) * LN_2;
    }
    store_unit<VALUE_DIM>(sum, factor, rows_of<Storage>(p, OUT, shared), unit, tile, first_block,
                          scratch_of_warp(shared));
  }
};

}  // namespace natten

NATTEN_KERNEL(natten_attention_tiles, natten::TILE_THREADS, MIN_BLOCKS) {
  using namespace natten;
  NATTEN_SHARED_MEMORY(shared);
  const int head = blockIdx.x % p.heads, slice = blockIdx.x / p.heads % SLICES;
  BlockTile tile;
  if (!tile.locate(p, blockIdx.x / p.heads / SLICES, head)) return;
  copy_table(p, head, shared);
  walk<Attend>(
      p, tile, shared, false,
      [&](int row, char* buffer) {
        const auto keys = rows_of<const Storage>(p, KEY, shared), values = rows_of<const Storage>(p, VALUE, shared);
        copy_columns(keys, values, tile, row, buffer);
        commit_copies();
      },
      [&](const Unit& unit) { return Attend(p, tile, unit, shared, slice); });
}
