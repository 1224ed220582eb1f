// Fused attention, backward, first part, with matrix instructions: the gradients of queries and rpb, and `delta`, the sum
// over keys of weight times its gradient, which is the product of the output and its gradient, less the logsumexp's.
#define HAS_GRADIENT HAS_RPB
#include "tiles.h"

namespace natten {

// The gradient of rpb that a warp's units add to: sums over the diagonals of gradients of logits, since a diagonal of
// tokens and columns shares an entry.
class UnitGradient {
 public:
  __device__ __forceinline__ UnitGradient(float* table, char* scratch)
      : table_(table), scratch_(reinterpret_cast<float*>(scratch)) {
    if (!HAS_GRADIENT) return;
    for (int i = lane_index(); i < 8 * DIAGONAL_PITCH; i += 32) scratch_[i] = 0;
    __syncwarp();
  }

  // The gradients of a row of columns, of which the first column and token stand at entry row + corner.
  __device__ __forceinline__ void add(int row, int corner, const float (&grad)[ROW_BLOCKS][4]) {
    float line[DIAGONAL_BLOCKS][2];
    if (RANK == 1) {  // the second half's columns are, to it, 8 further to the left
#pragma unroll
      for (int i = 0; i < DIAGONAL_BLOCKS * 2; ++i) {
        const int block = i / 2, item = i % 2;
        line[block][item] = (block > 0 ? grad[block > 0 ? block - 1 : 0][item] : 0.f) +
                            (block < ROW_BLOCKS ? grad[block < ROW_BLOCKS ? block : 0][2 + item] : 0.f);
      }
      sum_diagonals(line, row, corner - 8);
      return;
    }
    const bool follows = held_ == row - TABLE_X && held_corner_ == corner;
    if (!follows) flush();
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * 2; ++i)
      line[i / 2][i % 2] = grad[i / 2][2 + i % 2] + (follows ? before_[i / 2][i % 2] : 0.f);
    sum_diagonals(line, row - TABLE_X, corner);
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * 2; ++i) before_[i / 2][i % 2] = grad[i / 2][i % 2];
    held_ = row, held_corner_ = corner;
  }
  // What the first half added to the last row.
  __device__ __forceinline__ void flush() {
    if (held_ != NOTHING) sum_diagonals(before_, held_, held_corner_);
    held_ = NOTHING;
  }

 private:
  static constexpr int NOTHING = -(1 << 30);
  float *table_, *scratch_;
  float before_[DIAGONAL_BLOCKS][2];
  int held_ = NOTHING, held_corner_ = 0;

  // line: 8 tokens by columns, this thread's as in a fragment. Entries beyond the table only ever receive zeros.
  __device__ __forceinline__ void sum_diagonals(const float (&line)[DIAGONAL_BLOCKS][2], int row, int corner) {
    if (row < 0 || row >= TABLE) return;
    const int lane = lane_index();
#pragma unroll
    for (int block = 0; block < DIAGONAL_BLOCKS; ++block)
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
      if (GRADIENT_TABLES == WARPS) table_[row + entry] += sum;
      else atomicAdd(table_ + row + entry, sum);
    }
    __syncwarp();
  }
};

struct DifferentiateQuery {
  const Params& p;
  const BlockTile& tile;
  const Unit& unit;
  char* shared;
  int first_piece;
  Fragments query, grad_out;
  UnitBias bias;
  UnitGradient gradient;
  float lse[2], delta[2], sum[SLICE][4];

  __device__ __forceinline__ DifferentiateQuery(const Params& p, const BlockTile& tile, const Unit& unit, char* shared, int slice,
                                float* table)
      : p(p), tile(tile), unit(unit), shared(shared), first_piece(slice * SLICE),
        query(Rows<const Storage>(p, QUERY, tile.map), unit),
        grad_out(Rows<const Storage>(p, GRAD_OUT, tile.map), unit), bias(p, tile.map.head, shared, unit),
        gradient(table, scratch()) {
    const UnitRows<const Storage> out(Rows<const Storage>(p, OUT, tile.map), unit);
    const UnitRows<const float> given_lse(Rows<const float>(p, LSE, tile.map), unit);
    const UnitRows<const float> grad_lse(Rows<const float>(p, GRAD_LSE, tile.map), unit);
    const UnitRows<float> given_delta(Rows<float>(p, DELTA, tile.map), unit);
    delta[0] = delta[1] = 0;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      unsigned a[4], b[4];
      out.fragment(step, a), grad_out.get(step, b);
#pragma unroll
      for (int i = 0; i < 4; ++i) delta[i % 2] += low_of(a[i]) * low_of(b[i]) + high_of(a[i]) * high_of(b[i]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[half] += __shfl_xor_sync(~0u, delta[half], 1);
      delta[half] += __shfl_xor_sync(~0u, delta[half], 2);
      lse[half] = 0;
      if (!unit.is_there[half]) continue;
      lse[half] = *given_lse.row[half] * LOG2_E;
      if (p.tensors[GRAD_LSE].data) delta[half] -= *grad_lse.row[half];
      if (first_piece == 0 && lane_index() % 4 == 0) *given_delta.row[half] = delta[half];
    }
#pragma unroll
    for (int i = 0; i < SLICE * 4; ++i) sum[i / 4][i % 4] = 0;
  }

  __device__ __forceinline__ char* scratch() const { return shared + WARPS_AT + warp_index() * WARP_BYTES; }

  __device__ __forceinline__ void add(const Chunk& chunk, const char* buffer) {
    const float scale = p.scale * LOG2_E;
    float grads[BLOCKS][4];
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      float products[ROW_BLOCKS][4], grad_weights[ROW_BLOCKS][4], biases[ROW_BLOCKS][4];
      if (!chunk.is_used(r)) {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * 4; ++i) grads[r * ROW_BLOCKS + i / 4][i % 4] = 0;
        continue;
      }
      multiply_columns(query, buffer, chunk.token(r), products);
      multiply_columns(grad_out, buffer + COLUMN_BYTES, chunk.token(r), grad_weights);
      bias.get(chunk.place(r), biases);
#pragma unroll
      for (int i = 0; i < ROW_BLOCKS * 4; ++i) {
        const int block = i / 4, item = i % 4, half = item / 2;
        const float logit = products[block][item] * scale + (biases[block][item] - lse[half]);
        const float weight = chunk.is_seen(r, half) ? exp2_fast(logit) : 0.f;
        products[block][item] = grads[r * ROW_BLOCKS + block][item] =
            weight * (grad_weights[block][item] - delta[half]);
      }
      if (HAS_GRADIENT && first_piece == 0) {
        const Place at = chunk.place(r);
        gradient.add(bias.entry_of_row(at), bias.entry_of_corner(at.segment), products);
      }
    }
#pragma unroll
    for (int pair = 0; pair < BLOCKS / 2; ++pair) {
      if (!chunk.is_pair_used(pair)) continue;
      unsigned a[4];
      pack_blocks(grads[2 * pair], grads[2 * pair + 1], a);
      add_columns(a, buffer, chunk.pair_token(pair), first_piece, sum);
    }
  }

  __device__ __forceinline__ void finish() {
    if (HAS_GRADIENT && first_piece == 0) gradient.flush();
    store_unit(sum, {p.scale, p.scale}, Rows<Storage>(p, GRAD_QUERY, tile.map), unit, tile, first_piece, scratch());
  }
};

// The gradient of rpb over all a block's work, in shared memory; or, if it is too large, where the result is to lie.
class BlockGradient {
 public:
  __device__ __forceinline__ BlockGradient(const Params& p, int head, int part, int slice, char* shared)
      : out_(p.partial_rpb + (head * static_cast<long long>(p.parts) + part) * TABLE),
        tables_(reinterpret_cast<float*>(shared + GRADIENT_AT)) {
    if (!HAS_GRADIENT || slice) return;
    if (GRADIENT_TABLES == 0) tables_ = out_;
    const int count = GRADIENT_TABLES == 0 ? TABLE : GRADIENT_BYTES / 4;
    for (int i = threadIdx.x; i < count; i += TILE_THREADS) tables_[i] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ float* of_warp() const { return tables_ + (GRADIENT_TABLES > 1 ? warp_index() * STRIDE : 0); }
  __device__ __forceinline__ void finish() const {
    __syncthreads();
    if (!HAS_GRADIENT || GRADIENT_TABLES == 0) return;
    for (int i = threadIdx.x; i < TABLE; i += TILE_THREADS) {
      float sum = tables_[i];
      for (int table = 1; table < GRADIENT_TABLES; ++table) sum += tables_[table * STRIDE + i];
      out_[i] = sum;
    }
  }

 private:
  static constexpr int STRIDE = (TABLE + 3) / 4 * 4;
  float *out_, *tables_;
};

}  // namespace natten

NATTEN_KERNEL(natten_grad_query_tiles, natten::TILE_THREADS, MIN_BLOCKS) {
  using namespace natten;
  NATTEN_SHARED_MEMORY(shared);
  const int head = blockIdx.x % p.heads, slice = blockIdx.x / p.heads % SLICES, part = blockIdx.x / p.heads / SLICES;
  copy_table(p, head, shared);
  const BlockGradient gradient(p, head, part, slice, shared);
  long long first, end;
  share_of(p, part, first, end);
  for (long long piece = first; piece < end; ++piece) {
    BlockTile tile;
    if (!tile.locate(p, piece, head)) continue;
    walk<DifferentiateQuery>(
        tile, shared, [&](int row, char* buffer) { copy_columns(p, tile, row, KEY, VALUE, buffer); },
        [&](const Unit& unit) { return DifferentiateQuery(p, tile, unit, shared, slice, gradient.of_warp()); });
    __syncthreads();
  }
  if (slice == 0) gradient.finish();
}
