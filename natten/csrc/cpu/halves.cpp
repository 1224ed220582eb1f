// The two halves of attention and their gradients, for callers who want the weights themselves: logits of each query with
// the keys of its window, and sums of values by given weights.
#include <algorithm>
#include <limits>

#include "export.h"
#include "run.h"

namespace natten {

// What the four operators share: a block's weights here, and a window's weights in memory, in row-major order of its keys.
template <class Map>
class Half {
 public:
  Half(const Call& call, Map& map, Scratch& scratch)
      : plan_(*call.plan), call_(call), functions_(row_functions(plan_.dtype)), map_(&map),
        weights_(scratch.take_zeros(map.weights_size())) {
    for (const Axis& axis : plan_.axis) slots_ *= axis.kernel_size;
    window_ = scratch.take(slots_);
    for (auto& row : ones_) std::fill_n(row, W, 1.f);
  }

 protected:
  const Plan& plan_;
  const Call& call_;
  const RowFunctions functions_;
  Map* map_;
  float* weights_;
  float* window_;  // of one query
  int slots_ = 1;
  float ones_[MAX_ROWS][W];

  // Slots that lie before the map count as absent.
  void read(const Block& block, const View& from, float* weights) {
    for (int r = 0; r < block.rows; ++r) {
      float* row = weights + block.start[r];
      std::fill_n(row, block.keys[r] * W, 0.f);
      for (int lane = 0; lane < block.lanes[r]; ++lane) {
        functions_.load(from.at(block.token[r][lane]), 0, 1, slots_, slots_, 1.f, window_);
        map_->for_each_slot(r, lane, [&](int slot, int vector) {
          if (vector >= 0) row[vector * W + lane] = window_[slot];
        });
      }
    }
  }

  void write(const Block& block, const float* weights, const View& to, float absent) {
    for (int r = 0; r < block.rows; ++r) {
      const float* row = weights + block.start[r];
      for (int lane = 0; lane < block.lanes[r]; ++lane) {
        map_->for_each_slot(r, lane, [&](int slot, int vector) {
          window_[slot] = vector < 0 ? absent : row[vector * W + lane];
        });
        functions_.store(window_, slots_, 1, slots_, ones_[0], to.at(block.token[r][lane]), 0);
      }
    }
  }
};

template <class Map>
class QueryKey : Half<Map> {
 public:
  static Needs needs() { return {{true, false}, {false, false}, {false, false}}; }

  QueryKey(const Call& call, Map& map, Scratch& scratch) : Half<Map>(call, map, scratch), query_(scratch, call.plan->dim) {}

  void start(Map& map, const Submap& submap) {
    this->map_ = &map;
    query_view_ = submap.view(QUERY, this->functions_.size);
    attn_view_ = submap.view(ATTN, this->functions_.size);
  }

  void operator()(const Block& block) {
    query_.load(block, query_view_, this->functions_, 1.f);
    this->map_->dot(query_, KEYS, true, this->weights_);
    this->write(block, this->weights_, attn_view_, -std::numeric_limits<float>::infinity());
  }

 private:
  BlockRows query_;
  View query_view_, attn_view_;
};

template <class Map>
class QueryKeyBackward : Half<Map> {
 public:
  static Needs needs() { return {{false, false}, {true, false}, {true, false}}; }

  QueryKeyBackward(const Call& call, Map& map, Scratch& scratch)
      : Half<Map>(call, map, scratch), query_(scratch, call.plan->dim, false), grad_query_(scratch, call.plan->dim, false) {}

  void start(Map& map, const Submap& submap) {
    this->map_ = &map;
    query_view_ = submap.view(QUERY, this->functions_.size);
    grad_query_view_ = submap.view(GRAD_QUERY, this->functions_.size);
    grad_attn_view_ = submap.view(GRAD_ATTN, this->functions_.size);
  }

  void operator()(const Block& block) {
    query_.load(block, query_view_, this->functions_, 1.f);
    this->read(block, grad_attn_view_, this->weights_);
    if (this->call_.grad_rpb) this->map_->add_bias_gradient(this->weights_);
    this->map_->scatter(this->weights_, query_, KEYS);
    grad_query_.zero(block);
    this->map_->gather(this->weights_, KEYS, grad_query_);
    grad_query_.store(block, grad_query_view_, this->functions_, this->ones_);
  }

 private:
  BlockRows query_, grad_query_;
  View query_view_, grad_query_view_, grad_attn_view_;
};

template <class Map>
class WeightValue : Half<Map> {
 public:
  static Needs needs() { return {{false, false}, {false, true}, {false, false}}; }

  WeightValue(const Call& call, Map& map, Scratch& scratch)
      : Half<Map>(call, map, scratch), out_(scratch, call.plan->dim, false) {}

  void start(Map& map, const Submap& submap) {
    this->map_ = &map;
    attn_view_ = submap.view(ATTN, this->functions_.size);
    out_view_ = submap.view(OUT, this->functions_.size);
  }

  void operator()(const Block& block) {
    this->read(block, attn_view_, this->weights_);
    out_.zero(block);
    this->map_->gather(this->weights_, VALUES, out_);
    out_.store(block, out_view_, this->functions_, this->ones_);
  }

 private:
  BlockRows out_;
  View attn_view_, out_view_;
};

template <class Map>
class WeightValueBackward : Half<Map> {
 public:
  static Needs needs() { return {{false, true}, {false, false}, {false, true}}; }

  WeightValueBackward(const Call& call, Map& map, Scratch& scratch)
      : Half<Map>(call, map, scratch), grad_out_(scratch, call.plan->dim),
        grad_weights_(scratch.take_zeros(map.weights_size())) {}

  void start(Map& map, const Submap& submap) {
    this->map_ = &map;
    attn_view_ = submap.view(ATTN, this->functions_.size);
    grad_attn_view_ = submap.view(GRAD_ATTN, this->functions_.size);
    grad_out_view_ = submap.view(GRAD_OUT, this->functions_.size);
  }

  void operator()(const Block& block) {
    grad_out_.load(block, grad_out_view_, this->functions_, 1.f);
    this->read(block, attn_view_, this->weights_);
    this->map_->scatter(this->weights_, grad_out_, VALUES);
    this->map_->dot(grad_out_, VALUES, false, grad_weights_);
    this->write(block, grad_weights_, grad_attn_view_, 0.f);
  }

 private:
  BlockRows grad_out_;
  float* grad_weights_;
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
