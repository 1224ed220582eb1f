// Fused attention, backward, second part, with matrix instructions: the gradients of keys and values. Here the tokens of
// a tile are keys, and their columns the queries that see them.
#define IS_INVERSE 1
#include "tiles.h"

namespace natten {

struct DifferentiateKey {
  const Params& p;
  const BlockTile& tile;
  const Unit& unit;
  char* shared;
  int first_piece;
  Fragments key, value;
  UnitBias bias;
  float grad_key[SLICE][4], grad_value[SLICE][4];

  __device__ __forceinline__ DifferentiateKey(const Params& p, const BlockTile& tile, const Unit& unit, char* shared, int slice)
      : p(p), tile(tile), unit(unit), shared(shared), first_piece(slice * SLICE),
        key(Rows<const Storage>(p, KEY, tile.map), unit), value(Rows<const Storage>(p, VALUE, tile.map), unit),
        bias(p, tile.map.head, shared, unit) {
#pragma unroll
    for (int i = 0; i < SLICE * 4; ++i) grad_key[i / 4][i % 4] = grad_value[i / 4][i % 4] = 0;
  }

  __device__ __forceinline__ void add(const Chunk& chunk, const char* buffer) {
    const float scale = p.scale * LOG2_E;
    const float2* statistics = reinterpret_cast<const float2*>(buffer + 2 * COLUMN_BYTES);
    float weights[BLOCKS][4], grads[BLOCKS][4];
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      if (!chunk.is_used(r)) {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * 4; ++i)
          weights[r * ROW_BLOCKS + i / 4][i % 4] = grads[r * ROW_BLOCKS + i / 4][i % 4] = 0;
        continue;
      }
      float products[ROW_BLOCKS][4], grad_weights[ROW_BLOCKS][4], biases[ROW_BLOCKS][4];
      multiply_columns(key, buffer, chunk.token(r), products);
      multiply_columns(value, buffer + COLUMN_BYTES, chunk.token(r), grad_weights);
      bias.get(chunk.place(r), biases);
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 2; ++i) {
        const int block = i / 2;
        const float2 query = statistics[chunk.token(r) + block * 8 + lane_index() % 4 * 2 + i % 2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int item = 2 * half + i % 2;
          const float logit = products[block][item] * scale + (biases[block][item] - query.x);
          const float weight = chunk.is_seen(r, half) ? exp2_fast(logit) : 0.f;
          weights[r * ROW_BLOCKS + block][item] = weight;
          grads[r * ROW_BLOCKS + block][item] = weight * (grad_weights[block][item] - query.y);
        }
      }
    }
#pragma unroll
    for (int pair = 0; pair < BLOCKS / 2; ++pair) {
      if (!chunk.is_pair_used(pair)) continue;
      unsigned a[4];
      pack_blocks(weights[2 * pair], weights[2 * pair + 1], a);
      add_columns(a, buffer + COLUMN_BYTES, chunk.pair_token(pair), first_piece, grad_value);
      pack_blocks(grads[2 * pair], grads[2 * pair + 1], a);
      add_columns(a, buffer, chunk.pair_token(pair), first_piece, grad_key);
    }
  }

  __device__ __forceinline__ void finish() {
    char* scratch = shared + WARPS_AT + warp_index() * WARP_BYTES;
    store_unit(grad_key, {p.scale, p.scale}, Rows<Storage>(p, GRAD_KEY, tile.map), unit, tile, first_piece, scratch);
    store_unit(grad_value, {1.f, 1.f}, Rows<Storage>(p, GRAD_VALUE, tile.map), unit, tile, first_piece, scratch);
  }
};

// Brings the logsumexp, times log2(e), and delta of a stage's queries to shared memory.
__device__ __forceinline__ void copy_statistics(const Params& p, const BlockTile& tile, int first_row, char* buffer) {
  const Rows<const float> lse(p, LSE, tile.map), delta(p, DELTA, tile.map);
  float2* statistics = reinterpret_cast<float2*>(buffer + 2 * COLUMN_BYTES);
  for (int token = threadIdx.x; token < STAGE_TOKENS; token += TILE_THREADS) {
    const int row = first_row + token / COLUMNS;
    const Place at = tile.place(row);
    const int x = tile.x.first + at.segment * COLUMNS + token % COLUMNS;
    const bool is_there = row < tile.rows && x < tile.x.end;
    statistics[token] = {is_there ? *lse.at(at.z, at.y, x) * LOG2_E : 0.f, is_there ? *delta.at(at.z, at.y, x) : 0.f};
  }
}

}  // namespace natten

NATTEN_KERNEL(natten_grad_key_value_tiles, natten::TILE_THREADS, MIN_BLOCKS) {
  using namespace natten;
  NATTEN_SHARED_MEMORY(shared);
  const int head = blockIdx.x % p.heads, slice = blockIdx.x / p.heads % SLICES;
  BlockTile tile;
  if (!tile.locate(p, blockIdx.x / p.heads / SLICES, head)) return;
  copy_table(p, head, shared);
  walk<DifferentiateKey>(
      tile, shared,
      [&](int row, char* buffer) {
        copy_columns(p, tile, row, QUERY, GRAD_OUT, buffer);
        copy_statistics(p, tile, row, buffer);
      },
      [&](const Unit& unit) { return DifferentiateKey(p, tile, unit, shared, slice); });
}
