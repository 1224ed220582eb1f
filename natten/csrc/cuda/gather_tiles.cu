// Unfused attention with matrix instructions: RESULT[query] = the sum over keys of WEIGHTS[query][slot] * ROWS[key]. These are
// the outputs, or the gradients of queries and, if there is a bias, of rpb.
#define HAS_GRADIENT HAS_RPB
#include "slots.h"
#include "bias_gradient.h"

namespace natten {

struct Gather {
  const Params& p;
  const BlockTile& tile;
  const Unit& unit;
  char* shared;
  int first_block;
  UnitBias bias;
  UnitGradient gradient;
  UnitSlots slots;
  const char* from[LINES];                     // slot 0 of this thread's tokens
  int column[LINES_IN_X][ROW_BLOCKS][2];       // the distance in bytes from the first slot of a row to its columns
  unsigned selector[LINES_IN_X][ROW_BLOCKS];   // which of them are in the window
  Sums sum;

  __device__ __forceinline__ Gather(const Params& p, const BlockTile& tile, const Unit& unit, char* shared, int slice,
                                    float* table)
      : p(p), tile(tile), unit(unit), shared(shared), first_block(slice * SLICE), bias(p, tile, unit, shared),
        gradient(table, scratch_of_warp(shared)),
        slots(rows_of<Storage>(p, WEIGHTS, shared), places_to_read(rows_of<Storage>(p, WEIGHTS, shared).step[2]), tile,
              unit, scratch_of_warp(shared) + SLOTS_AT) {
    slots.copy();
    commit_copies();
#pragma unroll
    for (int line = 0; line < LINES; ++line) from[line] = slots.of_line(line);
    find_columns(0);
    clear(sum);
    if (IS_STAGED || UNITS <= WARPS) return;  // the walk waits
    wait_copies<0>();
    __syncwarp();
  }

  __device__ __forceinline__ void find_columns(int segment) {
    const int first = unit.first_x + segment * COLUMNS + lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < LINES_IN_X * ROW_BLOCKS; ++i) {
      const int line = i / ROW_BLOCKS, block = i % ROW_BLOCKS, x = first + block * 8, last = KERNEL_X - 1;
      const Span& span = unit.x_span[line];
      // Instead of slots that do not exist, others are read, which the selector ignores.
      const int slot = x - slots.start_x(line);
      column[line][block][0] = min(max(slot, 0), last) * SLOT_BYTES;
      column[line][block][1] = min(max(slot + 1, 0), last) * SLOT_BYTES;
      selector[line][block] = select_halves(span.holds(x), span.holds(x + 1));
    }
  }

  template <class AnyChunk>
  __device__ __forceinline__ void add(const AnyChunk& chunk) {
    Words weights;
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      if (IS_SEGMENTED) find_columns(chunk.place(r).segment);
#pragma unroll
      for (int line = 0; line < LINES; ++line) {
        const bool is_seen = chunk.may_see(r, line) && chunk.is_seen(r, line);
        const char* row = from[line] + (is_seen ? slots.row_offset(chunk, r, line) : 0);
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block) {
          const int x = LINES_IN_X > 1 ? line : 0;
          unsigned& word = weights[line / 2][r][block][line % 2];
          word = 0;
          if (is_seen)
            word = join_halves(*reinterpret_cast<const Storage*>(row + column[x][block][0]),
                               *reinterpret_cast<const Storage*>(row + column[x][block][1]), selector[x][block]);
        }
      }
    }
    add_chunk_columns(weights, chunk, 0, first_block, sum);
    if (HAS_GRADIENT && first_block == 0) add_gradient(chunk, weights);
  }

  template <class AnyChunk>
  __device__ __forceinline__ void add_gradient(const AnyChunk& chunk, const Words& weights) {
    Products grads;
#pragma unroll
    for (int i = 0; i < MATRICES * BLOCKS * 4; ++i) {
      const int m = i / 4 / BLOCKS, r = i / 4 / ROW_BLOCKS % CHUNK_ROWS, block = i / 4 % ROW_BLOCKS;
      const unsigned word = weights[m][r][block][i % 4 / 2];
      grads[m][r][block][i % 4] = i % 2 ? high_of(word) : low_of(word);
    }
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      const Place at = chunk.place(r);
      gradient.add(chunk, r, bias.table_row(at), bias.entry_of_corner(at.segment), grads);
    }
  }

  __device__ __forceinline__ void finish() {
    if (HAS_GRADIENT && first_block == 0) gradient.flush();
    store_unit<HEAD_DIM>(sum, rows_of<Storage>(p, RESULT, shared), unit, tile, first_block, scratch_of_warp(shared));
  }
};

}  // namespace natten

NATTEN_KERNEL(natten_gather_tiles, natten::TILE_THREADS, MIN_BLOCKS) {
  using namespace natten;
  NATTEN_SHARED_MEMORY(shared);
  const int head = blockIdx.x % p.heads, slice = blockIdx.x / p.heads % SLICES, part = blockIdx.x / p.heads / SLICES;
  const BlockGradient gradient(p, head, part, slice, shared);
  int first, end;
  share_of(p, part, first, end);
  for (int piece = first; piece < end; ++piece) {
    BlockTile tile;
    if (!tile.locate(p, piece, head)) continue;
    walk<Gather>(
        p, tile, shared, false,
        [&](int row, char* buffer) {
          const auto columns = rows_of<const Storage>(p, ROWS, shared);
          copy_columns(columns, columns, tile, row, buffer);
          commit_copies();
        },
        [&](const Unit& unit) { return Gather(p, tile, unit, shared, slice, gradient.of_warp()); });
    __syncthreads();
  }
  if (slice == 0) gradient.finish();
}
