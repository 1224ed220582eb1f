// Unfused attention with matrix instructions: RESULT[query][slot] = LEFT[query] * RIGHT[key], summed over head_dim. These
// are the logits, with a bias, or the gradients of weights.
#define HAS_RESULTS 0
#include "slots.h"

namespace natten {

// In slots before the map, which only causal windows have.
constexpr bool HAS_OUTSIDE = CAUSAL_Z || CAUSAL_Y || CAUSAL_X;
__device__ __forceinline__ float outside() { return RESULT == ATTN ? minus_infinity() : 0.f; }

// Whether adjacent tokens 4 apart have the same banks. Then half of the lanes write each two blocks in the other order.
constexpr bool SWAPS = WINDOW % 32 == 17 && ROW_BLOCKS % 2 == 0;
static_assert(SLOTS_PITCH == WINDOW * SLOT_BYTES, "lines of tokens are written as a whole");

struct WriteProducts {
  const Unit& unit;
  Fragments<HEAD_DIM> left;
  UnitBias bias;
  UnitSlots slots;
  const int swap;                           // 1 if this thread writes blocks 1 and 0 instead of 0 and 1, and so on
  char* to[LINES][2];                       // the slot of the unit's first column, or where it would be; for odd blocks
  bool is_seen[LINES_IN_X][ROW_BLOCKS][2];  // whether this thread's columns are in the windows of its tokens

  __device__ __forceinline__ WriteProducts(const Params& p, const BlockTile& tile, const Unit& unit, char* shared)
      : unit(unit), left(rows_of<const Storage>(p, LEFT, shared), unit), bias(p, tile, unit, shared),
        slots(rows_of<Storage>(p, RESULT, shared), places(rows_of<Storage>(p, RESULT, shared).step[2]), tile, unit,
              scratch_of_warp(shared) + SLOTS_AT),
        swap(SWAPS && lane_index() >= 16) {
#pragma unroll
    for (int line = 0; line < LINES; ++line) {
      char* first = slots.of_line(line) + (unit.first_x + lane_index() % 4 * 2 - slots.start_x(line)) * SLOT_BYTES;
      to[line][0] = first + swap * (8 * SLOT_BYTES), to[line][1] = first - swap * (8 * SLOT_BYTES);
    }
    find_columns(0);
    if (!HAS_OUTSIDE) return;
    slots.fill(outside());
    __syncwarp();
  }

  // step: from one token to the next in global memory.
  static __device__ __forceinline__ SlotPlaces places(Step step) {
    return {step == WINDOW * SLOT_BYTES ? SLOTS_PITCH : LOOSE_PITCH};
  }

  __device__ __forceinline__ void find_columns(int segment) {
    const int first = unit.first_x + segment * COLUMNS + lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < LINES_IN_X * ROW_BLOCKS * 2; ++i) {
      const int line = i / (ROW_BLOCKS * 2), block = i / 2 % ROW_BLOCKS;
      is_seen[line][block][i % 2] = unit.x_span[line].holds(first + (block ^ swap) * 8 + i % 2);
    }
  }

  template <class AnyChunk>
  __device__ __forceinline__ void add(const AnyChunk& chunk) {
    Products products;
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      const int segment = IS_SEGMENTED ? chunk.place(r).segment : 0;
      if (IS_SEGMENTED) find_columns(segment);
      if (HAS_RPB) bias.get(chunk, r, products);
#pragma unroll
      for (int i = 0; !HAS_RPB && i < MATRICES * ROW_BLOCKS * 4; ++i) products[i / 4 / ROW_BLOCKS][r][i / 4 % ROW_BLOCKS][i % 4] = 0;
      multiply_columns(left, chunk, 0, r, products);
#pragma unroll
      for (int line = 0; line < LINES; ++line) {
        if (!chunk.may_see(r, line) || !chunk.is_seen(r, line)) continue;
        const int row = slots.row_offset(chunk, r, line) + segment * (COLUMNS * SLOT_BYTES);
        unsigned words[ROW_BLOCKS];
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block) {
          const float* two = products[line / 2][r][block] + line % 2 * 2;
          words[block] = pack(two[0], two[1]);
        }
#pragma unroll
        for (int block = 0; block < ROW_BLOCKS; ++block) {
          const unsigned word = SWAPS && swap ? words[SWAPS ? block ^ 1 : 0] : words[block];
          const bool(&is_there)[2] = is_seen[LINES_IN_X > 1 ? line : 0][block];
          Storage* slot = reinterpret_cast<Storage*>(to[line][block % 2] + row + block * (8 * SLOT_BYTES));
          if (is_there[0]) slot[0] = static_cast<Storage>(word);
          if (is_there[1]) slot[1] = static_cast<Storage>(word >> 16);
        }
      }
    }
  }

  __device__ __forceinline__ void finish() {
    __syncwarp();
    slots.write();
    __syncwarp();
  }
};

}  // namespace natten

NATTEN_KERNEL(natten_logits_tiles, natten::TILE_THREADS, MIN_BLOCKS) {
  using namespace natten;
  NATTEN_SHARED_MEMORY(shared);
  const int head = blockIdx.x % p.heads;
  BlockTile tile;
  if (!tile.locate(p, blockIdx.x / p.heads, head)) return;
  copy_table(p, head, shared);
  walk<WriteProducts>(
      p, tile, shared, false,
      [&](int row, char* buffer) {
        const auto columns = rows_of<const Storage>(p, RIGHT, shared);
        copy_columns(columns, columns, tile, row, buffer);
        commit_copies();
      },
      [&](const Unit& unit) { return WriteProducts(p, tile, unit, shared); });
}
