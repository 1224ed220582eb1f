// The relative position bias of vectors of queries, in the layout of dot, and the conversion of its gradient to a table.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "plan.h"
#include "simd.h"

namespace natten {

inline int64_t table_size(const Plan& plan) {
  int64_t size = 1;
  for (const Axis& axis : plan.axis) size *= 2 * axis.kernel_size - 1;
  return size;
}

// A kind is a list of table entries, [vectors][W]: queries whose windows lie alike relative to them have the same.
class Bias {
 public:
  // Values are multiplied by `factor`. The gradients of the tables are added to `gradients`; or null.
  Bias(const Call& call, float factor, float* gradients)
      : call_(call), factor_(factor), size_(table_size(*call.plan)), gradients_(gradients), heads_(call.plan->heads) {}
  Bias(const Bias&) = delete;
  ~Bias() { flush(); }

  bool has_table() const { return call_.rpb; }

  // Adds a kind with these entries of the table; -1 where a key is not in the window. Returns its offset in a head's values.
  int64_t add_kind(const std::vector<int>& entries) {
    const int64_t offset = entries_.size();
    entries_.insert(entries_.end(), entries.begin(), entries.end());
    return offset;
  }

  // The bias of a head, for all kinds: -inf where a key is not in the window, 0 without a table.
  const float* values(int64_t head) {
    std::vector<float>& values = heads_[call_.rpb ? head : 0].values;
    const float* table = call_.rpb ? call_.rpb + head * size_ : nullptr;
    for (size_t i = values.size(); i < entries_.size(); ++i)
      values.push_back(entries_[i] < 0 ? -std::numeric_limits<float>::infinity() : table ? factor_ * table[entries_[i]] : 0);
    return values.data();
  }

  // Its gradient.
  float* gradient(int64_t head) {
    heads_[head].gradient.resize(entries_.size());
    return heads_[head].gradient.data();
  }

 private:
  struct Head {
    std::vector<float> values, gradient;
  };
  const Call& call_;
  const float factor_;
  const int64_t size_;
  float* gradients_;
  std::vector<int> entries_;
  std::vector<Head> heads_;

  void flush() {
    if (!gradients_) return;
    for (size_t h = 0; h < heads_.size(); ++h) {
      const std::vector<float>& gradient = heads_[h].gradient;
      if (gradient.empty()) continue;
      float* table = gradients_ + h * size_;
      for (size_t i = 0; i < gradient.size(); i += W) {
        const int* entry = &entries_[i];
        bool is_same = true;  // all lanes have the same entry, or none
        for (int lane = 1; lane < W; ++lane) is_same &= entry[lane] == entry[0];
        if (is_same) {
          if (entry[0] >= 0) table[entry[0]] += total(load(&gradient[i]));
          continue;
        }
        for (int lane = 0; lane < W; ++lane)
          if (entry[lane] >= 0) table[entry[lane]] += gradient[i + lane];
      }
    }
  }
};

}  // namespace natten
