// The relative position bias of rows of queries, laid out as dot needs it, and the way back for its gradient.
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

// The bias of all kinds of rows of a submap, for one head at a time. What is stored for a kind has [vectors][W] entries.
class Bias {
 public:
  struct Kind {
    std::vector<int> entry;  // of the head's table; -1 where the key is not in the window
    float* value;            // the bias itself; -inf where the key is not in the window; 0 without a table
    float* gradient;         // what `value` received
  };
  std::vector<Kind> kinds;
  int64_t stride = 0;  // of the values and gradients of kinds, which have equal sizes

  // `gradients`: where the gradients of the tables of `first_head` and those after it are added; or null.
  Bias(const Call& call, float* gradients, int64_t first_head)
      : call_(call), size_(table_size(*call.plan)), gradients_(gradients), first_head_(first_head) {}
  ~Bias() { flush(); }

  bool has_table() const { return call_.rpb; }

  // Forgets all kinds.
  void clear() {
    flush();
    kinds.clear();
    head_ = -1;
  }

  // The kind with those entries, made if it is new.
  int add_kind(std::vector<int> entry) {
    for (size_t i = 0; i < kinds.size(); ++i)
      if (kinds[i].entry == entry) return static_cast<int>(i);
    kinds.push_back({std::move(entry), nullptr, nullptr});
    return static_cast<int>(kinds.size()) - 1;
  }

  // Makes values and gradients those of a head.
  void prepare(int64_t head) {
    if (head == head_ || (head_ >= 0 && !call_.rpb)) return;
    flush();
    head_ = head;
    stride = kinds[0].entry.size();
    values_.resize(stride * kinds.size());
    if (gradients_) sums_.assign(values_.size(), 0.f);
    const float* table = call_.rpb ? call_.rpb + head * size_ : nullptr;
    for (size_t kind = 0; kind < kinds.size(); ++kind) {
      const std::vector<int>& entry = kinds[kind].entry;
      kinds[kind].value = &values_[kind * stride];
      if (gradients_) kinds[kind].gradient = &sums_[kind * stride];
      for (int64_t i = 0; i < stride; ++i)
        kinds[kind].value[i] = entry[i] < 0 ? -std::numeric_limits<float>::infinity() : table ? table[entry[i]] : 0.f;
    }
  }

 private:
  const Call& call_;
  int64_t size_;
  float* gradients_;
  int64_t first_head_, head_ = -1;
  std::vector<float> values_, sums_;

  void flush() {
    if (!gradients_ || head_ < 0) return;
    float* table = gradients_ + (head_ - first_head_) * size_;
    for (const Kind& kind : kinds)
      for (int64_t i = 0; i < stride; ++i)
        if (kind.entry[i] >= 0) table[kind.entry[i]] += kind.gradient[i];
  }
};

}  // namespace natten
