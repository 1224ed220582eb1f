// The weights (or logits) of unfused attention: [tokens][WINDOW], the slots of a token's window contiguous. They take more
// memory than all other tensors, so they are copied as whole rows, through shared memory. There the first slot of a token
// is as far from a multiple of 16 bytes as in global memory. If tokens are adjacent there, they are SLOTS_PITCH bytes apart
// here: to write them, they are adjacent here, too; to read them, other distances have fewer bank conflicts.
#pragma once

#define IS_UNFUSED 1
#include "walk.h"

namespace natten {

static_assert(sizeof(Storage) == 2, "slots have 16 bits");
#ifdef NATTEN_EMULATION
static const emulation::SmallAccesses small_accesses;
#endif

constexpr int LINES_IN_X = RANK > 1 ? 1 : LINES;  // lines with different positions on the last axis

// Where the slots of consecutive tokens are in shared memory.
struct SlotPlaces {
  int pitch;

  // The first slot of a token with this address in global memory.
  __device__ __forceinline__ int of(int token, unsigned address) const {
    const int first = token * pitch;
    return first + static_cast<int>(address - first & 15);
  }
};
// The places of slots that are read. step: from one token to the next in global memory.
__device__ __forceinline__ SlotPlaces places_to_read(Step step) {
  return {(step - SLOTS_PITCH) % 16 == 0 ? SLOTS_PITCH : LOOSE_PITCH};
}
__device__ __forceinline__ unsigned low_bits(const void* address) {
  return static_cast<unsigned>(reinterpret_cast<unsigned long long>(address));
}

// Copies a piece of a token's slots, if it contains any of the slots [first, end), asynchronously. to: slot 0. For a token
// that does not exist, `end` is 0. Nothing may be read there, not even the bytes before slot 0.
__device__ __forceinline__ void copy_slots(const void* slots, int first, int end, int piece, char* to) {
  const int skipped = low_bits(slots) & 15, at = piece * 16 - skipped, bytes = end * SLOT_BYTES - at;
  const bool is_copied = first < end && first * SLOT_BYTES < at + 16;
  // Not slots + at, whose high word would take another instruction.
  copy_async_part(to + at, static_cast<const char*>(slots) - skipped + piece * 16u, is_copied ? min(bytes, 16) : 0);
}

// The slots of a unit's tokens in the scratch memory of its warp.
class UnitSlots {
 public:
  __device__ __forceinline__ UnitSlots(const Rows<Storage>& rows, const SlotPlaces& places, const BlockTile& tile,
                                       const Unit& unit, char* shared)
      : rows_(rows), places_(places), unit_(unit), shared_(shared), first_(rows.at(unit.z, unit.y, unit.x)),
        rows_there_(min(tile.at[1] + TILE_Y, tile.map.n[1]) - unit.y),
        columns_there_(min(tile.at[2] + TILE_X, tile.map.n[2]) - unit.x), start_z_(WindowsZ::start(unit.z, tile.map.n[0])) {
#pragma unroll
    for (int line = 0; line < LINES; ++line) {
      start_y_[line] = WindowsY::start(unit.token_y[line], tile.map.n[1]);
      start_x_[line] = WindowsX::start(unit.token_x[line], tile.map.n[2]);
    }
  }

  // Copies the tokens' slots to shared memory asynchronously.
  __device__ __forceinline__ void copy() const {
    for_items<SLOT_PIECES>([&](int token, int piece, Storage* const (&slots)[LINES], int lines) {
#pragma unroll
      for (int line = 0; line < LINES; ++line)
        copy_slots(slots[line], 0, line < lines ? WINDOW : 0, piece, at(line, token, slots[line]));
    });
  }
  // The slot 0 of this thread's token of a line.
  __device__ __forceinline__ char* of_line(int line) const {
    const int y = unit_.token_y[line], x = unit_.token_x[line], column = x - unit_.x;
    return at(RANK > 1 ? y - unit_.y : column / 8u, RANK > 1 ? column : column % 8u, rows_.at(unit_.z, y, x));
  }

  // Sets all slots.
  __device__ __forceinline__ void fill(float value) const {
    for (int i = lane_index(); i < SLOTS_BYTES / 4; i += 32) reinterpret_cast<unsigned*>(shared_)[i] = pack(value, value);
  }
  // Writes the slots to global memory.
  __device__ __forceinline__ void write() const {
    if (rows_.step[2] == WINDOW * SLOT_BYTES) write_lines();
    else write_tokens();
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
  // Writes lines of adjacent tokens: 16 bytes at a time, and slots before the first and after the last multiple of 16.
  __device__ __forceinline__ void write_lines() const {
    constexpr int LINE_PIECES = (8 * WINDOW * SLOT_BYTES + 16 - SLOT_BYTES + 15) / 16;
    bool has_ends = false;
#pragma unroll
    for (int line = 0; line < LINES; ++line) {
      char* to = address_of_line(line);
      const int offset = low_bits(to) & 15, bytes = bytes_of_line(line);
      has_ends |= offset || bytes % 16;
#pragma unroll
      for (int first = 0; first < LINE_PIECES; first += 32) {
        const int at = (first + lane_index()) * 16 - offset;
        if (at >= 0 && at + 16 <= bytes)
          *reinterpret_cast<uint4*>(to + at) =
              *reinterpret_cast<const uint4*>(shared_ + line * slots_bytes(8) + offset + at);
      }
    }
    if (!has_ends) return;
    for (int i = lane_index(); i < LINES * 16; i += 32) {  // 8 slots at each end
      const int line = i / 16;
      char* to = address_of_line(line);
      const int offset = low_bits(to) & 15, bytes = bytes_of_line(line), head = min((16 - offset) % 16, bytes);
      const int at = i % 8 * SLOT_BYTES + (i & 8 ? max(bytes - (offset + bytes) % 16, head) : 0);
      if (at >= (i & 8 ? bytes : head)) continue;
      *reinterpret_cast<Storage*>(to + at) =
          *reinterpret_cast<const Storage*>(shared_ + line * slots_bytes(8) + offset + at);
    }
  }
  __device__ __forceinline__ char* address_of_line(int line) const {
    return reinterpret_cast<char*>(first_) + line * line_step();
  }
  __device__ __forceinline__ int bytes_of_line(int line) const {
    const int tokens = RANK > 1 ? (line < rows_there_ ? columns_there_ : 0) : columns_there_ - 8 * line;
    return min(max(tokens, 0), 8) * (WINDOW * SLOT_BYTES);
  }

  // Writes each token: words, and the first or the last slot if it is half a word.
  __device__ __forceinline__ void write_tokens() const {
    for_items<(WINDOW + 1) / 2>([&](int token, int word, Storage* const (&slots)[LINES], int lines) {
      unsigned found[LINES];
#pragma unroll
      for (int i = 0; i < LINES * 2; ++i) {  // all reads first
        const int line = i % LINES, half = half_of(slots[line]);
        const bool is_there = line < lines && half <= (WINDOW - 2 - 2 * word) * SLOT_BYTES;
        const char* from = at(line, token, slots[line]) + word * 4 + half;
        if (i < LINES && is_there) found[line] = *reinterpret_cast<const unsigned*>(from);
        if (i >= LINES && is_there)
          *reinterpret_cast<unsigned*>(reinterpret_cast<char*>(slots[line]) + word * 4 + half) = found[line];
      }
    });
    for_items<LINES / 2>([&](int token, int pair, Storage* const (&slots)[LINES], int lines) {
#pragma unroll
      for (int line = 0; line < LINES; ++line) {
        if (line / 2 != pair || line >= lines) continue;
        const Storage* from = reinterpret_cast<const Storage*>(at(line, token, slots[line]));
        const int half = half_of(slots[line]);
        if (half) slots[line][0] = from[0];
        if ((WINDOW - half / SLOT_BYTES) % 2) slots[line][WINDOW - 1] = from[WINDOW - 1];
      }
    });
  }

  __device__ __forceinline__ Step line_step() const { return RANK > 1 ? rows_.step[1] : 8 * rows_.step[2]; }
  // The bytes before the first whole word.
  static __device__ __forceinline__ int half_of(const void* slots) { return low_bits(slots) & 2; }
  // The slot 0 of a token of a line.
  __device__ __forceinline__ char* at(int line, int token, const void* slots) const {
    return shared_ + line * slots_bytes(8) + places_.of(token, low_bits(slots));
  }

  // Calls work(token, item, slots, lines) for COUNT items of token 0 to 7 of all lines, with lanes in the order of addresses.
  // slots: those of the token in each line. The token exists in the first `lines` of them.
  template <int COUNT, class Work>
  __device__ __forceinline__ void for_items(Work work) const {
#pragma unroll 1
    for (unsigned i = lane_index(); i < 8 * COUNT; i += 32) {
      const unsigned token = i / COUNT;
      const int columns = columns_there_ - static_cast<int>(token);
      Storage* slots[LINES];
#pragma unroll
      for (int line = 0; line < LINES; ++line)
        slots[line] = reinterpret_cast<Storage*>(reinterpret_cast<char*>(line ? slots[line - 1] : first_) +
                                                 (line ? line_step() : static_cast<Step>(token) * rows_.step[2]));
      work(static_cast<int>(token), static_cast<int>(i % COUNT), slots,
           RANK > 1 ? (columns > 0 ? rows_there_ : 0) : (columns + 7) / 8);
    }
  }

  Rows<Storage> rows_;
  SlotPlaces places_;
  const Unit& unit_;
  char* shared_;
  Storage* first_;
  int rows_there_, columns_there_, start_z_, start_y_[LINES], start_x_[LINES];
};

// Joins the low halves of two words. Each is zero-extended, so that a selector can take zeros instead.
__device__ __forceinline__ unsigned select_halves(bool takes_low, bool takes_high) {
  return (takes_low ? 0x10u : 0x32u) | (takes_high ? 0x5400u : 0x3200u);
}
__device__ __forceinline__ unsigned join_halves(unsigned low, unsigned high, unsigned selector) {
  return __byte_perm(low, high, selector);
}

}  // namespace natten
