// Fused attention, backward, second part, with matrix instructions: the gradients of keys and values. The tokens of a tile
// are keys, and its columns are the queries that attend to them.
#define IS_INVERSE 1
#include "walk.h"

namespace natten {

struct DifferentiateKey {
  const Params& p;
  const BlockTile& tile;
  const Unit& unit;
  char* shared;
  int first_block;
  Fragments key, value;
  UnitBias bias;
  float scale, grad_key[SLICE][4], grad_value[SLICE][4];  // scale: includes log2(e), for exp2

  __device__ __forceinline__ DifferentiateKey(const Params& p, const BlockTile& tile, const Unit& unit, char* shared,
                                              int slice)
      : p(p), tile(tile), unit(unit), shared(shared), first_block(slice * SLICE),
        key(rows_of<const Storage>(p, KEY, shared), unit), value(rows_of<const Storage>(p, VALUE, shared), unit),
        bias(p, tile, unit, shared), scale(p.scale * LOG2_E) {
#pragma unroll
    for (int i = 0; i < SLICE * 4; ++i) grad_key[i / 4][i % 4] = grad_value[i / 4][i % 4] = 0;
  }

  __device__ __forceinline__ void add(const Chunk& chunk) {
    float weights[CHUNK_ROWS][ROW_BLOCKS][4], grads[CHUNK_ROWS][ROW_BLOCKS][4];
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      bias.get(chunk, r, weights[r]);
      multiply_columns(key, chunk.columns(0, r), weights[r]);
      float2 query[ROW_BLOCKS * 2];
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 2; ++i) {
        query[i] = chunk.statistics(r)[i / 2 * 8 + lane_index() % 4 * 2 + i % 2];
        grads[r][i / 2][i % 2] = grads[r][i / 2][2 + i % 2] = -query[i].y;
      }
      multiply_columns(value, chunk.columns(1, r), grads[r]);
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 4; ++i) {
        float& weight = weights[r][i / 4][i % 4];
        weight = exp2_fast(weight * scale - query[i / 4 * 2 + i % 2].x);
        grads[r][i / 4][i % 4] *= weight;
      }
    }
    add_chunk_columns(weights, chunk.columns(1), first_block, grad_value);
    add_chunk_columns(grads, chunk.columns(0), first_block, grad_key);
  }

  __device__ __forceinline__ void finish() {
    char* scratch = shared + WARPS_AT + warp_index() * WARP_BYTES;
    store_unit(grad_key, {p.scale, p.scale}, rows_of<Storage>(p, GRAD_KEY, shared), unit, tile, first_block, scratch);
    store_unit(grad_value, {1.f, 1.f}, rows_of<Storage>(p, GRAD_VALUE, shared), unit, tile, first_block, scratch);
  }
};

// Copies logsumexp * log2(e) and delta of the queries of a stage to shared memory.
__device__ __forceinline__ void copy_statistics(const Rows<const float>& lse, const Rows<const float>& delta,
                                                const BlockTile& tile, int first_row, char* buffer) {
  float2* statistics = reinterpret_cast<float2*>(buffer + 2 * COLUMN_BYTES);
  for (int token = threadIdx.x; token < STAGE_TOKENS; token += TILE_THREADS) {
    const int row = first_row + token / COLUMNS;
    const Place at = tile.place(row);
    const int x = tile.first_x + at.segment * COLUMNS + token % COLUMNS;
    const bool is_there = row < tile.rows && tile.x.holds(x);
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
      p, tile, shared, false,
      [&](int row, char* buffer) {
        const auto queries = rows_of<const Storage>(p, QUERY, shared), grads = rows_of<const Storage>(p, GRAD_OUT, shared);
        copy_columns(queries, grads, tile, row, buffer);
        copy_statistics(rows_of<const float>(p, LSE, shared), rows_of<const float>(p, DELTA, shared), tile, row, buffer);
      },
      [&](const Unit& unit) { return DifferentiateKey(p, tile, unit, shared, slice); });
}
