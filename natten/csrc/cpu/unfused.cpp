// Unfused attention and its gradients, for callers that need the attention weights: query_key computes the logits of each
// query with the keys of its window, weight_value the sums of values with given weights.
#include <algorithm>
#include <limits>

#include "export.h"
#include "run.h"

namespace natten {

// Base class of the four operators. It converts between the weights of a visit and windows of weights in memory, which
// contain keys in row-major order.
template <class Map>
class Unfused {
 public:
  Unfused(const Call& call, Map& map, Scratch& scratch)
      : plan_(*call.plan), call_(call), functions_(row_functions(plan_.dtype)),
        weights_(map.weights(scratch.take_zeros(map.weights_size()))) {
    for (const Axis& axis : plan_.axis) slots_ *= axis.kernel_size;
    window_ = scratch.take(slots_);
    for (auto& row : ones_) std::fill_n(row, W, 1.f);
  }

 protected:
  using Visit = typename Map::Visit;
  const Plan& plan_;
  const Call& call_;
  const RowFunctions functions_;
  Map* map_ = nullptr;
  Rows weights_;
  float* window_;  // the window of one query
  int slots_ = 1;
  float ones_[MAX_ROWS][W];

  void read(const Block& block, const Visit& visit, const View& from, Rows weights) {
    for (int r = 0; r < visit.rows; ++r) {
      std::fill_n(weights[r], visit.keys * W, 0.f);
      for (int lane = 0; lane < block.lanes[visit.first_row + r]; ++lane) {
        int count;
        const int slot = map_->first_slot(visit, visit.first_row + r, lane, &count);
        const char* window = from.at(block.token[visit.first_row + r][lane]) + int64_t(slot) * functions_.size;
        functions_.load(window, 0, 1, count, count, 1.f, window_);
        for (int j = 0; j < count; ++j) weights[r][j * W + lane] = window_[j];
      }
    }
  }

  void write(const Block& block, const Visit& visit, Rows weights, const View& to) {
    for (int r = 0; r < visit.rows; ++r)
      for (int lane = 0; lane < block.lanes[visit.first_row + r]; ++lane) {
        int count;
        const int slot = map_->first_slot(visit, visit.first_row + r, lane, &count);
        for (int j = 0; j < count; ++j) window_[j] = weights[r][j * W + lane];
        char* window = to.at(block.token[visit.first_row + r][lane]) + int64_t(slot) * functions_.size;
        functions_.store(window_, count, 1, count, ones_[0], window, 0);
      }
  }

  // Fills all slots with a value. Slots of causal windows before the map keep it.
  void fill(const Block& block, const View& to, float value) {
    bool is_causal = false;
    for (const Axis& axis : plan_.axis) is_causal |= axis.is_causal;
    if (!is_causal) return;
    std::fill_n(window_, slots_, value);
    for (int r = 0; r < block.rows; ++r)
      for (int lane = 0; lane < block.lanes[r]; ++lane)
        functions_.store(window_, slots_, 1, slots_, ones_[0], to.at(block.token[r][lane]), 0);
  }
};

template <class Map>
class QueryKey : Unfused<Map> {
 public:
  static Needs needs() { return {{true, false}, {false, false}, {false, false}}; }

  QueryKey(const Call& call, Map& map, Scratch& scratch)
      : Unfused<Map>(call, map, scratch), query_(scratch, call.plan->dim) {}

  void start(Map& map, const Submap& submap) {
    this->map_ = &map;
    query_view_ = submap.view(QUERY, this->functions_.size);
    attn_view_ = submap.view(ATTN, this->functions_.size);
  }

  void operator()(const Block& block) {
    query_.load(block, query_view_, this->functions_, 1.f);
    this->fill(block, attn_view_, -std::numeric_limits<float>::infinity());
    this->map_->for_each_visit([&](const auto& visit) {
      this->map_->dot(visit, query_, KEYS, true, this->weights_);
      this->write(block, visit, this->weights_, attn_view_);
    });
  }

 private:
  BlockRows query_;
  View query_view_, attn_view_;
};

template <class Map>
class QueryKeyBackward : Unfused<Map> {
 public:
  static Needs needs() { return {{false, false}, {true, false}, {true, false}}; }

  QueryKeyBackward(const Call& call, Map& map, Scratch& scratch)
      : Unfused<Map>(call, map, scratch), query_(scratch, call.plan->dim, false),
        grad_query_(scratch, call.plan->dim, false) {}

  void start(Map& map, const Submap& submap) {
    this->map_ = &map;
    query_view_ = submap.view(QUERY, this->functions_.size);
    grad_query_view_ = submap.view(GRAD_QUERY, this->functions_.size);
    grad_attn_view_ = submap.view(GRAD_ATTN, this->functions_.size);
  }

  void operator()(const Block& block) {
    query_.load(block, query_view_, this->functions_, 1.f);
    grad_query_.zero(block);
    this->map_->for_each_visit([&](const auto& visit) {
      this->read(block, visit, grad_attn_view_, this->weights_);
      if (this->call_.grad_rpb) this->map_->add_bias_gradient(visit, this->weights_);
      this->map_->scatter(visit, this->weights_, query_, KEYS);
      this->map_->gather(visit, this->weights_, KEYS, grad_query_);
    });
    grad_query_.store(block, grad_query_view_, this->functions_, this->ones_);
  }

 private:
  BlockRows query_, grad_query_;
  View query_view_, grad_query_view_, grad_attn_view_;
};

template <class Map>
class WeightValue : Unfused<Map> {
 public:
  static Needs needs() { return {{false, false}, {false, true}, {false, false}}; }

  WeightValue(const Call& call, Map& map, Scratch& scratch)
      : Unfused<Map>(call, map, scratch), out_(scratch, call.plan->dim, false) {}

  void start(Map& map, const Submap& submap) {
    this->map_ = &map;
    attn_view_ = submap.view(ATTN, this->functions_.size);
    out_view_ = submap.view(OUT, this->functions_.size);
  }

  void operator()(const Block& block) {
    out_.zero(block);
    this->map_->for_each_visit([&](const auto& visit) {
      this->read(block, visit, attn_view_, this->weights_);
      this->map_->gather(visit, this->weights_, VALUES, out_);
    });
    out_.store(block, out_view_, this->functions_, this->ones_);
  }

 private:
  BlockRows out_;
  View attn_view_, out_view_;
};

template <class Map>
class WeightValueBackward : Unfused<Map> {
 public:
  static Needs needs() { return {{false, true}, {false, false}, {false, true}}; }

  WeightValueBackward(const Call& call, Map& map, Scratch& scratch)
      : Unfused<Map>(call, map, scratch), grad_out_(scratch, call.plan->dim),
        grad_weights_(map.weights(scratch.take_zeros(map.weights_size()))) {}

  void start(Map& map, const Submap& submap) {
    this->map_ = &map;
    attn_view_ = submap.view(ATTN, this->functions_.size);
    grad_attn_view_ = submap.view(GRAD_ATTN, this->functions_.size);
    grad_out_view_ = submap.view(GRAD_OUT, this->functions_.size);
  }

  void operator()(const Block& block) {
    grad_out_.load(block, grad_out_view_, this->functions_, 1.f);
    this->fill(block, grad_attn_view_, 0.f);
    this->map_->for_each_visit([&](const auto& visit) {
      this->read(block, visit, attn_view_, this->weights_);
      this->map_->scatter(visit, this->weights_, grad_out_, VALUES);
      this->map_->dot(visit, grad_out_, VALUES, false, grad_weights_);
      this->write(block, visit, grad_weights_, grad_attn_view_);
    });
  }

 private:
  BlockRows grad_out_;
  Rows grad_weights_;
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
