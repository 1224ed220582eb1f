// Unfused attention and its gradients, for callers that need the attention weights: query_key computes the logits of each
// query with the keys of its window, weight_value the sums of values with given weights.
#include <cmath>

#include "export.h"
#include "run.h"

namespace natten {

// Base class of the four operators. It converts between weights and windows in memory, whose keys are in row-major order.
class Unfused {
 public:
  static constexpr float BIAS_FACTOR = 1.f;

 protected:
  const Plan& plan_;
  const Call& call_;
  Map& map_;
  const RowFunctions functions_;
  QueryRows windows_;  // [rows][W][slots]
  Weights weights_;    // [rows][slots][W]
  float ones_[MAX_ROWS][W];

  Unfused(const Call& call, Map& map, Scratch& scratch)
      : plan_(*call.plan), call_(call), map_(map), functions_(row_functions(plan_.dtype)),
        windows_(scratch, map.slots(), false), weights_(scratch, map.slots(), true) {
    for (auto& row : ones_) std::fill_n(row, W, 1.f);
  }

  // Sets the weights of all lanes that have a query, and 0 in the others.
  void read(const Block& block, const View& from) {
    windows_.load(block, from, functions_, 1.f);
    for (int r = 0; r < block.rows; ++r) {
      std::memset(windows_.lane(r, 0), 0, sizeof(float) * block.first[r] * windows_.padded);
      for_each_line_with_missing(block, r, [&](float* line, int missing, int keys) {
        std::copy(line + missing, line + keys, line);
        std::fill(line + keys - missing, line + keys, 0.f);
      });
      for (int slot = 0; slot < windows_.padded; slot += W)
        transpose(windows_.lane(r, 0) + slot, windows_.padded, weights_.row(r) + slot * W, W);
    }
  }

  // Writes windows. Slots of causal windows before the map become `outside`.
  void write(const Block& block, const Weights& weights, float outside, const View& to) {
    for (int r = 0; r < block.rows; ++r) {
      for (int slot = 0; slot < windows_.padded; slot += W)
        transpose(weights.row(r) + slot * W, W, windows_.lane(r, 0) + slot, windows_.padded);
      for_each_line_with_missing(block, r, [&](float* line, int missing, int keys) {
        std::copy_backward(line, line + keys - missing, line + keys);
        std::fill(line, line + missing, outside);
      });
    }
    windows_.store(block, to, functions_, ones_);
  }

  // Slots that no visit sets.
  void fill(const Block& block, const Weights& weights, float outside) const {
    if (!block.has_missing) return;
    for (int r = 0; r < block.rows; ++r) std::fill_n(weights.row(r), map_.slots() * W, outside);
  }

 private:
  // Weights begin with the first key on the map, windows with slots before it. Calls function(line of a window, missing
  // slots, all slots).
  template <class Function>
  void for_each_line_with_missing(const Block& block, int r, const Function& function) {
    if (!block.has_missing) return;
    const int keys = map_.keys_of_line();
    for (int lane = block.first[r]; lane < block.end[r]; ++lane)
      for (int slot = 0; block.missing[r][lane] && slot < map_.slots(); slot += keys)
        function(windows_.lane(r, lane) + slot, block.missing[r][lane], keys);
  }
};

class QueryKey : public Unfused {
 public:
  static Needs needs() { return {{true, false}, {false, false}, {false, false}}; }

  QueryKey(const Call& call, Map& map, Scratch& scratch) : Unfused(call, map, scratch), query_(scratch, plan_.dim, true) {}

  void start(const Submap& submap, int64_t head) {
    query_view_ = submap.view(QUERY, head, functions_.size);
    attn_view_ = submap.view(ATTN, head, functions_.size);
  }

  void operator()(const Block& block) {
    query_.load(block, query_view_, functions_, 1.f);
    fill(block, weights_, -INFINITY);
    for (const Visit& visit : block.visits) map_.dot(visit, query_, KEYS, true, weights_);
    write(block, weights_, -INFINITY, attn_view_);
  }

 private:
  QueryRows query_;
  View query_view_, attn_view_;
};

class QueryKeyBackward : public Unfused {
 public:
  static Needs needs() { return {{false, false}, {true, false}, {true, false}}; }

  QueryKeyBackward(const Call& call, Map& map, Scratch& scratch)
      : Unfused(call, map, scratch), query_(scratch, plan_.dim, false), grad_query_(scratch, plan_.dim, false) {}

  void start(const Submap& submap, int64_t head) {
    query_view_ = submap.view(QUERY, head, functions_.size);
    grad_query_view_ = submap.view(GRAD_QUERY, head, functions_.size);
    grad_attn_view_ = submap.view(GRAD_ATTN, head, functions_.size);
  }

  void operator()(const Block& block) {
    query_.load(block, query_view_, functions_, 1.f);
    grad_query_.zero(block);
    read(block, grad_attn_view_);
    for (const Visit& visit : block.visits) {
      if (call_.grad_rpb) map_.add_bias_gradient(visit, weights_);
      map_.scatter(visit, weights_, query_, KEYS);
      map_.gather(visit, weights_, KEYS, grad_query_);
    }
    grad_query_.store(block, grad_query_view_, functions_, ones_);
  }

 private:
  QueryRows query_, grad_query_;
  View query_view_, grad_query_view_, grad_attn_view_;
};

class WeightValue : public Unfused {
 public:
  static Needs needs() { return {{false, false}, {false, true}, {false, false}}; }

  WeightValue(const Call& call, Map& map, Scratch& scratch)
      : Unfused(call, map, scratch), out_(scratch, plan_.value_dim, false) {}

  void start(const Submap& submap, int64_t head) {
    attn_view_ = submap.view(ATTN, head, functions_.size);
    out_view_ = submap.view(OUT, head, functions_.size);
  }

  void operator()(const Block& block) {
    out_.zero(block);
    read(block, attn_view_);
    for (const Visit& visit : block.visits) map_.gather(visit, weights_, VALUES, out_);
    out_.store(block, out_view_, functions_, ones_);
  }

 private:
  QueryRows out_;
  View attn_view_, out_view_;
};

class WeightValueBackward : public Unfused {
 public:
  static Needs needs() { return {{false, true}, {false, false}, {false, true}}; }

  WeightValueBackward(const Call& call, Map& map, Scratch& scratch)
      : Unfused(call, map, scratch), grad_out_(scratch, plan_.value_dim, true), grad_weights_(scratch, map.slots(), true) {}

  void start(const Submap& submap, int64_t head) {
    attn_view_ = submap.view(ATTN, head, functions_.size);
    grad_attn_view_ = submap.view(GRAD_ATTN, head, functions_.size);
    grad_out_view_ = submap.view(GRAD_OUT, head, functions_.size);
  }

  void operator()(const Block& block) {
    grad_out_.load(block, grad_out_view_, functions_, 1.f);
    read(block, attn_view_);
    fill(block, grad_weights_, 0.f);
    for (const Visit& visit : block.visits) {
      map_.scatter(visit, weights_, grad_out_, VALUES);
      map_.dot(visit, grad_out_, VALUES, false, grad_weights_);
    }
    write(block, grad_weights_, 0.f, grad_attn_view_);
  }

 private:
  QueryRows grad_out_;
  Weights grad_weights_;
  View attn_view_, grad_attn_view_, grad_out_view_;
};

}  // namespace natten

NATTEN_EXPORT int natten_query_key(const natten::Plan* plan, void* const* tensors, const float* rpb, float*, int threads) {
  return natten::run<natten::QueryKey>({plan, tensors, rpb, nullptr, threads});
}

NATTEN_EXPORT int natten_query_key_backward(const natten::Plan* plan, void* const* tensors, const float* rpb,
                                            float* grad_rpb, int threads) {
  return natten::run<natten::QueryKeyBackward>({plan, tensors, rpb, grad_rpb, threads});
}

NATTEN_EXPORT int natten_weight_value(const natten::Plan* plan, void* const* tensors, const float*, float*, int threads) {
  return natten::run<natten::WeightValue>({plan, tensors, nullptr, nullptr, threads});
}

NATTEN_EXPORT int natten_weight_value_backward(const natten::Plan* plan, void* const* tensors, const float*, float*,
                                               int threads) {
  return natten::run<natten::WeightValueBackward>({plan, tensors, nullptr, nullptr, threads});
}
