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
  Fragments<HEAD_DIM> key;
  Fragments<VALUE_DIM> value;
  UnitBias bias;
  float scale;  // includes log2(e), for exp2
  Sums grad_key, grad_value;

  __device__ __forceinline__ DifferentiateKey(const Params& p, const BlockTile& tile, const Unit& unit, char* shared,
                                              int slice)
      : p(p), tile(tile), unit(unit), shared(shared), first_block(slice * SLICE),
        key(rows_of<const Storage>(p, KEY, shared), unit), value(rows_of<const Storage>(p, VALUE, shared), unit),
        bias(p, tile, unit, shared), scale(p.scale * LOG2_E) {
    clear(grad_key), clear(grad_value);
  }

  template <class AnyChunk>
  __device__ __forceinline__ void add(const AnyChunk& chunk) {
    Products weights, grads;
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      bias.get(chunk, r, weights);
      multiply_columns(key, chunk, 0, r, weights);
      float lse[ROW_BLOCKS][2];  // of this lane's queries, times log2(e)
#pragma unroll
      for (int block = 0; block < ROW_BLOCKS; ++block) {
        const int first = block * 8 + lane_index() % 4 * 2;
        const float2 two = load_pair(chunk.statistics(0, r) + first);
        lse[block][0] = two.x * LOG2_E, lse[block][1] = two.y * LOG2_E;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 delta = load_pair(chunk.statistics(1, r) + first);
#pragma unroll
          for (int m = 0; m < MATRICES; ++m)
            grads[m][r][block][2 * half] = delta.x, grads[m][r][block][2 * half + 1] = delta.y;
        }
      }
      multiply_columns(value, chunk, 1, r, grads);
#pragma unroll
      for (int i = 0; i < MATRICES * ROW_BLOCKS * 4; ++i) {
        const int m = i / 4 / ROW_BLOCKS, block = i / 4 % ROW_BLOCKS, line = 2 * m + i % 4 / 2;
        float &weight = weights[m][r][block][i % 4], &grad = grads[m][r][block][i % 4];
        const bool is_used = chunk.may_see(r, line);
        weight = is_used ? exp2_fast(weight * scale - lse[block][i % 2]) : 0.f;
        grad = is_used ? grad * weight : 0.f;
      }
    }
    add_chunk_columns(weights, chunk, 1, first_block, grad_value);
    add_chunk_columns(grads, chunk, 0, first_block, grad_key);
  }

  __device__ __forceinline__ void finish() {
    char* scratch = scratch_of_warp(shared);
    float factor[LINES];
#pragma unroll
    for (int line = 0; line < LINES; ++line) factor[line] = p.scale;
    store_unit<HEAD_DIM>(grad_key, factor, rows_of<Storage>(p, GRAD_KEY, shared), unit, tile, first_block, scratch);
    store_unit<VALUE_DIM>(grad_value, rows_of<Storage>(p, GRAD_VALUE, shared), unit, tile, first_block, scratch);
  }
};

// Copies logsumexp and minus delta of the queries of a stage asynchronously, and zeros where there are none.
__device__ __forceinline__ void copy_statistics(const Rows<const float>& lse, const Rows<const float>& delta,
                                                const BlockTile& tile, int first_row, char* buffer) {
  float* statistics = reinterpret_cast<float*>(buffer + COLUMN_TENSORS * COLUMN_BYTES);
  for (int token = threadIdx.x; token < STAGE_TOKENS; token += TILE_THREADS) {
    const int row = first_row + token / COLUMNS;
    const Place at = tile.place(row);
    const int x = tile.first_x + at.segment * COLUMNS + token % COLUMNS;
    const bool is_there = row < tile.rows && tile.x.holds(x);
    copy_async<4>(statistics + token, lse.at(at.z, at.y, x), is_there);
    copy_async<4>(statistics + STAGE_TOKENS + token, delta.at(at.z, at.y, x), is_there);
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
        commit_copies();
      },
      [&](const Unit& unit) { return DifferentiateKey(p, tile, unit, shared, slice); });
}
