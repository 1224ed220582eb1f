// The relative position bias of vectors of queries, in the layout of dot, and the conversion of its gradient to a table.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "plan.h"
#include "scratch.h"
#include "simd.h"

namespace natten {

inline int64_t table_size(const Plan& plan) {
  int64_t size = 1;
  for (const Axis& axis : plan.axis) size *= 2 * axis.kernel_size - 1;
  return size;
}

// A kind is a list of table entries, [vectors][W]; -1 where a key is not in the window. Queries whose windows lie alike
// relative to them have the same kind.
class Bias {
 public:
  // Values are multiplied by `factor`. The gradients of the tables are added to `gradients`; or null.
  Bias(const Call& call, Scratch& scratch, float factor, float* gradients)
      : call_(call), scratch_(scratch), factor_(factor), table_(table_size(*call.plan)), heads_(call.plan->heads),
        gradients_(gradients) {}
  Bias(const Bias&) = delete;
  ~Bias() {
    for (size_t i = 0; i < blocks_.size(); ++i)
      if (blocks_[i].gradient) add_to_table(kinds_[i / heads_], blocks_[i].gradient, gradients_ + i % heads_ * table_);
  }

  bool has_table() const { return call_.rpb; }

  // Adds a kind, whose `vectors` * W entries the caller sets.
  int* add_kind(int64_t vectors) {
    kinds_.push_back({scratch_.take<int>(vectors * W), vectors * W});
    blocks_.resize(kinds_.size() * heads_);
    return kinds_.back().entries;
  }
  int kinds() const { return static_cast<int>(kinds_.size()); }

  // The bias of a kind and head: -inf where a key is not in the window, 0 without a table.
  const float* values(int kind, int64_t head) {
    float*& values = blocks_[kind * heads_ + (call_.rpb ? head : 0)].values;
    if (values) return values;
    const Kind& k = kinds_[kind];
    const float outside = -std::numeric_limits<float>::infinity();
    values = scratch_.take<float>(k.size);
    if (call_.rpb) {
      const float* table = call_.rpb + head * table_;
      for (int64_t i = 0; i < k.size; ++i) values[i] = k.entries[i] < 0 ? outside : factor_ * table[k.entries[i]];
    } else {
      for (int64_t i = 0; i < k.size; ++i) values[i] = k.entries[i] < 0 ? outside : 0.f;
    }
    return values;
  }

  // Its gradient; or null if none is wanted.
  float* gradient(int kind, int64_t head) {
    if (!gradients_) return nullptr;
    float*& gradient = blocks_[kind * heads_ + head].gradient;
    if (!gradient) gradient = scratch_.take_zeros(kinds_[kind].size);
    return gradient;
  }

 private:
  struct Kind {
    int* entries;
    int64_t size;
  };
  struct Block {
    float *values = nullptr, *gradient = nullptr;
  };
  const Call& call_;
  Scratch& scratch_;
  const float factor_;
  const int64_t table_, heads_;
  float* gradients_;
  std::vector<Kind> kinds_;
  std::vector<Block> blocks_;  // [kinds][heads]

  static void add_to_table(const Kind& kind, const float* gradient, float* table) {
    for (int64_t i = 0; i < kind.size; i += W) {
      const int* entry = kind.entries + i;
      bool is_same = true;  // all lanes have the same entry, or none
      for (int lane = 1; lane < W; ++lane) is_same &= entry[lane] == entry[0];
      if (is_same) {
        if (entry[0] >= 0) table[entry[0]] += total(load(gradient + i));
        continue;
      }
      for (int lane = 0; lane < W; ++lane)
        if (entry[lane] >= 0) table[entry[lane]] += gradient[i + lane];
    }
  }
};

}  // namespace natten
