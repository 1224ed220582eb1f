// Fused attention, forward, with matrix instructions: flash attention (arXiv:2205.14135) on tiles of a map, as in
// "Faster Neighborhood Attention" (arXiv:2403.04690); here with bias, and with columns skipped that no window holds.
#include "tiles.h"

namespace natten {

struct Attend {
  const Params& p;
  const BlockTile& tile;
  const Unit& unit;
  char* shared;
  int first_piece;
  Fragments query;
  UnitBias bias;
  float top[2], total[2], sum[SLICE][4];

  __device__ __forceinline__ Attend(const Params& p, const BlockTile& tile, const Unit& unit, char* shared, int slice)
      : p(p), tile(tile), unit(unit), shared(shared), first_piece(slice * SLICE),
        query(Rows<const Storage>(p, QUERY, tile.map), unit), bias(p, tile.map.head, shared, unit) {
    top[0] = top[1] = minus_infinity();
    total[0] = total[1] = 0;
#pragma unroll
    for (int i = 0; i < SLICE * 4; ++i) sum[i / 4][i % 4] = 0;
  }

  // Logits in units of log(2).
  __device__ __forceinline__ void multiply(const Chunk& chunk, const char* keys, float (&logits)[BLOCKS][4]) {
    const float scale = p.scale * LOG2_E;
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      if (!chunk.is_used(r)) {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * 4; ++i) logits[r * ROW_BLOCKS + i / 4][i % 4] = minus_infinity();
        continue;
      }
      float products[ROW_BLOCKS][4], biases[ROW_BLOCKS][4];
      multiply_columns(query, keys, chunk.token(r), products);
      bias.get(chunk.place(r), biases);
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 4; ++i) {
        const float logit = products[i / 4][i % 4] * scale + biases[i / 4][i % 4];
        logits[r * ROW_BLOCKS + i / 4][i % 4] = chunk.is_seen(r, i % 4 / 2) ? logit : minus_infinity();
      }
    }
  }

  // Logits become weights relative to the largest so far, which those before must follow.
  __device__ __forceinline__ void weigh(float (&logits)[BLOCKS][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = top[half];
#pragma unroll
      for (int i = 0; i < BLOCKS * 2; ++i) largest = max(largest, logits[i / 2][2 * half + i % 2]);
      largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
      const float base = largest == minus_infinity() ? 0.f : largest, factor = exp2_fast(top[half] - base);
      top[half] = largest;
      float added = 0;
#pragma unroll
      for (int i = 0; i < BLOCKS * 2; ++i) {
        float& weight = logits[i / 2][2 * half + i % 2];
        weight = exp2_fast(weight - base);
        added += weight;
      }
      total[half] = total[half] * factor + added;
#pragma unroll
      for (int i = 0; i < SLICE * 2; ++i) sum[i / 2][2 * half + i % 2] *= factor;
    }
  }

  __device__ __forceinline__ void add(const Chunk& chunk, const char* buffer) {
    float weights[BLOCKS][4];
    multiply(chunk, buffer, weights);
    weigh(weights);
#pragma unroll
    for (int pair = 0; pair < BLOCKS / 2; ++pair) {
      if (!chunk.is_pair_used(pair)) continue;
      unsigned a[4];
      pack_blocks(weights[2 * pair], weights[2 * pair + 1], a);
      add_columns(a, buffer + COLUMN_BYTES, chunk.pair_token(pair), first_piece, sum);
    }
  }

  __device__ __forceinline__ void finish() {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(~0u, total[half], 1);
      total[half] += __shfl_xor_sync(~0u, total[half], 2);
      factor[half] = 1 / total[half];
    }
    const UnitRows<float> lse(Rows<float>(p, LSE, tile.map), unit);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (first_piece == 0 && lane_index() % 4 == 0 && unit.is_there[half])
        *lse.row[half] = (top[half] + log2_fast(total[half])) * LN_2;
    store_unit(sum, factor, Rows<Storage>(p, OUT, tile.map), unit, tile, first_piece,
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
      tile, shared, [&](int row, char* buffer) { copy_columns(p, tile, row, KEY, VALUE, buffer); },
      [&](const Unit& unit) { return Attend(p, tile, unit, shared, slice); });
}
