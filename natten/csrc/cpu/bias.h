// The relative position bias of rows of queries, in the layout of dot, and the conversion of its gradient to a table.
#pragma once

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "plan.h"

namespace natten {

inline int64_t table_size(const Plan& plan) {
  int64_t size = 1;
  for (const Axis& axis : plan.axis) size *= 2 * axis.kernel_size - 1;
  return size;
}

// The bias of all kinds of rows of a submap, for a group of heads. A kind uses the same table entries for all heads.
class Bias {
 public:
  // Adds the gradients of the tables to `gradients`, which begins with head `first_head`; or null.
  Bias(const Call& call, float* gradients, int64_t first_head)
      : call_(call), size_(table_size(*call.plan)), gradients_(gradients), first_gradient_(first_head) {}
  ~Bias() { flush(); }

  bool has_table() const { return call_.rpb; }

  // Adds a kind with these entries of the table, [vectors][W]; -1 where a key is not in the window. Returns its index.
  int add_kind(std::vector<int> entries) {
    entries_.push_back(std::move(entries));
    return static_cast<int>(entries_.size()) - 1;
  }

  // Computes the values of some heads, for all kinds, and resets the gradients.
  void prepare(int64_t first_head, int heads) {
    const bool is_same_head = first_head == first_head_ || !call_.rpb;
    if (heads == heads_ && is_same_head && kinds_ == entries_.size()) return;
    flush();
    heads_ = 0;  // until all is in place, since the destructor reads it
    first_head_ = first_head;
    kinds_ = entries_.size();
    stride_ = entries_[0].size();
    values_.resize(heads * kinds_ * stride_);
    if (gradients_) sums_.assign(values_.size(), 0.f);
    for (int head = 0; head < heads; ++head) {
      const float* table = call_.rpb ? call_.rpb + (first_head + head) * size_ : nullptr;
      for (size_t kind = 0; kind < kinds_; ++kind) fill(entries_[kind], table, value(head, kind));
    }
    heads_ = heads;
  }

  // The bias of a kind for the head-th head, [vectors][W]: -inf where a key is not in the window, 0 without a table.
  float* value(int head, int kind) { return &values_[(head * kinds_ + kind) * stride_]; }
  // Its gradient.
  float* gradient(int head, int kind) { return &sums_[(head * kinds_ + kind) * stride_]; }
  // The distance from one kind to the next.
  int64_t stride() const { return stride_; }

 private:
  const Call& call_;
  int64_t size_;
  float* gradients_;
  int64_t first_gradient_, first_head_ = 0, stride_ = 0;
  int heads_ = 0;
  size_t kinds_ = 0;  // kinds that have values
  std::vector<std::vector<int>> entries_;
  std::vector<float> values_, sums_;

  static void fill(const std::vector<int>& entries, const float* table, float* value) {
    const float outside = -std::numeric_limits<float>::infinity();
    const int64_t count = entries.size();
    if (table)
      for (int64_t i = 0; i < count; ++i) value[i] = entries[i] < 0 ? outside : table[entries[i]];
    else
      for (int64_t i = 0; i < count; ++i) value[i] = entries[i] < 0 ? outside : 0.f;
  }

  void flush() {
    if (!gradients_) return;
    for (int head = 0; head < heads_; ++head) {
      float* table = gradients_ + (first_head_ + head - first_gradient_) * size_;
      for (size_t kind = 0; kind < kinds_; ++kind)
        for (int64_t i = 0; i < stride_; ++i)
          if (entries_[kind][i] >= 0) table[entries_[kind][i]] += gradient(head, kind)[i];
    }
  }
};

}  // namespace natten
