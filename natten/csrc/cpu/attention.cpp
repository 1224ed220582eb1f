// Fused attention, forward and backward: NAT, section 3 (arXiv:2204.07143), in the order of flash attention's backward
// (arXiv:2205.14135): only the output and the logsumexp are kept between the two, weights are computed again.
#include <cmath>

#include "export.h"
#include "run.h"

namespace natten {

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

// Logits become exp(logit - largest); their largest and their sum in each lane.
NATTEN_INLINE void exponentials(float* s, int keys, Vec& largest, Vec& sum) {
  Vec top[4];
  for (Vec& x : top) x = load(s);
  int j = 0;
  for (; j + 4 <= keys; j += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) top[i] = maximum(top[i], load(s + (j + i) * W));
  for (; j < keys; ++j) top[0] = maximum(top[0], load(s + j * W));
  largest = maximum(maximum(top[0], top[1]), maximum(top[2], top[3]));
  Vec total[2] = {};
  for (j = 0; j + 2 <= keys; j += 2)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vec weight = exp(load(s + (j + i) * W) - largest);
      store(s + (j + i) * W, weight);
      total[i] += weight;
    }
  if (j < keys) {
    const Vec weight = exp(load(s + j * W) - largest);
    store(s + j * W, weight);
    total[0] += weight;
  }
  sum = total[0] + total[1];
}

template <class Map>
class Forward {
 public:
  static Needs needs() { return {{true, false}, {false, true}, {false, false}}; }

  Forward(const Call& call, Map& map, Scratch& scratch)
      : plan_(*call.plan), functions_(row_functions(plan_.dtype)), map_(&map), query_(scratch, plan_.dim),
        out_(scratch, plan_.dim, false), weights_(scratch.take_zeros(map.weights_size())) {}

  void start(Map& map, const Submap& submap) {
    map_ = &map;
    query_view_ = submap.view(QUERY, functions_.size);
    out_view_ = submap.view(OUT, functions_.size);
    lse_view_ = submap.view(LSE, sizeof(float));
  }

  void operator()(const Block& block) {
    query_.load(block, query_view_, functions_, static_cast<float>(plan_.scale));
    map_->dot(query_, KEYS, true, weights_);
    float inverse[MAX_ROWS][W];
    for (int r = 0; r < block.rows; ++r) {
      Vec largest, sum;
      exponentials(weights_ + block.start[r], block.keys[r], largest, sum);
      natten::store(inverse[r], 1.f / sum);
      float lse[W];
      natten::store(lse, largest + log(sum));
      for (int lane = 0; lane < block.lanes[r]; ++lane)
        *reinterpret_cast<float*>(lse_view_.at(block.token[r][lane])) = lse[lane];
    }
    out_.zero(block);
    map_->gather(weights_, VALUES, out_);
    out_.store(block, out_view_, functions_, inverse);
  }

 private:
  const Plan& plan_;
  const RowFunctions functions_;
  Map* map_;
  BlockRows query_, out_;
  float* weights_;
  View query_view_, out_view_, lse_view_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------------------------------

template <class Map>
class Backward {
 public:
  static Needs needs() { return {{true, true}, {true, false}, {true, true}}; }

  Backward(const Call& call, Map& map, Scratch& scratch)
      : plan_(*call.plan), call_(call), functions_(row_functions(plan_.dtype)), map_(&map), query_(scratch, plan_.dim),
        grad_out_(scratch, plan_.dim), grad_query_(scratch, plan_.dim, false),
        weights_(scratch.take_zeros(map.weights_size())), grad_logits_(scratch.take_zeros(map.weights_size())) {
    for (auto& row : scale_)
      for (float& lane : row) lane = static_cast<float>(plan_.scale);
  }

  void start(Map& map, const Submap& submap) {
    map_ = &map;
    query_view_ = submap.view(QUERY, functions_.size);
    grad_out_view_ = submap.view(GRAD_OUT, functions_.size);
    grad_query_view_ = submap.view(GRAD_QUERY, functions_.size);
    lse_view_ = submap.view(LSE, sizeof(float));
    if (call_.tensors[GRAD_LSE]) grad_lse_view_ = submap.view(GRAD_LSE, sizeof(float));
  }

  void operator()(const Block& block) {
    query_.load(block, query_view_, functions_, static_cast<float>(plan_.scale));
    grad_out_.load(block, grad_out_view_, functions_, 1.f);
    map_->dot(query_, KEYS, true, weights_);
    map_->dot(grad_out_, VALUES, false, grad_logits_);
    for (int r = 0; r < block.rows; ++r) differentiate_softmax(block, r);
    if (call_.grad_rpb) map_->add_bias_gradient(grad_logits_);
    map_->scatter(weights_, grad_out_, VALUES);
    map_->scatter(grad_logits_, query_, KEYS);
    grad_query_.zero(block);
    map_->gather(grad_logits_, KEYS, grad_query_);
    grad_query_.store(block, grad_query_view_, functions_, scale_);
  }

 private:
  const Plan& plan_;
  const Call& call_;
  const RowFunctions functions_;
  Map* map_;
  BlockRows query_, grad_out_, grad_query_;
  float *weights_, *grad_logits_;
  View query_view_, grad_out_view_, grad_query_view_, lse_view_, grad_lse_view_;
  float scale_[MAX_ROWS][W];

  // From logits and gradients of weights: weights, and gradients of logits. Lanes without a query get 0.
  void differentiate_softmax(const Block& block, int r) {
    float lse[W], grad_lse[W];
    for (int lane = 0; lane < W; ++lane) {
      const Token& t = block.token[r][lane < block.lanes[r] ? lane : 0];
      lse[lane] = lane < block.lanes[r] ? *reinterpret_cast<const float*>(lse_view_.at(t)) : INFINITY;
      grad_lse[lane] =
          call_.tensors[GRAD_LSE] ? *reinterpret_cast<const float*>(grad_lse_view_.at(t)) : 0.f;
    }
    float *p = weights_ + block.start[r], *ds = grad_logits_ + block.start[r];
    const int count = block.keys[r] * W;
    const Vec shift = natten::load(lse);
    Vec delta = -natten::load(grad_lse);  // sum over keys of weight times its gradient
    for (int j = 0; j < count; j += W) {
      const Vec weight = exp(natten::load(p + j) - shift);
      natten::store(p + j, weight);
      delta += weight * natten::load(ds + j);
    }
    for (int j = 0; j < count; j += W)
      natten::store(ds + j, natten::load(p + j) * (natten::load(ds + j) - delta));
  }
};

}  // namespace natten

NATTEN_EXPORT int natten_attention(const natten::Plan* plan, void* const* tensors, const float* rpb, float*, int threads) {
  return natten::run<natten::Forward>({plan, tensors, rpb, nullptr, threads});
}

NATTEN_EXPORT int natten_attention_backward(const natten::Plan* plan, void* const* tensors, const float* rpb,
                                            float* grad_rpb, int threads) {
  return natten::run<natten::Backward>({plan, tensors, rpb, grad_rpb, threads});
}
