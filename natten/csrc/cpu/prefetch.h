// Prefetches the rows of d that the next band of blocks needs, a few cache lines at a time.
//
// All heads of a token are adjacent in memory, and often its query, key and value too. Reading them in this order, while
// blocks are computed, hides most of the time that memory takes. Many requests at once would be dropped.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"
#include "submap.h"

namespace natten {

class Prefetcher {
 public:
  void clear() { rows_.clear(), next_ = 0, left_ = 0; }

  // Adds rows of `bytes` bytes of `count` tokens, which are adjacent on the last axis from `first` on.
  void add(const View& view, const Token& first, int count, int64_t bytes) {
    if (count <= 0) return;
    const char* start = view.at(first);
    if (!rows_.empty()) {
      Rows& last = rows_.back();
      if (last.start + last.bytes == start && last.step == view.step[2] && last.count == count) {
        last.bytes += bytes;  // key and value of the same tokens, for example
        return;
      }
    }
    rows_.push_back({start, view.step[2], bytes, count});
  }

  // Prefetches the next LINES cache lines.
  NATTEN_INLINE void some() {
    if (left_ <= 0) {
      if (next_ == rows_.size()) return;
      next_row();
    }
#pragma GCC unroll 8
    for (int i = 0; i < LINES; ++i) __builtin_prefetch(at_ + 64 * i);
    at_ += 64 * LINES, left_ -= 64 * LINES;
  }

 private:
  static constexpr int LINES = 3;
  struct Rows {
    const char* start;
    int64_t step, bytes;
    int count;
  };
  std::vector<Rows> rows_;
  size_t next_ = 0;           // the entry of rows_ that holds the next row
  const char* at_ = nullptr;  // what is left of the current row
  int64_t left_ = 0;

  void next_row() {
    Rows& rows = rows_[next_];
    at_ = rows.start, left_ = rows.bytes;
    if (rows.bytes == rows.step) left_ *= rows.count, rows.count = 0;  // they are adjacent
    else rows.start += rows.step, --rows.count;
    if (rows.count <= 0) ++next_;
  }
};

}  // namespace natten
