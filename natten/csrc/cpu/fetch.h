// Asks for memory long before it is used, a few cache lines at a time between products: a map's tokens lie too far apart
// for the machine to guess, and more than a few at once make it wait.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace natten {

class Fetcher {
 public:
  // Cost of a part of dot, in lanes of gather or scatter.
  static constexpr int DOT_COST = 5;

  void clear() { runs_.clear(), which_ = 0, lines_ = credit_ = 0; }

  // `count` rows of `bytes` bytes, `step` bytes apart, which will be read or written.
  void add(const char* first, int64_t step, int count, int bytes, bool is_written) {
    if (count <= 0) return;
    runs_.push_back({first, step, count * ((bytes + LINE - 1) / LINE), (bytes + LINE - 1) / LINE, is_written});
    lines_ += runs_.back().lines;
  }

  // To be called before a sequence of work whose steps cost `cost` in all.
  void spread(int64_t cost) {
    rate_ = (lines_ * UNIT + cost - 1) / std::max<int64_t>(cost, 1);
    row_ = 0;
  }

  NATTEN_INLINE void step(int cost) {
    credit_ += rate_ * cost;
    if (credit_ >= UNIT && which_ < runs_.size()) fetch();
  }

 private:
  static constexpr int LINE = 64, UNIT = 256;
  struct Run {
    const char* first;
    int64_t step;
    int lines, lines_per_row;
    bool is_written;
  };
  std::vector<Run> runs_;
  size_t which_ = 0;
  int row_ = 0;  // lines of the current row that were asked for
  int64_t lines_ = 0, rate_ = 0, credit_ = 0;

  void fetch() {
    Run& run = runs_[which_];
    const int64_t count = std::min<int64_t>(credit_ / UNIT, run.lines);
    credit_ -= count * UNIT;
    for (int64_t i = 0; i < count; ++i) {
      const char* line = run.first + row_ * LINE;
      if (run.is_written) __builtin_prefetch(line, 1, 3);
      else __builtin_prefetch(line, 0, 2);
      if (++row_ == run.lines_per_row) row_ = 0, run.first += run.step;
    }
    run.lines -= count;
    if (!run.lines) ++which_, row_ = 0;
  }
};

}  // namespace natten
