// The weights (or logits) of unfused attention: [tokens][WINDOW], the slots of a token's window contiguous. They take more
// memory than all other tensors, so they are copied as whole rows, through shared memory. There the first slot of a token
// is as far from a multiple of 16 (logits: 4) bytes as in global memory, and tokens are SLOTS_PITCH bytes apart.
#pragma once

#define IS_UNFUSED 1
#include "walk.h"

namespace natten {

static_assert(sizeof(Storage) == 2, "slots have 16 bits");
#ifdef NATTEN_EMULATION
static const emulation::SmallAccesses small_accesses;
#endif

constexpr int SLOT_BYTES = 2;
constexpr int SLOT_PIECES = (WINDOW * SLOT_BYTES + 16 - SLOT_BYTES + 15) / 16;  // of 16 bytes, that a token may touch
constexpr int LINES_IN_X = RANK > 1 ? 1 : LINES;  // lines with different positions on the last axis

__device__ __forceinline__ int offset_in_piece(const void* from) {
  return static_cast<int>(reinterpret_cast<unsigned long long>(from) % 16);
}

// Copies a piece of a token's slots, if it contains any of the slots [first, end), asynchronously.
__device__ __forceinline__ void copy_slots(const Storage* slots, int first, int end, int piece, char* to) {
  const int offset = offset_in_piece(slots), bytes = offset + end * SLOT_BYTES - piece * 16;
  if (bytes <= 0 || offset + first * SLOT_BYTES >= piece * 16 + 16) return;
  copy_async_part(to + piece * 16, reinterpret_cast<const char*>(slots) - offset + piece * 16, min(bytes, 16));
}

// The slots of a unit's tokens in the scratch memory of its warp.
class UnitSlots {
 public:
  __device__ __forceinline__ UnitSlots(const Rows<Storage>& rows, const BlockTile& tile, const Unit& unit, char* shared)
      : rows_(rows), unit_(unit), shared_(shared), end_y_(min(tile.at[1] + TILE_Y, tile.map.n[1])),
        end_x_(min(tile.at[2] + TILE_X, tile.map.n[2])), start_z_(WindowsZ::start(unit.z, tile.map.n[0])) {
#pragma unroll
    for (int line = 0; line < LINES; ++line) {
      start_y_[line] = WindowsY::start(unit.token_y[line], tile.map.n[1]);
      start_x_[line] = WindowsX::start(unit.token_x[line], tile.map.n[2]);
    }
  }

  // Copies the tokens' slots to shared memory asynchronously.
  __device__ __forceinline__ void copy() const {
    for_items<SLOT_PIECES>([&](int token, int piece, Storage* slots) {
      copy_slots(slots, 0, WINDOW, piece, shared_ + token * SLOTS_PITCH);
    });
  }
  // The slot 0 of this thread's token of a line, after copy().
  __device__ __forceinline__ const char* copied(int line) const {
    return at(line) + offset_in_piece(rows_.at(unit_.z, unit_.token_y[line], unit_.token_x[line]));
  }

  // Where this thread has to store the slot 0 of its token of a line.
  __device__ __forceinline__ char* stored(int line) const {
    return at(line) + offset_in_word(rows_.at(unit_.z, unit_.token_y[line], unit_.token_x[line]));
  }
  // Sets all slots.
  __device__ __forceinline__ void fill(float value) const {
    for (int i = lane_index(); i < SLOTS_BYTES / 4; i += 32) reinterpret_cast<unsigned*>(shared_)[i] = pack(value, value);
  }
  // Writes the stored slots to global memory: words, and the first or the last slot if it is half a word.
  __device__ __forceinline__ void write() const {
    for_items<(WINDOW + 1) / 2>([&](int token, int word, Storage* slots) {
      const int offset = offset_in_word(slots), slot = 2 * word + offset / SLOT_BYTES;
      const char* from = shared_ + token * SLOTS_PITCH + offset + slot * SLOT_BYTES;
      if (slot + 1 < WINDOW) *reinterpret_cast<unsigned*>(slots + slot) = *reinterpret_cast<const unsigned*>(from);
    });
    for (int token = lane_index(); token < 8 * LINES; token += 32) {
      const int y = RANK > 1 ? unit_.y + token / 8 : 0, x = unit_.x + (RANK > 1 ? token % 8 : token);
      if (!is_there(y, x)) continue;
      Storage* slots = rows_.at(unit_.z, y, x);
      const int offset = offset_in_word(slots);
      const Storage* from = reinterpret_cast<const Storage*>(shared_ + token * SLOTS_PITCH + offset);
      if (offset) slots[0] = from[0];
      if ((WINDOW - offset / SLOT_BYTES) % 2) slots[WINDOW - 1] = from[WINDOW - 1];
    }
  }

  // The distance in bytes from slot 0 of a line to that of the first key in row r of a chunk.
  template <class AnyChunk>
  __device__ __forceinline__ int row_offset(const AnyChunk& chunk, int r, int line) const {
    const Place at = RANK > 1 && !(RANK == 2 && AnyChunk::IS_REGULAR) ? chunk.place(r) : Place{0, 0, 0};
    const int slot_y = AnyChunk::IS_REGULAR ? chunk.row_of_unit(r) - line : at.y - start_y_[line];
    return slot_index(RANK > 2 ? at.z - start_z_ : 0, RANK > 1 ? slot_y : 0, 0) * SLOT_BYTES;
  }
  // The first key on the last axis of the window of this thread's token.
  __device__ __forceinline__ int start_x(int line) const { return start_x_[line]; }

 private:
  static __device__ __forceinline__ int offset_in_word(const void* from) { return offset_in_piece(from) % 4; }
  __device__ __forceinline__ bool is_there(int y, int x) const { return y < end_y_ && x < end_x_; }
  __device__ __forceinline__ char* at(int line) const {
    const int x = unit_.token_x[line] - unit_.x;
    return shared_ + (RANK > 1 ? (unit_.token_y[line] - unit_.y) * 8 + x : x) * SLOTS_PITCH;
  }

  // Calls work(token, item, slots of the token) for COUNT items of each token, in the order of addresses.
  template <int COUNT, class Work>
  __device__ __forceinline__ void for_items(Work work) const {
#pragma unroll 2
    for (int i = lane_index(); i < 8 * COUNT; i += 32) {
      const int token = i / COUNT, item = i % COUNT;
#pragma unroll
      for (int line = 0; line < LINES; ++line) {
        const int y = RANK > 1 ? unit_.y + line : 0, x = unit_.x + token + (RANK > 1 ? 0 : 8 * line);
        if (is_there(y, x)) work(8 * line + token, item, rows_.at(unit_.z, y, x));
      }
    }
  }

  Rows<Storage> rows_;
  const Unit& unit_;
  char* shared_;
  int end_y_, end_x_, start_z_, start_y_[LINES], start_x_[LINES];
};

// Joins the low halves of two words. Each is zero-extended, so that a selector can take zeros instead.
__device__ __forceinline__ unsigned select_halves(bool takes_low, bool takes_high) {
  return (takes_low ? 0x10u : 0x32u) | (takes_high ? 0x5400u : 0x3200u);
}
__device__ __forceinline__ unsigned join_halves(unsigned low, unsigned high, unsigned selector) {
  return __byte_perm(low, high, selector);
}

}  // namespace natten
