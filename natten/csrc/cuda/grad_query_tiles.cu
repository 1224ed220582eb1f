// Fused attention, backward, first part, with matrix instructions: the gradients of queries and rpb, and minus delta. Delta is
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
  Fragments<HEAD_DIM> query;
  Fragments<VALUE_DIM> grad_out;
  UnitBias bias;
  UnitGradient gradient;
  float scale, lse[LINES], delta[LINES];  // scale and lse: include log2(e), for exp2
  Sums sum;

  __device__ __forceinline__ DifferentiateQuery(const Params& p, const BlockTile& tile, const Unit& unit, char* shared,
                                                int slice, float* table)
      : p(p), tile(tile), unit(unit), shared(shared), first_block(slice * SLICE),
        query(rows_of<const Storage>(p, QUERY, shared), unit),
        grad_out(rows_of<const Storage>(p, GRAD_OUT, shared), unit), bias(p, tile, unit, shared),
        gradient(table, scratch_of_warp(shared)), scale(p.scale * LOG2_E) {
    const UnitRows<const Storage> out(rows_of<const Storage>(p, OUT, shared), unit);
    const UnitRows<const float> given_lse(rows_of<const float>(p, LSE, shared), unit);
    const UnitRows<const float> grad_lse(rows_of<const float>(p, GRAD_LSE, shared), unit);
    const UnitRows<float> given_delta(rows_of<float>(p, DELTA, shared), unit);
#pragma unroll
    for (int line = 0; line < LINES; ++line) {
      float sum = 0;
#pragma unroll
      for (int quad = 0; quad < QUADS; ++quad) {
        unsigned a[4], b[4];
        load_words<VALUE_DIM>(quad, out.row[line], a);
        load_words<VALUE_DIM>(quad, grad_out.rows.row[line], b);  // not rounded to TF32
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += dot(a[i], b[i]);
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      lse[line] = 0, delta[line] = sum;
      if (!unit.is_there[line]) continue;
      lse[line] = *given_lse.row[line] * LOG2_E;
      if (p.tensors[GRAD_LSE].data) delta[line] -= *grad_lse.row[line];
      if (first_block == 0 && lane_index() % 4 == 0) *given_delta.row[line] = -delta[line];
    }
    clear(sum);
  }

  template <class AnyChunk>
  __device__ __forceinline__ void add(const AnyChunk& chunk) {
    Products weights, grads;
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      bias.get(chunk, r, weights);
      multiply_columns(query, chunk, 0, r, weights);
#pragma unroll
      for (int i = 0; i < LINES * ROW_BLOCKS * 2; ++i) {
        const int line = i % LINES, column = i / LINES;
        grads[line / 2][r][column / 2][line % 2 * 2 + column % 2] = -delta[line];
      }
      multiply_columns(grad_out, chunk, 1, r, grads);
#pragma unroll
      for (int i = 0; i < LINES * ROW_BLOCKS * 2; ++i) {
        const int line = i % LINES, column = i / LINES;
        float& grad = grads[line / 2][r][column / 2][line % 2 * 2 + column % 2];
        const float logit = weights[line / 2][r][column / 2][line % 2 * 2 + column % 2];
        grad = chunk.may_see(r, line) ? grad * exp2_fast(logit * scale - lse[line]) : 0.f;
      }
    }
    add_chunk_columns(grads, chunk, 0, first_block, sum);
    // Last, because it writes to shared memory, and the compiler does not move reads before a write.
    if (HAS_GRADIENT && first_block == 0)
#pragma unroll
      for (int r = 0; r < CHUNK_ROWS; ++r) {
        const Place at = chunk.place(r);
        gradient.add(chunk, r, bias.table_row(at), bias.entry_of_corner(at.segment), grads);
      }
  }

  __device__ __forceinline__ void finish() {
    if (HAS_GRADIENT && first_block == 0) gradient.flush();
    float factor[LINES];
#pragma unroll
    for (int line = 0; line < LINES; ++line) factor[line] = p.scale;
    store_unit<HEAD_DIM>(sum, factor, rows_of<Storage>(p, GRAD_QUERY, shared), unit, tile, first_block,
                         scratch_of_warp(shared));
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
          commit_copies();
        },
        [&](const Unit& unit) { return DifferentiateQuery(p, tile, unit, shared, slice, gradient.of_warp()); });
    __syncthreads();
  }
  if (slice == 0) gradient.finish();
}
