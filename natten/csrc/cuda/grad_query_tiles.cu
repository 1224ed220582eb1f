// Fused attention, backward, first part, with matrix instructions: the gradients of queries and rpb, and `delta`. Delta is
// the sum over keys of each weight times its gradient. It equals out * grad_out, summed over head_dim, minus grad_lse.
#define HAS_GRADIENT HAS_RPB
#include "bias_gradient.h"
#include "walk.h"

namespace natten {

struct DifferentiateQuery {
  const Params& p;
  const BlockTile& tile;
  const Unit& unit;
  char* shared;
  int first_block;
  Fragments query, grad_out;
  UnitBias bias;
  UnitGradient gradient;
  float scale, lse[2], delta[2], sum[SLICE][4];  // scale: includes log2(e), for exp2

  __device__ __forceinline__ DifferentiateQuery(const Params& p, const BlockTile& tile, const Unit& unit, char* shared,
                                                int slice, float* table)
      : p(p), tile(tile), unit(unit), shared(shared), first_block(slice * SLICE),
        query(rows_of<const Storage>(p, QUERY, shared), unit),
        grad_out(rows_of<const Storage>(p, GRAD_OUT, shared), unit), bias(p, tile, unit, shared),
        gradient(table, scratch()), scale(p.scale * LOG2_E) {
    const UnitRows<const Storage> out(rows_of<const Storage>(p, OUT, shared), unit);
    const UnitRows<const float> given_lse(rows_of<const float>(p, LSE, shared), unit);
    const UnitRows<const float> grad_lse(rows_of<const float>(p, GRAD_LSE, shared), unit);
    const UnitRows<float> given_delta(rows_of<float>(p, DELTA, shared), unit);
    delta[0] = delta[1] = 0;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      unsigned a[4], b[4];
      out.fragment(step, a);
      if (Element::IS_TFLOAT) grad_out.rows.fragment(step, b);  // not rounded
      else grad_out.get(step, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) delta[i % 2] += dot(a[i], b[i]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[half] += __shfl_xor_sync(~0u, delta[half], 1);
      delta[half] += __shfl_xor_sync(~0u, delta[half], 2);
      lse[half] = 0;
      if (!unit.is_there[half]) continue;
      lse[half] = *given_lse.row[half] * LOG2_E;
      if (p.tensors[GRAD_LSE].data) delta[half] -= *grad_lse.row[half];
      if (first_block == 0 && lane_index() % 4 == 0) *given_delta.row[half] = delta[half];
    }
#pragma unroll
    for (int i = 0; i < SLICE * 4; ++i) sum[i / 4][i % 4] = 0;
  }

  __device__ __forceinline__ char* scratch() const { return shared + WARPS_AT + warp_index() * WARP_BYTES; }

  __device__ __forceinline__ void add(const Chunk& chunk) {
    float weights[CHUNK_ROWS][ROW_BLOCKS][4], grads[CHUNK_ROWS][ROW_BLOCKS][4];
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      bias.get(chunk, r, weights[r]);
      multiply_columns(query, chunk.columns(0, r), weights[r]);
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 4; ++i) grads[r][i / 4][i % 4] = -delta[i % 4 / 2];
      multiply_columns(grad_out, chunk.columns(1, r), grads[r]);
    }
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r)
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 4; ++i)
        grads[r][i / 4][i % 4] *= exp2_fast(weights[r][i / 4][i % 4] * scale - lse[i % 4 / 2]);
    add_chunk_columns(grads, chunk.columns(0), first_block, sum);
    // Last, because it writes to shared memory, and the compiler does not move reads before a write.
    if (HAS_GRADIENT && first_block == 0)
#pragma unroll
      for (int r = 0; r < CHUNK_ROWS; ++r) {
        const Place at = chunk.place(r);
        gradient.add(bias.table_row(at), bias.entry_of_corner(at.segment), grads[r]);
      }
  }

  __device__ __forceinline__ void finish() {
    if (HAS_GRADIENT && first_block == 0) gradient.flush();
    store_unit(sum, {p.scale, p.scale}, rows_of<Storage>(p, GRAD_QUERY, shared), unit, tile, first_block, scratch());
  }
};

}  // namespace natten

NATTEN_KERNEL(natten_grad_query_tiles, natten::TILE_THREADS, MIN_BLOCKS) {
  using namespace natten;
  NATTEN_SHARED_MEMORY(shared);
  const int head = blockIdx.x % p.heads, slice = blockIdx.x / p.heads % SLICES, part = blockIdx.x / p.heads / SLICES;
  copy_table(p, head, shared);
  const BlockGradient gradient(p, head, part, slice, shared);
  int first, end;
  share_of(p, part, first, end);
  int x = -1, n = -1;  // the position and class length that the bias fragments in shared memory belong to
  for (int piece = first; piece < end; ++piece) {
    BlockTile tile;
    if (!tile.locate(p, piece, head)) continue;
    const bool has_fragments = tile.at[2] == x && tile.map.n[2] == n;
    x = tile.at[2], n = tile.map.n[2];
    walk<DifferentiateQuery>(
        p, tile, shared, has_fragments,
        [&](int row, char* buffer) {
          const auto keys = rows_of<const Storage>(p, KEY, shared), values = rows_of<const Storage>(p, VALUE, shared);
          copy_columns(keys, values, tile, row, buffer);
        },
        [&](const Unit& unit) { return DifferentiateQuery(p, tile, unit, shared, slice, gradient.of_warp()); });
    __syncthreads();
  }
  if (slice == 0) gradient.finish();
}
