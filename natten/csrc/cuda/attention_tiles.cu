// Fused attention, forward, with matrix instructions: FlashAttention (arXiv:2205.14135) on tiles of a map, as in "Faster
// Neighborhood Attention" (arXiv:2403.04690), but with a bias, and skipping columns outside all windows.
#include "walk.h"

namespace natten {

struct Attend {
  const Params& p;
  const BlockTile& tile;
  const Unit& unit;
  char* shared;
  int first_block;
  Fragments query;
  UnitBias bias;
  float scale, top[2], total[2], sum[SLICE][4];  // scale: includes log2(e), for exp2

  __device__ __forceinline__ Attend(const Params& p, const BlockTile& tile, const Unit& unit, char* shared, int slice)
      : p(p), tile(tile), unit(unit), shared(shared), first_block(slice * SLICE),
        query(rows_of<const Storage>(p, QUERY, shared), unit), bias(p, tile, unit, shared),
        scale(p.scale * LOG2_E) {
    top[0] = top[1] = minus_infinity();
    total[0] = total[1] = 0;
#pragma unroll
    for (int i = 0; i < SLICE * 4; ++i) sum[i / 4][i % 4] = 0;
  }

  __device__ __forceinline__ void add(const Chunk& chunk) {
    float weights[CHUNK_ROWS][ROW_BLOCKS][4];
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      bias.get(chunk, r, weights[r]);
      multiply_columns(query, chunk.columns(0, r), weights[r]);
    }
    weigh(weights);
    add_chunk_columns(weights, chunk.columns(1), first_block, sum);
  }

  // Converts logits to weights relative to the largest logit so far, and rescales the previous sums to it.
  __device__ __forceinline__ void weigh(float (&products)[CHUNK_ROWS][ROW_BLOCKS][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = top[half];
#pragma unroll
      for (int i = 0; i < BLOCKS * 2; ++i) largest = max(largest, item(products, i, half));
      largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
      const float base = largest == minus_infinity() ? 0.f : largest * scale;
      const float factor = exp2_fast(top[half] * scale - base);
      top[half] = largest;
      float added = 0;
#pragma unroll
      for (int i = 0; i < BLOCKS * 2; ++i) {
        float& weight = item(products, i, half);
        weight = exp2_fast(weight * scale - base);
        added += weight;
      }
      total[half] = total[half] * factor + added;
#pragma unroll
      for (int i = 0; i < SLICE * 2; ++i) sum[i / 2][2 * half + i % 2] *= factor;
    }
  }
  static __device__ __forceinline__ float& item(float (&products)[CHUNK_ROWS][ROW_BLOCKS][4], int i, int half) {
    return products[i / 2 / ROW_BLOCKS][i / 2 % ROW_BLOCKS][2 * half + i % 2];
  }

  __device__ __forceinline__ void finish() {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(~0u, total[half], 1);
      total[half] += __shfl_xor_sync(~0u, total[half], 2);
      factor[half] = reciprocal_fast(total[half]);
    }
    const UnitRows<float> lse(rows_of<float>(p, LSE, shared), unit);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (first_block == 0 && lane_index() % 4 == 0 && unit.is_there[half])
        *lse.row[half] = (top[half] * scale + log2_fast(total[half])) * LN_2;
    store_unit(sum, factor, rows_of<Storage>(p, OUT, shared), unit, tile, first_block,
               shared + WARPS_AT + warp_index() * WARP_BYTES);
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
      },
      [&](const Unit& unit) { return Attend(p, tile, unit, shared, slice); });
}
